"""A configuration at other sizes: what to write, what it counts, which blocks it does not need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, noun_of
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.probing import Field, Place, edited, get, skeleton
from slimlmm.rope import settings_after
from slimlmm.views import View, absolute, as_list, block_changes, merges, ratio, shared_blocks, view_of, vocab_fields

#: first row, row behind the last one, share that stays
_Stretch = tuple[int, int, Fraction]
#: widths write head_dim as it is, so that head_dim comes after them; blocks last: they renumber what others write block by block
_ORDER = {"width": 0, "head_dim": 2, "blocks": 3, "decoder_blocks": 3}


def block_kinds(config: Any, axis: Axis) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of each kind, as the lists per block tell them apart; a shallow copy has one of each."""
    view = view_of(config, axis.name.partition(".")[0])
    if axis.noun == "decoder_blocks":  # its blocks are all alike
        return ()
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
    for number in merges(view).values():
        for layer in range(view.blocks):
            kinds.setdefault(("merged", str(layer <= number)), []).append(layer)
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


def cut_in_turn(config: Any, sizes: Mapping[str, int]) -> Any:
    """Return the configuration after cuts of these axes one after the other, as a round makes them.

    An FFN that is told as a multiple of a width goes with the width when that is cut behind it.
    """
    for axis, size in sizes.items():
        config = resized(config, {axis: size})
    return config


