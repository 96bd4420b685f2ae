"""Whole blocks ranked by ablation: what the loss is without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy, Group
from slimlmm.blocks import layers_of, skipped
from slimlmm.collate import Batch
from slimlmm.errors import UserError
from slimlmm.forward import evaluating
from slimlmm.importance import Loss, mean_loss


def rank_blocks(model: PreTrainedModel, anatomy: Anatomy, axis: str, batches: Sequence[Batch], loss: Loss) -> Tensor:
    """Return how much the mean loss grows when each block alone is skipped; [blocks] fp64, unit of the loss.

    One pass over `batches` per block. First-order Taylor ranks whole blocks badly: skipping is no small
    change.
    """
    blocks = layers_of(model, anatomy.axis(axis))
    with evaluating(model):
        uncut = mean_loss(model, batches, loss)
        growth = []
        for block in blocks:
            with skipped(block):
                growth.append(mean_loss(model, batches, loss) - uncut)
    return torch.tensor(growth, dtype=torch.float64)


def greedy_blocks(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    batches: Sequence[Batch],
    loss: Loss,
    keep: int,
    stays: Sequence[int] = (),
) -> list[int]:
    """Return the `keep` blocks that stay when, one at a time, the one that costs least is dropped; ascending.

    `stays`: those that are left already, where a choice of more goes on; all of them if none is said.

    Each step measures every remaining block with the earlier ones already skipped: (L + keep + 1)(L - keep) /
    2 passes for L blocks. Better than dropping the lowest of one ranking, because neighbouring blocks stand
    in for each other.
    """
    blocks, group = layers_of(model, anatomy.axis(axis)), anatomy.axis(axis).groups[0]
    if not group.least <= keep <= len(blocks):
        raise UserError(f"{axis}: cannot keep {keep} blocks of {len(blocks)}; ask for {group.least} to {len(blocks)}.")

    def cost(left: list[int]) -> float:
        with skipped([block for unit, each in enumerate(blocks) if unit not in left for block in each]):
            return mean_loss(model, batches, loss)

    with evaluating(model):
        return greedily(group, keep, cost, stays)


def greedily(group: Group, keep: int, cost: Callable[[list[int]], float], stays: Sequence[int] = ()) -> list[int]:
    """Return the `keep` units that stay when, one by one, the unit is dropped without which the others cost least; ascending.

    `stays`: those that are left already; all of them if none is said.
    """
    kept = list(stays or range(group.units))
    while len(kept) > keep:
        tries = [[other for other in kept if other != unit] for unit in kept]
        least, kept = min(((cost(left), left) for left in tries if group.allows(left)), key=lambda one: one[0])
        if math.isinf(least):
            raise UserError(
                f"{group.name}: without any one of {len(tries)} blocks the loss is no number, so none can be chosen."
            )
    return kept
