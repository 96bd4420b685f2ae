"""Distillation losses as pure functions: sums over answer tokens, divided by the caller by the global token count.

Shape legend: A answer tokens, V vocabulary, N picture tokens, S and H hidden size of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimlmm.errors import UserError, nearest

T = TypeVar("T")


def cross_entropy(student_AV: Tensor, labels_A: Tensor) -> Tensor:
    """Return sum over A of -log softmax(student)[label]; nats."""
    return functional.cross_entropy(student_AV, labels_A, reduction="sum")


def forward_kl(student_AV: Tensor, teacher_AV: Tensor) -> Tensor:
    """Return sum over A of KL(teacher || student) = sum_v p_t (log p_t - log p_s), temperature 1; nats, 0 for equal logits."""
    student = functional.log_softmax(student_AV, -1)
    teacher = functional.log_softmax(teacher_AV, -1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def pairwise_margin(student_AV: Tensor, labels_A: Tensor) -> Tensor:
    """Return the paper's pairwise margin, which pushes the label's logit above the runner-up.

    m = mean(top-2 student logits) - label logit; L = sum over A of max(m * min(|m|, 1), 0): quadratic for small margins,
    linear beyond 1, and 0 once the label leads. Source: arXiv 2312.05795 and its code (alipay/PainlessInferenceAcceleration).
    """
    top = student_AV.topk(2, dim=-1).values.mean(-1)
    margin = top - student_AV.gather(-1, labels_A[:, None]).squeeze(-1)
    return (margin * margin.abs().clamp(max=1)).clamp(min=0).sum()


def state_match(student_NS: Tensor, teacher_NH: Tensor, readout: nn.Linear) -> Tensor:
    """Return the normalised squared error of the teacher's states read linearly from the student's.

    sum |W f + b - t|^2 / sum |t - mean(t)|^2, with student states f [N, S], teacher states t [N, H] and a throw-away map
    W [H, S], b [H]: 0 when the student's states tell all that the teacher's say, 1 when they tell nothing. Hidden-state
    matching is what recovered vision-language models best in arXiv 2604.24380.
    """
    teacher_NH = teacher_NH.to(student_NS.dtype)
    error: Tensor = (readout(student_NS) - teacher_NH).square().sum()
    return error / (teacher_NH - teacher_NH.mean(0)).square().sum()


@torch.no_grad()
def fitted_readout(student_NS: Tensor, teacher_NH: Tensor, ridge: float = 1e-2) -> nn.Linear:
    """Return the map of least squares from student to teacher states, W = ((F'F + r I)^-1 F'T)', both centred; fp64 inside."""
    student, teacher = student_NS.double(), teacher_NH.double()
    shift_S, shift_H = student.mean(0), teacher.mean(0)
    centred = student - shift_S
    gram = centred.T @ centred
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (teacher - shift_H)).T
    readout = nn.Linear(len(shift_S), len(shift_H), device=student_NS.device)
    readout.weight.copy_(weight)
    readout.bias.copy_(shift_H - weight @ shift_S)
    return readout


@dataclass(frozen=True, slots=True)
class Seen:
    """What one batch shows to the losses; None where nobody asked for it."""

    student_AV: Tensor
    labels_A: Tensor
    teacher_AV: Tensor | None = None
    student_NS: Tensor | None = None
    """states that enter the student's language model at picture tokens"""
    teacher_NH: Tensor | None = None
    readout: nn.Linear | None = None
    """throw-away map from S to H, trained beside the student"""


def _needed(value: T | None, loss: str) -> T:
    if value is None:
        raise UserError(f"the loss {loss} needs a teacher; without one use cross_entropy and pairwise_margin.")
    return value


def _picture_states(seen: Seen) -> Tensor:
    student, teacher, readout = (
        _needed(seen.student_NS, "picture_states"),
        _needed(seen.teacher_NH, "picture_states"),
        _needed(seen.readout, "picture_states"),
    )
    return seen.labels_A.numel() * state_match(student, teacher, readout)


#: name -> loss as a sum over answer tokens; picture_states counts its mean once per answer token, so that weights compare
LOSSES: dict[str, Callable[[Seen], Tensor]] = {
    "cross_entropy": lambda seen: cross_entropy(seen.student_AV, seen.labels_A),
    "forward_kl": lambda seen: forward_kl(seen.student_AV, _needed(seen.teacher_AV, "forward_kl")),
    "pairwise_margin": lambda seen: pairwise_margin(seen.student_AV, seen.labels_A),
    "picture_states": _picture_states,
}
NEEDS_TEACHER = frozenset({"forward_kl", "picture_states"})


def combine(weights: Mapping[str, float], seen: Seen) -> dict[str, Tensor]:
    """Return each weighted loss by name, and their ``total``; all sums over answer tokens."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"unknown loss {name!r}. {nearest(name, list(LOSSES))}")
        parts[name] = weight * LOSSES[name](seen)
    parts["total"] = sum(parts.values(), start=seen.student_AV.new_zeros(()))
    return parts
