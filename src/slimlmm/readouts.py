"""Throw-away maps from the student's states to the teacher's, fitted by least squares.

Shape legend: N tokens, S and H hidden size of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimlmm.errors import UserError

#: ridge, in parts of the mean power of a student's channel
RIDGE = 1e-2


class Readout(nn.Linear):
    """A map from student to teacher states, W [H, S] and b [H], and how far the teacher's spread, the mean of |t - mean(t)|^2."""

    spread: Tensor

    def __init__(self, weight_HS: Tensor, bias_H: Tensor, spread: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight_HS.shape[1], weight_HS.shape[0], device=weight_HS.device, dtype=dtype)
        with torch.no_grad():
            self.weight.copy_(weight_HS)
            self.bias.copy_(bias_H)
        self.register_buffer("spread", spread.to(dtype))


class SameBasis(nn.Identity):
    """What stands for a map where student and teacher states have one basis, and how far the teacher's spread."""

    spread: Tensor

    def __init__(self, spread: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("spread", spread.to(dtype))


class Fit:
    """Sums over tokens that a map is made of, in fp64; batch by batch, so that no states are held."""

    def __init__(self, *, same: bool, ridge: float = RIDGE) -> None:
        self.same, self.ridge = same, ridge
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, student_NS: Tensor, teacher_NH: Tensor) -> None:
        """Count the tokens of a batch."""
        teacher = teacher_NH.double()
        sums = {"sum_H": teacher.sum(0), "power": teacher.square().sum()}
        if not self.same:
            student = student_NS.double()
            sums |= {"sum_S": student.sum(0), "gram_SS": student.T @ student, "cross_SH": student.T @ teacher}
        self.sums = {name: self.sums[name] + value if self.sums else value for name, value in sums.items()}
        self.count += len(teacher)

    @torch.no_grad()
    def map(self, dtype: torch.dtype = torch.float32) -> Readout | SameBasis:
        """Return the map of least squares, W = ((F'F + r I)^-1 F'T)', both centred; none where there is one basis.

        Raises:
            UserError: the teacher's states are all the same, so that there is nothing to match.
        """
        shift_H, power = self.sums["sum_H"] / self.count, self.sums["power"] / self.count
        spread = power - shift_H.square().sum()
        if not spread > 1e-12 * power:
            raise UserError(
                f"the teacher's states at {self.count} token(s) of the pictures that maps are fitted on are all the same, so "
                "there is nothing to match; leave matches of states out, or give more rows."
            )
        if self.same:
            return SameBasis(spread, dtype)
        shift_S = self.sums["sum_S"] / self.count
        gram = self.sums["gram_SS"] - self.count * torch.outer(shift_S, shift_S)
        gram += self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram, self.sums["cross_SH"] - self.count * torch.outer(shift_S, shift_H)).T
        return Readout(weight, shift_H - weight @ shift_S, spread, dtype)


def fitted_readout(student_NS: Tensor, teacher_NH: Tensor, ridge: float = RIDGE) -> Readout:
    """Return the map of least squares from these states to those, in their format.

    Raises:
        UserError: as `Fit.map`.
    """
    fit = Fit(same=False, ridge=ridge)
    fit.add(student_NS, teacher_NH)
    found = fit.map(student_NS.dtype)
    assert isinstance(found, Readout)
    return found
