"""The few rows by which cuts are chosen and repaired: pictures that fits see, and others on which choices are judged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm.collate import Batch, Collator
from slimlmm.data import Row, by_picture
from slimlmm.forward import answer_logits, to_device
from slimlmm.half import half
from slimlmm.importance import Loss
from slimlmm.losses import Seen, combine
from slimlmm.teacher import TeacherCache

#: most calibration rows of one picture: what a picture says of the towers it says with its first question
EACH = 2
#: pictures in a batch
PICTURES = 4
#: most rows of a picture in one sequence
ROWS = 16
#: one picture in so many is kept from fits, to judge them
JUDGES = 3
LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Batches that scores and repairs are fitted on, and batches of other pictures on which choices between them are judged."""

    fit: Sequence[Batch]
    judge: Sequence[Batch]

    @property
    def rank(self) -> Sequence[Batch]:
        """Every other batch that judges, for what takes a pass for each unit: they keep nearly the heads that all keep."""
        return self.judge[::2]


def calibration_of(rows: Sequence[Row], collator: Collator, device: torch.device) -> Calibration:
    """Return the rows as batches: every third picture judges; of fewer than three pictures all do both."""
    pictures = by_picture(rows, len(rows) or 1)
    judges = pictures[JUDGES - 1 :: JUDGES]
    fits = [picture for number, picture in enumerate(pictures, 1) if number % JUDGES]

    def batches(pictures: list[list[Row]]) -> list[Batch]:
        groups = by_picture([row for picture in pictures for row in picture], ROWS)
        return [to_device(collator(groups[at : at + PICTURES]), device) for at in range(0, len(groups), PICTURES)]

    fit = batches(fits)
    return Calibration(fit=fit, judge=batches(judges) if judges else fit)


def loss_against(cache: TeacherCache) -> Loss:
    """Return cross-entropy + forward KL against the cached teacher, mean per answer token.

    Without gradients it is there to compare models, many of them, and runs in bfloat16 where that is quick.
    """

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        with nullcontext() if torch.is_grad_enabled() else half(model.device):
            logits_AV, labels_A, _ = answer_logits(model, batch)
        teacher_AV = cache.logits(cache.of(batch).to(model.device))
        return combine(LOSSES, Seen(logits_AV.float(), labels_A, teacher_AV))["total"] / labels_A.numel()

    return loss
