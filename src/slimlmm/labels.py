"""The teacher's answers as labels: for train rows that have none, or for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from slimlmm.checkpoint import Loaded
from slimlmm.data import Row
from slimlmm.decoding import generation_settings
from slimlmm.errors import UserError
from slimlmm.evaluate import answer_limit, evaluating, generated, one_look
from slimlmm.files import read_json, write_json
from slimlmm.progress import Reporter
from slimlmm.runfolder import RunFolder
from slimlmm.snapshot import key_of

BATCH = 32
#: batches between two writes of the file
WRITE_EVERY = 20
#: what the file of answers holds: hash of picture and question -> answer, null for one that did not come to an end
KNOWN = TypeAdapter(dict[str, str | None])


def file_of(folder: RunFolder, teacher: Loaded, rows: Sequence[Row]) -> Path:
    """Return where a run keeps the teacher's answers to its train rows; runs that share a cache share them there."""
    if folder.shared is None:
        return folder.path / "teacher-answers.json"
    folder.shared.mkdir(parents=True, exist_ok=True)
    return folder.shared / f"labels-{key_of(teacher, rows)}.json"


def labelled(
    teacher: Loaded, rows: Sequence[Row], others: Sequence[Row], path: Path, tell: Reporter, *, every: bool = False
) -> tuple[list[Row], str]:
    """Return the rows with the teacher's greedy answers where they have none (`every`: instead of their own too), and a note.

    Answers are kept in the JSON file `path`, by a hash of picture and question, so that a run which is taken up again asks only
    what is new. They may be as long as the longest of these rows and of `others`, which have answers, and 4 tokens more. Rows
    that the teacher has no answer to, or one that has not ended by then, are left out; the note tells how many.

    Raises:
        UserError: the teacher answers nothing at all.
    """
    asked = [row for row in rows if every or not row.answer]
    known = read_json(KNOWN, path) if path.exists() else {}
    keys = {id(row): _key(row) for row in asked}
    missing = sorted((row for row in asked if keys[id(row)] not in known), key=lambda row: row.picture_key())
    limit = answer_limit(teacher.processor, [row for row in (*rows, *others) if row.answer])
    with evaluating(teacher.model):
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            known |= zip((keys[id(row)] for row in part), _answers(teacher, part, limit), strict=True)
            if start // BATCH % WRITE_EVERY == WRITE_EVERY - 1 or start + BATCH >= len(missing):
                write_json(path, known)
            tell.step("the teacher answers", start + len(part), len(missing))
    said = {id(row): known[keys[id(row)]] for row in asked}
    answered = (replace(row, answer=said[id(row)] or "") if id(row) in said else row for row in rows)
    found = [row for row in answered if row.answer]
    cut, empty = sum(text is None for text in said.values()), sum(text == "" for text in said.values())
    told = f"{empty} of {len(asked)} answers of the teacher are empty, {cut} go on beyond {limit} tokens"
    if not found:
        raise UserError(f"{told}, so that there is nothing to learn.")
    tell.say("train rows with the teacher's answers", rows=len(asked), empty=empty, unended=cut)
    return found, f"{told}; their rows are left out" if empty or cut else ""


def _answers(teacher: Loaded, rows: Sequence[Row], limit: int) -> list[str | None]:
    """Return the teacher's answers, None for one that does not end within `limit` tokens."""
    pictures = {row.picture_key(): row for row in rows}
    opened = {key: row.open() for key, row in pictures.items()}
    keys = [row.picture_key() for row in rows]
    model: Any = teacher.model
    settings = generation_settings(model, teacher.processor, limit)
    with one_look(model, keys):
        tokens_BT = generated(model, teacher.processor, rows, settings, [opened[key] for key in keys])
    texts = teacher.processor.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
    ended = torch.isin(tokens_BT.cpu(), torch.tensor(settings["eos_token_id"])).any(1) | (tokens_BT.shape[1] < limit)
    return [text.strip() if end else None for text, end in zip(texts, ended.tolist(), strict=True)]


def _key(row: Row) -> str:
    return hashlib.sha256(row.picture_bytes() + "\x1f".join(filter(None, row.asked)).encode()).hexdigest()[:32]
