"""What a serving engine would refuse in a configuration, as far as arithmetic on the configuration tells.

The checks are those of vLLM's own source (docs/deploy.md has files and commits); vLLM itself is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy
from slimlmm.errors import UserError
from slimlmm.families import backbone_of, family_of
from slimlmm.resizing import resized
from slimlmm.rope import SECTIONS
from slimlmm.rope import parameters_of as rope_parameters_of
from slimlmm.views import View

#: head sizes that FlashAttention is built for are multiples of this, up to the largest; Triton's kernels start at the smallest
HEAD_MULTIPLE, HEAD_LARGEST, HEAD_SMALLEST = 8, 256, 32
#: model types that engines refuse in float16
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text")
#: fields that a top-level configuration may repeat from its text part; an engine may read either
REPEATED = ("hidden_size", "vocab_size", "tie_word_embeddings")


def warnings_of(config: Any, tensor_parallel: int = 1) -> list[str]:
    """Return what would keep a stock engine from serving `config` on `tensor_parallel` devices, one plain sentence each.

    Query heads H and key/value groups K on n devices: n must divide H, and n must divide K or K divide n. FFN widths must be
    divided by n; the vocabulary need not be, it is padded. head_dim has to be one that attention kernels are built for.
    """
    heads = [text for view in _views(config) if view.tower.name == "text" for text in _heads(view)]
    return _repeats(config) + _format(config) + unsplittable(config, tensor_parallel) + heads


def unsplittable(config: Any, tensor_parallel: int) -> list[str]:
    """Return the sizes of `config` that `tensor_parallel` devices cannot share, one plain sentence each."""
    if tensor_parallel == 1:
        return []
    return [text for view in _views(config) for text in _split(view, describe(config), tensor_parallel)]


def _views(config: Any) -> list[View]:
    """Return the towers whose sizes are plain numbers."""
    family, found = family_of(config), []
    for tower in family.towers:
        backbone = backbone_of(config, tower)
        if backbone is not None and not set(backbone.refusals) >= {"blocks", "ffn", "kv_groups", "width"}:
            found.append(View(config, family, tower, backbone))
    return found


def refuse_unsplittable(config: Any, sizes: Mapping[str, int], tensor_parallel: int = 1) -> list[str]:
    """Return the warnings of `config` at these sizes; refuse sizes that the devices cannot share, with the numbers."""
    student = resized(config, sizes)
    before, after = unsplittable(config, tensor_parallel), unsplittable(student, tensor_parallel)
    if new := [text for text in after if text not in before]:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(f"{wanted} cannot be split over {tensor_parallel} devices:\n  " + "\n  ".join(new))
    return warnings_of(student, tensor_parallel)


def _split(view: View, anatomy: Anatomy, n: int) -> list[str]:
    """Say which sizes of a tower `n` devices cannot share."""
    tower, found = view.tower.name, []
    if view.heads % n:
        found.append(f"{tower}: {view.heads} query heads cannot be shared by {n} devices.")
    if view.kv % n and n % view.kv:
        found.append(f"{tower}: {view.kv} key/value groups and {n} devices: neither number divides the other.")
    for name in (f"{tower}.ffn", f"{tower}.expert_ffn"):
        axis = anatomy.axes.get(name)
        if axis is not None and axis.size % n:
            found.append(f"{name}: {axis.size} neurons cannot be shared by {n} devices.")
    return found


def _heads(view: View) -> list[str]:
    """Say what is wrong with the size of a text tower's heads."""
    name = view.backbone.head_dim
    stated = view.value(name)
    size, found = int(stated or view.width // view.heads), []
    if not stated and view.width % view.heads:
        found.append(
            f"text: the config names no {name}, and an engine derives {view.width} // {view.heads} = {size} channels a head."
        )
    if stated and not view.free_heads and stated != view.width // view.heads:
        found.append(
            f"text: {name} is {stated}, but the model's own code has {view.width} / {view.heads} channels a head."
        )
    if size % HEAD_MULTIPLE or size > HEAD_LARGEST:
        found.append(
            f"text: heads of {size} channels; FlashAttention takes multiples of {HEAD_MULTIPLE} up to {HEAD_LARGEST}."
        )
    if size < HEAD_SMALLEST:
        found.append(f"text: heads of {size} channels; Triton's attention kernels start at {HEAD_SMALLEST}.")
    rope = view.value("rope_parameters")
    if any(one.get("rope_type") == "longrope" for one in rope_parameters_of(view).values()):
        found += _long_rope(view)
    sections = rope.get("mrope_section") if isinstance(rope, dict) else None
    rotary = int(size * (rope.get("partial_rotary_factor") or 1)) if sections else size
    if sections and sum(sections) != rotary // 2:
        found.append(
            f"text: mrope_section {sections} adds up to {sum(sections)}, not to half of {rotary} rotated channels."
        )
    return found


def _long_rope(view: View) -> list[str]:
    """Say where an engine would turn chosen rotary pairs otherwise than the stock class."""
    if view.backbone.mrope:
        return [
            f"text: longrope and {SECTIONS}: vLLM's get_rope drops the coordinates of pictures; keep evenly spaced pairs "
            "(a head_dim that divides the old one by a whole number)."
        ]
    if view.backbone.neighbours:
        return ["text: longrope on neighbouring pairs, which vLLM refuses (Phi3LongRoPE only supports neox_style)."]
    return []


def _repeats(config: Any) -> list[str]:
    """Say which fields of the text part the top level repeats with another value."""
    data = config.to_dict()
    part = family_of(config).tower("text").config
    text = data.get(part) if part else None
    if not isinstance(text, dict):
        return []
    return [
        f"config.json says {name} = {data[name]!r} on top and {text[name]!r} in {part}; an engine may read either."
        for name in REPEATED
        if name in data and name in text and data[name] is not None and data[name] != text[name]
    ]


def _format(config: Any) -> list[str]:
    kinds = {config.model_type, getattr(getattr(config, "text_config", None), "model_type", "")}
    if "float16" in str(config.dtype) and "bfloat16" not in str(config.dtype) and kinds & set(NO_FLOAT16):
        return [f"{config.model_type}: weights in float16, which engines refuse for this model; use bfloat16."]
    return []
