"""The noun of the whole program: an *axis* of a model, its units, and where those units live.

A model has few axes (``text.ffn``, ``vision.width`` ...). Some axes are chosen once for the whole tower (the residual
width), others layer by layer under one common size (each block keeps its own FFN neurons, all blocks the same number).
A `Group` is one such independent choice; scoring, planning, cutting, masking and printing all take groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slimlmm.errors import UserError, nearest

Role = Literal["produce", "consume", "affine"]
Kind = Literal["blocks", "inner", "width", "experts", "tokens", "vocab"]
Norm = Literal["", "write", "write2", "read", "rms", "rms1", "last", "last1", "layer"]
#: group name -> sorted indices of the kept units
Keep = Mapping[str, Tensor]


def noun_of(axis: str) -> str:
    """Return what an axis counts, its name without the tower: blocks, ffn, kv_groups, head_dim, width ..."""
    return axis.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One place where a group's units live: rows of one parameter along one dimension.

    Unit u owns the rows ``offset + (o * units + u) * inner + i`` for o < outer, i < inner. `outer` holds constants that
    vary slower than the unit (3 in a fused qkv), `inner` those that vary faster (head_dim, queries per KV head). `rest`
    further rows at the end belong to no unit and stay (placeholders behind the vocabulary).
    `parameter` is the name in ``model.state_dict()``; tied aliases (``Anatomy.tied``) own no slots. Role: *produce* writes
    the axis (output rows, biases, embeddings), *consume* reads it (input columns of a linear or convolution), *affine*
    scales it in place (norms, layer scale). `norm` says what a cut of the width has to make up for: "layer" is weight or bias
    of a LayerNorm, "rms" or "rms1" (1 + w) the weight of an RMSNorm that blocks read, "last" and "last1" of the one before
    a head tied to the embedding, "write" all that writes a stream read by RMSNorms ("write2": behind a factor of the root
    of the width), "read" what reads it without a norm, "" all else (`surgery._compensate`).
    """

    parameter: str
    dim: int
    role: Role
    outer: int = 1
    inner: int = 1
    offset: int = 0
    rest: int = 0
    norm: Norm = ""

    def rows(self, keep: Tensor, units: int) -> Tensor:
        """Return the rows of `parameter` that the units in `keep` own, in storage order; int64, [outer*len(keep)*inner]."""
        o = torch.arange(self.outer).view(-1, 1, 1)
        i = torch.arange(self.inner).view(1, 1, -1)
        return (self.offset + (o * units + keep.view(1, -1, 1)) * self.inner + i).reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that are kept or dropped together by one choice: (axis, layer or part), and all the places they live in.

    `stride` is how much axis size one unit carries: 1 for a residual channel, head_dim for a vision head that goes with
    the width. `rate` is how many units that much size carries: 4 for the FFN neurons of a tower whose FFN is 4 x width.
    For block axes unit i is layers ``i*stride .. (i+1)*stride-1`` of ``axis.layers`` (stride is 1 but in a Q-Former, where
    blocks go by whole periods of its cross-attention), and `slots` holds only what stands outside of them but has rows for
    each (Gemma 4's embeddings per layer). Of each set of units in `some_of` one at
    least has to stay (the only block with attention, a block whose output is read elsewhere).
    """

    name: str
    axis: str
    units: int
    slots: tuple[Slot, ...] = ()
    stride: int = 1
    rate: int = 1
    layer: int | None = None
    some_of: tuple[tuple[int, ...], ...] = ()

    def layers(self, units: Iterable[int]) -> list[int]:
        """Return the numbers of the layers that make up these units of a block axis."""
        return [unit * self.stride + number for unit in units for number in range(self.stride)]

    def allows(self, kept: Collection[int]) -> bool:
        """Tell whether one unit at least of each set in `some_of` is in `kept`."""
        return all(any(unit in kept for unit in units) for units in self.some_of)

    def _forced(self, scores: Tensor) -> list[int]:
        """Return the best unit of each set in `some_of` that holds none yet."""
        chosen: list[int] = []
        for units in sorted(self.some_of, key=len):
            if not any(unit in chosen for unit in units):
                chosen.append(max(units, key=lambda unit: float(scores[unit])))
        return chosen

    @property
    def masked_role(self) -> Role:
        """Role of the places whose zeros leave the model as if a unit were gone: its readers, where it has any."""
        return "consume" if any(slot.role == "consume" for slot in self.slots) else "produce"

    @property
    def least(self) -> int:
        """Least number of units that can stay alone."""
        return max(1, len(self._forced(torch.zeros(self.units))))

    def best(self, scores: Tensor, count: int) -> Tensor:
        """Return the `count` units of highest score that `some_of` allows, ascending."""
        chosen = self._forced(scores)
        if len(chosen) > count:
            raise UserError(f"{self.name}: {count} cannot stay alone; {len(chosen)} must: {sorted(chosen)}.")
        rest = [unit for unit in scores.argsort(descending=True, stable=True).tolist() if unit not in chosen]
        return torch.tensor(sorted(chosen + rest[: count - len(chosen)]))

    def first(self, count: int) -> Tensor:
        """Return the first `count` units that `some_of` allows, ascending."""
        return self.best(-torch.arange(self.units, dtype=torch.float64), count)

    def kept(self, size: int) -> int:
        """Return how many units stay when the axis has `size`."""
        if size % self.stride:
            raise UserError(f"{self.axis}={size}: must be a multiple of {self.stride} (one unit of {self.name}).")
        return size // self.stride * self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Something a stock config can shrink: its name, size, allowed sizes, config fields, and groups.

    `layers` is the state-dict prefix of the layer list for block axes ("model.language_model.layers"), else "".
    Legal sizes are the multiples of `multiple` from `minimum` on, or just those in `allowed` where it is not empty.
    `refusal` says why this axis cannot be cut in this model; a refused axis has no groups.
    `heavier_eps` is a norm whose epsilon weighs 1 / share that stays times as much after a cut of the width.
    `scalars` are tensors without channels that a cut of the width rescales, as (name, `Slot.norm`).
    `exact` tells whether cut == masked up to rounding once norms are compensated, `note` the reason where it is not.
    """

    name: str
    kind: Kind
    size: int
    fields: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    multiple: int = 1
    minimum: int = 1
    allowed: tuple[int, ...] = ()
    layers: str = ""
    scalars: tuple[tuple[str, Norm], ...] = ()
    heavier_eps: str = ""
    exact: bool = True
    note: str = ""
    refusal: str = ""

    @property
    def noun(self) -> str:
        """What is counted (`noun_of`)."""
        return noun_of(self.name)

    @property
    def level(self) -> str:
        """The level of a plan that cuts it: its kind, and of experts, which are neurons of an FFN by the set, inner."""
        return "inner" if self.kind == "experts" else self.kind

    def choices(self) -> tuple[int, ...]:
        """Return every legal size up to the current one, ascending."""
        start = -(-self.minimum // self.multiple) * self.multiple
        return self.allowed or tuple(range(start, self.size + 1, self.multiple))


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """All axes of one configuration, the parameters that share storage (alias -> owner), and where each tower stands.

    `towers` maps "vision", "text", "qformer", "projector" to the state-dict prefix of that part ("model.vision_tower.").
    """

    model_type: str
    axes: Mapping[str, Axis]
    tied: Mapping[str, str]
    towers: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Current size of every axis that can be cut."""
        return {name: axis.size for name, axis in self.axes.items() if not axis.refusal}

    def axis(self, name: str) -> Axis:
        """Return the axis, or raise a UserError that names the nearest one or the reason of its refusal."""
        if name not in self.axes:
            tower, _, noun = name.rpartition(".")
            heads = self.axes.get(f"{tower}.kv_groups")
            if noun in ("queries", "head_dim") and heads is not None:
                reason = heads.refusal or "every key/value head has one query head already"
                raise UserError(f"{name} of {self.model_type!r} cannot be cut: {reason}")
            raise UserError(
                f"unknown axis {name!r} for model type {self.model_type!r}. {nearest(name, list(self.axes))}"
            )
        found = self.axes[name]
        if found.refusal:
            raise UserError(f"{name} of {self.model_type!r} cannot be cut: {found.refusal}")
        return found

    def group(self, name: str) -> Group:
        """Return the group of that name."""
        return next(group for axis in self.axes.values() for group in axis.groups if group.name == name)
