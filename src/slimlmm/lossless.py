"""Cuts that lose nothing: which of them a model takes, why its vocabulary stays whole where it does, and the sizes after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slimlmm import vocab
from slimlmm.anatomy import describe
from slimlmm.recipe import DROPS, Drop
from slimlmm.resizing import dead_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossless:
    """What these cuts leave of a model: `blocks` by axis, and of its vocabulary the `tokens`, None where no rows tell them.

    `whole` says why the vocabulary stays whole, "" where it need not.
    """

    blocks: Mapping[str, int]
    tokens: tuple[int, ...] | None = None
    whole: str = ""

    @property
    def drops(self) -> tuple[Drop, ...]:
        """What a lossless round drops; nothing where nothing can go."""
        if self.whole:
            return ("dead_blocks",) if self.blocks else ()
        return DROPS

    @property
    def notes(self) -> tuple[str, ...]:
        """What stays although it was to go."""
        return (f"the vocabulary stays whole: {self.whole}",) if self.whole else ()

    def sizes(self, drops: Iterable[Drop] = DROPS) -> dict[str, int]:
        """Return the sizes that dropping these leaves, of the axes that it changes."""
        kept = {} if self.tokens is None else {"vocab": len(self.tokens)}
        left: dict[Drop, Mapping[str, int]] = {"unused_tokens": kept, "dead_blocks": self.blocks}
        return {axis: size for what in drops for axis, size in left[what].items()}


def lossless_of(config: Any, generation: Any, processor: Any, texts: Iterable[str]) -> Lossless:
    """Return the cuts that lose nothing for these texts, which are all that the model will see and say."""
    blocks = living_blocks(config)
    try:
        kept = vocab.needed(config, generation, processor, texts)
    except vocab.KeptWholeError as error:
        return Lossless(blocks=blocks, whole=error.reason)
    size = describe(config).axis("vocab").size
    return Lossless(blocks=blocks, tokens=tuple(token for token in kept if token < size))


def living_blocks(config: Any) -> dict[str, int]:
    """Return the sizes that are left of axes of blocks without those that never reach the output."""
    return {axis: describe(config).axis(axis).size - len(dead) for axis, dead in dead_blocks(config).items()}
