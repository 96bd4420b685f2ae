"""Low-rank maps with shared factors against Eckart-Young, against normal equations, and against derivatives."""

import itertools

import pytest
import torch

from slimlmm import lowrank
from slimlmm.lowrank import Factors, fitted

SHAPES = ([0], [0, 1, 2], [0, 0, 1, 1], [0, 0, 0])


def case(of, *, features=10, dim=3, outputs=7):
    """Random factors, and the moments of 200 samples of features and of what is lost."""
    torch.manual_seed(len(of) + max(of))
    terms = len(of)
    values = torch.randn(max(of) + 1, dim, features, dtype=torch.float64)
    before = Factors(values, torch.randn(terms, outputs, dim, dtype=torch.float64), torch.tensor(of))
    seen = torch.randn(200, terms * features, dtype=torch.float64) @ torch.randn(
        terms * features, terms * features, dtype=torch.float64
    )
    lost = seen @ torch.randn(terms * features, outputs, dtype=torch.float64) + 3 * torch.randn(
        200, outputs, dtype=torch.float64
    )
    both = torch.cat((seen, lost), 1)
    return before, both.T @ both / 200


def objective(before, whole, gram, ridge):
    """E|y - (M - M0) p|^2 + r d |M - M0|^2."""
    count = before.whole().shape[1]
    change, inner = whole - before.whole(), gram[:count, :count]
    error = gram[count:, count:].trace() - 2 * (change * gram[count:, :count]).sum() + (change @ inner * change).sum()
    return error + ridge * inner.diagonal().mean() * change.square().sum()


def solution(before, gram, ridge):
    count = before.whole().shape[1]
    inner = gram[:count, :count]
    inner = inner + ridge * inner.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    return before.whole() + torch.linalg.solve(inner, gram[:count, count:]).T, inner


@pytest.mark.parametrize("ridge", [1e-6, 1e-1])
def test_without_a_bound_on_the_rank_it_is_the_ridge_solution(ridge):
    before, gram = case([0, 1, 2], features=4, dim=4)
    wanted, _ = solution(before, gram, ridge)
    assert torch.allclose(fitted(before, gram, ridge, sweeps=3).whole(), wanted, rtol=1e-6, atol=1e-6)


def test_one_term_is_cut_off_as_eckart_and_young_say():
    before, gram = case([0])
    wanted, inner = solution(before, gram, 1e-2)
    lower = torch.linalg.cholesky(inner)
    left, size, right = torch.linalg.svd(wanted @ lower, full_matrices=False)
    best = left[:, :3] * size[:3] @ right[:3] @ torch.linalg.inv(lower)
    for sweeps in (0, 2):
        assert torch.allclose(fitted(before, gram, 1e-2, sweeps=sweeps).whole(), best, atol=1e-6)


@pytest.mark.parametrize("of", SHAPES)
def test_every_sweep_lowers_the_error_which_is_below_that_of_the_old_values(of):
    before, gram = case(of)
    errors = [float(objective(before, fitted(before, gram, 1e-2, sweeps=n).whole(), gram, 1e-2)) for n in (0, 1, 2, 8)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    count = before.whole().shape[1]
    inner = solution(before, gram, 1e-2)[1]
    refitted = lowrank._reads(before, inner, before.whole() @ inner + gram[count:, :count])
    assert errors[-1] < float(objective(before, refitted.whole(), gram, 1e-2)) <= float(gram[count:, count:].trace())


@pytest.mark.parametrize("of", SHAPES)
def test_each_step_is_where_the_derivative_vanishes(of, monkeypatch):
    """Of the objective, by autograd: in the reads after their step, in one group's values after its own."""
    monkeypatch.setattr(lowrank, "STEPS", 100)
    monkeypatch.setattr(lowrank, "ENOUGH", 1e-9)
    before, gram = case(of)
    count = before.whole().shape[1]
    inner = solution(before, gram, 1e-2)[1]
    target = before.whole() @ inner + gram[count:, :count]
    for found, name in (
        (lowrank._reads(before, inner, target), "reads"),
        (lowrank._values(before, inner, target, max(of)), "values"),
    ):
        free = getattr(found, name).clone().requires_grad_()
        other = {"values": found.values, "reads": found.reads} | {name: free}
        objective(before, Factors(**other, of=found.of).whole(), gram, 1e-2).backward()
        start = getattr(before, name).clone().requires_grad_()
        objective(before, Factors(**{**other, name: start}, of=found.of).whole(), gram, 1e-2).backward()
        at, had = (free.grad, start.grad) if name == "reads" else (free.grad[max(of)], start.grad[max(of)])
        assert float(at.norm()) < 1e-5 * float(had.norm()), name


@pytest.mark.parametrize("of", SHAPES)
def test_balancing_keeps_the_map_and_brings_values_next_to_the_old_ones(of):
    before, gram = case(of)
    found = fitted(before, gram, 1e-2, sweeps=3)
    even = found.like(before)
    assert torch.allclose(even.whole(), found.whole(), atol=1e-9)
    for group in set(of):
        mine = before.of == group
        old, new = (one.reads[mine].norm() / one.values[group].norm() for one in (before, even))
        assert float(new) == pytest.approx(float(old))
        crossed = before.values[group] @ even.values[group].T  # no rotation brings them nearer: symmetric, positive
        assert torch.allclose(crossed, crossed.T, atol=1e-8 * float(crossed.norm()))
        assert float(torch.linalg.eigvalsh(crossed).min()) > -1e-8 * float(crossed.norm())
