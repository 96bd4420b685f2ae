"""Importance per cost: the sizes of least predicted loss that a budget allows, over all towers and axes at once."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from slimlmm.budget import Cost
from slimlmm.errors import UserError
from slimlmm.plan import Space
from slimlmm.sensitivity import Curve, movable

Sizes = dict[str, int]
#: most nodes that the branch and bound visits, and prices that it reckons, a few milliseconds each
PRICES = 2000


@dataclass(slots=True)
class Market:
    """The sizes of a space with what they cost and what they lose.

    Loss is taken to add up: L(n) = sum over axes a of c_a(n_a), with the `curves` c, each measured with all other axes whole.
    What two cuts do to each other is not in it. Cost is the true function of all sizes at once, reckoned anew for each shape.
    """

    space: Space
    cost: Cost
    curves: Mapping[str, Curve]
    _prices: dict[tuple[int, ...], float] = field(default_factory=dict)

    def loss(self, sizes: Mapping[str, int]) -> float:
        """Return L(n), nats per answer token above the uncut model."""
        return sum(curve.at(sizes[axis]) for axis, curve in self.curves.items())

    def price(self, sizes: Mapping[str, int]) -> float:
        """Return the cost of a shape, reckoned once."""
        key = tuple(sizes.values())
        if key not in self._prices:
            self._prices[key] = self.cost(self.space.stated(sizes))
        return self._prices[key]

    @property
    def reckoned(self) -> int:
        """Return how many prices were reckoned."""
        return len(self._prices)

    def fits(self, sizes: Mapping[str, int], limit: float) -> bool:
        """Tell whether the price is within the limit and the stock config takes the sizes."""
        if self.price(sizes) > limit:
            return False
        try:
            self.space.check(sizes)
        except UserError:
            return False
        return True


def least_loss(market: Market, limit: float, starts: Sequence[Sizes] = ()) -> Sizes:
    """Return sizes of least predicted loss whose price is at most `limit`.

    Greedy descent (`descended`), then exchanges: while any two axes can take other sizes so that the loss falls within the
    limit, the best such pair is taken. Also from each of `starts` that fits, so the outcome is never worse than those. Then
    branch and bound (`_proven`), which ends with the best shape of all, or after `PRICES` prices with what was found before.
    What is left of the budget is filled up.

    Raises:
        UserError: no shape within the limit was found.
    """
    found = descended(market, limit)
    begun = [one for one in (found, *starts) if one is not None and market.fits(one, limit)]
    if not begun:
        raise UserError("importance per cost finds no shape within this budget; take --by shares, or ask for less.")
    best = min((_exchanged(market, limit, one) for one in begun), key=market.loss)
    return _filled(market, limit, _proven(market, limit, best))


def _proven(market: Market, limit: float, best: Sizes) -> Sizes:
    """Return the shape of least loss by best-first search, or `best` where `PRICES` prices do not find a better one.

    A node gives some axes a size. Its bound: their losses, and of each other axis that of its largest size which fits while
    all axes without a size have their least. As a cost rises with every size, no shape below the node has less.
    """
    axes = sorted(movable(market.space), key=lambda name: -market.curves[name].at(market.space.choices[name][0]))
    least: Sizes = {name: choices[0] for name, choices in market.space.choices.items()}

    def bound(chosen: Sizes) -> float:
        base = {**least, **chosen}
        if market.price(base) > limit:
            return math.inf
        total = sum(market.curves[name].at(size) for name, size in chosen.items())
        for name in axes[len(chosen) :]:
            total += market.curves[name].at(_affordable(market, limit, base, name)[-1])
        return total

    target, ticket, most = market.loss(best) - 1e-12, itertools.count(), market.reckoned + PRICES
    heap: list[tuple[float, int, Sizes]] = [(0.0, next(ticket), {})]
    for _ in range(PRICES):
        if not heap or heap[0][0] >= target or market.reckoned >= most:
            return best
        _, _, chosen = heapq.heappop(heap)
        if len(chosen) == len(axes):
            if market.fits(whole := {**least, **chosen}, limit):
                return whole
            continue
        name = axes[len(chosen)]
        for size in market.space.choices[name]:
            if (low := bound(child := {**chosen, name: size})) < target:
                heapq.heappush(heap, (low, next(ticket), child))
    return best


def descended(market: Market, limit: float) -> Sizes | None:
    """Go down from the whole model, each time by the step of least loss per saved cost, until the price is in the limit.

    A step takes one axis to any smaller size: (L(n') - L(n)) / (C(n) - C(n')), both evaluated at the whole shape. A step beyond
    the limit counts only what it has to save. None where no step is left before the limit.
    """
    space = market.space
    sizes: Sizes = {name: choices[-1] for name, choices in space.choices.items()}
    while (now := market.price(sizes)) > limit:
        steps = []
        for name in space.choices:
            for size in (one for one in space.choices[name] if one < sizes[name]):
                smaller = {**sizes, name: size}
                saved = now - max(market.price(smaller), limit)
                if saved > 0:
                    steps.append(((market.loss(smaller) - market.loss(sizes)) / saved, -size, name, smaller))
        if not steps:
            return None
        sizes = min(steps, key=lambda step: step[:3])[3]
    try:
        return space.lowered(sizes)
    except UserError:
        return None


def _exchanged(market: Market, limit: float, sizes: Sizes) -> Sizes:
    """Change two axes at a time (or one) as long as that lowers the loss within the limit."""
    while True:
        now = market.loss(sizes)
        better = [one for one in _pairs(market, limit, sizes) if market.loss(one) < now - 1e-12]
        step = next((one for one in sorted(better, key=market.loss) if market.fits(one, limit)), None)
        if step is None:
            return sizes
        sizes = step


def _pairs(market: Market, limit: float, sizes: Sizes) -> Iterator[Sizes]:
    """Yield the shapes with other sizes of two axes whose price is in the limit; the larger choice is bisected."""
    choices, axes = market.space.choices, movable(market.space)
    for pair in itertools.combinations(axes, 2) if len(axes) > 1 else [(axes[0], axes[0])]:
        few, many = sorted(pair, key=lambda name: len(choices[name]))
        for size in choices[few]:
            for other in _affordable(market, limit, {**sizes, few: size}, many):
                yield {**sizes, few: size, many: other}


def _affordable(market: Market, limit: float, sizes: Sizes, axis: str) -> list[int]:
    """Return the sizes of one axis whose price is in the limit, the other axes as they are; ascending."""
    choices = market.space.choices[axis]
    return choices[: bisect.bisect_right(choices, limit, key=lambda size: market.price({**sizes, axis: size}))]


def _filled(market: Market, limit: float, sizes: Sizes) -> Sizes:
    """Take larger sizes while they fit, least price first: what is left of a budget can only help where the loss says nothing."""
    sizes = dict(sizes)
    while True:
        larger = []
        for name in movable(market.space):
            size = next((one for one in market.space.choices[name] if one > sizes[name]), None)
            if size is not None:
                larger.append({**sizes, name: size})
        fits = [one for one in larger if market.fits(one, limit)]
        if not fits:
            return sizes
        sizes = min(fits, key=lambda one: (market.loss(one), market.price(one)))


def trades(market: Market, limit: float, sizes: Sizes, beside: Sequence[Sizes], count: int) -> list[Sizes]:
    """Return up to `count` other shapes within the limit that trade one axis against another, by predicted loss.

    One axis takes its next size, one other the largest with which that fits; then what is left is filled up. Of two that raise
    the same axis the better comes first, and its sibling only after all other axes had one. Shapes of `beside` are left out.
    """
    found: list[tuple[float, str, Sizes]] = []
    axes = movable(market.space)
    for up, down in itertools.permutations(axes, 2):
        larger = next((one for one in market.space.choices[up] if one > sizes[up]), None)
        smaller = [one for one in market.space.choices[down] if one < sizes[down]]
        if larger is None:
            continue
        made = ({**sizes, up: larger, down: size} for size in reversed(smaller))
        fits = next((one for one in made if market.fits(one, limit)), None)
        if fits is not None:
            whole = _filled(market, limit, fits)
            found.append((market.loss(whole), up, whole))
    found.sort(key=lambda one: one[0])
    order = [one for turn in range(len(axes)) for one in _nth_of_each(found, turn)]
    distinct: list[Sizes] = []
    for _, _, shape in order:
        if shape not in (*beside, sizes, *distinct):
            distinct.append(shape)
    return distinct[:count]


def _nth_of_each(found: list[tuple[float, str, Sizes]], turn: int) -> list[tuple[float, str, Sizes]]:
    """Return the entries that are number `turn` among those of their axis, in order."""
    seen: dict[str, int] = {}
    picked = []
    for one in found:
        if seen.setdefault(one[1], 0) == turn:
            picked.append(one)
        seen[one[1]] += 1
    return picked
