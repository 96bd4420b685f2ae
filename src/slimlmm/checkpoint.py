"""Models and processors as plain Hugging Face folders: safetensors only, written whole or not at all.

A folder is written under a temporary name beside its target, checked (every key and shape, on the meta
device), flushed to disk and renamed. The file ``slimlmm.json`` in it says that slimlmm wrote it and may
replace it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from slimlmm import __version__
from slimlmm.errors import UserError
from slimlmm.families import stock_class
from slimlmm.files import refuse_unwritable
from slimlmm.intake import broken_config, check_config, check_depth, check_files, check_sizes, raw_config
from slimlmm.probing import skeleton
from slimlmm.shards import Shards
from slimlmm.weights import Weights

MARKER = "slimlmm.json"
GENERATION = "generation_config.json"
#: largest file of weights, as for ``save_pretrained``
SHARD = "50GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
#: files that belong to the processor and the tokenizer, copied when the processor itself cannot be built here
PROCESSOR_FILES = (
    "*preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
#: what is downloaded of a model on the hub: no pickles, no other runtimes' weights
_WANTED = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.py", *PROCESSOR_FILES]
_PROCESSORS: Any = AutoProcessor
_LOGGING: Any = logging
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in eval mode, its processor (None where it cannot be built: `note` says why), its folder.

    `stored` is the number format that its files have, whatever it was loaded as.
    """

    model: PreTrainedModel
    processor: Any
    path: Path
    note: str = ""
    stored: torch.dtype = torch.float32


