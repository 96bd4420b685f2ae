"""Rotary positions: which dimensions of a head turn together, and the settings that keep their frequencies when some go.

Legend: D head_dim, R its rotated dimensions, P = R/2 rotary pairs; pair p turns by position * f_p, in a plain model
f_p = theta^(-2p/R). A smaller R gives other frequencies, so that a cut has to say which ones stay (`settings_after`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimlmm.families import part_of
from slimlmm.probing import Field
from slimlmm.slots import RefusedError
from slimlmm.views import ROPE_SCALING, View

#: kinds of scaling whose frequencies do not change while the model runs
_STATIC = ("default", "linear", "llama3", "yarn", "longrope")
#: those in which a pair's frequency follows from its unscaled one alone: every k-th pair is the plain model of R / k
_BY_FREQUENCY = ("default", "linear", "llama3")
#: what a rotary class whose positions have three coordinates calls their shares of the pairs
SECTIONS = "mrope_section"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring units among the dimensions of one head: `units` of `pairs` rotary pairs each, from pair `first` on.

    `pairs` = 0: dimensions that do not turn, from dimension `first` on. `prefix`: only the first units may stay.
    """

    name: str
    units: int
    pairs: int
    first: int
    prefix: bool = False

    def places(self, rotated: int, *, neighbours: bool) -> list[tuple[int, int]]:
        """Return (offset in the head, dimensions per unit) of each stretch that the units own.

        Pair p is (2p, 2p + 1) with `neighbours`, else (p, p + R/2).
        """
        if not self.pairs:
            return [(self.first, 1)]
        if neighbours:
            return [(2 * self.first, 2 * self.pairs)]
        return [(self.first, self.pairs), (self.first + rotated // 2, self.pairs)]

    def members(self, units: Iterable[int]) -> list[int]:
        """Return the numbers of the pairs of some units."""
        return [self.first + unit * self.pairs + i for unit in units for i in range(self.pairs)]


def parameters_of(view: View) -> dict[str | None, dict[str, Any]]:
    """Return the rotary settings of a tower by type of block (None: all alike), empty where it has no rotary positions."""
    found = view.value("rope_parameters")
    if not found:
        return {}
    if all(isinstance(value, dict) for value in found.values()):
        return dict(found)
    return {None: found}


def rotated(view: View) -> int:
    """R: how many dimensions of a head turn."""
    factors = {float(one.get("partial_rotary_factor", 1.0)) for one in parameters_of(view).values()}
    if len(factors) != 1:
        raise RefusedError(f"its blocks rotate different shares of head_dim ({sorted(factors)})")
    return int(view.head_dim * factors.pop())


def runs(view: View) -> list[Run]:
    """Return how the dimensions of a head fall into units that may be chosen, one after the other; [] with no rotation."""
    settings = parameters_of(view)
    if not settings:
        return []
    if other := sorted({one.get("rope_type", "default") for one in settings.values()} - set(_STATIC)):
        raise RefusedError(f"rotary frequencies of the kind {other[0]!r} cannot be said for chosen pairs")
    pairs = rotated(view) // 2
    found = (
        _sections(view, settings, pairs) if view.backbone.mrope else [Run(name="pairs", units=pairs, pairs=1, first=0)]
    )
    if view.head_dim > 2 * pairs:
        found.append(Run(name="rest", units=view.head_dim - 2 * pairs, pairs=0, first=2 * pairs))
    return found


def _sections(view: View, settings: Mapping[str | None, dict[str, Any]], pairs: int) -> list[Run]:
    """Return the runs of positions with three coordinates, each of which turns pairs of its own."""
    sections = settings[None].get(SECTIONS) if None in settings else None
    if not sections or sum(sections) != pairs:
        raise RefusedError(f"its {SECTIONS} {sections} does not share out its {pairs} rotary pairs")
    if view.backbone.mrope == "sections":
        starts = [sum(sections[:index]) for index in range(len(sections))]
        return [
            Run(name=f"section{index}", units=size, pairs=1, first=start)
            for index, (size, start) in enumerate(zip(sections, starts, strict=True))
        ]
    whole = min(sections)
    found = [Run(name="triples", units=whole, pairs=3, first=0)]
    rest = [_coordinate(sections, pair) for pair in range(3 * whole, pairs)]
    if rest:
        found.append(Run(name="tail", units=len(rest), pairs=1, first=3 * whole, prefix=len(set(rest)) > 1))
    return found


def _coordinate(sections: list[int], pair: int) -> int:
    """Which coordinate turns a pair when they take turns: 1 and 2 as long as they last, else 0."""
    return pair % 3 if pair < 3 * sections[pair % 3] else 0


def settings_after(view: View, size: int, kept: Mapping[str, Iterable[int]] | None) -> dict[Field, Any]:
    """Return the rotary fields to write when the head has `size` dimensions and the units `kept` of each run stay.

    Without `kept` evenly spaced units stay. Pairs p_0 < p_1 < ... that are every k-th one have the frequencies of the plain
    model of R / k dimensions, theta^(-2(ki)/R) = theta^(-2i/(R/k)). Any others are said by the stock ``longrope`` factors
    theta^(-2i/R') / f_(p_i), which leave out none of the scaling that the model had (arXiv 2402.13753 for the factors).
    """
    found = runs(view)
    if not found:
        return {}
    chosen = {
        run.name: list(kept[run.name]) if kept else _spaced(run, run.units * size // view.head_dim) for run in found
    }
    pairs = [pair for run in found for pair in run.members(chosen[run.name])]
    written = {kind: _one(view, settings, kind, pairs) for kind, settings in parameters_of(view).items()}
    return {view.field("rope_parameters"): written.get(None, written)}


def _spaced(run: Run, count: int) -> list[int]:
    return list(range(count)) if run.prefix else [unit * run.units // count for unit in range(count)]


def _one(view: View, settings: dict[str, Any], kind: str | None, pairs: list[int]) -> dict[str, Any]:
    """Return the settings of one type of block when these pairs stay."""
    before, count = rotated(view) // 2, len(pairs)
    new = dict(settings)
    if sections := settings.get(SECTIONS) if view.backbone.mrope else None:
        new[SECTIONS] = _new_sections(view, sections, pairs)
    rope_type = settings.get("rope_type", "default")
    every = before // count
    if rope_type in _BY_FREQUENCY and pairs == [every * index for index in range(count)] and every * count == before:
        return new
    theta = float(settings["rope_theta"])
    plain = torch.tensor([theta ** (-index / count) for index in range(count)], dtype=torch.float64)
    factors, scale = {}, 1.0
    for name, long in (("short_factor", False), ("long_factor", True)):
        frequencies, scale = _frequencies(view, settings, kind, long=long)
        factors[name] = (plain / frequencies[pairs]).tolist()
    last = settings.get("original_max_position_embeddings") or view.value("max_position_embeddings")
    new = {name: value for name, value in new.items() if name not in ROPE_SCALING}
    more = {"attention_factor": scale, "factor": 1.0, "original_max_position_embeddings": last}
    return new | {"rope_type": "longrope"} | factors | more


def _frequencies(view: View, settings: dict[str, Any], kind: str | None, *, long: bool) -> tuple[Tensor, float]:
    """Return f_p [P], in fp64, and the factor on cosine and sine, as the stock class computes them."""
    if settings.get("rope_type", "default") == "default":
        count = rotated(view) // 2
        theta = float(settings["rope_theta"])
        return torch.tensor([theta ** (-pair / count) for pair in range(count)], dtype=torch.float64), 1.0
    compute: Any = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
    length = settings["original_max_position_embeddings"] + 1 if long and settings["rope_type"] == "longrope" else None
    found, scale = compute(part_of(view.config, view.tower), "cpu", seq_len=length, layer_type=kind)
    return found.double(), float(scale)


def _new_sections(view: View, sections: list[int], pairs: list[int]) -> list[int]:
    """Return how many of the kept pairs each coordinate turns; they must still come in the order that the class gives them."""
    if view.backbone.mrope == "sections":
        ends = [sum(sections[: index + 1]) for index in range(len(sections))]
        owner = [next(index for index, end in enumerate(ends) if pair < end) for pair in pairs]
        return [owner.count(index) for index in range(len(sections))]
    owner = [_coordinate(sections, pair) for pair in pairs]
    new = [owner.count(index) for index in range(3)]
    assert owner == [_coordinate(new, index) for index in range(len(pairs))], (sections, pairs)
    return new


def proportion(head_dim: int, found: Iterable[Run]) -> int:
    """Return the smallest step of head_dim at which every run keeps a whole number of units."""
    return head_dim // math.gcd(head_dim, *(run.units for run in found))