def resized(config: Any, sizes: Mapping[str, int], keep: Mapping[str, Iterable[int]] | None = None) -> Any:
    """Return the stock configuration with these axis sizes (all at once), or refuse with the numbers.

    `keep` names, by group, the units that stay where the configuration tells which: blocks, rotary pairs. Without it the first
    blocks and evenly spaced pairs stay.
    """
    anatomy = describe(config)
    keep = keep or {}
    changes: dict[Field, Any] = {}
    for name, size in sorted(sizes.items(), key=lambda item: _ORDER.get(noun_of(item[0]), 1)):
        axis = anatomy.axis(name)
        if not 0 < size <= axis.size:
            raise UserError(f"{name}={size}: must be between 1 and its present size {axis.size}.")
        if axis.kind == "vocab":
            changes |= dict.fromkeys(vocab_fields(config), size)
            continue
        if name in (free := free_fields(config)):
            changes[free[name]] = size
            continue
        view = view_of(config, name.partition(".")[0])
        if axis.kind == "blocks":
            of = view.decoder() if axis.noun == "decoder_blocks" else view
            changes |= block_changes(of, _layers(axis, size, keep.get(axis.name)), changes)
        else:
            changes |= _changes(view, axis, size, sizes, keep)
    _refuse_too_few(config, anatomy, sizes, changes)
    try:
        return edited(config, _pins(config, anatomy) | changes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        reason = error.__cause__ or error
        raise UserError(f"{wanted} cannot be said by the {config.model_type!r} config: {reason}") from error


def _refuse_too_few(config: Any, anatomy: Anatomy, sizes: Mapping[str, int], changes: Mapping[Field, Any]) -> None:
    """Refuse fewer experts than a token takes, and an encoder shallower than its decoder: both load, and fail to answer."""
    for name, size in sizes.items():
        axis = anatomy.axis(name)
        if axis.kind == "experts" and size < axis.minimum:
            raise UserError(f"{name}={size}: {axis.note}; give {axis.minimum} to {axis.size}.")
        if axis.noun == "blocks":
            view = view_of(config, name.partition(".")[0])
            field = view.field(view.backbone.no_fewer_than)
            least = int(changes.get(field, view.value(view.backbone.no_fewer_than)) or 0)
            if size < least:
                raise UserError(f"{name}={size}: must not fall below {field[1]} = {least}; cut that too.")


def free_fields(config: Any) -> dict[str, Field]:
    """Return the axes that are one field of their own outside the towers."""
    family = family_of(config)
    return {**family.projector, **{name: (part, field) for name, (part, field, _) in family.query_tokens.items()}}


def _pins(config: Any, anatomy: Anatomy) -> dict[Field, Any]:
    """Fields that say head_dim wherever the modelling honours it: a reader may derive another one from width and heads."""
    pinned: dict[Field, Any] = {}
    for tower in family_of(config).towers:
        axes = (anatomy.axes.get(f"{tower.name}.{noun}") for noun in ("kv_groups", "head_dim"))
        if any(axis is not None and not axis.refusal for axis in axes):
            pinned |= view_of(config, tower.name).pin()
    return pinned


def _layers(axis: Axis, size: int, kept: Iterable[int] | None) -> list[int]:
    """Return the layers that stay of an axis of blocks: those of the units `kept`, or of the first that may."""
    group = axis.groups[0]
    units = sorted(int(unit) for unit in kept) if kept is not None else group.first(group.kept(size)).tolist()
    return group.layers(units)


def _changes(
    view: View, axis: Axis, size: int, sizes: Mapping[str, int], keep: Mapping[str, Iterable[int]]
) -> dict[Field, Any]:
    """Fields to write for one axis; `sizes` holds the other ones that change with it."""
    tower, noun = view.tower.name, axis.noun
    if noun in ("kv_groups", "queries"):
        kv, queries = sizes.get(f"{tower}.kv_groups", view.kv), sizes.get(f"{tower}.queries", view.queries)
        return view.set_heads(kv, queries) | view.pin()
    if noun == "head_dim":
        if size % axis.multiple:
            raise _not_a_multiple(axis, size, "rotary pairs keep their shares")
        runs = {name.removeprefix(f"{axis.name}."): list(units) for name, units in keep.items()}
        return {view.field(view.backbone.head_dim): size} | settings_after(view, size, runs)
    if noun == "width":
        # where the heads have to divide the width, the config class says so itself
        if size % axis.multiple and size != axis.size and not view.backbone.width_by_heads:
            heads = f"heads of {view.width // view.heads} channels go with it"
            raise _not_a_multiple(axis, size, "experts are multiplied in groups" if view.free_heads else heads)
        return view.set_width(size)
    if noun == "experts":
        return {view.field(view.backbone.experts): size}
    if noun == "expert_ffn":
        if size % axis.multiple and size != axis.size:
            raise _not_a_multiple(axis, size, "experts are multiplied in groups")
        return {view.field(view.backbone.expert_ffn): size}
    width = sizes.get(f"{tower}.width", view.width)
    if not view.backbone.ffn_is_ratio:
        return {view.field(view.backbone.ffn): size}
    if view.free_ratio:
        return {view.field(view.backbone.ffn): ratio(size, width)}
    if size % width:
        raise UserError(
            f"{axis.name}={size}: {view.backbone.ffn} is a whole number of the width {width}. "
            f"Possible: {', '.join(str(width * n) for n in range(1, view.ffn // width + 1))}."
        )
    return {view.field(view.backbone.ffn): size // width}


def _not_a_multiple(axis: Axis, size: int, reason: str) -> UserError:
    """Return the refusal of a size that `axis` does not offer."""
    possible = ", ".join(map(str, axis.choices()))
    return UserError(
        f"{axis.name}={size}: {reason}, so it must be a multiple of {axis.multiple}. Possible: {possible}."
    )


def shapes_at(
    config: Any, sizes: Mapping[str, int], keep_blocks: Mapping[str, Iterable[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that `config` keeps at these sizes, by its present name, without building anything.

    Every axis that owns rows lo..hi of a parameter's dimension leaves kept / units of them, so that a stretch of rows which
    several axes own (queries: key/value groups, queries per group, head_dim) shrinks by the product. `keep_blocks` names the
    blocks that stay: those of different kinds differ in size.
    """
    anatomy, whole, keep_blocks = describe(config), skeleton(config), keep_blocks or {}
    stretches: dict[Place, dict[str, list[_Stretch]]] = {}
    gone: list[str] = []
    for name, size in sizes.items():
        axis = anatomy.axis(name)
        if axis.kind == "blocks":
            group = axis.groups[0]
            kept = {int(unit) for unit in keep_blocks.get(name, group.first(group.kept(size)).tolist())}
            gone += [f"{axis.layers}.{layer}." for layer in range(axis.size) if layer // group.stride not in kept]
        for group in axis.groups:
            ratio = Fraction(group.kept(size), group.units)
            for slot in group.slots:
                rows = (slot.offset, slot.offset + slot.outer * group.units * slot.inner, ratio)
                stretches.setdefault((slot.parameter, slot.dim), {}).setdefault(name, []).append(rows)
    return {
        name: tuple(
            _length(length, stretches.get((whole.tied.get(name, name), dim), {})) for dim, length in enumerate(shape)
        )
        for name, shape in whole.shapes.items()
        if not name.startswith(tuple(gone))
    }


def _length(length: int, by_axis: Mapping[str, list[_Stretch]]) -> int:
    """Return what is left of `length` rows."""
    if not by_axis:
        return length
    if any(name.endswith(".ffn") for name in by_axis):  # an FFN that follows the width: its own axis has the last word
        by_axis = {name: rows for name, rows in by_axis.items() if not name.endswith(".width")}
    found = [rows for stretches in by_axis.values() for rows in stretches]
    edges = sorted({0, length, *(edge for low, high, _ in found for edge in (low, high))})
    left = Fraction(0)
    for low, high in itertools.pairwise(edges):
        left += (high - low) * math.prod((ratio for a, b, ratio in found if a <= low and high <= b), start=Fraction(1))
    assert left.denominator == 1, (length, by_axis)
    return int(left)


def predict_parameters(
    config: Any, sizes: Mapping[str, int], keep_blocks: Mapping[str, Iterable[int]] | None = None
) -> int:
    """Return the exact number of parameters (tied ones once) of `config` at these sizes, from its shapes (`shapes_at`)."""
    shapes = shapes_at(config, sizes, keep_blocks)
    return sum(math.prod(shapes[name]) for name in skeleton(config).weights if name in shapes)


def most_parameters(config: Any, sizes: Mapping[str, int]) -> int:
    """Return how many parameters `config` has at most at these sizes, whichever blocks stay: where the largest do.

    Blocks of different kinds differ in size (a dense FFN beside experts, attention beside convolutions), and which of them stay
    is chosen by what they are worth.
    """
    anatomy = describe(config)
    cut = [name for name in sizes if anatomy.axis(name).kind == "blocks" and sizes[name] < anatomy.axis(name).size]
    if all(_alike(config, anatomy.axis(name)) for name in cut):
        return predict_parameters(config, sizes)
    shapes = shapes_at(config, {name: size for name, size in sizes.items() if name not in cut})
    keep = {}
    for name in cut:
        axis = anatomy.axis(name)
        (group,) = axis.groups
        counts = [sum(map(math.prod, unit)) for unit in _units(axis, shapes)]
        keep[name] = group.best(torch.tensor(counts, dtype=torch.float64), group.kept(sizes[name])).tolist()
    return predict_parameters(config, sizes, keep)


def _alike(config: Any, axis: Axis) -> bool:
    """Tell whether the blocks of an axis all hold tensors of the same shapes."""
    first, *others = (sorted(unit) for unit in _units(axis, skeleton(config).shapes))
    return all(unit == first for unit in others)


def _units(axis: Axis, shapes: Mapping[str, tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Return the shapes of the tensors of every unit of an axis of blocks."""
    (group,) = axis.groups
    units: list[list[tuple[int, ...]]] = [[] for _ in range(group.units)]
    for name, shape in shapes.items():
        if name.startswith(f"{axis.layers}."):
            layer = int(name.removeprefix(f"{axis.layers}.").partition(".")[0])
            units[layer // group.stride].append(shape)
    return units
