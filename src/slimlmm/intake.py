"""What a folder must be before anything is read from it: an image-text model, whole, of its own weights, not quantised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from slimlmm.errors import UserError
from slimlmm.probing import skeleton

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MODEL_TYPES = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
#: keys under which a configuration says that its weights are quantised
_QUANTISED = ("quantization_config", "compression_config")
_ADAPTER = "adapter_config.json"
#: blocks that are built at most, and those that are whatever the weights: parts that are left out may have a usual number
MOST_BLOCKS, _USUAL_BLOCKS = 10_000, 1000


def check_files(folder: Path) -> None:
    """Raise a UserError unless the folder has a configuration and safetensors, and is no adapter and no GGUF."""
    names = sorted(path.name for path in folder.iterdir())
    if _ADAPTER in names:
        raise UserError(f"{folder}: {_adapter(folder)}")
    weights = any(name.endswith(".safetensors") for name in names)
    gguf = next((name for name in names if name.endswith(".gguf")), "")
    if gguf and not weights:
        raise UserError(
            f"{folder}: holds GGUF weights ({gguf}), which are for other runtimes and mostly quantised. "
            f"Give the original safetensors folder that they were made from."
        )
    if "config.json" not in names:
        raise UserError(f"{folder}: no config.json, so this is no model folder.")
    if weights:
        return
    pickled = next((name for name in names if name.endswith(PICKLES)), "")
    if pickled:
        raise UserError(
            f"{folder}: holds only pickled weights ({pickled}), which can run any code when loaded. "
            f"`slimlmm convert {folder} OUT` writes them as safetensors and runs none of it."
        )
    raise UserError(f"{folder}: no *.safetensors file, so there are no weights to load.")


def _adapter(folder: Path) -> str:
    """Say what to do with an adapter, and which model it belongs to."""
    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    whole = f"of {base}" if base else f"whose base {_ADAPTER} does not name"
    return (
        f"is an adapter (PEFT) {whole}, not a whole model. Load the base with the adapter, call merge_and_unload(), then "
        f"save_pretrained (and save the processor beside it); give that folder."
    )


def check_config(where: str, config: Any, trust_remote_code: bool) -> None:
    """Raise a UserError unless `config` is of an image-text model whose weights are not quantised."""
    if quantised := _method(config.to_dict()):
        raise UserError(
            f"{where}: its weights are quantised ({quantised}); units of such weights cannot be cut or scored. Give the "
            f"original (bfloat16, float16 or float32) or a dequantised folder, and quantise the student."
        )
    for name, part in config.to_dict().items():
        if isinstance(part, dict) and not isinstance(told := part.get("model_type", ""), str):
            raise UserError(f"{where}: config.json says {name}.model_type = {str(told)[:80]}, which is no text.")
    model_type = config.model_type
    if model_type in _MODEL_TYPES or trust_remote_code:
        return
    only = "a language model without pictures; " if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""
    raise UserError(
        f"{where}: model type {model_type!r} is no image-text-to-text model of transformers; {only}"
        f"slimlmm takes models of pictures and text only."
    )


def _method(data: Mapping[str, Any]) -> str:
    """Return how the weights of a configuration, or of a part of it, are quantised, "" where they are not."""
    for key, value in data.items():
        if key in _QUANTISED and value:
            return str(value.get("quant_method", "unknown method")) if isinstance(value, dict) else "unknown method"
        if isinstance(value, dict) and (found := _method(value)):
            return found
    return ""


def check_depth(where: str, data: Mapping[str, Any], tensors: int | None = None) -> None:
    """Raise a UserError where a configuration has more blocks than tensors on disk, or than any model: building may never end."""
    most = MOST_BLOCKS if tensors is None else max(tensors, _USUAL_BLOCKS)
    for name, count in _depths(data):
        if count > most:
            known = "at most" if tensors is None else f"but there are only {tensors:,} tensors on disk, so at most"
            raise UserError(
                f"{where}: config.json says {name} = {count:,.0f}, {known} {most:,} are built. Give the config.json that belongs "
                f"to the weights."
            )


def _depths(data: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield each number of blocks in a configuration with its name."""
    left: list[tuple[str, Any]] = list(data.items())
    while left:  # no recursion: files may be nested deeper than that goes
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{name}.{key}", one) for key, one in value.items()]
        elif isinstance(value, int | float) and str(name).endswith(("layers", "depth")):
            yield name, value


def check_sizes(where: str, config: Any) -> None:
    """Raise a UserError, with what the class says, where a model of this configuration cannot be built."""
    try:
        skeleton(config)
    except Exception as error:  # a wrong value may break any line of any class
        raise UserError(
            f"{where}: config.json contradicts itself, so no {config.model_type!r} model can be built of it: "
            f"{type(error).__name__}: {error}"
        ) from error


def broken_config(folder: Path) -> str:
    """Return all that the classes of a configuration and of its parts say against it, "" where they say nothing."""
    return "; ".join(_problems(raw_config(folder)))


def raw_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says before any class reads it, nothing where it is not there or cannot be read."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _problems(data: dict[str, Any]) -> list[str]:
    """Return what the class of each part says, then what that of the whole says of itself."""
    parts = {
        key: part for key, part in data.items() if isinstance(part, dict) and isinstance(part.get("model_type"), str)
    }
    inside = {key: _problems(part) for key, part in parts.items()}
    try:
        AutoConfig.for_model(**data)
        own = ""
    except StrictDataclassError as error:
        own = " ".join(str(error).split())
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        own = f"{data.get('model_type')}: {type(error).__name__}: {error}"
    found = [f"{key}: {problem}" for key, problems in inside.items() for problem in problems]
    return found if not own or any(one.endswith(own) for one in found) else [*found, own]
