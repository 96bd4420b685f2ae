"""How answers are decoded: plain greedy decoding, by nothing of the checkpoint's but its token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

#: what a checkpoint's generation config says of where a text begins and how it is padded
IDS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(model: Any, processor: Any, max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of plain greedy decoding, to be used within `nothing_else`."""
    end, pad = ends_of(model, processor.tokenizer), processor.tokenizer.pad_token_id
    if pad is None and end is not None:
        pad = end[0] if isinstance(end, list) else end
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return {**greedy, "max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}


def ends_of(model: Any, tokenizer: Any) -> int | list[int] | None:
    """Return the end tokens: those of its generation config, and the tokenizer's, by which answers are taught to end."""
    known = listed(model.generation_config.eos_token_id)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    return known[0] if len(known) == 1 else known or None


def listed(ends: int | Sequence[int] | None) -> list[int]:
    """Return end tokens, as a generation config holds them, as a list."""
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def end_as_taught(model: Any, tokenizer: Any) -> None:
    """Let stock `generate` stop at the end token of the tokenizer too, as a model that was taught to end with it needs."""
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = ends_of(model, tokenizer)


@contextmanager
def nothing_else(model: Any) -> Iterator[None]:
    """Within the block the model, and a language model in it, generate by what they are told and their token ids alone.

    Sampling, penalties, biases, bans, beams and time limits of a checkpoint are left out: `generate` would take each of them
    where its arguments do not say otherwise. An export, which hears nothing else anyway, is left as it is.
    """
    parts = (
        [part for part in model.modules() if isinstance(part, GenerationMixin)] if isinstance(model, nn.Module) else []
    )
    before = [part.generation_config for part in parts]
    for part, told in zip(parts, before, strict=True):
        part.generation_config = GenerationConfig(**{name: getattr(told, name) for name in IDS})
    try:
        yield
    finally:
        for part, told in zip(parts, before, strict=True):
            part.generation_config = told
