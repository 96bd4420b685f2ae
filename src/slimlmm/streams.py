"""The stream behind every block, in student and teacher: what `block_states` matches.

Shape legend: B sequences, T tokens, N tokens that count, S and H hidden size of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.anatomy import describe
from slimlmm.bridging import stream
from slimlmm.collate import Batch, Collator, fitting, real_tokens
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, evaluating, to_device
from slimlmm.half import half
from slimlmm.lineage import Kept, Pair, pairs_of, unknown_towers
from slimlmm.losses import BLOCKS
from slimlmm.readouts import Fit, Readout, SameBasis
from slimlmm.teacher import TeacherCache

#: axis whose blocks see text
TEXT = "text.blocks"


class Streams:
    """Pairs of blocks whose streams should be the same, with what is heard behind them."""

    def __init__(self, student: PreTrainedModel, teacher: TeacherCache, kept: Kept) -> None:
        if deaf := unknown_towers(describe(student.config)):
            raise UserError(
                f"train.losses: block_states: where the blocks of {', '.join(deaf)} are is not known for "
                f"{student.config.model_type}; leave it out."
            )
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
            answer_logits(model, batch)
        return states

    def fitted(self, student: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Readout | SameBasis]:
        """Return the maps by name: none where the widths are the same, else least squares over the batches.

        Only a cut of the width changes a basis (`rotation`), so where widths are the same the bases are.

        Raises:
            UserError: a block of the student does not give as many tokens as the one that it stands for.
        """
        fits: dict[str, Fit] = {}
        with torch.no_grad(), half(student.device), evaluating(student):
            for batch in batches:
                with self.student(batch) as now:
                    answer_logits(student, batch)
                then = self.said(batch)
                for name in self.pairs:
                    if len(now[name]) != len(then[name]):
                        raise UserError(
                            f"train.losses: block_states: {self.pairs[name].block} gives {len(now[name])} tokens, the teacher's "
                            f"{self.pairs[name].before} {len(then[name])}; leave block_states out."
                        )
                    same = now[name].shape == then[name].shape
                    fits.setdefault(name, Fit(same=same)).add(now[name], then[name])
        return {name: fit.map() for name, fit in fits.items()}


@contextmanager
def _heard(blocks: Mapping[str, nn.Module], pairs: Mapping[str, Pair], batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Within the block collect the stream behind blocks, at tokens that are no padding, all passes of a block in one.

    Of a tower that is told where a processor's mask is one of patches (lfm2_vl); else padding of smaller pictures counts too.
    """
    real_BT, patches_BT = real_tokens(batch), batch.get("pixel_attention_mask")
    states: dict[str, Tensor] = {}

    def hear(name: str, output: Any) -> None:
        values = stream(output)
        mask_BT = fitting(real_BT if pairs[name].axis == TEXT else patches_BT, values)
        heard_N = values[mask_BT.bool()] if mask_BT is not None else values.flatten(0, -2)
        states[name] = torch.cat((states[name], heard_N)) if name in states else heard_N

    with ExitStack() as stack:
        for name, block in blocks.items():
            handle = block.register_forward_hook(lambda _module, _inputs, output, name=name: hear(name, output))
            stack.callback(handle.remove)
        yield states


def streams_of(
    student: PreTrainedModel,
    teacher: TeacherCache,
    kept: Kept,
    collator: Collator,
    groups: Sequence[list[Row]],
    a_batch: int = 8,
) -> tuple[Streams, dict[str, Readout | SameBasis]]:
    """Return the pairs of blocks of student and teacher, and their maps, fitted on pictures with their rows, `a_batch` at once.

    Raises:
        UserError: the teacher cannot run on the student's batches, as it reads other tokens; as `Streams`.
    """
    parts = [groups[at : at + a_batch] for at in range(0, len(groups), a_batch)]
    own = Collator(teacher.collator.processor, packed=collator.packed)(parts[0])["input_ids"]
    if not torch.equal(own, collator(parts[0])["input_ids"]):
        raise UserError(
            "train.losses: block_states has the teacher read the student's batches, and its processor makes other tokens of "
            "them; leave block_states out."
        )
    streams = Streams(student, teacher, kept)
    return streams, streams.fitted(student, (to_device(collator(part), student.device) for part in parts))
