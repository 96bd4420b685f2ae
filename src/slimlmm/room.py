"""Room on disk: what a run will need at most, before it starts and before each of its rounds.

P_r parameters after round r, b bytes of a stored one, 4 of one in work, H hidden size, tau tokens

states  2 * 4 P_r (3 + best)      weights and two moments, the state before beside it; the best weights where it looks for them
parts   2 * 4 P_r                 the part before beside the new one
models  4 sum P_i                 of the finished rounds that stay (`Keeping.rounds`)
cache   2 H tau                   half precision; answer tokens of the rows asked, picture tokens where a loss wants them
final   b P
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimlmm import data
from slimlmm.collate import Collator
from slimlmm.errors import UserError
from slimlmm.measure import disk_bytes
from slimlmm.recipe import Round, Stage
from slimlmm.resizing import cut_in_turn, predict_parameters
from slimlmm.saving import SAVE_EVERY

#: bytes of a parameter while it is worked on
WORKED = 4
#: losses that want the teacher's states at picture tokens
PICTURED = "picture_states"
#: rows whose tokens are counted; the others are taken to be like them
COUNTED = 256


@dataclass(frozen=True, slots=True)
class Keeping:
    """What of a run goes to disk and stays: the state of a training, every so many `seconds`; models of the last `rounds`.

    None: of all. Those of the lossless rounds, of which one is the teacher, and the last that kept the promise stay anyway.
    """

    seconds: float = SAVE_EVERY
    rounds: int | None = None


KEEPING = Keeping()


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a run takes on disk at its peak."""

    cache: int
    models: int
    work: int
    final: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.models + self.work + self.final

    def __str__(self) -> str:
        parts = {
            "the teacher's states": self.cache,
            "models of rounds": self.models,
            "parts and states of the largest round": self.work,
            "final/": self.final,
        }
        return ", ".join(f"{readable(size)} {name}" for name, size in parts.items() if size)


def work_of(parameters: int, before: int, turn: Round) -> int:
    """Return the bytes that a round takes while it is made; units that fade are still there."""
    if not turn.train:
        return WORKED * parameters
    trained = before if turn.fade else parameters
    best = any(one.validate_every is not None for one in turn.train)
    return WORKED * (2 * trained * (3 + best) + 2 * parameters)


def need_of(config: Any, stages: Sequence[Stage], stored: int, cache: int, keeping: Keeping) -> Need:
    """Return what a run needs at most; lossless cuts are not counted on, so it is that of a model that has nothing unused.

    `stored` is the bytes of a parameter in the model's files, `cache` those of what the teacher will have said.
    """
    before = predict_parameters(config, {})
    lossless: list[int] = []
    others: list[int] = []
    needs: list[Need] = []
    for turn in (turn for stage in stages for turn in stage.rounds):
        config = cut_in_turn(config, turn.sizes)
        parameters = predict_parameters(config, {})
        needs.append(Need(cache, sum(lossless + others), work_of(parameters, before, turn), 0))
        (lossless if turn.drop else others).append(WORKED * parameters)
        if keeping.rounds is not None:
            others = others[-keeping.rounds :]
        before = parameters
    needs.append(Need(cache, sum(lossless + others), 0, stored * before))
    return max(needs, key=lambda one: one.total)


def cache_of(collator: Collator, rows: Sequence[data.Row], stages: Sequence[Stage], hidden: int) -> int:
    """Return the bytes of what the teacher will say of the train rows that it is asked about, those that are visited.

    A training that asks the model before its round too keeps as much of that, until the round is settled.
    """
    trainings = [one for stage in stages for turn in stage.rounds for one in turn.train]
    visits = sum(one.steps * one.pictures_per_step * one.questions_per_picture for one in trainings)
    if not rows or not visits:
        return 0
    some = data.sample(rows, COUNTED, 0)
    answers = sum(len(collator.prompter.answer_ids(row)) for row in some) / len(some) * min(len(rows), visits)
    pictures = 0.0
    if any(PICTURED in one.losses for one in trainings):
        groups = data.by_picture(rows, len(rows))
        visited = min(len(groups), sum(one.steps * one.pictures_per_step for one in trainings))
        pictures = float(collator([groups[0][:1]])["picture_tokens"].sum()) * visited
    twice = 2 if any("previous" in one.teachers for one in trainings) else 1
    return round(twice * 2 * hidden * (answers + pictures))


def refuse(needs: Mapping[Path, int], told: str) -> None:
    """Refuse where a file system has less room than what is needed in its folders, what lies there already counted as room.

    Raises:
        UserError: with the bytes, and `told`, what they are of.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(folder.stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed = sum(needs[folder] for folder in folders)
        free = shutil.disk_usage(folders[0]).free + sum(map(disk_bytes, folders))
        if needed > free:
            raise UserError(
                f"{folders[0]}: about {readable(needed)} are needed there ({told}), {readable(free)} are free or this run's. "
                "Make room, choose an --out on a larger disk, or let models of earlier rounds go with --keep-rounds 1."
            )


def readable(size: int) -> str:
    """Return bytes as readers want them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"
