"""Distillation losses as pure functions: sums over answer tokens, divided by the caller by the global token count.

Shape legend: A answer tokens, V vocabulary, N tokens whose states are matched (answer or picture tokens), S and H hidden size of
student and teacher. p_s = softmax(student logits), p_t = softmax(teacher logits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from slimlmm.errors import UserError, nearest
from slimlmm.readouts import Readout, SameBasis

T = TypeVar("T")


def cross_entropy(student_AV: Tensor, labels_A: Tensor) -> Tensor:
    """Return sum over A of -log softmax(student)[label]; nats."""
    return functional.cross_entropy(student_AV, labels_A, reduction="sum")


def forward_kl(student_AV: Tensor, teacher_AV: Tensor) -> Tensor:
    """Return sum over A of KL(teacher || student) = sum_v p_t (log p_t - log p_s); nats, 0 for equal logits."""
    student = functional.log_softmax(student_AV, -1)
    teacher = functional.log_softmax(teacher_AV, -1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def reverse_kl(student_AV: Tensor, teacher_AV: Tensor) -> Tensor:
    """Return the divergence that forgives a student what it leaves out, not what it makes up.

    Sum over A of KL(student || teacher) = sum_v p_s (log p_s - log p_t); nats, 0 for equal logits. Source: MiniLLM,
    arXiv 2306.08543 (there on the student's own answers).
    """
    return forward_kl(teacher_AV, student_AV)


def jensen_shannon(student_AV: Tensor, teacher_AV: Tensor, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, which lies between both directions of KL and is bounded.

    Sum over A of beta KL(p_t || m) + (1 - beta) KL(p_s || m) with m = beta p_t + (1 - beta) p_s; nats, 0 for equal logits, at
    most log 2 a token for beta = 0.5. Source: GKD, arXiv 2306.13649.
    """
    student, teacher = functional.log_softmax(student_AV, -1), functional.log_softmax(teacher_AV, -1)
    return beta * _kl_to_mixture(teacher, student, beta) + (1 - beta) * _kl_to_mixture(student, teacher, 1 - beta)


def skew_kl(student_AV: Tensor, teacher_AV: Tensor, alpha: float = 0.1) -> Tensor:
    """Return the forward KL to a student into which a little of the teacher is mixed, so that no token costs without bound.

    Sum over A of KL(p_t || alpha p_t + (1 - alpha) p_s); nats, 0 for equal logits, at most -log alpha a token. Source:
    DistiLLM, arXiv 2402.03898.
    """
    student, teacher = functional.log_softmax(student_AV, -1), functional.log_softmax(teacher_AV, -1)
    return _kl_to_mixture(teacher, student, alpha)


def _kl_to_mixture(log_p_AV: Tensor, log_q_AV: Tensor, share: float) -> Tensor:
    """Return sum over A of KL(p || share p + (1 - share) q) = -sum_v p log(share + (1 - share) q / p), from log-probabilities.

    The ratio stays a difference of logarithms: neither a tiny p nor a tiny q is ever divided by, or rounded to 0 and logged.
    """
    log_ratio_AV = torch.logaddexp(log_p_AV.new_tensor(math.log(share)), math.log1p(-share) + log_q_AV - log_p_AV)
    return -(log_p_AV.exp() * log_ratio_AV).sum()


def top_k_kl(student_AV: Tensor, teacher_AV: Tensor, k: int = 20) -> Tensor:
    """Return the forward KL over the teacher's k most probable tokens and one bucket for all others.

    Sum over A of KL(b(p_t) || b(p_s)), b(p) [k + 1] = (p at the teacher's top k, 1 - sum of these); nats, 0 for equal logits, at
    most `forward_kl` (data-processing inequality) and equal to it from k = V - 1. Without the bucket the loss is no divergence:
    it is biased towards the teacher's likeliest tokens (arXiv 2503.16870).
    """
    if k >= teacher_AV.shape[-1]:
        return forward_kl(student_AV, teacher_AV)
    top_Ak = teacher_AV.topk(k, dim=-1).indices
    return forward_kl(_bucketed(student_AV, top_Ak), _bucketed(teacher_AV, top_Ak))


def _bucketed(logits_AV: Tensor, top_Ak: Tensor) -> Tensor:
    """Return logits [A, k + 1] of the tokens at `top_Ak` and of all others as one, whose logit is their log-sum-exp."""
    rest_A1 = logits_AV.scatter(-1, top_Ak, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logits_AV.gather(-1, top_Ak), rest_A1), -1)


def pairwise_margin(student_AV: Tensor, labels_A: Tensor) -> Tensor:
    """Return the paper's pairwise margin, which pushes the label's logit above the runner-up.

    m = mean(top-2 student logits) - label logit; L = sum over A of max(m * min(|m|, 1), 0): quadratic for small margins,
    linear beyond 1, and 0 once the label leads. Source: arXiv 2312.05795 and its code (alipay/PainlessInferenceAcceleration).
    """
    top = student_AV.topk(2, dim=-1).values.mean(-1)
    margin = top - student_AV.gather(-1, labels_A[:, None]).squeeze(-1)
    return (margin * margin.abs().clamp(max=1)).clamp(min=0).sum()


