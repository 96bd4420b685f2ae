"""A configuration at other sizes: what to write, what it counts, which blocks it does not need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from slimlmm.anatomy import describe
from slimlmm.axes import Axis
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.probing import Field, Place, edited, get, skeleton
from slimlmm.views import View, absolute, as_list, block_changes, shared_blocks, view_of, vocab_fields


def block_kinds(config: Any, axis: Axis) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of each kind, as the lists per block tell them apart; a shallow copy has one of each."""
    view = view_of(config, axis.name.partition(".")[0])
    kinds: dict[tuple[str, str], list[int]] = {}
    for name in view.backbone.per_layer:
        for layer, value in enumerate(view.value(name) or ()):
            kinds.setdefault((name, str(value)), []).append(layer)
    for name in view.backbone.indexes:
        for layer in range(view.blocks):
            kinds.setdefault((name, str(layer in (view.value(name) or ()))), []).append(layer)
    for name in view.backbone.counts:
        for layer in range(view.blocks):
            kinds.setdefault((name, str(layer < (view.value(name) or 0))), []).append(layer)
    if view.backbone.sharing:
        for layer in range(view.blocks):
            kinds.setdefault((view.backbone.sharing, str(layer in shared_blocks(view))), []).append(layer)
    return tuple(map(tuple, kinds.values()))


def dead_blocks(config: Any) -> dict[str, list[int]]:
    """Return the blocks that never reach the output, by axis: vision blocks behind the last one read."""
    family = family_of(config)
    if not family.feature_layer:
        return {}
    view = view_of(config, "vision")
    last = max(absolute(index, view.blocks) for index in as_list(get(config, family.feature_layer)))
    return {"vision.blocks": list(range(last, view.blocks))} if last < view.blocks else {}


def resized(config: Any, sizes: Mapping[str, int], keep_blocks: Mapping[str, Iterable[int]] | None = None) -> Any:
    """Return the stock configuration with these axis sizes (all at once), or refuse with the numbers.

    `keep_blocks` names the units that stay of a block axis; without it the first ones stay.
    """
    anatomy = describe(config)
    keep_blocks = keep_blocks or {}
    changes: dict[Field, Any] = {}
    # blocks last: they renumber what others write block by block
    for name, size in sorted(sizes.items(), key=lambda item: anatomy.axis(item[0]).kind == "blocks"):
        axis = anatomy.axis(name)
        if not 0 < size <= axis.size:
            raise UserError(f"{name}={size}: must be between 1 and its present size {axis.size}.")
        if axis.kind == "vocab":
            changes |= dict.fromkeys(vocab_fields(config), size)
            continue
        if name in family_of(config).projector:
            changes[family_of(config).projector[name]] = size
            continue
        view = view_of(config, name.partition(".")[0])
        if axis.kind == "blocks":
            changes |= block_changes(view, _layers(axis, size, keep_blocks.get(name)), changes)
        else:
            changes |= _changes(view, axis, size, sizes)
    try:
        return edited(config, changes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        reason = error.__cause__ or error
        raise UserError(f"{wanted} cannot be said by the {config.model_type!r} config: {reason}") from error


def _layers(axis: Axis, size: int, kept: Iterable[int] | None) -> list[int]:
    """Return the layers that stay of an axis of blocks: those of the units `kept`, or of the first that may."""
    group = axis.groups[0]
    units = sorted(int(unit) for unit in kept) if kept is not None else group.first(group.kept(size)).tolist()
    return [unit * group.stride + i for unit in units for i in range(group.stride)]


def _changes(view: View, axis: Axis, size: int, sizes: Mapping[str, int]) -> dict[Field, Any]:
    """Fields to write for one axis; `sizes` holds the other ones that change with it."""
    tower = view.tower.name
    if axis.name == f"{tower}.kv_groups":
        return view.set_heads(view.heads // view.kv * size) | view.pin()
    if axis.name == f"{tower}.width":
        if size % axis.multiple and not view.backbone.width_by_heads:
            possible = ", ".join(map(str, axis.choices()))
            reason = "its experts are multiplied in rows of 16 bytes"
            if not view.free_heads:
                reason = f"heads of {view.width // view.heads} channels go with it"
            raise UserError(
                f"{axis.name}={size}: {reason}, so it must be a multiple of {axis.multiple}. Possible: {possible}."
            )
        return view.set_width(size)
    if axis.name == f"{tower}.expert_ffn":
        return {view.field(view.backbone.expert_ffn): size}
    width = sizes.get(f"{tower}.width", view.width)
    if not view.backbone.ffn_is_ratio:
        return {view.field(view.backbone.ffn): size}
    if view.free_ratio:
        return {view.field(view.backbone.ffn): size / width}
    if size % width:
        raise UserError(
            f"{axis.name}={size}: {view.backbone.ffn} is a whole number of the width {width}. "
            f"Possible: {', '.join(str(width * n) for n in range(1, view.ffn // width + 1))}."
        )
    return {view.field(view.backbone.ffn): size // width}


def predict_parameters(
    config: Any, sizes: Mapping[str, int], keep_blocks: Mapping[str, Iterable[int]] | None = None
) -> int:
    """Return the exact number of parameters (tied ones once) of `config` at these sizes, from its shapes.

    `keep_blocks` as in `resized`: blocks of different kinds differ in size.
    """
    anatomy, whole, keep_blocks = describe(config), skeleton(config), keep_blocks or {}
    lengths: dict[Place, int] = {}
    gone: list[str] = []
    # widths first: where an FFN follows the width, its own axis has the last word
    for name, size in sorted(sizes.items(), key=lambda item: anatomy.axis(item[0]).kind != "width"):
        axis = anatomy.axis(name)
        if axis.kind == "blocks":
            group = axis.groups[0]
            kept = {int(unit) for unit in keep_blocks.get(name, group.first(group.kept(size)).tolist())}
            gone += [f"{axis.layers}.{layer}." for layer in range(axis.size) if layer // group.stride not in kept]
        for group in axis.groups:
            for slot in group.slots:
                old = whole.shapes[slot.parameter][slot.dim]
                lengths[slot.parameter, slot.dim] = slot.length(old, group.kept(size), group.units)
    return sum(
        math.prod(lengths.get((name, dim), length) for dim, length in enumerate(whole.shapes[name]))
        for name, _ in whole.model.named_parameters()
        if not name.startswith(tuple(gone))
    )
