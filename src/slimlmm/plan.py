"""Budget -> sizes -> rounds, and scores -> kept units; what cannot be reached is refused with the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.recipe import LEVELS, Level, Round, Stage, Training
from slimlmm.resizing import predict_parameters, resized

#: axis -> sizes that the planner may choose
Choices = Mapping[str, list[int]]
#: share of the (logarithmic) shrinkage that each noun carries: width most, key/value groups, which hold few parameters and
#: lose most, least (docs/lab-notes.md)
SHARES = {"blocks": 0.22, "ffn": 0.35, "expert_ffn": 0.35, "kv_groups": 0.20, "width": 0.50}
#: most that one round may divide the parameters by
ROUND_RATIO = 1.8
#: share of the recovery's compute (row visits x parameters) that the last shape gets; the rest is shared evenly
LAST_SHARE = 0.5
#: share of a round's row visits that stop at the language model
STATES_SHARE = 0.5
#: peak learning rate of the first round, and how many times higher it ends
FIRST_RATE, RATE_RISE = 1e-4, 8


def sizes_for(
    config: Any,
    shrink: float,
    whole: int,
    fixed: Mapping[str, int] | None = None,
    grid: Grid | None = None,
    levels: Sequence[Level] = LEVELS,
) -> dict[str, int]:
    """Return axis sizes with at most ``whole / shrink`` parameters, every tower cut in every level of `levels`.

    FFN sizes that the config holds as a whole number of the width are given at the *present* width (`follow_width`).

    An axis keeps the fraction s^share of its noun, rounded to the nearest legal size; the largest s in (0, 1] that fits is
    found by bisection, then the left-over budget goes to the axes that rounding left furthest below their share.

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
    target = whole / shrink
    anatomy = describe(config)
    usable = {name: axis for name, axis in anatomy.axes.items() if not axis.refusal and axis.kind in levels}
    axes = {name: axis for name, axis in usable.items() if axis.noun in SHARES}
    choices = _choices(config, axes, grid or Grid())
    least = _count(config, _fit(config, _scaled(axes, choices, 0.0), choices))
    if least > target:
        where = "" if set(levels) == set(LEVELS) else f" in {', '.join(levels)}"
        raise UserError(
            f"--shrink {shrink:g} needs {target:,.0f} parameters or fewer, but the smallest shape that the axes of "
            f"{anatomy.model_type!r} allow{where} has {least:,} "
            f"({whole / least:.1f}x). Ask for --shrink {whole / least:.1f} or less."
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if _count(config, _fit(config, _scaled(axes, choices, middle), choices)) <= target
            else (low, middle)
        )
    return _grown(config, axes, choices, _fit(config, _scaled(axes, choices, low), choices), low, target)


def _count(config: Any, sizes: Mapping[str, int]) -> int:
    return predict_parameters(config, follow_width(describe(config), sizes, sizes))


def _scaled(axes: Mapping[str, Axis], choices: Choices, scale: float) -> dict[str, int]:
    """Return for every axis the legal size nearest (in ratio) to its share of the scale."""
    sizes = {}
    for name, axis in axes.items():
        wanted, legal = _wanted(axis, scale), choices[name]
        sizes[name] = min(legal, key=lambda size: abs(math.log(size / wanted))) if wanted else legal[0]
    return sizes


def _wanted(axis: Axis, scale: float) -> float:
    return axis.size * scale ** SHARES[axis.noun] if scale > 0 else 0.0


def follow_width(anatomy: Anatomy, sizes: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, int]:
    """Restate FFN sizes that the config holds as a whole number of the width: the same number of the widths in `widths`."""
    stated = dict(sizes)
    for name in sizes:
        axis, width = anatomy.axes[name], anatomy.axes.get(f"{name.partition('.')[0]}.width")
        if axis.kind == "inner" and name.endswith(".ffn") and width and axis.multiple == width.size > 1:
            stated[name] = sizes[name] // width.size * widths.get(width.name, width.size)
    return stated


def _choices(config: Any, axes: Mapping[str, Axis], grid: Grid) -> Choices:
    return {name: grid.sizes(config, axis) for name, axis in axes.items()}


def _fit(config: Any, sizes: dict[str, int], choices: Choices) -> dict[str, int]:
    """Lower widths until the stock config accepts all sizes at once (heads must divide the hidden size, for one)."""
    anatomy = describe(config)
    sizes = dict(sizes)
    for _ in range(64):
        try:
            resized(config, follow_width(anatomy, sizes, sizes))
        except UserError:
            name = "text.width" if "text.width" in sizes else next(iter(sizes))
            smaller = [size for size in choices[name] if size < sizes[name]]
            smaller = smaller or [size for size in anatomy.axis(name).choices() if size < sizes[name]]
            if not smaller:
                raise
            sizes[name] = smaller[-1]
            continue
        return sizes
    raise UserError(f"no sizes near {sizes} are accepted by the stock {config.model_type!r} config.")


def _grown(
    config: Any, axes: Mapping[str, Axis], choices: Choices, sizes: dict[str, int], scale: float, target: float
) -> dict[str, int]:
    """Spend what is left of the budget, step by step on the axis that stays furthest below its share of the scale."""
    sizes = dict(sizes)
    while True:
        options = []
        for name, axis in axes.items():
            larger = [size for size in choices[name] if size > sizes[name]]
            if not larger:
                continue
            trial = {**sizes, name: larger[0]}
            try:
                resized(config, follow_width(describe(config), trial, trial))
                count = _count(config, trial)
            except UserError:
                continue
            if count <= target:
                options.append((larger[0] / _wanted(axis, scale), name, larger[0]))
        if not options:
            return sizes
        _, name, size = min(options)
        sizes[name] = size


