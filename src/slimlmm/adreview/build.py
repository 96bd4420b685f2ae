"""From facts to files: one creative on the fly, or the three splits with a hash over every byte."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from slimlmm.adreview.answers import Row, rows
from slimlmm.adreview.catalogue import TASKS, VERSION
from slimlmm.adreview.facts import SPLITS, Facts, draw, stream
from slimlmm.adreview.paint import Canvas, paint

QUALITY = 92


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What `write` wrote; also the content of version.json."""

    version: str
    seed: int
    rows: dict[str, int]
    creatives: dict[str, int]
    held_out_rows: int
    rows_sha256: str
    """Hash over the rows alone; the same on every machine."""
    sha256: str
    """Hash over rows and picture bytes; follows the versions of Pillow and its codecs too."""


def canvas(index: int, split: str, seed: int = 0) -> tuple[Facts, Canvas]:
    """Return the facts of one creative and its painting with the boxes of everything on it."""
    facts = draw(index, split, seed)
    return facts, paint(facts, stream("paint", split, index, seed))


def creative(index: int, split: str, seed: int = 0) -> tuple[Image.Image, list[Row]]:
    """Return the 168x168 RGB picture and its questions; a pure function of the arguments."""
    facts, painted = canvas(index, split, seed)
    return painted.image, rows(facts, name_of(index, split), stream("rows", split, index, seed))


def name_of(index: int, split: str) -> str:
    """Return the id of a creative."""
    return f"{split}-{index:06d}"


def jpeg(picture: Image.Image) -> bytes:
    """Return the file bytes of one picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def write(folder: Path, *, train: int, val: int, test: int, seed: int = 0) -> Summary:
    """Write the three splits with exactly the given numbers of rows, the pictures, and version.json.

    Each creative carries one row per task; the last one gives fewer where the count asks for it.
    """
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    rows_hash, all_hash = hashlib.sha256(), hashlib.sha256()
    seen: dict[str, str] = {}
    creatives: dict[str, int] = {}
    held_out = 0
    for split, count in counts.items():
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        creatives[split] = -(-count // len(TASKS))
        lines: list[str] = []
        for index in range(creatives[split]):
            records, data, facts = _records(index, split, seed)
            assert seen.setdefault(facts.key, split) == split, f"{facts.key} in {seen[facts.key]} and {split}"
            (folder / records[0]["image"]).write_bytes(data)
            records = records[: count - len(lines)]
            held_out += sum(bool(record.get("held_out")) for record in records)
            lines += [json.dumps(record) for record in records]
            all_hash.update(data)
        text = "".join(line + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
        rows_hash.update(text.encode())
        all_hash.update(text.encode())
    summary = Summary(
        version=VERSION,
        seed=seed,
        rows=counts,
        creatives=creatives,
        held_out_rows=held_out,
        rows_sha256=rows_hash.hexdigest(),
        sha256=all_hash.hexdigest(),
    )
    (folder / "version.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def _records(index: int, split: str, seed: int) -> tuple[list[dict[str, Any]], bytes, Facts]:
    """Return the rows of one creative as written, its picture file, and its facts."""
    facts, painted = canvas(index, split, seed)
    name = name_of(index, split)
    extra = {"held_out": facts.held_out} if split == "test" else {}
    told = rows(facts, name, stream("rows", split, index, seed))
    image = {"image": f"images/{split}/{name}.jpg"}
    return [{"id": row["id"], **image, **row, **extra} for row in told], jpeg(painted.image), facts
