"""Laws of importance per cost: on losses that add up it finds what brute force finds, within budget, floors and given sizes."""

import itertools
import random

import pytest

from slimlmm import budget, plan
from slimlmm.allocation import Market, least_loss, trades
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.resizing import predict_parameters
from slimlmm.sensitivity import Curve, movable, sampled
from tiny import tiny_config

COARSE = Grid(multiples={"width": 8, "ffn": 16})


def space_of(name, axes, **more):
    """A space of a few axes with a few sizes each, so that all shapes can be tried."""
    whole = plan.space_of(tiny_config(name), COARSE, **more)
    few = {
        axis: sorted({sizes[0], sizes[len(sizes) // 3], sizes[-2], sizes[-1]}) for axis, sizes in whole.choices.items()
    }
    choices = {axis: few[axis] if axis in axes else sizes[-1:] for axis, sizes in whole.choices.items()}
    return plan.Space(config=whole.config, axes=whole.axes, choices=choices, least=whole.least)


def drawn(space, seed):
    """Convex curves with steepness drawn at random, one for every axis."""
    rng = random.Random(seed)
    found = {}
    for name in movable(space):
        size, steep = space.axes[name].size, 10 ** rng.uniform(-1, 1)
        found[name] = Curve.through(
            name, {n: steep * ((size / n) ** rng.uniform(0.5, 2) - 1) for n in {*space.choices[name], size}}
        )
    return found


def legal_shapes(space, allowed):
    """Every shape of the space that the config takes, with its cost."""
    found = []
    for pick in itertools.product(*space.choices.values()):
        sizes = dict(zip(space.choices, pick, strict=True))
        try:
            space.check(sizes)
        except UserError:
            continue
        found.append((allowed.cost(space.stated(sizes)), sizes))
    return found


SPACES = {
    "llava-dinov2-llama": ("text.ffn", "vision.width", "text.blocks", "text.width"),
    "qwen2_5_vl": ("text.ffn", "vision.blocks", "vision.ffn", "text.blocks"),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_sizes_are_those_of_brute_force_over_the_whole_grid(name):
    space = space_of(name, SPACES[name])
    allowed = budget.by_parameters(space.config, 1, "--parameters")
    shapes = legal_shapes(space, allowed)
    least, most = min(shapes, key=lambda one: one[0])[0], max(shapes, key=lambda one: one[0])[0]
    for seed in range(4):
        limit = least + (0.15 + 0.18 * seed) * (most - least)
        market = Market(space, allowed.cost, drawn(space, seed))
        sizes = least_loss(market, limit)
        space.check(sizes)
        assert allowed.cost(space.stated(sizes)) <= limit
        assert market.loss(sizes) == pytest.approx(min(market.loss(one) for cost, one in shapes if cost <= limit))


def test_no_budget_is_exceeded_and_the_loss_is_never_above_that_of_the_shares():
    space = space_of("llava-dinov2-llama", ("text.ffn", "vision.width", "text.blocks", "text.width", "vision.ffn"))
    whole = predict_parameters(space.config, {})
    losses = []
    for share in (0.4, 0.65):
        allowed = budget.by_shrink(space.config, 1 / share, whole)
        shares = plan.sizes_within(space, allowed)
        market = Market(space, allowed.cost, drawn(space, 3))
        sizes = least_loss(market, allowed.limit, [shares])
        assert allowed.cost(space.stated(sizes)) <= share * whole
        assert market.loss(sizes) <= market.loss(shares)
        losses.append(market.loss(sizes))
    assert losses == sorted(losses, reverse=True)


def test_floors_and_given_sizes_are_kept_and_an_axis_that_costs_nothing_goes_first():
    more = {"floors": {"text.ffn": 40}, "fixes": {"text.blocks": 2}}
    space = plan.space_of(tiny_config("llava-dinov2-llama"), COARSE, **more)
    allowed = budget.by_shrink(space.config, 1.8, predict_parameters(space.config, {}))
    curves = drawn(space, 1) | {"text.ffn": Curve.through("text.ffn", {68: 0.0, 40: 0.0})}
    assert "text.blocks" not in curves
    market = Market(space, allowed.cost, curves)
    sizes = least_loss(market, allowed.limit)
    assert sizes["text.blocks"] == 2
    assert 40 <= sizes["text.ffn"] < 68
    for other in trades(market, allowed.limit, sizes, [], 6):
        assert other["text.blocks"] == 2
        assert other["text.ffn"] >= 40


def test_trades_are_other_shapes_within_the_budget_none_better_than_the_best():
    space = plan.space_of(tiny_config("smolvlm"), COARSE)
    allowed = budget.by_shrink(space.config, 2, predict_parameters(space.config, {}))
    market = Market(space, allowed.cost, drawn(space, 2))
    best = least_loss(market, allowed.limit)
    found = trades(market, allowed.limit, best, [], 4)
    assert 2 <= len(found) <= 4
    assert best not in found
    assert len({tuple(one.values()) for one in found}) == len(found)
    for one in found:
        assert allowed.cost(space.stated(one)) <= allowed.limit
        assert market.loss(one) >= market.loss(best)
        assert any(one[axis] > best[axis] for axis in one)
        assert any(one[axis] < best[axis] for axis in one)
    assert trades(market, allowed.limit, best, found[:1], 1) == found[1:2]


@pytest.mark.parametrize("seed", range(5))
def test_a_curve_rises_ever_faster_and_is_nowhere_below_what_was_measured(seed):
    rng = random.Random(seed)
    measured = {64: 0.0} | {size: rng.uniform(-0.1, 2) for size in (48, 32, 16, 4)}
    curve = Curve.through("text.ffn", measured)
    losses = [curve.at(size) for size in range(64, 0, -1)]
    assert losses == sorted(losses)
    assert losses[0] == 0
    assert all(curve.at(size) >= loss - 1e-12 for size, loss in measured.items())
    slopes = [(curve.at(2**k) - curve.at(2 ** (k + 1))) for k in range(5, -1, -1)]
    assert all(one <= other + 1e-9 for one, other in itertools.pairwise(slopes))


def test_a_curve_that_is_convex_already_is_left_as_measured():
    curve = Curve.through("text.ffn", {64: 0.0, 32: 1.0, 16: 3.0})
    assert curve.losses == curve.measured == (0.0, 1.0, 3.0)
    assert curve.at(45.254834) == pytest.approx(0.5)
    assert curve.at(8) == pytest.approx(5.0)


def test_sizes_to_try_can_be_said_alone_and_reach_the_least():
    space = plan.space_of(tiny_config("llava-clip-llama"), COARSE)
    for axis in movable(space):
        sizes = sampled(space, axis, 3)
        assert sizes == sorted(set(sizes), reverse=True)
        assert len(sizes) <= 3
        for size in sizes:
            space.check({axis: size})
    assert sampled(space, "text.blocks", 3)[-1] == space.choices["text.blocks"][0]
