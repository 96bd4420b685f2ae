"""Nothing is trusted that was not checked: prove on a shallow random copy that a configuration can be cut.

For every axis: cut == masked, the cut model has the predicted number of parameters, saves and reloads with no
key missing or left over, answers the same afterwards, and generates. No weights of the real model are needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from slimlmm import checkpoint
from slimlmm.anatomy import describe, predict_parameters, resized
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.errors import UserError
from slimlmm.families import BACKBONES, Inputs, family_of
from slimlmm.surgery import cut, masked
from slimlmm.token_ids import referenced

#: largest |cut - masked| of the logits, as a share of the largest logit
TOLERANCE = 1e-5
#: layers per tower of the shallow copy
DEPTH = 3
_STOCK: Any = AutoModelForImageTextToText
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Verdict on one axis. `error`: largest |cut - masked| over the largest |logit|, None without one."""

    axis: str
    ok: bool
    error: float | None = None
    reason: str = ""


def self_check(config: Any, axes: Iterable[str] | None = None) -> list[Check]:
    """Check these axes of `config` (default: all not refused) on a random copy of few layers.

    One verdict per axis; what fails there is a reason, never an exception.
    """
    names = list(axes) if axes is not None else list(describe(config).sizes)
    copied = shallow(config)
    anatomy = describe(copied)
    model = random_model(copied)
    batch = picture_prompt(copied)
    return [_check(model, anatomy, name, batch) for name in names]


def shallow(config: Any, depth: int = DEPTH) -> Any:
    """Return `config` with at most `depth` blocks per tower (whole periods where blocks go by periods)."""
    axes = describe(config).axes.values()
    sizes = {
        axis.name: min(axis.size, max(depth // axis.multiple, 2) * axis.multiple)
        for axis in axes
        if axis.kind == "blocks" and not axis.refusal
    }
    return resized(config, sizes)


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a random model of `config` in which all matters: unit gain in matrices, jitter in vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _STOCK.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.train(False)
    return model


def some_units(axis: Axis, size: int, seed: int = 0) -> Keep:
    """Return a random choice of units that brings `axis` to `size`."""
    rng = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.units, generator=rng)[: group.kept(size)].sort().values
        for group in axis.groups
    }


