"""How answers are decoded: plain greedy decoding, by nothing of the checkpoint's but its token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

#: what a checkpoint's generation config says of where a text begins and how it is padded
IDS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(model: Any, processor: Any, max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of plain greedy decoding, to be used within `nothing_else`.

    End tokens are those of the checkpoint's generation config, else of its tokenizer.
    """
    tokenizer = processor.tokenizer
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None and end is not None:
        pad = end[0] if isinstance(end, list) else end
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    return {**greedy, "max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": pad}


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
