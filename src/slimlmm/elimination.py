"""Structured Optimal Brain Surgeon: which units go, if what reads them is refitted to those that stay.

Shape legend: N input columns of a reader, O its outputs, U units, C columns of a unit, L units that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: ridge of the refit on each input, relative to its own power, and to the mean of all, for those that are never anything but 0: a
#: few inputs may be thousands of times as large as the others (massive activations, arXiv 2402.17762), whose ridge is not theirs
RIDGE, FLOOR = 1e-2, 1e-6
#: share of the units that stays in each round of elimination; behind it all is reckoned anew
STAYS = 0.9
#: units that may go in a round: the cheapest ones, so many times as many as go, and no fewer than FEW
CANDIDATES, FEW = 3, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A linear layer that reads the units: its weight [O, N], the Gram matrix of its inputs [N, N], columns of units [U, C]."""

    weight: Tensor
    gram: Tensor
    columns: Tensor


def order(readers: Sequence[Reader]) -> Tensor:
    """Return how long each unit stays, from 0 for the first that goes to U - 1; [U], fp64.

    With S the columns that are left, R = RIDGE diag G + FLOOR mean(diag G) I, H = G + R and W_S = W H[:,S] H_SS^-1 the reader
    refitted to them, dropping unit u and refitting once more adds tr W_u (H_SS^-1)_uu^-1 W_u^T to E|W x - W_S x_S|^2 +
    tr (W - W_S) R (W - W_S)^T, summed over the readers that anything ever enters (the missing columns of W_S are 0). The unit of
    least cost goes, one after the other; among the CANDIDATES of a round alone, so that what each removal does to the costs of
    the others is reckoned for few. No numbers if costs are none.
    Source: Optimal Brain Surgeon (Hassibi and Stork 1993) for groups of columns, as in SlimGPT (arXiv 2412.18110).
    """
    units = len(readers[0].columns)
    staying, gone = torch.arange(units), 0
    ranks = torch.zeros(units, dtype=torch.float64)
    live = [reader for reader in readers if float(reader.gram.diagonal().sum()) > 0]
    prepared = [_Prepared.of(reader) for reader in live or readers]
    while len(staying):
        count = len(staying) - min(len(staying) - 1, int(STAYS * len(staying)))
        now = [one.at(staying) for one in prepared]
        costs = _costs(now)
        if not bool(costs.isfinite().all()):
            return torch.full_like(ranks, torch.nan)
        few = costs.argsort(stable=True)[: max(CANDIDATES * count, FEW)]
        going = few[_cheapest([one.among(few) for one in now], count)]
        ranks[staying[going]] = torch.arange(gone, gone + count, dtype=torch.float64)
        left = torch.ones(len(staying), dtype=torch.bool)
        left[going] = False
        staying, gone = staying[left], gone + count
    return ranks


def _cheapest(now: Sequence[_Left], count: int) -> Tensor:
    """Return `count` units in the order in which they go, each the one of least cost behind those before it."""
    going: list[int] = []
    there = torch.zeros(len(now[0].weights_LCO), dtype=torch.float64)
    for _ in range(count):
        unit = int((_costs(now) + there).argmin())
        going.append(unit)
        there[unit] = torch.inf
        now = [one.without(unit) for one in now]
    return torch.tensor(going)


def _costs(now: Sequence[_Left]) -> Tensor:
    return sum((one.costs() for one in now), start=torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Left:
    """A reader refitted to the units that are left: its weights, and their part of H_SS^-1."""

    weights_LCO: Tensor
    inverse_LCLC: Tensor

    def costs(self) -> Tensor:
        """Return what each unit costs; [L], on the CPU."""
        own_LCC = self.inverse_LCLC.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        found: Tensor = (torch.linalg.solve(own_LCC, self.weights_LCO) * self.weights_LCO).sum((1, 2)).cpu()
        return found

    def among(self, few: Tensor) -> _Left:
        """Return it for some of the units; a copy."""
        few = few.to(self.weights_LCO.device)
        return _Left(self.weights_LCO[few], self.inverse_LCLC[few][:, :, few])

    def without(self, unit: int) -> _Left:
        """Return it refitted once more, to all units but one; that one keeps a place that can be solved with."""
        across_CLC, mine_CO = self.inverse_LCLC[unit], self.weights_LCO[unit]
        back_CLC = torch.linalg.solve(across_CLC[:, unit], across_CLC.flatten(1)).unflatten(1, across_CLC.shape[1:])
        weights_LCO = self.weights_LCO - torch.einsum("dlc,do->lco", back_CLC, mine_CO)
        inverse_LCLC = self.inverse_LCLC - torch.einsum("dlc,dmk->lcmk", across_CLC, back_CLC)
        inverse_LCLC[unit, :, unit] = torch.eye(len(mine_CO)).to(mine_CO)
        return _Left(weights_LCO, inverse_LCLC)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What of one reader is the same for every set of columns: H, W H, and where units and other columns stand."""

    inner: Tensor
    target: Tensor
    columns: Tensor
    others: Tensor

    @classmethod
    def of(cls, reader: Reader) -> _Prepared:
        """Return it in fp64; where nothing ever enters weights alone count."""
        gram, weight = reader.gram.double(), reader.weight.detach().double()
        power = gram.diagonal()
        floor = FLOOR * power.mean() if float(power.sum()) > 0 else 1.0
        inner = gram + torch.diag(RIDGE * power + floor)
        free = torch.ones(len(gram), dtype=torch.bool)
        free[reader.columns.flatten()] = False
        return cls(inner, weight @ inner, reader.columns, free.nonzero().flatten())

    def at(self, staying: Tensor) -> _Left:
        """Return the reader refitted to the staying units and the columns that are nobody's."""
        count, each = len(staying), self.columns.shape[1]
        left = torch.cat((self.columns[staying].flatten(), self.others)).to(self.inner.device)
        factor = torch.linalg.cholesky(self.inner[left][:, left])
        own = count * each
        weights_NO = torch.cholesky_solve(self.target[:, left].T, factor)[:own]
        inverse_NN = torch.cholesky_inverse(factor)[:own, :own]
        return _Left(weights_NO.unflatten(0, (count, each)), inverse_NN.view(count, each, count, each))
