"""Every row of every split with its place, the ones that cannot be read as findings; nothing is skipped in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slimlmm import data
from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.record import Example
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.pictures import USUAL, PictureError, PictureSettings
from slimlmm.progress import Reporter
from slimlmm.tables import records_of, tables_of

#: rows between two words about progress
BUNDLE = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """A row, where it stands, and which of the different pictures it is about."""

    split: str
    file: str
    line: int
    row: Row
    picture: int

    def example(self, note: str = "") -> Example:
        """Return this place with a note."""
        return Example(split=self.split, file=self.file, line=self.line, id=self.row.id, note=note)


@dataclass(slots=True)
class Reading:
    """All rows, and the different pictures among them, each with the first row about it."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    pictures: list[Entry] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """paths of pictures that lie where none may"""


def read(source: Path, pad: Pad, tell: Reporter, allowed: PictureSettings = USUAL) -> Reading:
    """Read all rows of a folder or file as the data loader does, without leaving out what is broken.

    Raises:
        UserError: nothing there that can be read as rows.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder. DATA is a folder or file of rows, see the README.")
    found = Reading(data.root_of(source))
    known: dict[str, int] = {}
    rows = 0
    for split, parts in tables_of(source).items():
        before = len(found.entries)
        for table in parts:
            rows += _read_table(table, split, found, known, pad, tell, allowed)
        tell.say(f"read {split}", rows=len(found.entries) - before)
    pad.among("unreadable row", rows)
    for kind in ("escaping path", "absolute path"):
        pad.among(kind, len(found.pictures) + len(found.refused))
    if not found.entries:
        raise UserError(f"{source}: no row in any split can be read. {_first_problem(pad)}")
    return found


def _read_table(
    table: Path,
    split: str,
    found: Reading,
    known: dict[str, int],
    pad: Pad,
    tell: Reporter,
    allowed: PictureSettings,
) -> int:
    """Read the rows of one file; return how many records it holds."""
    count, lines, file = 0, _lines(table), str(table)
    places: data.Places = {}
    for number, record in enumerate(records_of(table, found.root)):
        count, line = number + 1, lines[number] if number < len(lines) else number + 1
        if count % BUNDLE == 0 and lines:
            tell.step(f"reading {split}", count, len(lines))
        try:
            row = data.parse(record, number, unlabelled=True, allowed=allowed, places=places)
        except ValueError as error:
            name = str(record.get("id") or f"row {count}")
            example = Example(split=split, file=file, line=line, id=name, note=str(error))
            if not isinstance(error, PictureError):
                pad.add("unreadable row", example)
            elif (path := str(table.parent / error.detail)) not in found.refused:
                found.refused.add(path)
                pad.add(error.kind, example.model_copy(update={"note": error.detail}))
            continue
        entry = Entry(split, file, line, row, known.setdefault(row.picture_key(), len(known)))
        found.entries.append(entry)
        if entry.picture == len(found.pictures):
            found.pictures.append(entry)
    return count


def _lines(table: Path) -> list[int]:
    """Return the numbers of the lines that hold records, none for files whose records are not lines."""
    if table.suffix != ".jsonl":
        return []
    with table.open("rb") as file:
        return [number for number, line in enumerate(file, 1) if line.strip()]


def _first_problem(pad: Pad) -> str:
    findings = pad.findings()
    if not findings:
        return ""
    first = findings[0].examples[0]
    return f"The first of {findings[0].count}: {first.file}, line {first.line}: {first.note}."
