"""optipfair: blocks and GLU neurons of a language model, then its own distillation.

It does not know a LLaVA (it looks for ``model.layers``), so the language model is taken out as a `LlamaForCausalLM`, cut there,
and put back. What its calibration sees is what the LLaVA's language model gets: embeddings, the picture's among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optipfair
import torch
from optipfair.pruning import analyze_layer_importance
from shared import Outcome, Task, batches, cache_of, outcome, recipe_of, save, steps_of, train_rows, trained, versions
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from slimlmm import checkpoint, data
from slimlmm.collate import IGNORE, Batch, Collator
from slimlmm.data import Row
from slimlmm.families import stock_class
from slimlmm.packing import can_pack
from slimlmm.resizing import predict_parameters
from slimlmm.trainings import Training

#: one of three blocks goes, and four of five FFN neurons: 16,550,208 parameters
BLOCKS_GONE, NEURONS_GONE = 1, 80
CALIBRATION_PICTURES = 16
LANGUAGE = "model.language_model."


def reach(task: Task) -> Outcome:
    """Cut and distil with optipfair alone, at our rate and steps (its `distill_model` has our schedule)."""
    rows, loaded = train_rows(task), checkpoint.load(task.teacher)
    student = cut(task, loaded, rows)
    training = _ours(task, rows)
    lessons = Lessons(task, loaded, rows, training.steps)
    teacher: Any = checkpoint.load(task.teacher).model
    _, told = optipfair.distill_model(
        student,
        teacher,
        lessons,
        epochs=1,
        learning_rate=training.learning_rate,
        warmup_ratio=training.warmup,
        accumulation_steps=1,
        show_progress=False,
        return_stats=True,
    )
    save(task, student.eval(), loaded.processor, loaded.stored)
    return Outcome(
        row_visits=lessons.row_visits,
        training_seconds=told["total_time_seconds"],
        versions=versions("optipfair"),
        notes=(
            f"its defaults (alpha 0.6, beta 0.4, T = 2, skewed KL), AdamW at {training.learning_rate}; all trained",
        ),
        could_not=limits(loaded.model.config),
    )


def reach_with_our_training(task: Task) -> Outcome:
    """Cut with optipfair, train with the training of our recipe."""
    rows, loaded = train_rows(task), checkpoint.load(task.teacher)
    student = cut(task, loaded, rows)
    done = trained(
        task, student, loaded.processor, rows, _ours(task, rows), teacher=cache_of(task, loaded, rows), number=1
    )
    save(task, student, loaded.processor, loaded.stored)
    return outcome([done], "optipfair", could_not=limits(loaded.model.config))


def limits(config: Any) -> tuple[str, ...]:
    """Return what it cannot do for this teacher, with the numbers."""
    least = predict_parameters(config, {"text.blocks": 1, "text.ffn": 1})
    whole = predict_parameters(config, {})
    return (
        f"18x: it cuts blocks and GLU neurons of the language model alone; with one block of one neuron {least:,} parameters are "
        f"left, {whole / least:.2f}x",
        "a LLaVA as it is: its decoder lookup ends at model.layers",
    )


def cut(task: Task, loaded: checkpoint.Loaded, rows: list[Row]) -> PreTrainedModel:
    """Return the LLaVA with the language model that optipfair left."""
    whole = loaded.model
    config: Any = AutoConfig.from_pretrained(task.teacher).text_config
    language = LlamaForCausalLM(config).eval()
    state = {f"model.{name}": tensor for name, tensor in whole.get_submodule(LANGUAGE[:-1]).state_dict().items()}
    language.load_state_dict({**state, "lm_head.weight": whole.get_output_embeddings().weight})
    seen = Seen(
        loaded, data.sample(rows, round(CALIBRATION_PICTURES * data.rows_a_step(rows)(1, len(rows))), task.seed)
    )
    handle = language.register_forward_pre_hook(embedded, with_kwargs=True)
    costs = analyze_layer_importance(language, seen, show_progress=False)
    gone = sorted(sorted(costs, key=costs.__getitem__)[:BLOCKS_GONE])
    optipfair.prune_model(
        language, pruning_type="DEPTH", layer_indices=gone, layer_selection_method="custom", show_progress=False
    )
    optipfair.prune_model(
        language,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=NEURONS_GONE,
        dataloader=seen,
        show_progress=False,
    )
    handle.remove()
    return put_back(whole, language)


def put_back(whole: PreTrainedModel, language: Any) -> PreTrainedModel:
    """Return a stock LLaVA with `language` in the place of its language model."""
    # the two fields that optipfair writes
    changed = {key: getattr(language.config, key) for key in ("num_hidden_layers", "intermediate_size")}
    stored = whole.config.to_dict()
    config = type(whole.config)(**{**stored, "text_config": {**stored["text_config"], **changed}})
    student: PreTrainedModel = stock_class(config).from_config(config, dtype=torch.float32).eval()
    state = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(LANGUAGE)}
    cut_state = {LANGUAGE + name: tensor for name, tensor in language.model.state_dict().items()}
    student.load_state_dict({**state, **cut_state})
    return student


class Seen:
    """What the LLaVA's language model gets of some rows, as the batches of a text model: embeddings (`embedded`) and masks."""

    def __init__(self, loaded: checkpoint.Loaded, rows: list[Row]) -> None:
        self.batches: list[dict[str, Tensor]] = []
        collator = Collator(loaded.processor, packed=False)

        def look(_module: Any, _args: Any, named: dict[str, Any]) -> None:
            self.batches.append({"input_ids": named["inputs_embeds"], "attention_mask": named["attention_mask"]})

        handle = loaded.model.get_submodule(LANGUAGE[:-1]).register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            for start in range(0, len(rows), 32):
                loaded.model(**inputs_of(collator([[row] for row in rows[start : start + 32]])))
        handle.remove()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def embedded(_module: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let a text model take embeddings where optipfair's calibration gives it ``input_ids``."""
    return args, {**named, "input_ids": None, "inputs_embeds": named["input_ids"]}


class Lessons:
    """Our batches as its trainer reads them: labels stand at their own tokens, because it shifts them itself."""

    def __init__(self, task: Task, loaded: checkpoint.Loaded, rows: list[Row], steps: int) -> None:
        self.collator = Collator(loaded.processor, packed=can_pack(loaded.model, loaded.processor, rows))
        self.rows, self.steps, self.seed = rows, steps, task.seed
        self.row_visits = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches(self.collator, self.rows, self.steps, self.seed):
            self.row_visits += len(batch["rows"])
            labels_BT = batch["shift_labels"].roll(1, 1)
            labels_BT[:, 0] = IGNORE
            yield {**inputs_of(batch), "labels": labels_BT}

    def __len__(self) -> int:
        return self.steps


def inputs_of(batch: Batch) -> Batch:
    """Return what the model takes of a collated batch."""
    return {
        key: value for key, value in batch.items() if key not in ("shift_labels", "picture_tokens", "rows", "heads")
    }


def _ours(task: Task, rows: list[Row]) -> Training:
    """Return our recipe's only training at the task's budget."""
    only = recipe_of(task, rows).stages[-1].rounds[-1].train[-1]
    return only.model_copy(update={"steps": steps_of(task.row_visits, rows)})
