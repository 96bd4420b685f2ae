"""What a conversation is and what its answer, for those who pass them on without a model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One conversation to be continued; `messages` are chat turns whose picture parts stand for `pictures`, in their order."""

    messages: Sequence[Mapping[str, Any]]
    pictures: Sequence[Image.Image]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token that was written: log p(token | before) of the model itself, sampling aside, and the likeliest ones there."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer: its tokens without the end token, and why it ended."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish
    prompt_tokens: int
