"""Records of tables: one a row, as JSON, JSON lines, CSV, Parquet or a `datasets` folder holds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from slimlmm.errors import UserError

#: accepted spellings of the three splits
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
#: CSV has text alone: an answer 007, True or None is what it says, and only an empty cell is missing
CSV: dict[str, Any] = {
    "keep_default_na": False,
    "converters": dict.fromkeys(("id", "image", "question", "answer", "task", "system"), str),
}
#: the file that tells a folder which `datasets` has saved
SAVED = "dataset_info.json"
SPACE = re.compile(r"\s*")
BOM = b"\xef\xbb\xbf"


def tables_of(source: Path) -> dict[str, list[Path]]:
    """Return split -> files (or image folders) that hold its rows."""
    if source.is_file():
        if source.suffix not in READERS:
            raise UserError(
                f"{source}: cannot read {source.suffix or 'a file without suffix'}; known: {', '.join(READERS)}."
            )
        named = next((split for split, names in SPLITS.items() if source.stem in names), "train")
        return {named: [source]}
    if (source / SAVED).exists():
        return {"train": [source]}
    found: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            files = [path for suffix in READERS for path in sorted(source.glob(f"{name}{suffix}"))]
            folder = source / name
            saved = (folder / SAVED).exists()  # its other .json files are no tables
            files += [folder] if saved else [path for end in READERS for path in sorted(folder.glob(f"*{end}"))]
            if files:
                found[split] = files
                break
    if not found:
        raise UserError(
            f"{source}: holds none of train, validation, test as .jsonl, .json, .parquet, .csv or sub-folders with such files."
        )
    return found


def records_of(table: Path, root: Path) -> Iterator[dict[str, Any]]:
    """Yield the raw records of one table; relative picture paths are resolved against its folder, and stay within `root`."""
    if table.is_file():
        _refuse_packed(table)
    kind = READERS.get(table.suffix)
    for record in _of_json(table) if kind == "json" and table.is_file() else _of_datasets(table, kind):
        yield {**record, "_folder": table.parent, "_root": root}


def _of_datasets(table: Path, kind: str | None) -> Iterator[dict[str, Any]]:
    """Yield the records of what `datasets` reads, pictures as they are stored."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind is None or table.is_dir():
            data = datasets.load_from_disk(str(table))
        else:
            data = datasets.load_dataset(kind, data_files=str(table), split="train", **(CSV if kind == "csv" else {}))
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, StopIteration) as error:
        cause = error.__cause__ or error
        told = str(cause).splitlines() or [type(cause).__name__]
        raise UserError(f"{table}: cannot be read as rows: {told[0][:200]}") from error
    for name, feature in data.features.items():
        if (as_stored := _undecoded(feature)) != feature:
            data = data.cast_column(name, as_stored)
    number = 1
    try:
        for record in data:
            yield record
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: row {number} holds text that is no UTF-8 ({error}).") from error


def _undecoded(feature: Any) -> Any:
    """Return a feature of `datasets` whose pictures, also those in lists and structures, stay the files that they are."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(one) for name, one in feature.items()}
    return feature


def _of_json(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, one or more a line, or all in one list.

    By the standard library, which takes texts as they are: Arrow's reader makes times of texts that look like dates.
    """
    number = 0
    try:
        for number, record in enumerate(_values(table), 1):
            if not isinstance(record, dict):
                told = json.dumps(record)
                raise UserError(f"{table}: row {number} is {told[:60]}, not an object. Take it out.")
            yield record
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: row {number + 1} holds text that is no UTF-8 ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{table}: lists or objects are nested too deep to be rows.") from error
    except ValueError as error:
        raise UserError(f"{table}: cannot be read as rows: row {number + 1}: {str(error)[:200]}") from error


def _values(table: Path) -> Iterator[Any]:
    """Yield the values of a file of JSON; those of a list that stands alone."""
    decoder = json.JSONDecoder()
    with table.open("rb") as file:
        start = file.read(64).removeprefix(BOM).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from json.loads(file.read().removeprefix(BOM).decode())
            return
        for number, line in enumerate(file):  # each is decoded alone, so that the row which cannot be is known
            at, text = 0, (line if number else line.removeprefix(BOM)).decode().strip()
            while at < len(text):
                value, at = decoder.raw_decode(text, at)
                yield value
                at = cast(re.Match[str], SPACE.match(text, at)).end()


def _refuse_packed(table: Path) -> None:
    """Raise a UserError for an archive under the name of a table: `datasets` would unpack it, however large it gets."""
    from datasets.utils.extract import Extractor

    try:
        packed = Extractor.infer_extractor_format(table)
    except Exception as error:  # what looks like an archive and is none
        packed = type(error).__name__
    if packed:
        raise UserError(f"{table}: is packed ({packed}), not a table. Unpack it, and give what is inside.")
