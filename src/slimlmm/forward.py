"""Logits at answer positions only: the language head is the widest matrix of a small model, so it runs where labels are.

Shape legend: B sequences, T tokens, A answer tokens of the batch, N picture tokens of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.collate import IGNORE, Batch
from slimlmm.errors import UserError

#: batch entry with the teacher's states behind its blocks
TEACHER_STREAMS = "teacher_streams"
NOT_INPUTS = (
    "labels",
    "shift_labels",
    "rows",
    "heads",
    "row_count",
    "picture_tokens",
    "teacher_hidden",
    "teacher_pictures",
    "second_hidden",
    "given_answers",
    "taught_answers",
    "taught_pictures",
    TEACHER_STREAMS,
)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """Run the model on a batch as the collator made it, without a cache; pixels in its number format."""
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    return model(**in_format(inputs, _format_of(model)), use_cache=False)


def _format_of(model: nn.Module) -> torch.dtype:
    """Return the number format of the first weights, of a model or of what wraps one (DDP)."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def in_format(inputs: Batch, dtype: torch.dtype) -> Batch:
    """Return the inputs with pixels in this number format: Llama 4's processor gives bfloat16, whatever its model is."""
    return {
        key: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and key != "attention_mask"
        else value
        for key, value in inputs.items()
    }


def refuse_encoder_decoder(model: PreTrainedModel) -> None:
    """Refuse a model whose answers are written by a decoder of their own: batches are one text, prompt and answer.

    Raises:
        UserError: it is one (Florence-2, BLIP-2 with T5).
    """
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise UserError(
            f"{model.config.model_type} with an encoder and a decoder cannot be trained or distilled; inspect, plan without "
            "--data, cut, evaluate and bench work."
        )


@contextmanager
def head_at(model: PreTrainedModel, where_BT: Tensor) -> Iterator[list[Tensor]]:
    """Within the block the head sees only the hidden states at `where_BT`, as [1, A, H]; yields the list that collects them."""
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def narrow(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_1AH = inputs[0][where_BT][None]
        seen.append(hidden_1AH)
        return (hidden_1AH, *inputs[1:])

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield seen
    finally:
        handle.remove()


def answer_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model on a batch; return (logits [A, V], labels [A], last hidden states [A, H]) at answer positions, row by row."""
    where_BT = batch["shift_labels"] != IGNORE
    bare: PreTrainedModel = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with head_at(bare, where_BT) as seen:
        logits_AV = forward(model, batch).logits[0]
    return logits_AV, batch["shift_labels"][where_BT], seen[0][0]


@contextmanager
def states_into(block: nn.Module, where_BT: Tensor) -> Iterator[list[Tensor]]:
    """Within the block yields a list that collects the states [N, H] that enter a decoder block at the positions `where_BT`."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden_BTH: Tensor = inputs[0] if inputs else named["hidden_states"]
        seen.append(hidden_BTH[where_BT])

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every module is in eval mode; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _ReachedError(Exception):
    """The block was reached; what lies behind it need not run."""


def _run_to(model: PreTrainedModel, block: nn.Module, batch: Batch, handle: RemovableHandle) -> None:
    """Run the model on a batch until the hook of `handle` at `block` raises _ReachedError; the hook is removed."""
    try:
        forward(model, batch)
    except _ReachedError:
        return
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never called the block {type(block).__name__}")


def states_until(model: PreTrainedModel, block: nn.Module, batch: Batch) -> Tensor:
    """Return the states [N, H] that enter `block` at picture tokens, with their gradient; the model stops there."""

    def stop(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        raise _ReachedError

    with states_into(block, batch["picture_tokens"]) as seen:
        _run_to(model, block, batch, block.register_forward_pre_hook(stop))
    return seen[0]


def output_of(model: PreTrainedModel, block: nn.Module, batch: Batch) -> Any:
    """Return what `block` gives out; the model stops there."""
    seen: list[Any] = []

    def stop(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise _ReachedError

    _run_to(model, block, batch, block.register_forward_hook(stop))
    return seen[0]


def first_text_block(model: PreTrainedModel, anatomy: Anatomy) -> nn.Module:
    """Return the language model's first decoder block: what enters it at picture tokens is all that it gets of the picture."""
    return model.get_submodule(f"{anatomy.axes['text.blocks'].layers}.0")
