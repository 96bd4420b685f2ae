"""Structured Optimal Brain Surgeon: against the loss itself, minimised anew without each unit, and against what is known."""

import itertools

import pytest
import torch

from slimlmm import elimination
from slimlmm.elimination import Reader, order


def reader(seed, units=6, each=1, free=0, outputs=5, samples=40):
    """A reader of correlated inputs whose units own every `units`-th column; `free` columns are nobody's."""
    rng = torch.Generator().manual_seed(seed)
    size = units * each + free
    inputs = torch.randn(samples, size, generator=rng, dtype=torch.float64)
    inputs = inputs @ torch.randn(size, size, generator=rng, dtype=torch.float64) + 0.5
    weight = torch.randn(outputs, size, generator=rng, dtype=torch.float64)
    columns = torch.arange(units * each).view(each, units).T
    return Reader(weight=weight, gram=inputs.T @ inputs / samples, columns=columns)


def least(one, staying):
    """The least E|W x - V x|^2 + ridge over all V that read the staying units alone, by least squares on a root of H."""
    count, power = len(one.gram), one.gram.diagonal()
    inner = one.gram + torch.diag(elimination.RIDGE * power + elimination.FLOOR * power.mean())
    root = torch.linalg.cholesky(inner).T  # |root v|^2 = v H v
    gone = {int(c) for unit, cs in enumerate(one.columns) if unit not in staying for c in cs}
    left = [column for column in range(count) if column not in gone]
    wanted = root @ one.weight.T
    found = torch.linalg.lstsq(root[:, left], wanted).solution
    return float((root[:, left] @ found - wanted).square().sum())


@pytest.mark.parametrize(("each", "free", "readers"), [(1, 0, 1), (1, 3, 2), (3, 2, 1), (2, 0, 2)])
def test_each_unit_that_goes_is_the_one_whose_loss_is_least_once_readers_are_refitted(each, free, readers):
    for seed in range(5):
        every = [reader(seed * 10 + number, each=each, free=free) for number in range(readers)]
        stays = order(every).argsort(descending=True).tolist()
        assert sorted(order(every).tolist()) == list(range(6))
        for count in range(5, 0, -1):
            before = set(stays[: count + 1])
            losses = {gone: sum(least(one, before - {gone}) for one in every) for gone in before}
            assert stays[count] == min(losses, key=losses.__getitem__)


def test_costs_are_how_much_the_least_loss_grows():
    one = reader(3, each=2, free=1)
    staying = torch.tensor([0, 2, 3, 5])
    costs = elimination._Prepared.of(one).at(staying).costs()
    whole = least(one, set(staying.tolist()))
    wanted = [least(one, set(staying.tolist()) - {unit}) - whole for unit in staying.tolist()]
    assert costs.tolist() == pytest.approx(wanted, rel=1e-8)
    after = elimination._Prepared.of(one).at(staying).without(1).costs()
    left = set(staying.tolist()) - {2}
    wanted = [least(one, left - {unit}) - least(one, left) for unit in (0, 3, 5)]
    assert after[[0, 2, 3]].tolist() == pytest.approx(wanted, rel=1e-8)


def test_twins_and_what_is_never_read_go_first_and_one_twin_stays():
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 30, generator=rng, dtype=torch.float64)
    inputs[:, 1] = inputs[:, 0]  # nobody misses one of two
    weight = torch.randn(8, 30, generator=rng, dtype=torch.float64)
    weight[:, 7] = 0
    ranks = order([Reader(weight=weight, gram=inputs.T @ inputs / 200, columns=torch.arange(30)[:, None])])
    assert ranks[7] < 3
    assert min(ranks[0], ranks[1]) < 3 < max(ranks[0], ranks[1])


def test_of_inputs_that_are_always_0_weights_alone_decide():
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    ranks = order(
        [Reader(weight=weight, gram=torch.zeros(3, 3, dtype=torch.float64), columns=torch.arange(3)[:, None])]
    )
    assert ranks.tolist() == [2, 0, 1]


@pytest.mark.parametrize(("units", "each", "readers"), [(200, 1, 1), (100, 2, 2)])
def test_rounds_and_candidates_cost_next_to_nothing(units, each, readers, monkeypatch):
    """One unit at a time among all of them, reckoned anew for each, keeps a half that is hardly better."""
    every = [reader(seed, units=units, each=each, outputs=40, samples=400) for seed in range(readers)]
    found = set(order(every).topk(units // 2).indices.tolist())
    monkeypatch.setattr(elimination, "STAYS", 1.0)
    wanted = set(order(every).topk(units // 2).indices.tolist())
    losses = [sum(least(one, kept) for one in every) for kept in (found, wanted, set(range(units // 2)))]
    assert losses[0] <= 1.03 * losses[1]
    assert losses[0] < 0.9 * losses[2]


def test_it_keeps_nearly_what_the_best_set_keeps():
    """Of all 495 sets of 8 of 12 neurons the one that stays is among the best."""
    for seed in range(5):
        one = reader(seed, units=12, outputs=20, samples=100)
        kept = set(order([one]).topk(8).indices.tolist())
        every = sorted(least(one, set(some)) for some in itertools.combinations(range(12), 8))
        assert least(one, kept) <= every[len(every) // 20]


def test_weights_that_are_no_numbers_give_no_order():
    one = reader(0)
    one.weight[0, 0] = torch.nan
    assert order([one]).isnan().all()


def test_a_reader_that_nothing_enters_does_not_outvote_one_that_something_does():
    live, dead = reader(0), reader(1)
    small = Reader(weight=live.weight, gram=1e-6 * live.gram, columns=live.columns)
    dead = Reader(weight=dead.weight, gram=torch.zeros_like(dead.gram), columns=dead.columns)
    assert torch.equal(order([small, dead]), order([live]))


def test_a_few_massive_inputs_do_not_hide_what_the_others_say():
    """Two of 60 inputs ten thousand times as large: the other neurons go in nearly the order in which they would without them."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 60, generator=rng, dtype=torch.float64) @ torch.randn(
        60, 60, generator=rng, dtype=torch.float64
    )
    inputs *= torch.logspace(-1, 1, 60, dtype=torch.float64)[torch.randperm(60, generator=rng)]
    weight = torch.randn(30, 60, generator=rng, dtype=torch.float64)
    columns = torch.arange(60)[:, None]
    wanted = order([Reader(weight=weight[:, 2:], gram=inputs[:, 2:].T @ inputs[:, 2:] / 400, columns=columns[:58])])
    inputs[:, :2] = 0
    inputs[::200, :2] = 1e4 * inputs[:, 2:].std()
    found = order([Reader(weight=weight, gram=inputs.T @ inputs / 400, columns=columns)])[2:]
    kept = set(found.topk(29).indices.tolist()) & set(wanted.topk(29).indices.tolist())
    assert len(kept) >= 26
