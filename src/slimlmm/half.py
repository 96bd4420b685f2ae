"""bfloat16 where the device multiplies it by units of its own: twice the speed and more; weights and sums stay in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from slimlmm.collate import Batch
from slimlmm.forward import answer_logits

#: largest relative deviation of logits between two implementations of the same attention
SAME = 1e-3


def has_half(device: torch.device) -> bool:
    """Tell whether units of the device multiply bfloat16: CUDA from Ampere on, CPUs with AMX or AVX512_BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def trains_in_half(precision: str, device: torch.device) -> bool:
    """Tell whether a training of that precision (``auto``, ``float32``) multiplies matrices in bfloat16."""
    return precision == "auto" and has_half(device)


def half(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block matrices are multiplied in bfloat16 where `has_half`, else as they are."""
    return torch.autocast(device.type, torch.bfloat16) if has_half(device) else nullcontext()


def as_it_was(model: PreTrainedModel) -> None:
    """Take off what accelerate leaves on a model that it prepared.

    With its half-precision forward the model would be measured in it from now on; with its mark the next training would be in
    full precision, and over several processes unshared, because accelerate prepares no model twice.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


@contextmanager
def quick_attention(model: PreTrainedModel, batch: Batch) -> Iterator[bool]:
    """Within the block a model on a CPU attends eagerly, for bfloat16, if that gives the logits of `batch` as before.

    The CPU's fused attention has no bfloat16 units behind its backward pass: eagerly, a step of a 1.3 M model took .73 of the
    time, of a 22 M model .82 (docs/lab-notes.md, 2026-11-25). Yields whether it does.
    """
    parts = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    fused = all(config._attn_implementation == "sdpa" for config in parts)
    if model.device.type != "cpu" or not fused:
        yield False
        return
    was_training = model.training
    try:
        same = _eager_is_the_same(model.eval(), batch)
        model.train(was_training)
        yield same
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def _eager_is_the_same(model: PreTrainedModel, batch: Batch) -> bool:
    """Make the model attend eagerly; return whether its logits are as before, else undo it."""
    wanted_AV = answer_logits(model, batch)[0]
    model.set_attn_implementation("eager")
    found_AV = answer_logits(model, batch)[0]
    same = bool((found_AV - wanted_AV).abs().max() <= SAME * wanted_AV.abs().max())
    if not same:
        model.set_attn_implementation("sdpa")
    return same
