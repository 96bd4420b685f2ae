"""`convert`: pickled weights into safetensors, by torch's reader of weights alone, which runs nothing; bit by bit the same.

Keys on disk stay as they are. Left out are keys that the model has no place for, and the second of two tied weights of
equal values; code and pickles are not copied.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from slimlmm import checkpoint
from slimlmm.errors import UserError
from slimlmm.evaluate import Record
from slimlmm.intake import check_depth, check_sizes
from slimlmm.probing import Skeleton, skeleton
from slimlmm.shards import FLOATS, INDEX, WHOLE, Shards, first_of
from slimlmm.weights import parts_of

ONE = "pytorch_model.bin"
INDEX_OF_PICKLES = "pytorch_model.bin.index.json"
#: endings of files of configuration, processor and tokenizer that hold text or numbers, never code
PLAIN = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_CONFIGS = ("config.json", checkpoint.GENERATION)
_FORMATS = frozenset((*FLOATS.values(), *WHOLE.values()))
#: lines of torch's message that tell how to run the pickle all the same
_ADVICE = ("Weights only load failed", "(1)", "(2)", "Check the documentation")


class Converted(Record):
    """What `convert` wrote."""

    folder: str
    tensors: int
    parameters: int
    bytes: int
    files: int
    left_out: tuple[str, ...]
    """keys that the model has no place for"""
    tied: tuple[str, ...]
    """keys that lay there twice, as tied weights do"""
    notes: tuple[str, ...]


def convert(source: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB") -> Converted:
    """Write a folder with pickled weights as a plain safetensors folder `out`, whole or not at all.

    Each file is read by ``torch.load(weights_only=True, mmap=True)``; a file of weights is what is held in memory.

    Raises:
        UserError: a pickle that holds more than tensors by name, an old format, or weights that do not fit the configuration.
    """
    folder = Path(source).expanduser()
    files = _files(folder)
    size = checkpoint.shard_size(max_shard_size)
    config = checkpoint.load_config(folder)
    tensors = _tensors(folder, files)
    check_depth(str(folder), config.to_dict(), len(tensors))
    check_sizes(str(folder), config)
    frame = skeleton(config)
    parts, left = parts_of(frame.model, tensors)
    names = {part.name: part.keys[0][0] for part in parts if len(part.keys) == 1}
    tied = _twice(frame, names, tensors)
    kept = {key: tensor for key, tensor in tensors.items() if key not in {*left, *tied}}
    if not kept:
        raise UserError(
            f"{folder}: none of its {len(tensors)} tensors belongs to a {config.model_type!r} model: {first_of(left)}. "
            f"config.json and the weights are of different models."
        )
    notes: list[str] = []

    def write(partial: Path) -> None:
        _write(kept, partial, size)
        notes.extend(_copy(folder, partial))
        _refuse_misfits(folder, partial)
        _refuse_changes(kept, partial)

    checkpoint.written(out, write)
    written = sorted(Path(out).expanduser().glob("*.safetensors"))
    return Converted(
        folder=str(out),
        tensors=len(kept),
        parameters=frame.parameters,
        bytes=sum(path.stat().st_size for path in written),
        files=len(written),
        left_out=tuple(left),
        tied=tuple(tied),
        notes=tuple(notes),
    )


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Return the pickled files of a folder, with the keys that an index says are in each (None: no index)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; convert takes a local one, since pickles are not downloaded.")
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if name.endswith(".safetensors")]:
        raise UserError(f"{folder}: has safetensors already ({found[0]}); use the folder as it is.")
    if ONE in names:
        return {ONE: None}
    if INDEX_OF_PICKLES not in names:
        raise UserError(
            f"{folder}: has neither {ONE} nor {INDEX_OF_PICKLES}; convert takes these alone. There are: {first_of(names, 6)}."
        )
    path = folder / INDEX_OF_PICKLES
    try:
        pairs = {str(key): str(file) for key, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no index of weights ({type(error).__name__}: {error}).") from error
    if not pairs:
        raise UserError(f"{path}: its weight_map is empty, so there are no weights to read.")
    files: dict[str, set[str] | None] = {
        name: {key for key, file in pairs.items() if file == name} for name in sorted(set(pairs.values()))
    }
    if gone := [name for name in files if name not in names]:
        raise UserError(
            f"{folder}: {len(gone)} of {len(files)} files that {INDEX_OF_PICKLES} names are missing, first {gone[0]}. "
            f"Download or copy them."
        )
    return files


def _tensors(folder: Path, files: Mapping[str, set[str] | None]) -> dict[str, Tensor]:
    """Return every tensor by its key, mapped from the files, not read."""
    found: dict[str, Tensor] = {}
    for name, expected in files.items():
        part = _read(folder / name)
        if expected is not None and (absent := sorted(expected - part.keys())):
            raise UserError(
                f"{folder / name}: lacks {len(absent)} tensors that {INDEX_OF_PICKLES} says it holds: {first_of(absent)}. "
                f"The files and the index are of different versions; download the folder again."
            )
        if double := [key for key in part.keys() & found.keys() if not _same_bits(part[key], found[key])]:
            raise UserError(f"{folder / name}: {first_of(sorted(double))} lies in another file too, with other values.")
        found |= part
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one pickled file, mapped into memory."""
    _refuse_format(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than weights, so it is not converted: {_reason(error)}. Loading it in full would run what it "
            f"names. Get a safetensors version, or load it where you trust it and save_pretrained."
        ) from error
    except Exception as error:  # a hostile file may bring the reader to anything
        raise UserError(
            f"{path}: is damaged or no file of weights ({_reason(error)}). Download or copy it again."
        ) from error
    if not isinstance(held, dict):
        raise UserError(f"{path}: holds a {type(held).__name__}, not tensors by name.")
    for key, value in held.items():
        if problem := _wrong(key, value):
            raise UserError(
                f"{path}: entry {key!r} is {problem}. convert takes plain weights by name alone: take the model's part out "
                f"of a training checkpoint, or load it where you trust it and save_pretrained."
            )
    return {key: value.detach() for key, value in held.items()}