def stages_for(
    config: Any,
    final: Mapping[str, int],
    *,
    row_visits: int,
    rows_per_picture: int,
    order: Sequence[Level] = LEVELS,
    grid: Grid | None = None,
) -> tuple[Stage, ...]:
    """Return the default schedule: lossless cuts, then the levels of `order`, each round at most `ROUND_RATIO`.

    Every round is recovered before the next cut. Compute is shared, not visits: a visit of a small shape is cheap, so the
    last one gets most of the `row_visits`.
    """
    anatomy = describe(config)
    start = {name: anatomy.axis(name).size for name in final}
    current = dict(start)
    plans: list[tuple[str, dict[str, int], dict[str, int]]] = []  # level, sizes at the first width, at that round's
    for level in order:
        for sizes in _steps(config, current, {n: s for n, s in final.items() if anatomy.axis(n).kind == level}, grid):
            plans.append((level, sizes, follow_width(anatomy, sizes, current)))
            current |= sizes
    if not plans:
        raise UserError("the wanted size needs no cut at all; ask for a larger --shrink.")
    visits = _visits(config, start, [sizes for _, sizes, _ in plans], row_visits)
    stages: list[Stage] = [Stage(name="lossless", rounds=(Round(drop=("unused_tokens", "dead_blocks")),))]
    for level in order:
        rounds = [
            Round(sizes=stated, train=_trainings(anatomy, index / len(plans), share / rows_per_picture))
            for index, ((name, _, stated), share) in enumerate(zip(plans, visits, strict=True))
            if name == level
        ]
        stages += [Stage(name=level, rounds=tuple(rounds))] if rounds else []
    return tuple(stages)


def _visits(config: Any, start: dict[str, int], cuts: list[dict[str, int]], row_visits: int) -> list[float]:
    """Return each round's row visits: equal row visits x parameters for all but the last, which gets `LAST_SHARE`."""
    current, weights = dict(start), []
    for index, sizes in enumerate(cuts, 1):
        current |= sizes
        share = LAST_SHARE if index == len(cuts) else (1 - LAST_SHARE) / (len(cuts) - 1)
        weights.append(share / _count(config, current))
    return [row_visits * weight / sum(weights) for weight in weights]


def _trainings(anatomy: Anatomy, progress: float, picture_visits: float) -> tuple[Training, ...]:
    """Return one round's recovery: first what comes before the language model learns the teacher's states, then all the answers.

    A picture costs far less where the language model does not run, and says more: one state a picture token. Smaller shapes
    bear, and need, a higher learning rate; a nearly whole model is damaged by one (docs/lab-notes.md).
    """
    pictures = 8 if progress < 0.7 else 16

    def training(share: float, pictures: int, **more: Any) -> Training:
        return Training(
            steps=max(1, round(picture_visits * share / pictures)),
            pictures_per_step=pictures,
            learning_rate=FIRST_RATE * RATE_RISE**progress,
            warmup=0.1,
            **more,
        )

    if anatomy.axes["text.blocks"].refusal:
        return (training(1.0, pictures),)
    states = {"picture_states": 1.0}
    return (
        training(STATES_SHARE, 2 * pictures, losses=states, freeze=("patch_embedding", "text")),
        training(1 - STATES_SHARE, pictures, losses=Training.model_fields["losses"].default | states),
    )


def _steps(
    config: Any, current: Mapping[str, int], final: Mapping[str, int], grid: Grid | None
) -> list[dict[str, int]]:
    """Split one level's cut geometrically, in legal sizes; no round more than halves an axis (where its sizes allow)."""
    if all(current[name] == size for name, size in final.items()):
        return []
    anatomy = describe(config)
    ratio = _count(config, current) / _count(config, {**current, **final})
    steepest = max(current[name] / size for name, size in final.items())
    count = max(1, math.ceil(math.log(ratio) / math.log(ROUND_RATIO)), math.ceil(math.log2(steepest) - 1e-9))
    steps: list[dict[str, int]] = []
    last = dict(current)
    legal = _choices(config, {name: anatomy.axis(name) for name in final}, grid or Grid())
    for index in range(1, count + 1):
        sizes = {}
        for name, size in final.items():
            wanted = current[name] * (size / current[name]) ** (index / count)
            choices = [c for c in legal[name] if c >= size] or [size]
            sizes[name] = size if index == count else min(choices, key=lambda c: abs(math.log(c / wanted)))
        sizes = {name: size for name, size in sizes.items() if size < last[name]}
        if not sizes:
            continue
        sizes = _accepted(config, {**last, **sizes}, sizes, final)
        last |= sizes
        steps.append(sizes)
    return steps


def _accepted(config: Any, whole: Mapping[str, int], sizes: dict[str, int], final: Mapping[str, int]) -> dict[str, int]:
    """Keep an intermediate shape that the stock config accepts; where it does not, move that level to its final sizes."""
    try:
        resized(config, follow_width(describe(config), whole, whole))
    except UserError:
        return {name: final[name] for name in sizes}
    return sizes


def choose(scores: Mapping[str, torch.Tensor], anatomy: Anatomy, axis: str, size: int) -> Keep:
    """Return for every group of the axis its best-scored units, as many as `size` asks for, ascending."""
    keep = {}
    for group in anatomy.axis(axis).groups:
        keep[group.name] = group.best(scores[group.name], group.kept(size))
    return keep
