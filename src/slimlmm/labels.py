"""The teacher's answers as labels: for train rows that have none, or for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from slimlmm.checkpoint import Loaded
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import answer, answer_limit, evaluating, one_look
from slimlmm.files import read_json, write_json
from slimlmm.progress import Reporter
from slimlmm.runfolder import RunFolder
from slimlmm.snapshot import key_of

#: most tokens of an answer, where no row says how long answers are
LONGEST = 64
BATCH = 32
#: batches between two writes of the file
WRITE_EVERY = 20
#: what the file of answers holds: hash of picture and question -> answer
KNOWN = TypeAdapter(dict[str, str])


def file_of(folder: RunFolder, teacher: Loaded, rows: Sequence[Row]) -> Path:
    """Return where a run keeps the teacher's answers to its train rows; runs that share a cache share them there."""
    if folder.shared is None:
        return folder.path / "teacher-answers.json"
    folder.shared.mkdir(parents=True, exist_ok=True)
    return folder.shared / f"labels-{key_of(teacher, rows)}.json"


def labelled(teacher: Loaded, rows: Sequence[Row], path: Path, tell: Reporter, *, every: bool = False) -> list[Row]:
    """Return the rows with the teacher's greedy answers where they have none (`every`: instead of their own too).

    Answers are kept in the JSON file `path`, by a hash of picture and question, so that a run which is taken up again asks only
    what is new. Rows that the teacher has no answer to are left out, and counted aloud.

    Raises:
        UserError: the teacher answers nothing at all.
    """
    asked = [row for row in rows if every or not row.answer]
    known = read_json(KNOWN, path) if path.exists() else {}
    keys = {id(row): _key(row) for row in asked}
    missing = sorted((row for row in asked if keys[id(row)] not in known), key=lambda row: row.picture_key())
    given = [row for row in rows if row.answer]
    limit = answer_limit(teacher.processor, given) if given else LONGEST
    with evaluating(teacher.model):
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            known |= zip((keys[id(row)] for row in part), _answers(teacher, part, limit), strict=True)
            if start // BATCH % WRITE_EVERY == WRITE_EVERY - 1 or start + BATCH >= len(missing):
                write_json(path, known)
            tell.step("the teacher answers", start + len(part), len(missing))
    new = {id(row): replace(row, answer=known[keys[id(row)]]) for row in asked}
    found = [row for row in (new.get(id(row), row) for row in rows) if row.answer]
    if not found:
        raise UserError(
            f"the teacher gave an empty answer to all {len(asked)} rows, so that there is nothing to learn."
        )
    tell.say("train rows with the teacher's answers", rows=len(asked), without_answer=len(rows) - len(found))
    return found


def _answers(teacher: Loaded, rows: Sequence[Row], limit: int) -> list[str]:
    pictures = {row.picture_key(): row for row in rows}
    opened = {key: row.open() for key, row in pictures.items()}
    keys = [row.picture_key() for row in rows]
    model: Any = teacher.model
    with one_look(model, keys):
        texts = answer(model, teacher.processor, rows, limit, [opened[key] for key in keys])
    return [text.strip() for text in texts]


def _key(row: Row) -> str:
    return hashlib.sha256(row.picture_bytes() + row.question.encode()).hexdigest()[:32]
