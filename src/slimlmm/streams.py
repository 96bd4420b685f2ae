"""The stream behind every block, in student and teacher: what `block_states` matches.

Shape legend: B sequences, T tokens, N tokens that count, S and H hidden size of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.bridging import stream
from slimlmm.collate import Batch, Collator, fitting, real_tokens
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.forward import evaluating, forward, to_device
from slimlmm.half import half
from slimlmm.lineage import Kept, Pair, pairs_of
from slimlmm.losses import BLOCKS, Readout, SameBasis, fitted_readout
from slimlmm.teacher import TeacherCache

#: axis whose blocks see text
TEXT = "text.blocks"
#: pictures in a batch that maps are fitted on
A_BATCH = 8


class Streams:
    """Pairs of blocks whose streams should be the same, with what is heard behind them."""

    def __init__(self, student: PreTrainedModel, teacher: TeacherCache, kept: Kept) -> None:
        self.teacher = teacher
        self.pairs = {f"{BLOCKS} {one.block}": one for one in pairs_of(student, teacher.model, kept)}
        self._blocks = {name: student.get_submodule(one.block) for name, one in self.pairs.items()}
        self._before = {name: teacher.model.get_submodule(one.before) for name, one in self.pairs.items()}

    def counted(self, name: str) -> str:
        """Return by which tokens a match weighs where a step is several batches (`lessons.taught_tokens`)."""
        return TEXT if self.pairs[name].axis == TEXT else "picture_states"

    @contextmanager
    def student(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """Within the block yields the student's states [N, S] behind its blocks, with their gradient, by name of the map."""
        with _heard(self._blocks, self.pairs, batch) as states:
            yield states

    @torch.no_grad()
    def said(self, batch: Batch) -> dict[str, Tensor]:
        """Return the teacher's states [N, H] behind the blocks that they stand for, computed now on the very same batch."""
        model = self.teacher.model
        batch = to_device(batch, model.device)
        with half(model.device), evaluating(model), _heard(self._before, self.pairs, batch) as states:
            forward(model, batch)
        return states

    def fitted(self, student: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Readout | SameBasis]:
        """Return the maps by name: none where the widths are the same, else least squares over the batches.

        Raises:
            UserError: a block of the student does not give as many tokens as the one that it stands for.
        """
        found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in self.pairs}
        with torch.no_grad(), half(student.device), evaluating(student):
            for batch in batches:
                with self.student(batch) as now:
                    forward(student, batch)
                then = self.said(batch)
                for name, (mine, others) in found.items():
                    if len(now[name]) != len(then[name]):
                        raise UserError(
                            f"train.losses: block_states: {self.pairs[name].block} gives {len(now[name])} tokens, the teacher's "
                            f"{self.pairs[name].before} {len(then[name])}; leave block_states out."
                        )
                    mine.append(now[name].float())
                    others.append(then[name].float())
        return {name: _map(torch.cat(mine), torch.cat(others)) for name, (mine, others) in found.items()}


def _map(student_NS: Tensor, teacher_NH: Tensor) -> Readout | SameBasis:
    return SameBasis(teacher_NH) if student_NS.shape == teacher_NH.shape else fitted_readout(student_NS, teacher_NH)


@contextmanager
def _heard(blocks: Mapping[str, nn.Module], pairs: Mapping[str, Pair], batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Within the block collect the stream behind blocks, at tokens that are no padding, all passes of a block in one."""
    real_BT = real_tokens(batch)
    states: dict[str, Tensor] = {}

    def hear(name: str, output: Any) -> None:
        values = stream(output)
        mask_BT = fitting(real_BT, values) if pairs[name].axis == TEXT else None
        heard_N = values[mask_BT] if mask_BT is not None else values.flatten(0, -2)
        states[name] = torch.cat((states[name], heard_N)) if name in states else heard_N

    with ExitStack() as stack:
        for name, block in blocks.items():
            handle = block.register_forward_hook(lambda _module, _inputs, output, name=name: hear(name, output))
            stack.callback(handle.remove)
        yield states


def streams_of(
    student: PreTrainedModel, teacher: TeacherCache, kept: Kept, collator: Collator, groups: Sequence[list[Row]]
) -> tuple[Streams, dict[str, Readout | SameBasis]]:
    """Return the pairs of blocks of student and teacher, and their maps, fitted on pictures with their rows.

    Raises:
        UserError: the teacher does not read the same tokens, so that it cannot run on the student's batches; as `Streams.fitted`.
    """
    parts = [groups[at : at + A_BATCH] for at in range(0, len(groups), A_BATCH)]
    batches = [to_device(collator(part), student.device) for part in parts]
    own = teacher.collator(parts[0])["input_ids"] if teacher.collator.packed == collator.packed else torch.empty(0)
    if not torch.equal(own, batches[0]["input_ids"].cpu()):
        raise UserError(
            "train.losses: block_states has the teacher read the student's batches, and its processor makes other tokens of "
            "them; leave block_states out."
        )
    streams = Streams(student, teacher, kept)
    return streams, streams.fitted(student, batches)
