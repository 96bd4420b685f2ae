"""The safetensors files of a checkpoint folder: which key lies where, read one tensor at a time, never mapped into memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlmm.errors import UserError
from slimlmm.files import is_file

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: number formats that weights of a model can have, by their name in a file
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: those of counts and numbers of positions; no weight is stored so, unless it is quantised
WHOLE = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a file. `kind` is its number format as the file names it ("BF16")."""

    file: Path
    kind: str
    shape: tuple[int, ...]

    @property
    def meta(self) -> Tensor:
        """A tensor of its shape and number format without memory; formats that hold no weights count as bytes."""
        return torch.empty(self.shape, dtype=(FLOATS | WHOLE).get(self.kind, torch.uint8), device="meta")


class Shards:
    """Every tensor of a folder by its key on disk; heads of files are read at once, tensors when asked for.

    Files are read, not mapped: mapped pages would count as memory of this process. Raises a UserError where a file is
    missing, cut short, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._open: tuple[Path, Any] | None = None
        named = _weight_map(folder)
        for name in sorted(set(named.values())):
            self._head(folder / name)
        absent = sorted(key for key in named if key and key not in self.entries)
        if absent:
            raise UserError(
                f"{folder}: {INDEX} names {len(absent)} tensors that their files lack, first {absent[0]} in "
                f"{named[absent[0]]}. The files and the index are of different versions; download the folder again."
            )

    def _head(self, path: Path) -> None:
        reader = self._reader(path)
        for key in reader.keys():  # noqa: SIM118 - a reader of safetensors is no mapping
            part = reader.get_slice(key)
            self.entries[key] = Entry(file=path, kind=part.get_dtype(), shape=tuple(part.get_shape()))

    def _reader(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            try:
                self._open = (path, safe_open(path, framework="pt", backend="pread"))
            except SafetensorError as error:
                raise UserError(
                    f"{path}: is cut short or no safetensors file, at {path.stat().st_size:,} bytes "
                    f"({error}). Download or copy it again."
                ) from error
        return self._open[1]

    def read(self, key: str) -> Tensor:
        """Return one tensor as it is stored."""
        tensor: Tensor = self._reader(self.entries[key].file).get_tensor(key)
        return tensor

    @property
    def common(self) -> torch.dtype:
        """Number format of most of the floating-point numbers."""
        counts: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            if entry.kind in FLOATS:
                counts[FLOATS[entry.kind]] += entry.meta.numel()
        return counts.most_common(1)[0][0] if counts else torch.float32

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(path.stat().st_size for path in self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))


def _weight_map(folder: Path) -> dict[str, str]:
    """Return key -> file of the index; one file without an index stands under the key ""."""
    if (folder / ONE).is_file():
        return {"": ONE}
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise UserError(
            f"{folder}: has {others[0] if others else 'no *.safetensors file'}, but neither {ONE} nor {INDEX}, so it does "
            f"not say what its weights are."
        )
    try:
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(key): str(file) for key, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX}: is no index of weights ({type(error).__name__}: {error}).") from error
    if not pairs:
        raise UserError(f"{folder / INDEX}: its weight_map is empty, so there are no weights to read.")
    gone = sorted(file for file in set(pairs.values()) if not is_file(folder / file))
    if gone:
        count = sum(file in gone for file in pairs.values())
        raise UserError(
            f"{folder}: {len(gone)} of {len(set(pairs.values()))} files that {INDEX} names are missing, first {gone[0]} "
            f"({count} tensors in all). Download or copy them."
        )
    return pairs


def first_of(names: Iterable[str], most: int = 3) -> str:
    """Name the first few of many."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