def _wrong(key: Any, value: Any) -> str:
    """Say what keeps an entry from being a weight, "" where nothing does."""
    if not isinstance(key, str):
        return f"named by a {type(key).__name__}"
    if type(value) not in (Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"a tensor of layout {value.layout} on {value.device}"
    if value.dtype not in _FORMATS:
        return f"a tensor of {value.dtype}"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"a tensor of {list(value.shape)} over a storage of {value.untyped_storage().nbytes():,} bytes"
    return ""


def _refuse_format(path: Path) -> None:
    """Raise unless the file is what ``torch.save`` has written since version 1.6: a zip file of stored members."""
    with path.open("rb") as file:
        head = file.read(512)
    how = "Load it where you trust it and save_pretrained, or torch.save its state_dict with torch 1.6 or newer."
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a TAR file, torch's format before version 0.4, which is not read. {how}")
    if not head.startswith(b"PK\x03\x04"):
        kind = "a pickle of torch before version 1.6" if head.startswith(b"\x80") else "no file of torch.save"
        raise UserError(f"{path}: is {kind}, not a zip file; such a file cannot be mapped and is not read. {how}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{path}: is cut short or damaged, at {path.stat().st_size:,} bytes ({_reason(error)}). Download or copy it again."
        ) from error
    if any(one.filename.endswith("constants.pkl") for one in members):
        raise UserError(f"{path}: is a TorchScript program, which holds code beside weights, and is not read. {how}")
    if packed := [one.filename for one in members if one.compress_type != zipfile.ZIP_STORED]:
        raise UserError(f"{path}: is a compressed zip file ({packed[0]}), which torch.save does not write. {how}")


def _reason(error: BaseException) -> str:
    """Return torch's reason without its advice to run the pickle all the same."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_ADVICE)] or [type(error).__name__]
    text = said[0].removeprefix("WeightsUnpickler error: ").split(" Please use")[0]
    # names in a pickle are whatever its writer wanted to see on a terminal
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300]).rstrip(".")


def _twice(frame: Skeleton, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of tied weights whose owner lies there too with the same bits."""
    found = []
    for alias, owner in frame.tied.items():
        if alias in names and owner in names and names[alias] != names[owner]:
            one, other = tensors[names[alias]], tensors[names[owner]]
            if _same_bits(one, other):
                found.append(names[alias])
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike to the bit, numbers that are not finite and the sign of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))


def _write(tensors: Mapping[str, Tensor], folder: Path, size: int) -> None:
    """Write the files of weights one at a time, named as stock saving names them."""
    meta = {key: torch.empty(one.shape, dtype=one.dtype, device="meta") for key, one in tensors.items()}
    split = split_torch_state_dict_into_shards(meta, filename_pattern="model{suffix}.safetensors", max_shard_size=size)
    for file, keys in split.filename_to_tensors.items():
        # copies: views of one storage, as tied or fused weights are, are tensors of their own in safetensors
        shard = {key: tensors[key].clone(memory_format=torch.contiguous_format) for key in keys}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_misfits(source: Path, folder: Path) -> None:
    """Raise, with the name of the source, where the weights are not those that the configuration asks for."""
    try:
        checkpoint.opened(folder, AutoConfig.from_pretrained(folder, local_files_only=True))
    except UserError as error:
        raise UserError(str(error).replace(str(folder), str(source))) from error


def _refuse_changes(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise unless what lies in the folder is, bit by bit, what was read."""
    shards = Shards(folder)
    wrong = [key for key in tensors if not _same_bits(shards.read(key), tensors[key])]
    if wrong or shards.entries.keys() != tensors.keys():
        raise UserError(f"{folder}: what was written differs from what was read: {first_of(wrong)}. Is the disk sound?")


def _copy(source: Path, folder: Path) -> Iterator[str]:
    """Copy configuration, processor and tokenizer, plain files alone; yield what was left out of them."""
    wanted = sorted({path for pattern in (*_CONFIGS, *checkpoint.PROCESSOR_FILES) for path in source.glob(pattern)})
    for path in wanted:
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        for one in inside:
            name = one.relative_to(source)
            if not one.name.endswith(PLAIN):
                yield f"{name} was not copied: it is no plain text or table of tokens"
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(one, folder / name)
            if one.suffix == ".json" and _without_code(folder / name):
                yield f"{name} asked for code of its own (auto_map), which was taken out"


def _without_code(path: Path) -> bool:
    """Take the request for code of its own out of a JSON file; say whether there was one."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: is no JSON ({type(error).__name__}).") from error
    if not isinstance(data, dict) or "auto_map" not in data:
        return False
    del data["auto_map"]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True