def load(
    model_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a local folder (never online) or a hub id; refuse pickled weights and incomplete checkpoints."""
    folder = folder_of(model_id)
    options = _offline(trust_remote_code)
    try:
        config = _checked_config(str(folder), options)
        if not trust_remote_code:  # code of the hub names and keeps its weights as it likes
            opened(folder, config)
        stored = config.dtype or torch.float32
        with _quiet():
            model, info = stock_class(config).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except _BROKEN as error:
        raise UserError(f"{model_id}: cannot be loaded. {_first_line(error)}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise UserError(
            f"{model_id}: {len(absent)} weights are missing or of another shape than its config says, "
            f"first {absent[0]}."
        )
    processor, note = _load_processor(str(folder), options)
    model = model.to(device) if device is not None else model
    return Loaded(model=model.eval(), processor=processor, path=folder, note=note, stored=stored)


def usual_device() -> torch.device:
    """Return the device that models run on unless otherwise said: the GPU where torch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_to_answer(
    model_id: str | Path, *, device: str | torch.device | None = None, trust_remote_code: bool = False
) -> Loaded:
    """Load as `load` does, in float32, to the usual device, and refuse a model whose processor cannot be built."""
    loaded = load(model_id, device=device or usual_device(), trust_remote_code=trust_remote_code)
    if loaded.processor is None:
        raise UserError(f"{model_id}: has no processor that can be loaded. {loaded.note}")
    return loaded


def open_weights(model_id: str | Path, *, trust_remote_code: bool = False) -> Weights:
    """Return the weights of a local folder or a hub id, checked against its configuration, none of them read yet."""
    folder = folder_of(model_id)
    try:
        return opened(folder, _checked_config(str(folder), _offline(trust_remote_code)))
    except _BROKEN as error:
        raise UserError(f"{model_id}: cannot be read. {_first_line(error)}") from error


def opened(folder: Path, config: Any) -> Weights:
    """Return the weights of a folder, checked against this configuration."""
    check_depth(str(folder), config.to_dict(), len(Shards(folder).entries))
    check_sizes(str(folder), config)
    return Weights(folder, config, skeleton(config))


def _offline(trust_remote_code: bool) -> dict[str, bool]:
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def load_config(model_id: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the stock configuration of a local folder (never online) or a hub id; no weights are read."""
    local = _local_folder(model_id)
    options = {"local_files_only": local is not None, "trust_remote_code": trust_remote_code}
    try:
        return _checked_config(str(local or model_id), options)
    except _BROKEN as error:
        place = "" if local else f"There is no folder {model_id}, and as a hub id: "
        raise UserError(f"{model_id}: its configuration cannot be read. {place}{_first_line(error)}") from error


def load_processor(model_id: str | Path, config: Any, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the processor and the generation config of a local folder (never online) or a hub id; no weights are read.

    Raises:
        UserError: the processor cannot be built; the message says why.
    """
    local = _local_folder(model_id)
    where, only = str(local or model_id), local is not None
    processor, note = _load_processor(where, {"local_files_only": only, "trust_remote_code": trust_remote_code})
    if processor is None:
        raise UserError(f"{model_id}: has no processor that can be loaded. {note}")
    try:
        generation = GenerationConfig.from_pretrained(where, local_files_only=only)
    except OSError as error:
        if local is not None and (local / GENERATION).is_file():
            raise UserError(f"{model_id}: its {GENERATION} cannot be read. {_first_line(error)}") from error
        generation = GenerationConfig.from_model_config(config)  # what the stock class does without
    except Exception as error:  # as for configurations
        raise UserError(f"{model_id}: its {GENERATION} cannot be understood. {_first_line(error)}") from error
    return processor, generation


def folder_of(model_id: str | Path) -> Path:
    """Return the folder of a model, a hub id downloaded or taken from the cache; refuse what holds no weights to be read."""
    folder = _local_folder(model_id)
    if folder is None:
        try:
            with _quiet():
                folder = Path(snapshot_download(str(model_id), allow_patterns=_WANTED))
        except _BROKEN as error:
            raise UserError(
                f"{model_id}: cannot be loaded. There is no folder of that name, and as a hub id: {_first_line(error)}"
            ) from error
    check_files(folder)
    return folder


def _local_folder(model_id: str | Path) -> Path | None:
    """Return the folder that `model_id` names, None when it can only be a hub id."""
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path
    if isinstance(model_id, Path) or path.is_absolute() or len(path.parts) > 2 or str(model_id).startswith((".", "~")):
        kind = "a file, not a model folder" if path.exists() else "no such folder"
        raise UserError(f"{model_id}: {kind}.")
    return None


def _checked_config(where: str, options: dict[str, bool]) -> Any:
    """Return the configuration of an image-text-to-text model, and refuse any other."""
    check_depth(where, raw_config(Path(where)))
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(where, **options)
        check_config(where, config, options["trust_remote_code"])
    except StrictDataclassError as error:
        problems = broken_config(Path(where)) or " ".join(str(error).split())
        raise UserError(f"{where}: config.json contradicts itself: {problems}") from error
    except (UserError, *_BROKEN):
        raise
    # the classes of configurations check little, so a wrong value may break any line of theirs
    except Exception as error:
        raise UserError(f"{where}: config.json cannot be understood: {_first_line(error)}") from error
    return config


def _load_processor(where: str, options: dict[str, bool]) -> tuple[Any, str]:
    try:
        return _PROCESSORS.from_pretrained(where, **options), ""
    except BaseException as error:  # as for configurations; a panic of the tokenizers' library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lacking = re.search(r"requires the (\S+) library", str(error)) if isinstance(error, ImportError) else None
        if lacking:
            name = lacking[1].lower()
            return None, f"no processor: it needs {name}, which is not installed; pip install {name}."
        return None, f"no processor: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loader's progress bars and reports: what they would say is checked and said by us."""
    level, bars = _LOGGING.get_verbosity(), _LOGGING.is_progress_bar_enabled()
    _LOGGING.set_verbosity(_LOGGING.CRITICAL)
    _LOGGING.disable_progress_bar()
    try:
        yield
    finally:
        _LOGGING.set_verbosity(level)
        if bars:
            _LOGGING.enable_progress_bar()


def save(
    model: PreTrainedModel,
    processor: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_size: int | str = SHARD,
    prove: Callable[[Path], object] | None = None,
) -> None:
    """Write model, config, generation config, processor, tokenizer and chat template as one plain folder.

    With ``processor=None`` the processor's files are copied from `source` (default: where the model was
    loaded from). An existing folder is replaced only if slimlmm wrote it (or it is empty); any failure leaves
    it as it was, one of `prove` too, which gets the whole folder before it appears.
    """
    origin = Path(source or model.name_or_path or os.devnull)
    size = shard_size(max_shard_size)
    written(folder, lambda partial: _write(model, processor, partial, origin, size), prove)


def shard_size(text: int | str) -> int:
    """Return a size of files such as "5GB" in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", str(text).strip().upper())
    size = text if isinstance(text, int) else int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise UserError(f"--max-shard-size {text!r}: give a size such as 5GB or 500MB.")
    return size


def written(folder: str | Path, write: Callable[[Path], None], prove: Callable[[Path], object] | None = None) -> None:
    """Let `write` fill a folder beside `folder`, check it (`prove` too), and put it in the place of `folder`, all or nothing."""
    with replaced(folder) as partial:
        write(partial)
        _sign(partial)
        verify(partial)
        if prove is not None:
            prove(partial)


@contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which is flushed and takes its place when the block ends, and goes if that fails.

    Raises:
        UserError: `folder` holds what slimlmm did not write, or the disk refuses.
    """
    target = Path(folder).expanduser().absolute()
    refuse_foreign(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        yield partial
        _flush(partial)
        _swap(partial, target)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        raise UserError(f"{target}: cannot be written. {_first_line(error)}") from error
    except BaseException:
        _remove(partial)
        raise


def as_stored(model: PreTrainedModel, stored: torch.dtype) -> PreTrainedModel:
    """Put the model's weights, in place, into the number format of the files that it came from; refuse what overflows there."""
    unsaved = [(one, name, one._buffers[name]) for one in model.modules() for name in one._non_persistent_buffers_set]
    # no file holds them: rotary frequencies, some of them complex, stay as loading would make them
    for module, name, _ in unsaved:
        module._buffers[name] = None
    within: PreTrainedModel = nn.Module.to(model, stored)
    for module, name, buffer in unsaved:
        module._buffers[name] = buffer
    broken = [name for name, value in within.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise UserError(
            f"{len(broken)} weights do not fit into {stored}, first {broken[0]}; give the model in bfloat16 or float32."
        )
    return within


@contextmanager
def valued_as_stored(model: PreTrainedModel, stored: torch.dtype) -> Iterator[None]:
    """Within the block weights have the values that files of this number format hold of them (`as_stored`), then their own again.

    Holds one more copy of the weights that are of another format.
    """
    saved = {one.data_ptr(): one for one in model.state_dict().values()}.values()
    changed = [(one, one.clone()) for one in saved if one.is_floating_point() and one.dtype != stored]
    try:
        for one, own in changed:
            one.copy_(own.to(stored))
        yield
    finally:
        for one, own in changed:
            one.copy_(own)


def refuse_foreign(target: Path) -> None:
    """Raise a UserError if `target` exists and slimlmm did not write it, or if nothing can be written beside it."""
    refuse_unwritable(target.parent)
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target}: exists and is no folder.")
    if any(target.iterdir()) and not (target / MARKER).is_file():
        raise UserError(f"{target}: holds files that slimlmm did not write; choose another folder or empty it.")


def _write(model: PreTrainedModel, processor: Any, folder: Path, source: Path, max_shard_size: int) -> None:
    with _quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    if processor is not None:
        _forget_last_call(processor)
        processor.save_pretrained(folder)
    elif source.is_dir():
        copy_processor(source, folder)


def _forget_last_call(processor: Any) -> None:
    """Take off padding and truncation of a fast tokenizer's last call, which its file would hold; each call sets its own."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "is_fast", False):
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the files of processor, tokenizer and chat template as they are."""
    for path in sorted({path for pattern in PROCESSOR_FILES for path in source.glob(pattern)}):
        if path.is_dir():  # several templates have a folder of their own
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _sign(folder: Path) -> None:
    """Say that slimlmm wrote the folder, and let all read its weights, which are written for their owner alone."""
    (folder / MARKER).write_text(json.dumps({"slimlmm": __version__}) + "\n")
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / MARKER, weights)


def write_plain(model: PreTrainedModel, folder: Path) -> None:
    """Write a model without a processor into an empty folder, neither checked nor flushed: for a proof that reads it again."""
    _write(model, None, folder, Path(os.devnull), shard_size(SHARD))


def verify(folder: Path, device: str = "meta") -> PreTrainedModel:
    """Return the model of `folder`; raise a UserError unless the stock class finds every key, no other, at the right shape."""
    try:
        with _quiet():
            model, info = stock_class(AutoConfig.from_pretrained(folder, local_files_only=True)).from_pretrained(
                folder,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                device_map=device,
            )
    except _BROKEN as error:
        raise UserError(f"{folder}: does not load again. {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            keys = sorted(map(str, info[kind]))[:3]
            raise UserError(f"{folder}: does not load again; {kind.replace('_', ' ')}: {keys}.")
    found: PreTrainedModel = model
    return found


def _flush(folder: Path) -> None:
    """Force every file of `folder`, and the list of them, to disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`."""
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