def _check(model: PreTrainedModel, anatomy: Anatomy, name: str, batch: Batch) -> Check:
    try:
        axis = anatomy.axis(name)
        smaller = [size for size in axis.choices() if size < axis.size]
        if not smaller:
            return Check(axis=name, ok=True, reason=f"{axis.size} is the smallest size that the config can say")
        error = _prove(model, anatomy, axis, smaller[(len(smaller) - 1) // 2], batch)
    except UserError as refused:
        return Check(axis=name, ok=False, reason=str(refused))
    except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as broken:
        return Check(axis=name, ok=False, reason=f"{type(broken).__name__}: {broken}")
    if error > TOLERANCE:
        reason = f"the cut model differs from the masked one by {error:.1e} of the largest logit"
        return Check(axis=name, ok=False, error=error, reason=reason)
    return Check(axis=name, ok=True, error=error)


@torch.no_grad()
def _prove(model: PreTrainedModel, anatomy: Anatomy, axis: Axis, size: int, batch: Batch) -> float:
    """Return the relative difference of cut and masked logits; raise if anything else does not hold."""
    keep = _kept_tokens(model, axis, batch) if axis.kind == "vocab" else some_units(axis, size)
    size = len(keep["vocab"]) if axis.kind == "vocab" else size
    student = cut(model, anatomy, axis.name, keep)
    inputs = dict(batch)
    if axis.kind == "vocab":
        inputs["input_ids"] = torch.searchsorted(keep["vocab"], batch["input_ids"])
    with masked(model, anatomy, axis.name, keep):
        wanted = model(**batch).logits
    if axis.kind == "vocab":
        wanted = wanted[..., keep["vocab"]]
    elif torch.allclose(wanted, model(**batch).logits, rtol=0, atol=1e-4 * float(wanted.abs().max())):
        raise UserError("masking half of the units changes nothing, so nothing was proven")
    got = student(**inputs).logits
    counted = sum(parameter.numel() for parameter in student.parameters())
    predicted = predict_parameters(model.config, {axis.name: size})
    if counted != predicted:
        raise UserError(f"predicted {predicted} parameters, counted {counted}")
    _prove_folder(student, inputs, got)
    return float((got - wanted).abs().max() / wanted.abs().max())


def _prove_folder(student: PreTrainedModel, inputs: Batch, logits: Tensor) -> None:
    """Save, reload with the stock class, compare, generate."""
    with tempfile.TemporaryDirectory() as parent:
        checkpoint.save(student, None, Path(parent) / "model", source=parent)
        again = checkpoint.load(Path(parent) / "model").model
    if not torch.allclose(again(**inputs).logits, logits, rtol=0, atol=1e-6 * float(logits.abs().max())):
        raise UserError("the model gives other logits after saving and loading")
    length = inputs["input_ids"].shape[1]
    generate: Any = again.generate
    answer: Tensor = generate(**inputs, max_new_tokens=2, min_new_tokens=1, do_sample=False)
    if answer.shape[1] <= length:
        raise UserError("the cut model generates nothing")


def _kept_tokens(model: PreTrainedModel, axis: Axis, batch: Batch) -> Keep:
    """Keep every second token, and all that the prompt or a configuration mentions."""
    data = model.config.to_dict()
    part = data[family_of(model.config).tower("text").config]
    mentioned = referenced(data, part, model.generation_config.to_dict())
    kept = {*range(0, axis.size, 2), *batch["input_ids"].flatten().tolist()}
    kept |= {token for token in mentioned if token < axis.size}
    return {"vocab": torch.tensor(sorted(kept))}


def picture_prompt(config: Any, seed: int = 0) -> Batch:
    """Return one valid random input for `config`: a picture, its placeholders, and eight text tokens."""
    rng = torch.Generator().manual_seed(seed)
    family = family_of(config)
    pictures, count = _PICTURES[family.inputs](config, rng)
    data = config.to_dict()
    text = data[family.tower("text").config]
    image = next(data[key] for key in ("image_token_id", "image_token_index") if key in data)
    special = set(referenced(data, text))
    plain = torch.tensor([token for token in range(text["vocab_size"]) if token not in special])
    words = plain[torch.randint(len(plain), (8,), generator=rng)]
    ids = torch.cat((words[:2], torch.full((count,), image), words[2:])).unsqueeze(0)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    if family.inputs == "qwen":
        batch["mm_token_type_ids"] = (ids == image).long()
    return batch


def _square(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _grid(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    vision = config.vision_config
    side = _square(vision.image_size)
    count = (side // _square(vision.patch_size)) ** 2 + BACKBONES[vision.model_type].class_tokens
    count -= config.vision_feature_select_strategy == "default"
    return {"pixel_values": torch.randn(1, 3, side, side, generator=rng)}, count


def _idefics(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    side, patch = _square(config.vision_config.image_size), _square(config.vision_config.patch_size)
    count = (side // patch) ** 2 // config.scale_factor**2
    return {"pixel_values": torch.randn(1, 1, 3, side, side, generator=rng)}, count


def _qwen(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    vision = config.vision_config
    side = 2 * vision.spatial_merge_size
    length = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(side * side, length, generator=rng)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}, 4


def _queries(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    side = _square(config.vision_config.image_size)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=rng)}, config.num_query_tokens


_PICTURES: Mapping[Inputs, Callable[[Any, torch.Generator], tuple[Batch, int]]] = {
    "grid": _grid,
    "idefics": _idefics,
    "qwen": _qwen,
    "queries": _queries,
}
