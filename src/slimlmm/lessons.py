"""What a batch shows: the student's side (logits, states) and the teacher's, of all rows or of those that it was asked about.

Shape legend: A answer tokens, N tokens whose states are matched, S and H hidden size of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.collate import IGNORE, Batch, Collator, real_tokens
from slimlmm.data import Row, by_picture, sample
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, first_text_block, states_into, states_until, to_device
from slimlmm.lineage import Kept
from slimlmm.losses import BLOCKS, MATCHES, NEEDS_TEACHER, TEACHER_ENTRIES
from slimlmm.packing import can_pack
from slimlmm.readouts import Fit, Readout, SameBasis
from slimlmm.streams import TEXT, Streams, streams_of
from slimlmm.teacher import TeacherCache, Teachers
from slimlmm.trainings import Training

#: keys of the pictures that the teacher answers about, None for all
Taught = Collection[str] | None
#: match of states -> the batch entry that tells which of its tokens the teacher was asked about, where not all are
TAUGHT = {"answer_states": "taught_answers", "picture_states": "taught_pictures"}
Collate = Callable[[list[list[Row]]], Batch]


@dataclass(slots=True)
class Readouts:
    """The throw-away maps of one training, by the loss that matches states through them, and where that looks up states.

    Those of `block_states` are named by it and the student's block.
    """

    maps: Mapping[str, Readout | SameBasis]
    block: nn.Module | None
    """what picture states enter; None where no loss looks at them"""

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all maps."""
        return [parameter for readout in self.maps.values() for parameter in readout.parameters()]

    def clear(self) -> None:
        """Forget all gradients."""
        for readout in self.maps.values():
            readout.zero_grad()


def asked_of(rows: Sequence[Row], count: int | None, seed: int) -> tuple[list[Row], Taught]:
    """Return the rows that the teacher is asked about, whole pictures, and the keys of these pictures; all without a count."""
    asked = sample(rows, count, seed)
    return asked, None if count is None else frozenset(row.picture_key() for row in asked)


def learnt_from(rows: Sequence[Row], losses: Collection[str], taught: Taught) -> list[Row]:
    """Return the rows that a training goes through: all, or where every loss asks the teacher those that it is asked about."""
    if taught is None or not set(losses) <= NEEDS_TEACHER:
        return list(rows)
    return [row for row in rows if row.picture_key() in taught]


def collator_for(
    processor: Any,
    *,
    packed: bool,
    teacher: TeacherCache | None,
    losses: Collection[str],
    taught: Taught,
    second: TeacherCache | None = None,
) -> Collate:
    """Return the Trainer's collator: a batch with what the losses ask of the teacher, of the pictures that are `taught`.

    Where not all are, ``taught_answers`` [A] and ``taught_pictures`` [picture tokens] tell which tokens the teacher's states
    belong to. Of a `second` teacher only what the divergences ask for comes along, as ``second_hidden``. Where some answers are
    the student's own, ``given_answers`` [A] tells the others.
    """
    collator = Collator(processor, packed=packed)
    asked = {TEACHER_ENTRIES[name] for name in losses if name in TEACHER_ENTRIES}

    def collate(groups: list[list[Row]]) -> Batch:
        batch = collator(groups)
        batch["labels"] = batch["shift_labels"]
        batch["row_count"] = torch.tensor(len(batch["rows"]))
        if teacher is not None and asked:
            batch |= _said(batch, teacher, asked, taught)
        if second is not None:
            batch["second_hidden"] = _said(batch, second, {"teacher_hidden"}, taught)["teacher_hidden"]
        if any(row.tokens for row in batch["rows"]):
            counts = torch.tensor([len(collator.prompter.answer_ids(row)) for row in batch["rows"]])
            batch["given_answers"] = torch.tensor([not row.tokens for row in batch["rows"]]).repeat_interleave(counts)
        del batch["rows"], batch["heads"]
        return batch

    return collate


def _said(batch: Batch, teacher: TeacherCache, asked: Collection[str], taught: Taught) -> Batch:
    """Return the teacher's entries of a batch; pictures first: where the teacher must run for them, its answers come along."""
    known = {key: [taught is None or row.picture_key() in taught for row in batch[key]] for key in ("rows", "heads")}
    part = {key: [row for row, here in zip(batch[key], flags, strict=True) if here] for key, flags in known.items()}
    found: Batch = {}
    if "teacher_pictures" in asked:
        found["teacher_pictures"] = teacher.pictures(part, answers="teacher_hidden" in asked)
    if "teacher_hidden" in asked:
        found["teacher_hidden"] = teacher.of(part)
    if taught is not None:
        found["taught_answers"] = torch.tensor(known["rows"]).repeat_interleave(
            torch.tensor(teacher.lengths(batch["rows"]))
        )
        found["taught_pictures"] = torch.tensor(known["heads"]).repeat_interleave(batch["picture_tokens"].sum(1))
    return found


