"""Labels that people gave, from a CSV or JSONL file into the store: all of the file or nothing."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, tuple_

from slimlmm.errors import UserError
from slimlmm.serving.store import ANSWERS, AUDITS

KNOWN = ("answer_id", "correct", "label", "auditor")
TRUE, FALSE = frozenset(("true", "1", "yes", "y")), frozenset(("false", "0", "no", "n"))
#: problems that are told one by one; ids that one query asks for
MOST_TOLD, ASKED = 20, 500


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did."""

    added: int
    changed: int


def load(path: Path, connection: Connection) -> Imported:
    """Read a file of `answer_id, correct[, label, auditor]` into the store; a label given before by the same auditor is replaced.

    Raises:
        UserError: the file cannot be read, lines of it are wrong, or the store has no such answers; nothing is written then.
    """
    rows, wrong = _parsed(path)
    ids = [row["answer_id"] for row in rows.values()]
    there = _there(connection, ids)
    unknown = [(line, row["answer_id"]) for line, row in rows.items() if row["answer_id"] not in there]
    wrong += [f"line {line}: the store has no answer {name!r}" for line, name in unknown]
    if wrong:
        more = f"\n  ... and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        raise UserError(
            f"{path}: {len(wrong)} problem(s), of which {len(unknown)} of {len(rows)} answers are not in the store; "
            "nothing was imported. Ids are those of the header x-slimlmm-id.\n  "
            + "\n  ".join(wrong[:MOST_TOLD])
            + more
        )
    return _write(connection, list(rows.values()))


def _parsed(path: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the good rows by line, and what is wrong with the others."""
    rows: dict[int, dict[str, Any]] = {}
    seen: dict[tuple[str, str], int] = {}
    wrong: list[str] = []
    for line, raw in _lines(path):
        if isinstance(raw, str):
            wrong.append(f"line {line}: {raw}")
            continue
        row, why = _row(raw)
        if row is None:
            wrong.append(f"line {line}: {why}")
            continue
        key = (row["answer_id"], row["auditor"])
        if key in seen:
            wrong.append(f"line {line}: {key[0]!r} by {key[1]!r} was labelled on line {seen[key]}")
        seen.setdefault(key, line)
        rows[line] = row
    if not rows and not wrong:
        raise UserError(f"{path}: holds no label.")
    return rows, wrong


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Yield each row with its line, or what is wrong with the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--import-audits {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--import-audits {path}: is not UTF-8 text.") from error
    if path.suffix == ".csv":
        yield from _csv(path, text)
    elif path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _json(line)
    else:
        raise UserError(f"--import-audits {path}: is neither .csv nor .jsonl.")


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    head = reader.fieldnames or []
    if missing := [name for name in KNOWN[:2] if name not in head]:
        raise UserError(f"{path}: the first line names no {' and no '.join(missing)}; columns are {', '.join(KNOWN)}.")
    try:
        for row in reader:
            extra = None in row
            yield reader.line_num, "more cells than the first line" if extra else row
    except csv.Error as error:
        yield reader.line_num, str(error)


def _json(line: str) -> Mapping[str, Any] | str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg}"
    return found if isinstance(found, dict) else "is not an object"


def _row(raw: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return a row of the store, or None and why not."""
    if unknown := sorted(set(raw) - set(KNOWN)):
        return None, f"unknown {', '.join(unknown)}; known: {', '.join(KNOWN)}"
    told = {name: str(raw[name]).strip() for name in KNOWN if raw.get(name) is not None}
    correct = told.get("correct", "").lower()
    if not told.get("answer_id"):
        return None, "answer_id is missing"
    if correct not in TRUE | FALSE:
        return None, f"correct is {correct or 'missing'!r}; say true or false"
    if len(told.get("auditor", "")) > 200:
        return None, "auditor has more than 200 characters"
    return {
        "answer_id": told["answer_id"],
        "auditor": told.get("auditor") or "unnamed",
        "correct": correct in TRUE,
        "label": told.get("label") or None,
    }, ""


def _there(connection: Connection, ids: list[str]) -> set[str]:
    found: set[str] = set()
    for begin in range(0, len(ids), ASKED):
        found |= set(connection.scalars(select(ANSWERS.c.id).where(ANSWERS.c.id.in_(ids[begin : begin + ASKED]))))
    return found


def _write(connection: Connection, rows: list[dict[str, Any]]) -> Imported:
    now, changed = time.time(), 0
    for begin in range(0, len(rows), ASKED):
        part = rows[begin : begin + ASKED]
        keys = [(row["answer_id"], row["auditor"]) for row in part]
        changed += connection.execute(
            AUDITS.delete().where(tuple_(AUDITS.c.answer_id, AUDITS.c.auditor).in_(keys))
        ).rowcount
        connection.execute(AUDITS.insert(), [row | {"at": now} for row in part])
    return Imported(added=len(rows) - changed, changed=changed)
