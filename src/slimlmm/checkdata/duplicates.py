"""The same picture twice, nearly the same picture in two splits, and the same question answered in two ways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.look import Look
from slimlmm.checkdata.near import nearest
from slimlmm.checkdata.reading import Entry, Reading
from slimlmm.progress import Reporter

#: which splits may share no picture, the one that is learned from first
PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))
WORK = "comparing pictures"


def judge(reading: Reading, looks: Sequence[Look], near: int, pad: Pad, tell: Reporter) -> None:
    """Put duplicates of pictures and rows on the pad; `near` is how many bits of 64 two similar pictures differ in at most."""
    splits = _first_rows(reading)
    contents = {split: _by_content(entries, looks, pad) for split, entries in splits.items()}
    for number, (first, second) in enumerate(PAIRS, 1):
        if first in contents and second in contents:
            _leaks(first, second, contents, pad)
            _near(first, second, contents, looks, near, pad)
        tell.step(WORK, number, len(PAIRS))
    _rows(reading, looks, pad)


def _first_rows(reading: Reading) -> dict[str, list[Entry]]:
    """Return for every split the first row about each picture."""
    found: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in reading.entries:
        found[entry.split].setdefault(entry.picture, entry)
    return {split: list(entries.values()) for split, entries in found.items()}


def _by_content(entries: Sequence[Entry], looks: Sequence[Look], pad: Pad) -> dict[bytes, Entry]:
    """Return the first row about each content of a split; further pictures of the same content are findings."""
    found: dict[bytes, Entry] = {}
    for entry in entries:
        sha = looks[entry.picture].sha
        if not sha:
            continue
        first = found.setdefault(sha, entry)
        if first is not entry:
            pad.add("repeated picture", entry.example(f"{_name(entry)} is {_name(first)}"), len(entries))
    return found


def _name(entry: Entry) -> str:
    image = entry.row.image
    return "embedded bytes" if isinstance(image, bytes) else str(image)


def _also(entry: Entry) -> str:
    return f"also in {entry.file}, line {entry.line} ({entry.row.id})"


def _leaks(first: str, second: str, contents: dict[str, dict[bytes, Entry]], pad: Pad) -> None:
    for sha, entry in contents[second].items():
        if sha in contents[first]:
            other = contents[first][sha]
            pad.add(f"leak {first}-{second}", entry.example(f"{_name(entry)}, {_also(other)}"), len(contents[second]))


def _near(
    first: str,
    second: str,
    contents: dict[str, dict[bytes, Entry]],
    looks: Sequence[Look],
    most: int,
    pad: Pad,
) -> None:
    """Tell pictures of the second split that look like one of the first; equal files are told as leaks already."""
    base = [entry for entry in contents[first].values() if looks[entry.picture].hash is not None]
    asked = [
        entry
        for sha, entry in contents[second].items()
        if sha not in contents[first] and looks[entry.picture].hash is not None
    ]
    best, apart = nearest(_hashes(asked, looks), _hashes(base, looks), most)
    for entry, index, bits in zip(asked, best, apart, strict=True):
        if index >= 0:
            other = base[index]
            note = f"{_name(entry)} is {bits} of 64 bits from {_name(other)}, {_also(other)}"
            pad.add(f"near {first}-{second}", entry.example(note), len(contents[second]))


def _hashes(entries: Sequence[Entry], looks: Sequence[Look]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([looks[entry.picture].hash for entry in entries], dtype=np.uint64)


def _rows(reading: Reading, looks: Sequence[Look], pad: Pad) -> None:
    """Tell rows that occur before in their split, and rows that contradict one of any split."""
    answered: dict[tuple[object, ...], Entry] = {}
    seen: set[tuple[object, ...]] = set()
    total = len(reading.entries)
    for entry in reading.entries:
        row = entry.row
        system, question, answer = (" ".join(text.split()) for text in (row.system, row.question, row.answer))
        content = looks[entry.picture].sha or entry.picture
        whole = (entry.split, content, system, question, answer)
        if whole in seen:
            pad.add("identical row", entry.example(f"{question} {answer}"), total)
            continue
        seen.add(whole)
        if not answer:
            continue
        first = answered.setdefault((content, system, question), entry)
        if " ".join(first.row.answer.split()) != answer:
            pad.add(
                "contradiction", entry.example(f"{question} {answer!r}, {_also(first)}: {first.row.answer!r}"), total
            )
