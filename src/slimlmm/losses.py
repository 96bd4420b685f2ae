"""Distillation losses as pure functions: sums over answer tokens, divided by the caller by the global token count.

Shape legend: A answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from slimlmm.errors import UserError, nearest


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


#: name -> loss(student logits [A, V], teacher logits [A, V] or None, labels [A]) -> sum over A
LOSSES: dict[str, Callable[[Tensor, Tensor | None, Tensor], Tensor]] = {
    "cross_entropy": lambda student, _, labels: cross_entropy(student, labels),
    "forward_kl": lambda student, teacher, _: forward_kl(student, _needed(teacher)),
    "pairwise_margin": lambda student, _, labels: pairwise_margin(student, labels),
}
NEEDS_TEACHER = frozenset({"forward_kl"})


def _needed(teacher: Tensor | None) -> Tensor:
    if teacher is None:
        raise UserError("the loss forward_kl needs a teacher; without one use cross_entropy and pairwise_margin.")
    return teacher


def combine(
    weights: Mapping[str, float], student_AV: Tensor, teacher_AV: Tensor | None, labels_A: Tensor
) -> dict[str, Tensor]:
    """Return each weighted loss by name, and their ``total``; all sums over answer tokens."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"unknown loss {name!r}. {nearest(name, list(LOSSES))}")
        parts[name] = weight * LOSSES[name](student_AV, teacher_AV, labels_A)
    parts["total"] = sum(parts.values(), start=student_AV.new_zeros(()))
    return parts
