"""How much each axis suffers as it shrinks: the calibration loss of the model cut on that axis alone, as a curve over sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from slimlmm.cutting import Trials
from slimlmm.errors import UntriedError, UserError
from slimlmm.files import read_json, write_json
from slimlmm.job import Job
from slimlmm.plan import Space
from slimlmm.recipe import Round

#: smaller sizes of an axis that are measured, evenly spaced in ratio; few and cheap, because each is a cut with its repair
POINTS = 3
#: how a trial cut is made: as a round does it, without what gains little at one axis alone and takes long (merging, settling)
TRIAL = Round(repair=("refit", "rotate", "bridge"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Loss over the size of one axis, above that of the uncut model, in nats per answer token.

    `sizes` descend from the whole axis; `measured` is what calibration rows gave there, `losses` what the planner reckons with:
    the least convex rising curve over ln(whole / size) that starts at 0 and is nowhere below what was measured.
    """

    axis: str
    sizes: tuple[int, ...]
    measured: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def through(cls, axis: str, measured: Mapping[int, float]) -> Curve:
        """Return the curve through measured losses by size, the whole size (loss 0) among them.

        With x = ln(whole / size), going down: u_k = max(m_k, u_(k-1) + s_(k-1) (x_k - x_(k-1))), where s is the slope of the
        piece before, 0 at first. So u rises, and ever faster: a loss saturates once the model knows nothing any more, and a
        flat end of the measured curve must not pass for sizes that cost nothing.
        """
        sizes = tuple(sorted(measured, reverse=True))
        assert measured[sizes[0]] == 0
        losses, slope = [0.0], 0.0
        for before, size in itertools.pairwise(sizes):
            step = math.log(before / size)
            losses.append(max(measured[size], losses[-1] + slope * step))
            slope = (losses[-1] - losses[-2]) / step
        return cls(axis=axis, sizes=sizes, measured=tuple(measured[size] for size in sizes), losses=tuple(losses))

    def at(self, size: int) -> float:
        """Return the loss at any size, linear in ln(size) between two that were measured and beyond the last."""
        if size >= self.sizes[0] or len(self.sizes) == 1:
            return 0.0
        last = next((k for k, one in enumerate(self.sizes) if one <= size), len(self.sizes) - 1)
        (high, low), (less, more) = self.sizes[last - 1 : last + 1], self.losses[last - 1 : last + 1]
        return less + (more - less) * math.log(high / size) / math.log(high / low)


def curves(
    job: Job, model: PreTrainedModel, processor: Any, space: Space, kept: Path, *, points: int = POINTS
) -> dict[str, Curve]:
    """Cut every axis of the space alone to a few of its sizes, repair, and return the curve of each by its name.

    What was measured is kept in the file `kept` and not measured again; it has to be of the same model and calibration rows.

    Raises:
        UntriedError: the config takes no smaller size of some axis by itself.
    """
    wanted = {axis: sampled(space, axis, points) for axis in movable(space)}
    known = read_json(TypeAdapter(dict[str, float]), kept) if kept.exists() else {}
    with TemporaryDirectory() as scratch:
        trials = cache(
            lambda: Trials(job, model, processor, TRIAL, Path(scratch))
        )  # rows are read where something is tried

        def loss(name: str, cut: tuple[str, int] | None = None) -> float:
            if name not in known:
                known[name] = trials().loss(*cut) if cut else trials().uncut()
                write_json(kept, known)
            return known[name]

        found: dict[str, Curve] = {}
        for axis, sizes in wanted.items():
            measured = {space.axes[axis].size: 0.0}
            for size in sizes:
                measured[size] = loss(f"{axis}={size}", (axis, size)) - loss("uncut")
                job.tell.say("tried a size", axis=axis, size=size, loss=measured[size])
            found[axis] = Curve.through(axis, measured)
    return found


def movable(space: Space) -> list[str]:
    """Return the axes that leave a choice of sizes."""
    return [name for name, sizes in space.choices.items() if len(sizes) > 1]


def sampled(space: Space, axis: str, points: int) -> list[int]:
    """Return up to `points` sizes of the axis to try alone, descending to its least: those nearest to even steps in ratio."""
    whole, legal = space.axes[axis].size, []
    for size in (one for one in space.choices[axis] if one < space.axes[axis].size):
        try:
            space.check({axis: size})
        except UserError:
            continue
        legal.append(size)
    if not legal:
        raise UntriedError(
            f"{axis} cannot be cut alone to any of the sizes {', '.join(map(str, space.choices[axis]))}, so what it costs cannot "
            f"be measured; take --by shares, or --fix {axis}=SIZE."
        )
    wanted = [whole * (legal[0] / whole) ** (step / points) for step in range(1, points + 1)]
    nearest = {min(legal, key=lambda size: abs(math.log(size / one))) for one in wanted}
    return sorted(nearest, reverse=True)
