"""nvidia-modelopt: its logits distillation in place of our last trainings, from the very student that we cut and repaired."""

from __future__ import annotations

import importlib
import time
from typing import Any

import modelopt.torch.distill as mtd
import torch
from own import earlier_visits, last_cut
from shared import Outcome, Task, batches, recipe_of, save, steps_of, train_rows, versions
from transformers import PreTrainedModel, get_scheduler

from slimlmm import checkpoint
from slimlmm.collate import IGNORE, Collator
from slimlmm.forward import NOT_INPUTS
from slimlmm.packing import can_pack
from slimlmm.progress import Lines
from slimlmm.trainings import Training

PRUNING = "modelopt.torch.prune.plugins.mcore_minitron"


def reach(task: Task) -> Outcome:
    """Train our last cut by modelopt's loss alone, as its own trainer for transformers does, for the visits that are left."""
    rows, before = train_rows(task), earlier_visits(task.own)
    loaded, student = checkpoint.load(task.teacher), checkpoint.load(last_cut(task.own))
    packed = can_pack(loaded.model, loaded.processor, rows)
    settings = recipe_of(task, rows).stages[-1].rounds[-1].train[-1]
    settings = settings.model_copy(update={"steps": steps_of(task.row_visits - before, rows)})
    lessons = batches(Collator(loaded.processor, packed=packed), rows, settings.steps, task.seed)
    began = time.perf_counter()
    visits, trained = distilled(task, student.model, loaded.model, lessons, settings)
    seconds = time.perf_counter() - began
    save(task, trained, loaded.processor, loaded.stored)
    return Outcome(
        row_visits=before + visits,
        training_seconds=seconds,
        versions=versions("nvidia-modelopt"),
        notes=(f"{before:,} of the row visits are those of our earlier rounds; seconds are of its part alone",),
        could_not=(f"prune: {pruning()}",),
    )


def distilled(
    task: Task, student: PreTrainedModel, teacher: PreTrainedModel, lessons: Any, settings: Training
) -> tuple[int, PreTrainedModel]:
    """Return row visits and the student after `settings.steps` steps on the KL divergence of the logits at answer tokens."""
    criterion = {("lm_head", "lm_head"): mtd.LogitsDistillationLoss(temperature=1.0, reduction="none")}
    both: Any = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
    both.train()
    own = [one for name, one in both.named_parameters() if not name.startswith("_teacher_model")]
    optimizer = torch.optim.AdamW(own, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    warmup = max(1, int(settings.steps * settings.warmup))
    schedule = get_scheduler(settings.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=settings.steps)
    visits = 0
    with Lines() as tell:
        for step, batch in enumerate(lessons, 1):
            both(**{key: value for key, value in batch.items() if key not in NOT_INPUTS}, use_cache=False)
            answers_BT = batch["shift_labels"] != IGNORE
            loss = both.compute_kd_loss(loss_reduction_fn=lambda kl_BT, at=answers_BT: kl_BT[at].mean())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, settings.clip)
            optimizer.step()
            schedule.step()
            visits += len(batch["rows"])
            tell.step(task.arm, step, settings.steps, loss=float(loss.detach()))
    exported: PreTrainedModel = mtd.export(both)
    return visits, exported.eval()


def pruning() -> str:
    """Return why its pruning of language models (Minitron) does not run here, as it says itself."""
    try:
        importlib.import_module(PRUNING)
    except ImportError as error:
        return f"{PRUNING} does not import: {error}"
    return f"{PRUNING} imports, but wants a Megatron-Core model"