def matched_tokens(batch: Batch, loss: str, states_NS: Tensor) -> Tensor:
    """Return the student's states at those tokens that the teacher was asked about."""
    mask: Tensor | None = batch.get(TAUGHT[loss])
    return states_NS if mask is None else states_NS[mask]


def taught_tokens(batch: Batch) -> dict[str, int]:
    """Return how many tokens of a batch each match of states is about; by `TEXT` those of the language model's blocks.

    Behind blocks of a tower there are as many as picture tokens, or the same multiple of that in every batch.
    """
    whole = {"answer_states": batch["shift_labels"] != IGNORE, "picture_states": batch["picture_tokens"]}
    real_BT = real_tokens(batch)
    text = batch["input_ids"].numel() if real_BT is None else int(real_BT.sum())
    return {loss: int(batch.get(mask, whole[loss]).sum()) for loss, mask in TAUGHT.items()} | {TEXT: text}


def look(model: Any, batch: Batch, block: nn.Module | None, *, stop: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the student's logits [A, V], the labels [A] and, by the loss that matches them, its states [N, S].

    Picture states are those that enter `block`; with `stop` the student stops there, and the logits are empty.
    """
    if block is not None and stop:
        states_NS = states_until(model, block, batch)
        labels_A = batch["shift_labels"][batch["shift_labels"] != IGNORE]
        return states_NS.new_empty(len(labels_A), 0), labels_A, {"picture_states": states_NS}
    looking: AbstractContextManager[list[Tensor]] = (
        states_into(block, batch["picture_tokens"]) if block is not None else nullcontext([])
    )
    with looking as seen:
        logits_AV, labels_A, hidden_AS = answer_logits(model, batch)
    return logits_AV, labels_A, {"answer_states": hidden_AS} | ({"picture_states": seen[0]} if seen else {})


def fitted_readouts(
    model: PreTrainedModel,
    anatomy: Anatomy,
    settings: Training,
    collate: Collate,
    groups: Sequence[list[Row]],
    a_batch: int = 8,
) -> Readouts:
    """Return the maps of the state matches that the recipe weighs, each fitted on 32 pictures, `a_batch` at once."""
    names = [name for name in MATCHES if name in settings.losses]
    if not names:
        return Readouts({}, None)
    block = first_text_block(model, anatomy) if "picture_states" in names else None
    fits = {name: Fit(same=False) for name in names}
    with torch.inference_mode():
        for start in range(0, min(32, len(groups)), a_batch):
            batch = to_device(collate(list(groups[start : min(start + a_batch, 32)])), model.device)
            _, _, states = look(model, batch, block, stop=names == ["picture_states"])
            for name in names:
                fits[name].add(matched_tokens(batch, name, states[name]), batch[TEACHER_ENTRIES[name]])
    return Readouts({name: fit.map() for name, fit in fits.items()}, block)


class Groups(Dataset[list[Row]]):
    """Rows grouped by picture, so that one visit pays the picture once."""

    def __init__(self, rows: Sequence[Row], most: int) -> None:
        self.groups = by_picture(rows, most)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[Row]:
        return self.groups[index]


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a training goes through: pictures with their rows, as batches, with the maps of its state matches."""

    groups: Groups
    collate: Collate
    readouts: Readouts
    streams: Streams | None = None


def lessons_of(
    model: PreTrainedModel,
    processor: Any,
    anatomy: Anatomy,
    rows: Sequence[Row],
    settings: Training,
    teachers: Teachers | None,
    taught: Taught,
    kept: Kept,
) -> Lessons:
    """Return the rows of a training as its model sees them, with what its losses ask of the teachers.

    Raises:
        UserError: `block_states` cannot be had (`streams.streams_of`), or not of all pictures.
    """
    if taught is not None and settings.asks_of_every_picture:
        raise UserError(
            "train.losses: block_states asks the teacher about every picture of a step, and data.teacher_rows has it asked about "
            "some; leave out one of them, or the losses of labels."
        )
    lead, second = (teachers.lead, teachers.second) if teachers else (None, None)
    live = lead if BLOCKS in settings.losses else None  # reads the very batches of the student
    packed = can_pack(model, processor, rows) and (live is None or live.collator.packed)
    collate = collator_for(processor, packed=packed, teacher=lead, losses=settings.losses, taught=taught, second=second)
    groups = Groups(learnt_from(rows, settings.losses, taught), settings.questions_per_picture)
    known = (group for group in groups.groups if taught is None or group[0].picture_key() in taught)
    few = list(islice(known, 32))
    a_batch = min(8, max(1, settings.pictures_per_step // settings.accumulate))
    readouts = fitted_readouts(model, anatomy, settings, collate, few, a_batch)
    if live is None:
        return Lessons(groups, collate, readouts)
    streams, maps = streams_of(model, live, kept, Collator(processor, packed=packed), few, a_batch)
    return Lessons(groups, collate, Readouts({**readouts.maps, **maps}, readouts.block), streams)
