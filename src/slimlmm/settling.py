"""Closed-form local distillation: after a cut, block by block, the residual stream is fitted back to what it was before.

A refit (`repair.refit`) mends each matrix against inputs of the uncut model, so that errors add up from block to block. Here the
cut model runs: what its stream lacks behind a block is predicted from that block's own FFN activations and folded into the FFN's
output matrix, first block first, so that each next block sees the mended stream.

Shape legend: B sequences, T tokens, H residual channels, I FFN neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.anatomy import describe
from slimlmm.bridging import NoBridgeError, count, mend, stream, writer_of
from slimlmm.calibration import Calibration
from slimlmm.collate import Batch
from slimlmm.forward import evaluating, output_of
from slimlmm.importance import Loss, at_least_one
from slimlmm.lineage import TOWERS, Kept, pairs_of
from slimlmm.moments import Moments, products_of
from slimlmm.repair import Choice, judged
from slimlmm.resuming import Memory


def settle_best(
    student: PreTrainedModel,
    before: PreTrainedModel,
    kept: Kept,
    calibration: Calibration,
    loss: Loss,
) -> tuple[PreTrainedModel, list[Choice]]:
    """Settle a cut model (`settled`); return it or the model as it is, whichever has less loss on unseen rows, and both losses.

    Neither input is touched. Holds one more copy of the student.
    """
    trial = copy.deepcopy(student)
    if not settled(trial, before, kept, calibration.fit):
        return student, []
    tries = [judged(name, model, calibration.judge, loss) for name, model in (("cut", student), ("settled", trial))]
    return (trial if tries[1].loss < tries[0].loss else student), tries


def settled(student: PreTrainedModel, before: PreTrainedModel, kept: Kept, batches: Sequence[Batch]) -> list[str]:
    """Fit the stream of `student` to that of `before` in place; return the blocks that were mended, by name.

    With h [I] the inputs of a block's last FFN matrix W, d [H] the stream of `before` less that of `student` behind it, and
    g [H] what the block makes of its writer's output: W' = W + diag(1/g) A for the ridge regression d ~ A h (+ c with a bias),
    taken where it lowers the held-out error. Towers whose stream has another width than before are left alone, for there its
    basis is another; so are blocks whose FFN does not write the stream as it is.

    Args:
        student: the cut model.
        before: the model that it was cut from.
        kept: numbers of the layers that stayed, by block axis, where blocks were cut.
        batches: calibration batches.
    """
    mended, few = [], list(at_least_one(batches, "settling"))
    layers = describe(student.config).axes["text.blocks"].layers  # of models too whose blocks must all stay
    with evaluating(student), evaluating(before), torch.no_grad():
        now, then = (
            _Side(model, Memory.of(model, describe(model.config), few), fixed=model is before)
            for model in (student, before)
        )
        for place, wanted in _pairs(student, before, kept):
            writer = writer_of(student, place)
            if writer is None:
                continue
            text = place.startswith(f"{layers}.")
            moments = partial(_lacking, (now, place), (then, wanted), writer, batches, text=text)
            if mend(student, student.get_submodule(place), writer, batches, moments):
                mended.append(place)
    return mended


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two models. Before a block whose stream is asked for nothing changes any more; in a `fixed` one nothing ever."""

    model: PreTrainedModel
    memory: Memory
    fixed: bool

    def behind(self, block: str, batch: Batch) -> Tensor:
        """Return the stream behind a block; the model stops there."""
        with self.memory.resumed(self.model, self.memory.last if self.fixed else block):
            return stream(output_of(self.model, self.model.get_submodule(block), batch))


def _pairs(student: PreTrainedModel, before: PreTrainedModel, kept: Kept) -> list[tuple[str, str]]:
    """Return each block of the student with the block of `before` behind which the stream should be the same, inputs first.

    Towers before the first one that was cut are left out: nothing is lacking there.
    """
    now, then = describe(student.config), describe(before.config)
    changed = {name.partition(".")[0] for name, size in now.sizes.items() if size != then.sizes.get(name)}
    first = min((TOWERS.index(tower) for tower in changed if tower in TOWERS), default=len(TOWERS))

    def lacks(tower: str) -> bool:
        width = f"{tower}.width"
        refused = now.axes[f"{tower}.blocks"].refusal
        return TOWERS.index(tower) >= first and not refused and now.sizes.get(width) == then.sizes.get(width)

    return [(one.block, one.before) for one in pairs_of(student, before, kept) if lacks(one.axis.partition(".")[0])]


def _lacking(
    now: tuple[_Side, str], then: tuple[_Side, str], writer: nn.Linear, batches: Sequence[Batch], *, text: bool
) -> Moments:
    """Return the moments of (h, d) [I + H] over the calibration tokens; of the `text` tower padding does not count."""
    moments = Moments(writer.in_features + writer.out_features, writer.weight.device, products_of(writer.weight))
    for batch in batches:
        neurons: list[Tensor] = []
        handle = writer.register_forward_pre_hook(lambda _, inputs, heard=neurons: heard.append(inputs[0]))
        wanted_BTH, found_BTH = then[0].behind(then[1], batch), now[0].behind(now[1], batch)
        handle.remove()
        if wanted_BTH.shape != found_BTH.shape:
            raise NoBridgeError("tokens are merged between the block and the one whose stream it should have")
        count(moments, neurons[0], wanted_BTH - found_BTH, batch, text=text)
    return moments
