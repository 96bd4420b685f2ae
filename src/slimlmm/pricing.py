"""What a measured budget (time, energy) is reckoned with between measurements: a table of shapes, and a line through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimlmm.allocation import Market, Sizes, least_loss
from slimlmm.anatomy import describe
from slimlmm.budget import Budget, Cost
from slimlmm.costs import Answer
from slimlmm.errors import UserError
from slimlmm.plan import Space
from slimlmm.resizing import predict_parameters, shapes_at
from slimlmm.sensitivity import Curve, movable, sampled

#: sizes of an axis that are measured alone for the table
TABLE = 2
#: scales of all axes together that are measured for it
SCALES = (0.6, 0.3, 0.1)
#: times that a limit of the line is corrected by what the shape that it led to really costs
CORRECTIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Cost = sum of weight x feature, with weights that are not negative, so that it rises with every size.

    Features of a shape: 1, its blocks and its FLOPs by tower, its parameters: starting a block costs, computing and reading do.
    """

    config: Any
    answer: Answer
    weights: NDArray[np.float64]

    def cost(self, sizes: Mapping[str, int]) -> float:
        """Return the predicted cost of a shape, in the unit of the table."""
        return float(features(self.config, self.answer, sizes) @ self.weights)


def features(config: Any, answer: Answer, sizes: Mapping[str, int]) -> NDArray[np.float64]:
    """Return the features of a shape (`Line`); FLOPs are left out where they are not known."""
    anatomy = describe(config)
    towers = dict(anatomy.towers)
    blocks = [sizes.get(f"{name}.blocks", anatomy.sizes.get(f"{name}.blocks", 0)) for name in towers]
    found = answer.flops(shapes_at(config, sizes)) or {}
    flops = [sum(value for name, value in found.items() if name.startswith(prefix)) for prefix in towers.values()]
    rest = sum(found.values()) - sum(flops)
    return np.array([1.0, *blocks, *flops, rest, predict_parameters(config, sizes)])


def table(space: Space, scaled: Callable[[float], Sizes]) -> list[Sizes]:
    """Return the shapes to measure: whole, each axis alone at a few sizes, all axes together at a few scales."""
    whole = {name: axis.size for name, axis in space.axes.items() if name in space.choices}
    alone = [{**whole, name: size} for name in movable(space) for size in sampled(space, name, TABLE)]
    return [whole, *alone, *(scaled(scale) for scale in SCALES)]


def fitted(space: Space, answer: Answer, shapes: Sequence[Sizes], costs: Sequence[float]) -> Line:
    """Return the line of least squared relative error through measured shapes, weights not negative (`nonnegative`)."""
    rows = np.array([features(space.config, answer, space.stated(one)) for one in shapes])
    target = np.array(costs)
    return Line(config=space.config, answer=answer, weights=nonnegative(rows / target[:, None], np.ones(len(target))))


def nonnegative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the x >= 0 of least |a x - b|, by active sets (Lawson and Hanson, Solving Least Squares Problems, 1974, ch. 23)."""
    scale = np.linalg.norm(a, axis=0)
    a = a / np.where(scale > 0, scale, 1.0)
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(3 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        gradient[free] = -np.inf
        if gradient.max() <= 1e-9:
            break
        free[gradient.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (trial[free] > 0).all():
                x = trial
                break
            down = free & (trial <= 0)
            step = (x[down] / (x[down] - trial[down])).min()
            x = x + step * (trial - x)
            free &= x > 1e-15
            x[~free] = 0.0
    found: NDArray[np.float64] = x / np.where(scale > 0, scale, 1.0)
    return found


def within_measured(
    space: Space, budget: Budget, line: Cost, curves: Mapping[str, Curve], start: Sizes
) -> tuple[Market, float, Sizes]:
    """Return the shape of least predicted loss whose measured cost is in the budget; with the line's market and limit for it.

    The line chooses for a limit; that is multiplied by limit / measured cost of the shape that came out, and so on,
    `CORRECTIONS` times, never by more than 2. `start`, which must be in the budget, stays where nothing better is.
    """
    market = Market(space, line, curves)
    bound = limit = budget.limit
    best = start
    for _ in range(CORRECTIONS):
        try:
            sizes = least_loss(market, bound, [start])
        except UserError:  # the line has nothing that small
            break
        cost = budget.cost(space.stated(sizes))
        if cost <= budget.limit and market.loss(sizes) <= market.loss(best):
            best, limit = sizes, bound
        if 0.98 * budget.limit <= cost <= budget.limit:
            break
        bound *= min(2.0, max(0.5, budget.limit / cost))
    return market, limit, best
