"""Sums of low-rank maps that share factors, fitted to a map of full rank: the least squares behind merged heads (`merging`).

Shape legend: G shared factors (values), K terms (query heads), D rank, X features of one term, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
#: most steps of conjugate gradients for the values of one group, and the residual that ends them
STEPS, ENOUGH = 10, 1e-3
#: jitter on inner Gram matrices, relative to the mean of their diagonal
JITTER = 1e-10


@dataclass(frozen=True, slots=True)
class Factors:
    """A map M [O, K * X] of K terms side by side, M_k = reads_k [O, D] values_of(k) [D, X]."""

    values: Tensor
    """[G, D, X]"""
    reads: Tensor
    """[K, O, D]"""
    of: Tensor
    """which value factor each term uses; [K]"""

    def whole(self) -> Tensor:
        """Return M; [O, K * X]."""
        whole: Tensor = torch.einsum("kod,kdx->okx", self.reads, self.values[self.of]).flatten(1)
        return whole

    def like(self, other: Factors) -> Factors:
        """Return the same map with factors balanced as those of `other` and values turned towards its values.

        M_g = U S W^T (terms of a group below each other) becomes reads U S^1/2 c Q^T and values Q S^1/2 W^T / c: c keeps the
        ratio of the factors' norms, and the rotation Q brings the values next to the old ones, so that a training goes on from
        numbers of the size that it knows.
        """
        values, reads = self.values.clone(), self.reads.clone()
        for group in self.of.unique().tolist():
            mine = self.of == group
            stacked = self.reads[mine].flatten(0, 1)
            left, upper = torch.linalg.qr(stacked)
            right, lower = torch.linalg.qr(self.values[group].T)
            turned, size, back = torch.linalg.svd(upper @ lower.T)
            root = size.clamp(min=0).sqrt()
            new_values = root[:, None] * (back @ right.T)
            new_reads = left @ turned * root
            old_values, old_reads = other.values[group], other.reads[mine]
            c = (old_reads.norm() / old_values.norm()).sqrt() if old_values.any() and old_reads.any() else 1.0
            u, _, v = torch.linalg.svd(old_values @ new_values.T)
            values[group] = u @ v @ new_values / c
            reads[mine] = (new_reads @ (u @ v).T * c).unflatten(0, (int(mine.sum()), -1))
        return Factors(values, reads, self.of)


def fitted(before: Factors, gram: Tensor, ridge: float, *, sweeps: int) -> Factors:
    """Return the factors that make up for what is lost as well as terms of this rank can.

    With p [K * X] the features, y [O] what is lost, G = E[p p^T] and L = E[y p^T] (both in `gram`, features first), minimises
    E|y - (M - M0) p|^2 + r d |M - M0|^2 over the factors of M, d = mean diag G. As the square can be completed this is the
    distance |(M - M*) (G + r d I)^1/2| from the ridge solution M* = M0 + L (G + r d I)^-1. Values start as the first D weighted
    right singular vectors of M*, then reads and values are solved for in turn: reads at once, values group by group.
    """
    features = before.whole().shape[1]
    inner = gram[:features, :features]
    scale = inner.diagonal().mean().clamp(min=1e-300)
    inner = inner + ridge * scale * torch.eye(features, dtype=gram.dtype, device=gram.device)
    start = before.whole()
    target = start @ inner + gram[features:, :features]  # M* (G + r d I)
    wanted = torch.cholesky_solve(target.T, torch.linalg.cholesky(inner)).T
    found = _reads(replace(before, values=_principal(before, wanted, inner)), inner, target)
    for _ in range(sweeps):
        for group in before.of.unique().tolist():
            found = _values(found, inner, target, group)
        found = _reads(found, inner, target)
    return found


def _blocks(gram: Tensor, terms: int) -> Tensor:
    """View a Gram matrix of all features as [K, X, K, X]."""
    return gram.view(terms, len(gram) // terms, terms, len(gram) // terms)


def _principal(before: Factors, wanted: Tensor, inner: Tensor) -> Tensor:
    """Return values that span the first D right singular vectors of each group's M*, weighted by its terms' mean Gram matrix."""
    terms, dim = len(before.of), before.values.shape[1]
    blocks, maps = _blocks(inner, terms), wanted.unflatten(1, (terms, -1))
    values = before.values.clone()
    for group in before.of.unique().tolist():
        mine = (before.of == group).nonzero().flatten().tolist()
        lower = torch.linalg.cholesky(torch.stack([blocks[k, :, k] for k in mine]).mean(0))
        stacked = maps[:, mine].flatten(0, 1) @ lower
        _, vectors = torch.linalg.eigh(stacked.T @ stacked)
        top = vectors[:, -dim:].T
        values[group, : len(top)] = torch.linalg.solve_triangular(lower, top, upper=False, left=False)
    return values


def _reads(found: Factors, inner: Tensor, target: Tensor) -> Factors:
    """Return the factors with the best reads for their values."""
    terms, values = len(found.of), found.values[found.of]
    blocks = _blocks(inner, terms)
    seen = torch.stack(
        [torch.einsum("dx,xly,ley->dle", one, block, values) for one, block in zip(values, blocks, strict=True)]
    )
    seen = seen.flatten(2).flatten(0, 1)
    seen += JITTER * seen.diagonal().mean() * torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
    right = torch.einsum("kdx,okx->kdo", values, target.unflatten(1, (terms, -1)))
    reads = torch.cholesky_solve(right.flatten(0, 1), torch.linalg.cholesky(seen)).T
    return replace(found, reads=reads.unflatten(1, (len(found.of), -1)).movedim(1, 0).contiguous())


def _values(found: Factors, inner: Tensor, target: Tensor, group: int) -> Factors:
    """Return the factors with the best values of one group for all else, by conjugate gradients on the normal equations.

    sum over terms k, l of reads_k^T reads_l V G_lk = sum over k of reads_k^T (target - the other groups' part)_k; exact in one
    step for a group of one term, which the preconditioner solves.
    """
    terms = len(found.of)
    mine = (found.of == group).nonzero().flatten()
    blocks = _blocks(inner, terms)[:, :, mine]  # [k, x, l, x]
    rest = target.unflatten(1, (terms, -1))[:, mine]
    for term in (found.of != group).nonzero().flatten().tolist():
        seen = found.values[found.of[term]] @ blocks[term].flatten(1)
        rest = rest - (found.reads[term] @ seen).unflatten(1, (len(mine), -1))
    reads, own = found.reads[mine], blocks[mine]
    right = torch.einsum("kod,okx->dx", reads, rest)
    crossed = torch.einsum("kod,loe->kdle", reads, reads)
    count, dim = len(mine), reads.shape[-1]

    def normal(values: Tensor) -> Tensor:
        spread = torch.einsum("kdle,ex->kdlx", crossed, values)
        return torch.einsum("kdlx,lxky->dy", spread, own)

    eye = torch.eye(dim, dtype=inner.dtype, device=inner.device)
    pulled = sum((crossed[k, :, k] for k in range(count)), start=torch.zeros_like(eye))
    pulled = torch.linalg.cholesky(pulled + JITTER * pulled.diagonal().mean().clamp(min=1e-300) * eye)
    mean = torch.linalg.cholesky(
        sum((own[k, :, k] for k in range(count)), start=torch.zeros_like(own[0, :, 0])) / count
    )

    def eased(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, pulled).T, mean).T

    values = found.values.clone()
    values[group] = _conjugate(normal, eased, right, values[group])
    return replace(found, values=values)


def _conjugate(normal: Map, eased: Map, right: Tensor, start: Tensor) -> Tensor:
    """Solve normal(x) = right by preconditioned conjugate gradients from `start`."""
    found, residual = start.clone(), right - normal(start)
    ready = eased(residual)
    way, power = ready, (residual * ready).sum()
    first = (right * eased(right)).sum()
    for _ in range(STEPS):
        if not float(power) > ENOUGH**2 * float(first):
            break
        pushed = normal(way)
        step = power / (way * pushed).sum()
        found = found + step * way
        residual = residual - step * pushed
        ready = eased(residual)
        before, power = power, (residual * ready).sum()
        way = ready + power / before * way
    return found
