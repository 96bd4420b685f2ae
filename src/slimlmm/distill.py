"""Recovery training and fine-tuning: a `transformers.Trainer` whose loss sees answer tokens only.

With a teacher cache the losses may be those of distillation (divergences, matches of states), without one it is fine-tuning.
accelerate, FSDP, DeepSpeed, loggers and checkpoints come with the Trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slimlmm import demands, leaving
from slimlmm.anatomy import describe
from slimlmm.collate import Batch, Collator
from slimlmm.compiling import quick
from slimlmm.costs import flop_counter
from slimlmm.data import Row, by_picture
from slimlmm.decoding import end_as_taught
from slimlmm.errors import LossError
from slimlmm.forward import TEACHER_STREAMS, refuse_encoder_decoder, to_device
from slimlmm.half import as_it_was, trains_in_half
from slimlmm.launchers import processes
from slimlmm.lessons import Lessons, Taught, lessons_of, look, matched_tokens, taught_tokens
from slimlmm.lineage import Kept
from slimlmm.losses import (
    BLOCKS,
    DIVERGENCES,
    MATCHES,
    TEACHER_ENTRIES,
    Match,
    Seen,
    combine,
)
from slimlmm.optimizing import frozen, optimizers, settled_statistics
from slimlmm.own import OwnAnswers, groups_as_they_are, own_answers
from slimlmm.packing import can_pack
from slimlmm.saving import More, Saver, Saving, SavingTrainer, latest, more_of
from slimlmm.spans import Span, warmup_steps
from slimlmm.stopping import KeepBest
from slimlmm.teacher import TeacherCache, Teachers
from slimlmm.trainings import Training

Progress = Callable[[dict[str, float]], None]


class TrainResult(BaseModel):
    """What a training took and gave.

    Losses are means per answer token; `history` holds one record per logging interval. `flops` are those of the student's
    forward and backward passes, counted on one batch and scaled by row visits (neither the teachers' passes are in it nor the
    student's own answering). `looks` are (step, validation loss), `kept_step` is the step whose weights stayed.
    """

    steps: int
    row_visits: int
    seconds: float
    flops: float
    history: list[dict[str, float]]
    looks: list[tuple[int, float]]
    kept_step: int
    remarks: list[str] = []

    @property
    def first_loss(self) -> float | None:
        """Mean loss of the first logging interval, None where there was none."""
        return self.history[0]["loss"] if self.history else None

    @property
    def last_loss(self) -> float | None:
        """Mean loss of the last logging interval, None where there was none."""
        return self.history[-1]["loss"] if self.history else None


class DistillTrainer(SavingTrainer):
    """Trainer with the summed answer-token losses divided by the global answer-token count."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        lessons: Lessons,
        settings: Training,
        teachers: Teachers | None,
        own: OwnAnswers | None,
        **kwargs: Any,
    ) -> None:
        self.use_cache = vars(model.config).get("use_cache")
        collate: Any = groups_as_they_are if own else lessons.collate
        super().__init__(model=model, args=arguments, data_collator=collate, train_dataset=lessons.groups, **kwargs)
        demands.refuse_shards(self, settings)
        self.weights: Mapping[Any, float] = settings.losses
        self.temperature, self.shapes = settings.temperature, settings.shapes
        self.readouts, self.streams = lessons.readouts, lessons.streams
        self.held = frozen(model, settings.still)
        self.teachers = teachers
        self.own = own
        self.remove_callback(PrinterCallback)  # the run's own reporter tells it
        self.model_accepts_loss_kwargs = (
            True  # makes the Trainer count answer tokens over all devices and micro-batches
        )
        self.saves = False
        self.row_visits = 0
        self.step: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one step and their answer tokens; here the student, as it is at this step, answers first."""
        if self.own is not None:
            student: Any = self.model
            epoch_iterator = self.own.batches(student, epoch_iterator, device, self.state.global_step)
        found: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(epoch_iterator, num_batches, device)
        uneven = {"picture_states", BLOCKS} & set(self.weights)
        parts = len(found[0]) * self.accelerator.num_processes
        self.step = self._taught(found[0]) if uneven and parts > 1 else {}
        return found

    def _taught(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return how many tokens of a step each match of states is about, over its micro-batches and all processes."""
        counts = [taught_tokens(batch) for batch in batches]
        mine = torch.tensor([[*count.values()] for count in counts], device=self.accelerator.device).sum(0)
        every = cast(Tensor, self.accelerator.reduce(mine, "sum")).tolist()
        return dict(zip(counts[0], every, strict=True))

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the total loss; each part is kept for the log."""
        self.row_visits += int(inputs["row_count"])
        shown = self.seen(model, self.asked(inputs))
        parts = combine(self.weights, shown)
        tokens = shown.labels_A.numel()
        count = num_items_in_batch if num_items_in_batch is not None else tokens
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.sums["tokens"] = self.sums.get("tokens", 0.0) + tokens
        total = parts["total"]
        if self.accelerator.num_processes > 1 and self.weights.keys() <= {*MATCHES, BLOCKS}:
            # these leave the logits alone, and DDP waits for a gradient of everything that its outputs come from
            total = total + 0 * shown.student_AV.sum()
        loss = total / count * self.accelerator.num_processes
        return (loss, {"logits": shown.student_AV}) if return_outputs else loss

    def share(self, match: str, mine: Mapping[str, int]) -> float | None:
        """Return the answer tokens that a micro-batch' match counts for: those of the step, by its share of the tokens matched.

        So that a picture weighs as much in whatever micro-batch and process it comes; None where the step is one batch.
        `mine`: how many tokens of the micro-batch each match is about.
        """
        tokens = self.step.get(match, 0)
        return self.step["answer_states"] * mine[match] / tokens if tokens else None

    def asked(self, inputs: Batch) -> Batch:
        """Return a batch with what the teacher says of it now, where a loss wants that."""
        return inputs if self.streams is None else {**inputs, TEACHER_STREAMS: self.streams.said(inputs)}

    def seen(self, model: Any, inputs: Batch) -> Seen:
        """Run the student, as far as the losses look; over several processes whole, so that its gradients are shared out."""
        stop = set(self.weights) == {"picture_states"} and self.accelerator.num_processes == 1
        nothing: AbstractContextManager[dict[str, Tensor]] = nullcontext({})
        hearing = self.streams.student(inputs) if self.streams is not None else nothing
        with hearing as streams:
            logits_AV, labels_A, states = look(model, inputs, self.readouts.block, stop=stop)
        mine = taught_tokens(inputs) if self.step else {}  # once: each count waits for the device
        teacher_AV = second_AV = None
        if self.teachers and not DIVERGENCES.keys().isdisjoint(self.weights):
            teacher_AV = self.teachers.lead.logits(inputs["teacher_hidden"])
            if self.teachers.second is not None:
                second_AV = self.teachers.second.logits(inputs["second_hidden"])
        return Seen(
            logits_AV.float(),
            labels_A,
            teacher_AV,
            {name: self.match(name, inputs, states | streams, mine) for name in self.readouts.maps},
            self.temperature,
            inputs.get("taught_answers"),
            second_AV,
            self.teachers.share if self.teachers else 0.0,
            inputs.get("given_answers"),
            self.shapes,
        )

    def match(self, name: str, inputs: Batch, states: Mapping[str, Tensor], mine: Mapping[str, int]) -> Match:
        """Return the states of student and teacher that a map stands between; `mine`: as `share`."""
        if name in MATCHES:
            student_NS, teacher_NH, counted = (
                matched_tokens(inputs, name, states[name]),
                inputs[TEACHER_ENTRIES[name]],
                name,
            )
        else:
            assert self.streams is not None
            student_NS, teacher_NH = states[name], inputs[TEACHER_STREAMS][name].float()
            counted = self.streams.counted(name)
        return Match(student_NS.float(), teacher_NH, self.readouts.maps[name], self.share(counted, mine))

    def visited(self) -> int:
        """Return the row visits of all processes."""
        return int(self.accelerator.reduce(torch.tensor(self.row_visits, device=self.accelerator.device), "sum"))

    def forget_use_cache(self) -> None:
        """Put back what the Trainer sets in the configuration, so that it is not written into the student's."""
        config = cast(PreTrainedModel, self.model).config
        if self.use_cache is None:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = self.use_cache

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's loss by the means per answer token since the last log; stop on a loss that is no number.

        The rate is that of the recipe: the Trainer tells that of the first group of parameters, a vision block's.
        """
        if "learning_rate" in logs:
            rates = cast(LRScheduler, self.lr_scheduler).get_last_lr()
            logs = {**logs, "learning_rate": max(map(float, rates))}
        tokens = self.sums.pop("tokens", 0.0)
        if tokens:
            means = {name: value / tokens for name, value in self.sums.items()}
            logs = {
                **logs,
                **{f"loss/{name}": value for name, value in means.items()},
                "loss": means["total"],
                "row_visits": float(self.visited()),
            }
            self.sums.clear()
            if not math.isfinite(means["total"]):
                raise LossError(
                    f"the loss became {means['total']} at step {self.state.global_step} (parts: {means}); "
                    "lower train.learning_rate in the recipe."
                )
        super().log(logs, start_time)


class _Report(TrainerCallback):
    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.history: list[dict[str, float]] = []

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        record = {
            key: float(value)
            for key, value in logs.items()
            if key.startswith("loss") or key in ("learning_rate", "grad_norm", "row_visits")
        }
        record |= {"step": float(state.global_step), "steps": float(state.max_steps)}
        self.history.append(record)
        if self.progress:
            self.progress(record)


def train(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Row],
    settings: Training,
    out: Path,
    *,
    teacher: TeacherCache | None = None,
    previous: TeacherCache | None = None,
    kept: Kept | None = None,
    taught: Taught = None,
    validation: Sequence[Row] = (),
    seed: int = 0,
    progress: Progress | None = None,
    span: Span | None = None,
    saving: Saving | None = None,
) -> TrainResult:
    """Train `model` in place on rows for ``settings.steps`` optimizer steps; with a teacher cache, distil from it.

    `taught` are the pictures that the teacher is asked about (default: all); the others count in the losses of labels alone.
    `previous` is the teacher of that name, `kept` the layers of the teacher that the student still has. With `saving` the state
    is written to `out` now and then, and taken up. Of several processes each takes its pictures and needs own caches.

    Raises:
        UserError: a loss needs a teacher and there is none, or no rows.
        LossError: the loss becomes non-finite.
    """
    refuse_encoder_decoder(model)
    demands.check(settings, rows, teacher, previous, validation, saving)
    anatomy, report = describe(model.config), _Report(progress)
    teachers = Teachers.of(settings.teachers, teacher, previous) if teacher else None
    lessons = lessons_of(model, processor, anatomy, rows, settings, teachers, taught, kept or {})
    keeper = _keeper(model, processor, validation, settings)
    trainer = DistillTrainer(
        model,
        _arguments(settings, out, seed, model.device, span),
        lessons,
        settings,
        teachers,
        own_answers(model, processor, rows, settings, lessons.collate, taught, seed),
        optimizers=optimizers(model, anatomy, settings, lessons.readouts, span),
        callbacks=[report, *keeper, *(span.callbacks if span else ())],
    )
    row_flops = _row_flops(trainer, model, batch := to_device(lessons.collate(lessons.groups.groups[:2]), model.device))
    state = _State(trainer, report, keeper)
    state.take_up(out, saving, teachers)
    with settled_statistics(model), quick(model, anatomy, settings, batch, in_half=bool(trainer.args.bf16)):
        _run(trainer, model, teachers, state.found)
    end_as_taught(model, processor.tokenizer)
    return _result(trainer, state.seconds, row_flops, report, keeper)


class _State:
    """What of a training neither model, optimizer nor Trainer holds: counts, histories, readouts, the best weights so far."""

    def __init__(self, trainer: DistillTrainer, report: _Report, keeper: Sequence[KeepBest]) -> None:
        self.trainer, self.report, self.keeper = trainer, report, keeper
        self.found: Path | None = None
        self._began, self._earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._earlier + time.perf_counter() - self._began

    def take_up(self, out: Path, saving: Saving | None, teachers: Teachers | None) -> None:
        """Have the state written as `saving` says, and go on from the one that is there."""
        if saving is None:
            return
        self.trainer.saves = True
        self.trainer.add_callback(Saver(out, saving, self.more, teachers.flush if teachers else lambda: None))
        self.found = latest(out, saving.of, saving.say)
        if self.found is None:
            return
        figures, tensors = more_of(self.found)
        trainer = self.trainer
        trainer.row_visits, trainer.sums = figures["row_visits"], figures["sums"]
        self.report.history, self._earlier = figures["history"], figures["seconds"]
        for name, parameter in self._readouts():
            parameter.data.copy_(tensors.pop(name))
        for one in self.keeper:
            one.take_up(figures["looks"], tensors)

    def more(self) -> More:
        """Return it as figures and tensors."""
        trainer = self.trainer
        figures = {"row_visits": trainer.row_visits, "sums": trainer.sums, "history": self.report.history}
        tensors = {name: parameter.detach() for name, parameter in self._readouts()}
        for one in self.keeper:
            figures["looks"] = one.looks
            tensors |= one.best
        return figures | {"seconds": self.seconds}, tensors

    def _readouts(self) -> list[tuple[str, Tensor]]:
        maps = self.trainer.readouts.maps
        return [(f"readout.{name}.{key}", value) for name in maps for key, value in maps[name].named_parameters()]


def _result(
    trainer: DistillTrainer, seconds: float, row_flops: float, report: _Report, keeper: Sequence[KeepBest]
) -> TrainResult:
    return TrainResult(
        steps=trainer.state.global_step,
        row_visits=(visits := trainer.visited()),
        seconds=seconds,
        flops=row_flops * visits,
        history=report.history,
        looks=[look for one in keeper for look in one.looks],
        kept_step=keeper[0].kept if keeper else trainer.state.global_step,
    )


def _keeper(model: PreTrainedModel, processor: Any, rows: Sequence[Row], settings: Training) -> list[KeepBest]:
    """Return the callback that looks at the validation rows, none where the recipe wants no look."""
    if settings.validate_every is None:
        return []
    collator = Collator(processor, packed=can_pack(model, processor, rows))
    groups = by_picture(rows, settings.questions_per_picture)
    batches = [collator(groups[at : at + 16]) for at in range(0, len(groups), 16)]
    return [KeepBest(model, batches, settings.validate_every, settings.stop_after)]


def _run(trainer: DistillTrainer, model: PreTrainedModel, teachers: Teachers | None, found: Path | None) -> None:
    """Train; whatever happens, the model is in eval mode afterwards and what the teachers answered is on disk."""
    with trainer.held:
        model.train()
        try:
            with leaving.patiently() if trainer.saves else nullcontext():
                trainer.train(resume_from_checkpoint=None if found is None else str(found))
        finally:
            as_it_was(model)
            trainer.forget_use_cache()
            model.eval()
            if teachers:
                teachers.flush()


def _row_flops(trainer: DistillTrainer, model: PreTrainedModel, batch: Batch) -> float:
    """Return floating-point operations per row of one forward and backward pass, as far as losses look and gradients go."""
    counter, batch = flop_counter(), trainer.asked(batch)
    with trainer.held, counter:
        combine(trainer.weights, trainer.seen(model, batch))["total"].backward()
    model.zero_grad(set_to_none=True)
    trainer.readouts.clear()
    return float(counter.get_total_flops() / int(batch["row_count"]))


def _arguments(settings: Training, out: Path, seed: int, device: torch.device, span: Span | None) -> TrainingArguments:
    steps = settings.steps if span is None else span.last - span.first
    found = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=settings.pictures_per_step // settings.accumulate // processes(),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=warmup_steps(settings),
        max_grad_norm=settings.clip,
        logging_steps=min(settings.log_every, steps),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        bf16=trains_in_half(settings.precision, device),
    )
    # one process trains on one GPU: of several that it sees the Trainer would make nn.DataParallel, which copies a model at every
    # step and has none of its methods; asking for the device counts them, so it comes first
    if found.device.type == "cuda" and found.n_gpu > 1:
        found._n_gpu = 1
    return found
