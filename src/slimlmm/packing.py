"""Whether several questions can stand behind one picture prefix in this model: tried, never taken on trust."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slimlmm.collate import Collator, Prompter
from slimlmm.data import Row, by_picture, by_system
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, to_device
from slimlmm.trainings import Training

#: groups of longest texts whose tokens are counted: other scripts have other tokens a character
LONG = 64


@torch.inference_mode()
def can_pack(model: PreTrainedModel, processor: Any, rows: Sequence[Row]) -> bool:
    """Whether packed questions give this model the same logits as separate rows.

    Tried on two pictures with several rows, and on that with the longest one: a window of attention that holds the others may be
    too small for it. False where no picture has several: there is nothing to pack, and nothing that packing could be tried on.
    """
    most = Training.model_fields["questions_per_picture"].default
    several = [part for group in by_picture(rows, most) for part in by_system(group) if len(part) > 1]
    if not several:
        return False
    groups = [*(group[:4] for group in several[:2]), _longest(several, Prompter(processor))]
    was_training = model.training
    model.eval()
    try:
        packed = Collator(processor, packed=True)(groups)
        apart = Collator(processor, packed=False)(groups)
        a, _, _ = answer_logits(model, to_device(packed, model.device))
        b, _, _ = answer_logits(model, to_device(apart, model.device))
    except (UserError, ValueError, TypeError, RuntimeError, IndexError):
        return False
    finally:
        model.train(was_training)
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-3 * b.abs().max()).all())


def _longest(groups: Sequence[Sequence[Row]], prompter: Prompter) -> Sequence[Row]:
    """Return the group with the row of most tokens, among those with the rows of most characters."""

    def characters(group: Sequence[Row]) -> int:
        return max(len(row.system) + len(row.question) + len(row.answer) for row in group)

    def tokens(group: Sequence[Row]) -> int:
        return max(len(prompter.ids(prompter.prompt(*row.asked))) + len(prompter.answer_ids(row)) for row in group)

    return max(heapq.nlargest(LONG, groups, key=characters), key=tokens)