def state_match(student_NS: Tensor, teacher_NH: Tensor, readout: Readout | SameBasis) -> Tensor:
    """Return the squared error a token of the teacher's states read linearly from the student's, in parts of their spread.

    mean |W f + b - t|^2 / spread, with student states f [N, S] and teacher states t [N, H]: 0 when the student's states tell all
    that the teacher's say, 1 when they tell nothing. The spread is that of the states that the map was fitted on: that of a
    batch would make the loss another one for each batch, and none for a single token. Hidden-state matching is what recovered
    vision-language models best in arXiv 2604.24380.
    """
    error_N: Tensor = (readout(student_NS) - teacher_NH.to(student_NS.dtype)).square().sum(1)
    return error_N.mean() / readout.spread


@dataclass(frozen=True, slots=True)
class Match:
    """States of the same tokens in student [N, S] and teacher [N, H], and the throw-away map that is trained between them."""

    student_NS: Tensor
    teacher_NH: Tensor
    readout: Readout | SameBasis
    count: float | None = None
    """answer tokens that the mean over these tokens counts for; None for those of the batch"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one batch shows to the losses; None or absent where nobody asked for it."""

    student_AV: Tensor
    labels_A: Tensor
    teacher_AV: Tensor | None = None
    matches: Mapping[str, Match] = field(default_factory=dict)
    """states by the name of the loss that matches them"""
    temperature: float = 1.0
    """of the divergences"""
    taught_A: Tensor | None = None
    """which answer tokens the teacher was asked about; None for all"""
    second_AV: Tensor | None = None
    """logits of a second teacher, at the same tokens as the first's"""
    second_share: float = 0.0
    """of the second teacher in the divergences, 0 to 1; the first has the rest"""
    given_A: Tensor | None = None
    """which answer tokens are those of given answers, not the student's own; None for all"""
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """further arguments of divergences by name, such as the k of top_k_kl"""


def _needed(value: T | None, loss: str) -> T:
    if value is None:
        raise UserError(f"the loss {loss} needs a teacher; without one use cross_entropy and pairwise_margin.")
    return value


#: divergence of the student's distribution from the teacher's, by name
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "top_k_kl": top_k_kl,
}


def _divergence(name: str, seen: Seen) -> Tensor:
    """Return T^2 D(student / T, teacher / T): the factor keeps gradients of one size at all temperatures (arXiv 1503.02531).

    With a second teacher it is the mean over both, (1 - s) D(student, first) + s D(student, second), s its share: a mean of
    divergences, not the divergence from a mean of distributions.
    """
    teacher_AV, by = _needed(seen.teacher_AV, name), seen.temperature
    student_AV = seen.student_AV if seen.taught_A is None else seen.student_AV[seen.taught_A]
    divergence = partial(DIVERGENCES[name], **seen.shapes.get(name, {}))
    found: Tensor = by * by * divergence(student_AV / by, teacher_AV / by)
    if seen.second_AV is None:
        return found
    second: Tensor = by * by * divergence(student_AV / by, seen.second_AV / by)
    return (1 - seen.second_share) * found + seen.second_share * second


def _labelled(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return logits and labels of given answers: a student that learns its own as labels only gets surer of itself."""
    if seen.given_A is None:
        return seen.student_AV, seen.labels_A
    return seen.student_AV[seen.given_A], seen.labels_A[seen.given_A]


def _matched(name: str, seen: Seen) -> Tensor:
    """Return a match of states, whose mean counts once per answer token, so that its weight compares with the others'."""
    return _counted(_needed(seen.matches.get(name), name), seen)


def _blocks_matched(seen: Seen) -> Tensor:
    """Return the mean over the matches behind blocks."""
    found = [_counted(match, seen) for name, match in seen.matches.items() if name.startswith(f"{BLOCKS} ")]
    return torch.stack(_needed(found or None, BLOCKS)).mean()


def _counted(match: Match, seen: Seen) -> Tensor:
    if not len(match.teacher_NH):  # a batch without any picture that the teacher was asked about
        nothing: Tensor = match.readout(match.student_NS).sum()
        return nothing
    count = match.count
    if count is None:
        count = seen.labels_A.numel() if seen.taught_A is None else int(seen.taught_A.sum())
    return count * state_match(match.student_NS, match.teacher_NH, match.readout)


#: match of states behind every block; each has a map of its own, named by this and the student's block
BLOCKS = "block_states"
#: match of states -> the batch entry with the teacher's: at answer tokens its last ones, at picture tokens those that enter its
#: language model
MATCHES = {"answer_states": "teacher_hidden", "picture_states": "teacher_pictures"}
#: loss -> the batch entry of the teacher that it is computed from; the teacher's logits are its head's on its hidden states
TEACHER_ENTRIES: dict[str, str] = dict.fromkeys(DIVERGENCES, "teacher_hidden") | MATCHES
#: name -> loss as a sum over answer tokens
LOSSES: dict[str, Callable[[Seen], Tensor]] = {
    "cross_entropy": lambda seen: cross_entropy(*_labelled(seen)),
    "pairwise_margin": lambda seen: pairwise_margin(*_labelled(seen)),
    **{name: partial(_divergence, name) for name in DIVERGENCES},
    **{name: partial(_matched, name) for name in MATCHES},
    BLOCKS: _blocks_matched,
}
NEEDS_TEACHER = frozenset((*TEACHER_ENTRIES, BLOCKS))


def combine(weights: Mapping[str, float], seen: Seen) -> dict[str, Tensor]:
    """Return each weighted loss by name, and their ``total``; all sums over answer tokens."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"unknown loss {name!r}. {nearest(name, list(LOSSES))}")
        parts[name] = weight * LOSSES[name](seen)
    parts["total"] = sum(parts.values(), start=seen.student_AV.new_zeros(()))
    return parts
