"""Budget -> sizes, and scores -> kept units; what cannot be reached is refused with the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.budget import Budget, by_shrink
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.recipe import LEVELS, Level
from slimlmm.resizing import resized

#: axis -> sizes that the planner may choose
Choices = Mapping[str, list[int]]
#: share of the (logarithmic) shrinkage that each noun carries: width most, key/value groups, which hold few parameters and
#: lose most, least (docs/lab-notes.md); experts as much as their neurons
SHARES = {
    "blocks": 0.22,
    "decoder_blocks": 0.22,
    "ffn": 0.35,
    "expert_ffn": 0.35,
    "experts": 0.35,
    "kv_groups": 0.20,
    "width": 0.50,
}
#: halvings of the interval in which the scale of all axes is sought
BISECTIONS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may be chosen for one configuration: axes with their sizes, ascending; a given size is the only one of its axis.

    `least`: the size that an axis must not fall below, where one was asked for; `levels`: those that may be cut.
    """

    config: Any
    axes: Mapping[str, Axis]
    choices: Choices
    least: Mapping[str, int]
    levels: Sequence[Level] = LEVELS

    def stated(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes as a model that was cut to all of them has them (`follow_width`)."""
        return follow_width(describe(self.config), sizes, sizes)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise a UserError unless the stock config takes all these sizes at once."""
        resized(self.config, self.stated(sizes))

    def lowered(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the nearest sizes below these that the stock config takes at once, widths before groups."""
        return _fit(self, dict(sizes))

    def whole(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether nothing is cut at these sizes."""
        return all(size == self.axes[name].size for name, size in sizes.items())


def space_of(
    config: Any,
    grid: Grid | None = None,
    levels: Sequence[Level] = LEVELS,
    *,
    floors: Mapping[str, int] | None = None,
    fixes: Mapping[str, int] | None = None,
) -> Space:
    """Return what the planner may choose for `config`: sizes of the grid, none below `floors`, the `fixes` as they are given.

    Only axes of `levels` are cut. Floors and given sizes are those in the end. An FFN that the config holds as a whole number of
    the width follows the width, so that it takes a floor or a given size only together with a given width.

    Raises:
        UserError: axes that no round cuts, and sizes that they do not have; all problems at once.
    """
    anatomy, floors, fixes, grid = describe(config), floors or {}, fixes or {}, grid or Grid()
    problems: list[str] = []
    told: dict[str, dict[str, int]] = {"--floor": {}, "--fix": {}}
    for option, wishes, other in (("--floor", floors, fixes), ("--fix", fixes, floors)):
        for name, size in wishes.items():
            try:
                told[option][name] = _wish(anatomy, option, (name, size), fixes, levels)
                if name in other:
                    raise UserError("has a floor and a given size; leave one of the two out.")
            except UserError as error:
                problems.append(f"{option} {name}={size}: {error}")
    for name in filter(lambda one: "." in one, grid.multiples):
        try:
            anatomy.axis(name)
        except UserError as error:
            problems.append(f"multiples: {error}")
    if problems:
        raise UserError("not possible:\n  " + "\n  ".join(problems))
    least, given = told["--floor"], told["--fix"]
    usable = {name: axis for name, axis in anatomy.axes.items() if axis.level in levels and not axis.refusal}
    axes = {
        name: axis for name, axis in anatomy.axes.items() if name in given or (name in usable and axis.noun in SHARES)
    }
    choices = {name: [given[name]] if name in given else grid.sizes(config, axis) for name, axis in axes.items()}
    choices |= {
        name: [one for one in choices[name] if one >= size] or [axes[name].size] for name, size in least.items()
    }
    return Space(config=config, axes=axes, choices=choices, least=least | given, levels=levels)


def _wish(
    anatomy: Anatomy, option: str, wish: tuple[str, int], fixes: Mapping[str, int], levels: Sequence[Level]
) -> int:
    """Return a floor or a given size as the planner counts it, or refuse it."""
    name, size = wish
    axis = anatomy.axis(name)
    if axis.level not in levels:
        raise UserError(f"no round of a plan cuts it; cut it first (slimlmm cut MODEL --set {name}={size}).")
    if option == "--floor" and axis.noun not in SHARES:
        raise UserError("the planner leaves this axis as it is; leave the floor out.")
    if (width := _leader(anatomy, name)) and width.kind in levels:
        if width.name not in fixes:
            raise UserError(f"it is a whole number of the width and follows it; give --fix {width.name}=SIZE too.")
        count = size / fixes[width.name]
        size = (math.ceil(count) if option == "--floor" else round(count)) * width.size
        if size not in axis.choices() or (option == "--fix" and count != round(count)):
            raise UserError(f"must be 1 to {axis.size // width.size} times the width {fixes[width.name]}.")
    elif option == "--fix" and size not in axis.choices():
        near = sorted(sorted(axis.choices(), key=lambda one: abs(one - wish[1]))[:2])
        raise UserError(f"no size of this axis; the nearest: {', '.join(map(str, near))}.")
    return size


def sizes_for(
    config: Any,
    shrink: float,
    whole: int,
    fixed: Mapping[str, int] | None = None,
    grid: Grid | None = None,
    levels: Sequence[Level] = LEVELS,
) -> dict[str, int]:
    """Return axis sizes with at most ``whole / shrink`` parameters, every tower cut in every level of `levels` (`sizes_within`).

    Args:
        config: configuration of the model that will be cut.
        shrink: wanted ratio of parameters.
        whole: parameters of the original model.
        fixed: sizes that other cuts will have reached (the trimmed vocabulary, living blocks).
        grid: which legal sizes to choose from.
        levels: the levels that may be cut.

    Raises:
        UserError: the smallest sizes still have too many parameters; the message says how far one can go.
    """
    config = resized(config, fixed) if fixed else config
    return sizes_within(space_of(config, grid, levels), by_shrink(config, shrink, whole))


def sizes_within(space: Space, budget: Budget) -> dict[str, int]:
    """Return the sizes of `scaled_within`; what is left of the budget goes to the axes furthest below their share.

    FFN sizes that the config holds as a whole number of the width are given at the *present* width (`follow_width`).
    """
    scale, sizes = scaled_within(space, budget)
    return _grown(space, budget, sizes, max(scale, 0.5**BISECTIONS))


def scaled_within(space: Space, budget: Budget) -> tuple[float, dict[str, int]]:
    """Return the largest scale s in (0, 1] whose sizes fit the budget, by bisection, and these sizes.

    An axis keeps the fraction s^share of its noun, rounded to the nearest legal size.

    Raises:
        UserError: the smallest sizes cost too much still; the message says how much.
    """
    least = budget.cost(space.stated(_fit(space, _scaled(space, 0.0))))
    if least > budget.limit:
        asked = "" if set(space.levels) == set(LEVELS) else f" in {', '.join(space.levels)}"
        asked += " with these --floor and --fix" if space.least else ""
        raise UserError(
            f"{budget.asked} allows {budget.said(budget.limit)}, but the smallest shape that the axes of "
            f"{space.config.model_type!r} allow{asked} takes {budget.said(least)}. Ask for {budget.again(least)}."
        )
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = budget.cost(space.stated(_fit(space, _scaled(space, middle)))) <= budget.limit
        low, high = (middle, high) if fits else (low, middle)
    return low, _fit(space, _scaled(space, low))


def scaled(space: Space, scale: float) -> dict[str, int]:
    """Return the sizes of a scale in [0, 1], as the stock config takes them (`scaled_within`)."""
    return _fit(space, _scaled(space, scale))


def _scaled(space: Space, scale: float) -> dict[str, int]:
    """Return for every axis the legal size nearest (in ratio) to its share of the scale."""
    sizes = {}
    for name, axis in space.axes.items():
        wanted, legal = _wanted(axis, scale), space.choices[name]
        sizes[name] = min(legal, key=lambda size: abs(math.log(size / wanted))) if wanted else legal[0]
    return sizes


def _wanted(axis: Axis, scale: float) -> float:
    return axis.size * scale ** SHARES.get(axis.noun, 0.0) if scale > 0 else 0.0


def _leader(anatomy: Anatomy, name: str) -> Axis | None:
    """Return the width that an FFN is a whole number of; None where it is a number of its own."""
    axis, width = anatomy.axes[name], anatomy.axes.get(f"{name.partition('.')[0]}.width")
    follows = axis.kind == "inner" and name.endswith(".ffn") and width and axis.multiple == width.size > 1
    return width if follows else None


def follow_width(anatomy: Anatomy, sizes: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, int]:
    """Restate FFN sizes that the config holds as a whole number of the width: the same number of the widths in `widths`."""
    stated = dict(sizes)
    for name in sizes:
        if width := _leader(anatomy, name):
            stated[name] = sizes[name] // width.size * widths.get(width.name, width.size)
    return stated


def _fit(space: Space, sizes: dict[str, int]) -> dict[str, int]:
    """Lower widths, then groups, until the stock config accepts all sizes at once (heads must divide the width, for one).

    Where groups may not be lowered (`least`) that can end at a width too small for their heads; a larger one is taken then.
    """
    sizes = dict(sizes)
    for _ in range(64):
        try:
            space.check(sizes)
        except UserError:
            lowered = _lowered(space, sizes) or _widened(space, sizes)
            if not lowered:
                raise
            sizes |= lowered
            continue
        return sizes
    raise UserError(f"no sizes near {sizes} are accepted by the stock {space.config.model_type!r} config.")


def _lowered(space: Space, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the next smaller size of the first axis that has one; nothing where none has."""
    for name in ("text.width", "text.kv_groups") if "text.width" in sizes else sizes:
        for legal in (space.choices.get(name, ()), space.axes[name].choices() if name in space.axes else ()):
            if smaller := [size for size in legal if space.least.get(name, 0) <= size < sizes[name]]:
                return {name: smaller[-1]}
    return {}


def _widened(space: Space, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the least larger width that the stock config takes beside the others; nothing where none is."""
    for width in (one for one in space.choices.get("text.width", ()) if one > sizes["text.width"]):
        try:
            space.check({**sizes, "text.width": width})
        except UserError:
            continue
        return {"text.width": width}
    return {}


def _grown(space: Space, budget: Budget, sizes: Mapping[str, int], scale: float) -> dict[str, int]:
    """Spend what is left of the budget, step by step on the axis that stays furthest below its share of the scale."""
    sizes = dict(sizes)
    while True:
        steps = []
        for name, axis in space.axes.items():
            larger = [size for size in space.choices[name] if size > sizes[name]]
            steps += [(larger[0] / _wanted(axis, scale), name, larger[0])] if larger else []
        step = next(
            ({name: size} for _, name, size in sorted(steps) if _fits(space, budget, {**sizes, name: size})), None
        )
        if step is None:
            return sizes
        sizes |= step


def _fits(space: Space, budget: Budget, sizes: Mapping[str, int]) -> bool:
    """Tell whether the stock config takes the sizes, and the budget allows what they cost."""
    try:
        space.check(sizes)
        return budget.cost(space.stated(sizes)) <= budget.limit
    except UserError:
        return False


def halved(config: Any, sizes: Mapping[str, int], grid: Grid) -> dict[str, int]:
    """Return half of a cut: of each axis the legal size nearest to sqrt(present x wanted) between the two, where there is one.

    A cut of several axes none of which has a size between gives up the later half of its axes; {} where nothing lies between.
    """
    half: dict[str, int] = {}
    planned = dict(describe(config).sizes)
    for name, wanted in sizes.items():
        anatomy = describe(config)
        axis, size = anatomy.axis(name), restated(anatomy, {name: wanted}, planned)[name]
        planned[name] = wanted
        middle = math.sqrt(axis.size * size)
        between = [n for n in grid.sizes(config, axis) if size < n < axis.size]
        between = between or [n for n in axis.choices() if size < n < axis.size and grid.splits(config, axis, n)]
        found, config = _cut_to_first(config, name, sorted(between, key=lambda n: abs(math.log(n / middle))))
        half |= {name: found} if found else {}
    first = list(sizes)[: len(sizes) // 2]
    return half or {name: sizes[name] for name in first}


def _cut_to_first(config: Any, name: str, sizes: Iterable[int]) -> tuple[int | None, Any]:
    """Return the first of these sizes that the config takes, and it cut to that; None and the config as it is where none is."""
    for size in sizes:
        try:
            return size, resized(config, {name: size})
        except UserError:
            continue
    return None, config


def restated(anatomy: Anatomy, sizes: Mapping[str, int], planned: Mapping[str, int]) -> dict[str, int]:
    """Restate FFN sizes that the config holds as a whole number of the width, where the width is another than was planned.

    `sizes` are those of one round, cut in this order; `planned` are those before it. A width that the round cuts first is then
    as planned.
    """
    stated: dict[str, int] = {}
    for name, size in sizes.items():
        width = _leader(anatomy, name)
        if width and width.name not in stated and planned[width.name] != width.size:
            size = size // planned[width.name] * width.size
        stated[name] = size
    return stated


def carried(config: Any, sizes: Mapping[str, int], grid: Grid) -> tuple[dict[str, int], list[str]]:
    """Return a round's sizes as a model takes them that is not the one they were planned for, and what is other than planned.

    Other blocks stayed than were counted on, or half of an earlier cut was made. An axis that is gone (dense neurons where blocks
    of experts stayed) falls away; a size that the config does not take (heads divide the width) becomes the next smaller one that
    it does, else the next larger one.
    """
    taken: dict[str, int] = {}
    told: list[str] = []
    for name, wanted in sizes.items():
        try:
            axis = describe(config).axis(name)
        except UserError as error:
            told.append(f"{name}={wanted} falls away: {error}")
            continue
        legal = (grid.sizes(config, axis), [size for size in axis.choices() if grid.splits(config, axis, size)])
        less = [size for some in legal for size in reversed(some) if size < wanted]
        more = [size for some in legal for size in some if wanted < size < axis.size]
        found, config = _cut_to_first(config, name, (wanted, *less, *more))
        taken |= {name: found} if found else {}
        if found != wanted:
            told.append(f"{name}={wanted} is not possible any more; {found or 'nothing'} is taken")
    return taken, told


def choose(scores: Mapping[str, torch.Tensor], anatomy: Anatomy, axis: str, size: int) -> Keep:
    """Return for every group of the axis its best-scored units, as many as `size` asks for, ascending."""
    keep = {}
    for group in anatomy.axis(axis).groups:
        keep[group.name] = group.best(scores[group.name], group.kept(size))
    return keep
