"""Which sizes slimlmm chooses by itself: multiples that hardware likes, and shares that devices can split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimlmm.anatomy import describe
from slimlmm.axes import Axis
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.recipe import MULTIPLES, Recipe
from slimlmm.views import View, view_of

#: fewer sizes than this are no choice: a smaller multiple is taken
HANDFUL = 5
#: least sizes that the planner goes to by itself; one block alone cannot pass on what an earlier one found
FLOORS = {"blocks": 2, "inner": 1, "width": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Multiples by noun ("width", "ffn") or axis ("text.width", which has the last word), and devices to split over."""

    multiples: Mapping[str, int] = field(default_factory=lambda: dict(MULTIPLES))
    tensor_parallel: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Grid:
        """Return the grid that a recipe asks for."""
        return cls(multiples=recipe.multiples, tensor_parallel=recipe.tensor_parallel)

    def sizes(self, config: Any, axis: Axis) -> list[int]:
        """Return the sizes to choose from: legal, above the floor, split evenly, in the largest multiple that leaves a handful.

        The present size is always one of them where the devices can split it. Of a width the floor is at most an eighth.

        Raises:
            UserError: no size at all can be split over the devices; the message has the numbers.
        """
        floor = min(FLOORS.get(axis.kind, 1), axis.size if axis.kind == "blocks" else axis.size // 8)
        legal = [size for size in axis.choices() if size >= floor and self.splits(config, axis, size)]
        if not legal:
            raise UserError(f"tensor_parallel {self.tensor_parallel}: {self._why(config, axis)}")
        step = self._step(axis, legal)
        return [size for size in legal if size % step == 0 or size == axis.size]

    def notes(self, config: Any) -> list[str]:
        """Say for which axes a smaller multiple than the wanted one is taken, and why."""
        found = []
        for axis in describe(config).axes.values():
            if axis.refusal or axis.kind not in ("inner", "width"):
                continue
            wanted, sizes = self._wanted(axis), self.sizes(config, axis)
            step = max((p for p in _halves(wanted) if all(s % p == 0 or s == axis.size for s in sizes)), default=1)
            if step < wanted:
                legal = sum(size % wanted == 0 for size in axis.choices())
                found.append(
                    f"{axis.name}: multiples of {wanted} leave {legal} of its {len(axis.choices())} legal sizes; "
                    f"multiples of {step} are taken"
                )
        return found

    def _wanted(self, axis: Axis) -> int:
        noun = "ffn" if axis.noun.endswith("ffn") else axis.noun
        return self.multiples.get(axis.name, self.multiples.get(noun, 1))

    def _step(self, axis: Axis, legal: list[int]) -> int:
        for step in _halves(self._wanted(axis)):
            if sum(size % step == 0 or size == axis.size for size in legal) >= HANDFUL:
                return step
        return 1

    def splits(self, config: Any, axis: Axis, size: int) -> bool:
        """Tell whether the devices can share an axis of this size: FFN neurons evenly, heads and groups as `deployable` says."""
        n = self.tensor_parallel
        if n == 1 or axis.kind not in ("inner", "width"):
            return True
        if axis.noun.endswith("ffn"):
            return size % n == 0
        heads = _heads_at(config, axis, size)
        return heads is None or (heads[0] % n == 0 and (heads[1] % n == 0 or n % heads[1] == 0))

    def _why(self, config: Any, axis: Axis) -> str:
        n = self.tensor_parallel
        heads = _heads_at(config, axis, axis.size)
        if heads is None:
            return (
                f"none of the {len(axis.choices())} legal sizes of {axis.name} (now {axis.size}) is a multiple of {n}."
            )
        return (
            f"{axis.name}: at no legal size do its {heads[0]} query heads in {heads[1]} key/value groups leave a number of "
            f"heads that {n} divides, with groups that {n} divides or that divide {n}."
        )


def _halves(multiple: int) -> list[int]:
    """Return the multiple, and the powers of two below it, descending."""
    powers = [1 << bit for bit in range(multiple.bit_length(), -1, -1) if 1 << bit < multiple]
    return [multiple, *powers]


def _heads_at(config: Any, axis: Axis, size: int) -> tuple[int, int] | None:
    """Return query heads and key/value groups of the tower when the axis has `size`; None where it carries no heads."""
    name = axis.name.partition(".")[0]
    if name not in {tower.name for tower in family_of(config).towers}:
        return None
    view: View = view_of(config, name)
    if axis.noun == "kv_groups":
        return view.heads // view.kv * size, size
    if axis.kind == "width" and describe(config).axes[f"{name}.kv_groups"].refusal and not view.free_heads:
        return view.heads * size // view.width, view.kv * size // view.width
    return None
