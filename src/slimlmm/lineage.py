"""Which block of an earlier model each block of a cut one stands for.

RUN/stages/01-blocks.1/kept.json      numbers of the layers that a round left, by block axis
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy
from slimlmm.bridging import read_blocks
from slimlmm.errors import UserError
from slimlmm.files import read_json, write_json

#: numbers of the layers of a model that stayed, by block axis; an axis that is not named has all of them
Kept = Mapping[str, Sequence[int]]
FILE = "kept.json"
#: towers in the order in which a picture comes through
TOWERS = ("vision", "qformer", "projector", "text")


def keep(folder: Path, kept: Kept) -> None:
    """Write down in a round's folder which layers stayed."""
    write_json(folder / FILE, {axis: list(layers) for axis, layers in kept.items()})


def after(folder: Path, before: Kept) -> dict[str, list[int]]:
    """Return which layers of the first model stay behind a round, of those that were there `before`."""
    path = folder / FILE
    found = read_json(TypeAdapter(dict[str, list[int]]), path) if path.exists() else {}
    left = {axis: list(layers) for axis, layers in before.items()}
    for axis, layers in found.items():
        left[axis] = [left[axis][number] for number in layers] if axis in left else layers
    return left


def of_run(rounds: Sequence[Path]) -> Kept:
    """Return which layers of its teacher the last model of a run has, from the folders of its rounds in their order."""
    kept: Kept = {}
    for folder in rounds:
        if read_json(TypeAdapter(dict[str, Any]), folder / "metrics.json")["kept_promise"]:
            kept = after(folder, kept)
    return kept


@dataclass(frozen=True, slots=True)
class Pair:
    """A block of a cut model and the one of the model before behind which the stream should be the same, by name."""

    axis: str
    block: str
    before: str


def unknown_towers(anatomy: Anatomy) -> list[str]:
    """Return the towers that have blocks, but where these are is not known."""
    axes = anatomy.axes
    return [tower for tower in TOWERS if f"{tower}.blocks" in axes and not axes[f"{tower}.blocks"].layers]


def pairs_of(student: PreTrainedModel, before: PreTrainedModel, kept: Kept) -> list[Pair]:
    """Return the pairs of all towers, those near the picture first; what dropped blocks added is the task of the one before them.

    Blocks of `before` behind the last place where something reads the stream have none.

    Raises:
        UserError: `kept` names another number of layers than the student has.
    """
    now, then = describe(student.config), describe(before.config)
    pairs = []
    for tower in TOWERS:
        axis = now.axes.get(f"{tower}.blocks")
        if axis is None or not axis.layers:
            continue
        whole = then.axes[axis.name]
        stays = [*kept.get(axis.name, range(whole.size)), whole.size]
        if len(stays) != axis.size + 1:
            raise UserError(
                f"{axis.name}: the student has {axis.size} blocks, the model before {whole.size}, and it is not known which of "
                "them stayed."
            )
        read = read_blocks(before, axis.name, whole.size)
        for number in range(axis.size):
            if stays[number] < read:
                pairs.append(
                    Pair(axis.name, f"{axis.layers}.{number}", f"{whole.layers}.{min(stays[number + 1], read) - 1}")
                )
    return pairs
