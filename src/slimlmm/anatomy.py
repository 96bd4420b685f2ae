"""What can be cut: every axis of a configuration, its groups of units, and where they live. Meta device only.

Shapes come from `probing` (change one field, see what moved), roles from the class of the module that holds a
parameter, and only what neither can tell from `families`. Legend: W residual width, Q query heads, KV
key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from slimlmm.axes import Anatomy, Axis, Group, Norm, Role, Slot
from slimlmm.errors import UserError
from slimlmm.families import Attention, Family, Tower, backbone_of, family_of
from slimlmm.probing import Field, Place, Skeleton, View, edited, get, key_of, moved, skeleton

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Places = Mapping[Place, tuple[int, int]]
_REMEMBERED = 64
_ANATOMIES: dict[str, Anatomy] = {}


class _RefusedError(Exception):
    """The probe found something that the slots cannot say; the text is the reason."""


def describe(config: Any) -> Anatomy:
    """Return all axes of `config` by probing it; no weights are read or made."""
    key = key_of(config)
    if key not in _ANATOMIES:
        if len(_ANATOMIES) >= _REMEMBERED:
            _ANATOMIES.clear()
        family = family_of(config)
        axes: dict[str, Axis] = {}
        for tower in family.towers:
            axes |= {axis.name: axis for axis in _tower_axes(config, family, tower)}
        axes["vocab"] = _vocab_axis(config, family)
        towers = {tower.name: f"{tower.prefix}." for tower in family.towers} | {"projector": f"{family.joint}."}
        tied = skeleton(config).tied
        _ANATOMIES[key] = Anatomy(model_type=config.model_type, axes=axes, tied=tied, towers=towers)
    return _ANATOMIES[key]


def _tower_axes(config: Any, family: Family, tower: Tower) -> Iterable[Axis]:
    backbone = backbone_of(config, tower)
    if backbone is None:
        model_type = getattr(config, tower.config).model_type
        reason = f"the backbone {model_type!r} is not known to families.py"
        for kind, name in (
            ("blocks", "blocks"),
            ("inner", "ffn"),
            ("inner", "kv_groups"),
            ("width", "width"),
        ):
            yield Axis(name=f"{tower.name}.{name}", kind=kind, size=0, refusal=reason)  # type: ignore[arg-type]
        return
    view = View(config, family, tower, backbone)
    for make in (_blocks_axis, _ffn_axis, _kv_axis, _width_axis):
        yield make(view)


def _blocks_axis(view: View) -> Axis:
    name, period = f"{view.tower.name}.blocks", view.period
    layers = f"{view.tower.prefix}.{view.backbone.layers}"
    refusal = "" if view.blocks == 1 else _last_block_goes(view, layers)
    if view.blocks % period:
        refusal = f"{view.blocks} blocks are no whole number of {view.backbone.period} = {period}"
    group = Group(name=name, axis=name, units=view.blocks // period, stride=period)
    return Axis(
        name=name,
        kind="blocks",
        size=view.blocks,
        fields=_labels((view.field(view.backbone.blocks),)),
        groups=() if refusal else (group,),
        multiple=period,
        minimum=period,
        layers=layers,
        refusal=refusal,
        note=f"blocks go {period} at a time ({view.backbone.period})" if period > 1 else "",
    )


def _last_block_goes(view: View, layers: str) -> str:
    """Return why one block fewer does not remove exactly the last layer of `layers`, "" when it does."""
    fewer = skeleton(edited(view.config, _block_changes(view, list(range(view.blocks - 1)))))
    gone = set(skeleton(view.config).shapes) - set(fewer.shapes)
    last = f"{layers}.{view.blocks - 1}"
    right = bool(gone) and all(parameter.startswith(f"{last}.") for parameter in gone)
    return "" if right else f"one block fewer does not remove exactly {last}"


def _ffn_axis(view: View) -> Axis:
    name, field = f"{view.tower.name}.ffn", view.field(view.backbone.ffn)
    places = moved(view.config, edited(view.config, {field: 2 * view.value(view.backbone.ffn)}))
    multiple = view.width if view.backbone.ffn_is_ratio else 1
    note = f"the config holds the whole number FFN / width ({view.backbone.ffn})" if multiple > 1 else ""

    def group_of(place: Place, length: int) -> Group:
        return Group(name=_place_name(view, name, place), axis=name, units=length, layer=view.locate(place[0])[0])

    draft = Axis(name=name, kind="inner", size=view.ffn, fields=_labels((field,)), multiple=multiple, note=note)
    return _axis(view, draft, places, group_of)


def _kv_axis(view: View) -> Axis:
    name = f"{view.tower.name}.kv_groups"
    fields = tuple(view.field(field) for field in (view.backbone.heads, view.backbone.kv) if field)
    if not view.free_heads:
        reason = (
            f"head_dim is {view.backbone.width} / {view.backbone.heads} in this tower, so fewer heads would "
            f"re-cut the same matrices into wider heads; heads go with {view.tower.name}.width"
        )
        return Axis(name=name, kind="inner", size=view.kv, fields=_labels(fields), refusal=reason)
    wide = view.set_width(2 * view.width)  # twice the width, so that twice the heads divide it
    places = moved(edited(view.config, wide), edited(view.config, wide | view.set_heads(2 * view.heads)))

    def group_of(place: Place, length: int) -> Group:
        return Group(name=_place_name(view, name, place), axis=name, units=view.kv, layer=view.locate(place[0])[0])

    queries = view.heads // view.kv
    legal = [n for n in range(1, view.kv + 1) if view.width % (queries * n) == 0]
    allowed = tuple(legal) if view.backbone.width_by_heads else ()
    note = f"width {view.width} must be a multiple of the number of heads ({queries} per group)" if allowed else ""
    draft = Axis(name=name, kind="inner", size=view.kv, fields=_labels(fields), allowed=allowed, note=note)
    return _axis(view, draft, places, group_of)


def _width_axis(view: View) -> Axis:
    name, width = f"{view.tower.name}.width", view.width
    free = view.free_heads
    base = edited(view.config, view.pin() if free else {})
    changes = view.set_width(2 * width)
    places = moved(base, edited(view.config, changes))
    ffn = moved(base, edited(base, {view.field(view.backbone.ffn): 2 * view.value(view.backbone.ffn)}))
    interiors = {i.part: i for i in view.family.interiors if i.axis == name}

    def group_of(place: Place, length: int) -> Group:
        layer = view.locate(place[0])[0]
        attention = None if free else _attention(view, place)
        if attention is not None:
            where = f"{name}[{layer}].{attention.group}" if layer is not None else f"{name}.{attention.group}"
            return Group(name=where, axis=name, units=view.kv, stride=width // view.kv, layer=layer)
        rate = length // width
        if place in ffn:
            where = f"{_place_name(view, name, place)}.ffn"
            return Group(name=where, axis=name, units=length, rate=rate, layer=layer)
        for part, interior in interiors.items():
            if _is_interior(place, interior.produce, interior.consume):
                return Group(name=f"{name}.{part}", axis=name, units=length, rate=rate)
        return Group(name=name, axis=name, units=width)

    multiple = width // view.kv if not free else view.heads if view.backbone.width_by_heads else 1
    note = _width_note(view)
    fields = tuple(field for field in changes if field[1] != "head_dim")
    draft = Axis(name=name, kind="width", size=width, fields=_labels(fields), multiple=multiple, note=note)
    return _axis(view, draft, places, group_of)


def _labels(fields: Iterable[Field]) -> tuple[str, ...]:
    return tuple(".".join(field).removeprefix(".") for field in fields)


def _width_note(view: View) -> str:
    if view.backbone.norm == "layer":
        return "LayerNorm takes the mean over all channels: cut == masked with norms over the kept ones alone"
    return "" if view.backbone.eps else "exact up to the norms' epsilon, which the config cannot set"


def _vocab_axis(config: Any, family: Family) -> Axis:
    tower = family.tower("text")
    field = (tower.config, "vocab_size")
    size = int(get(config, field))
    places = moved(config, edited(config, {field: 2 * size}))
    slots = tuple(Slot(parameter=name, dim=dim, role="produce") for name, dim in places)
    refusal = "" if places and all(new == 2 * old for old, new in places.values()) else "vocab_size moves no parameter"
    groups = () if refusal else (Group(name="vocab", axis="vocab", units=size, slots=slots),)
    return Axis(
        name="vocab",
        kind="vocab",
        size=size,
        fields=_labels((field,)),
        groups=groups,
        refusal=refusal,
        note="cut together with the tokenizer",
    )


def _axis(view: View, draft: Axis, places: Places, group_of: Callable[[Place, int], Group]) -> Axis:
    """Sort the moved places into groups of slots; refuse the axis, with the reason, where they do not fit."""
    slots: dict[Group, list[Slot]] = {}
    whole = skeleton(view.config)
    if not places:
        return _refused(draft, f"changing {', '.join(draft.fields)} moves no parameter")
    try:
        for place, (old, new) in places.items():
            if new != 2 * old:
                raise _RefusedError(f"{place[0]} dim {place[1]} went from {old} to {new}, which is not in proportion")
            group = group_of(place, old)
            slots.setdefault(group, []).append(_slot(view, whole, place, group))
    except _RefusedError as refused:
        return _refused(draft, str(refused))
    groups = [replace(group, slots=tuple(found)) for group, found in slots.items()]
    groups.sort(key=lambda group: (group.layer is not None, group.layer or 0))
    exact = draft.kind != "width" or view.backbone.norm == "rms"
    return replace(draft, groups=tuple(groups), minimum=draft.multiple, exact=exact)


def _refused(draft: Axis, reason: str) -> Axis:
    return Axis(name=draft.name, kind=draft.kind, size=draft.size, fields=draft.fields, refusal=reason)


def _place_name(view: View, axis: str, place: Place) -> str:
    """Name the group of a place: ``axis[layer]``, or ``axis.part`` for a declared part outside the layers."""
    layer, inside = view.locate(place[0])
    if layer is not None:
        return f"{axis}[{layer}]"
    for prefix, part in view.backbone.parts.items():
        if inside.startswith(f"{prefix}."):
            return f"{axis}.{part}"
    raise _RefusedError(f"{place[0]} moves with it, but lies in no known part of the tower")


def _attention(view: View, place: Place) -> Attention | None:
    """Return the attention module whose head axis this place is, None for every other axis."""
    inside = view.locate(place[0])[1]
    for attention in view.backbone.attention:
        names = attention.produce if place[1] == 0 else attention.consume
        leaves = {f"{attention.module}.{name}{leaf}" for name in names for leaf in ("", ".weight", ".bias")}
        if inside in leaves and not (place[1] == 0 and inside.rpartition(".")[0] in attention.consume):
            return attention
    return None


def _is_interior(place: Place, produce: str, consume: str) -> bool:
    module = place[0].rpartition(".")[0]
    return (module == produce and place[1] == 0) or (module == consume and place[1] == 1)


def _slot(view: View, whole: Skeleton, place: Place, group: Group) -> Slot:
    role, norm = _role(view, whole, place)
    length = whole.shapes[place[0]][place[1]]
    attention = _attention(view, place)
    outer = attention.outer if attention is not None and place[1] == 0 else 1
    per_unit = length // group.units
    if group.stride == 1 and attention is None:
        outer = per_unit  # constants that multiply a plain channel axis vary slowest
    if length % (group.units * outer):
        raise _RefusedError(f"{place[0]} dim {place[1]} of length {length} does not split into {group.units} units")
    return Slot(parameter=place[0], dim=place[1], role=role, outer=outer, inner=per_unit // outer, norm=norm)


def _role(view: View, whole: Skeleton, place: Place) -> tuple[Role, Norm]:
    """Tell what a parameter axis does with its channels, from the class of the module that holds it."""
    name, dim = place
    module, leaf = whole.owner(name), name.rpartition(".")[2]
    if isinstance(module, nn.LayerNorm):
        return "affine", "layer"
    if isinstance(module, _LINEAR) or (isinstance(module, nn.MultiheadAttention) and leaf.startswith("in_proj")):
        return ("produce" if dim == 0 else "consume"), ""
    if isinstance(module, nn.Embedding) or len(whole.shapes[name]) > 1:
        return "produce", ""
    if view.locate(name)[1] in view.backbone.tokens:
        return "produce", ""
    return "affine", ("rms" if leaf == "weight" and view.backbone.norm == "rms" else "")


def dead_blocks(config: Any) -> dict[str, list[int]]:
    """Return the blocks that never reach the output, by axis: vision blocks behind the last one read."""
    family = family_of(config)
    if not family.feature_layer:
        return {}
    view = _view(config, "vision")
    last = max(_absolute(index, view.blocks) for index in _as_list(get(config, ("", family.feature_layer))))
    return {"vision.blocks": list(range(last, view.blocks))} if last < view.blocks else {}


def _view(config: Any, tower: str) -> View:
    family = family_of(config)
    found = family.tower(tower)
    backbone = backbone_of(config, found)
    if backbone is None:
        raise UserError(f"{tower}: backbone {getattr(config, found.config).model_type!r} is not supported.")
    return View(config, family, found, backbone)


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _absolute(index: int, blocks: int) -> int:
    """Hidden state `index` as the number of blocks that ran before it (hidden state 0 is the embedding)."""
    return index if index >= 0 else blocks + 1 + index


def resized(config: Any, sizes: Mapping[str, int], keep_blocks: Mapping[str, Iterable[int]] | None = None) -> Any:
    """Return the stock configuration with these axis sizes (all at once), or refuse with the numbers.

    `keep_blocks` names the units that stay of a block axis; without it the first ones stay.
    """
    anatomy = describe(config)
    keep_blocks = keep_blocks or {}
    changes: dict[Field, Any] = {}
    for name, size in sizes.items():
        axis = anatomy.axis(name)
        if not 0 < size <= axis.size:
            raise UserError(f"{name}={size}: must be between 1 and its present size {axis.size}.")
        if axis.kind == "vocab":
            changes[family_of(config).tower("text").config, "vocab_size"] = size
            continue
        view = _view(config, name.partition(".")[0])
        changes |= _changes(view, axis, size, sizes, keep_blocks.get(name))
    try:
        return edited(config, changes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        reason = error.__cause__ or error
        raise UserError(f"{wanted} cannot be said by the {config.model_type!r} config: {reason}") from error


def _changes(
    view: View, axis: Axis, size: int, sizes: Mapping[str, int], kept: Iterable[int] | None
) -> dict[Field, Any]:
    """Fields to write for one axis; `sizes` holds the other ones that change with it."""
    tower = view.tower.name
    if axis.kind == "blocks":
        group = axis.groups[0]
        units = sorted(int(unit) for unit in kept) if kept is not None else range(group.kept(size))
        return _block_changes(view, [unit * group.stride + i for unit in units for i in range(group.stride)])
    if axis.name == f"{tower}.kv_groups":
        return view.set_heads(view.heads // view.kv * size) | view.pin()
    if axis.name == f"{tower}.width":
        if not view.free_heads and size % axis.multiple:
            possible = ", ".join(map(str, axis.choices()))
            raise UserError(
                f"{axis.name}={size}: heads of {view.width // view.heads} channels go with it, "
                f"so it must be a multiple of {axis.multiple}. Possible: {possible}."
            )
        return view.set_width(size)
    width = sizes.get(f"{tower}.width", view.width)
    if not view.backbone.ffn_is_ratio:
        return {view.field(view.backbone.ffn): size}
    if size % width:
        raise UserError(
            f"{axis.name}={size}: {view.backbone.ffn} is a whole number of the width {width}. "
            f"Possible: {', '.join(str(width * n) for n in range(1, view.ffn // width + 1))}."
        )
    return {view.field(view.backbone.ffn): size // width}


def _block_changes(view: View, layers: list[int]) -> dict[Field, Any]:
    """Fields to write when only `layers` stay: depth, lists per block, block numbers, the feature layer."""
    if not layers:
        raise UserError(f"{view.tower.name}.blocks: at least one block must stay.")
    place = {old: new for new, old in enumerate(layers)}
    changes: dict[Field, Any] = {view.field(view.backbone.blocks): len(layers)}
    for name in view.backbone.per_layer:
        if (values := view.value(name)) is not None:
            changes[view.field(name)] = [values[layer] for layer in layers]
    for name in view.backbone.indexes:
        changes[view.field(name)] = [place[layer] for layer in view.value(name) if layer in place]
    changes |= {view.field(name): None for name in view.backbone.reset}
    field = ("", view.family.feature_layer)
    if view.tower.name == "vision" and view.family.feature_layer:
        old = get(view.config, field)
        new = [_moved_index(index, view.blocks, layers) for index in _as_list(old)]
        changes[field] = new if isinstance(old, list | tuple) else new[0]
    return changes


def _moved_index(index: int, blocks: int, layers: list[int]) -> int:
    """Feature layer `index` when only `layers` stay: behind the same blocks, counted from the same end."""
    absolute = sum(layer < _absolute(index, blocks) for layer in layers)
    return absolute if index >= 0 else absolute - len(layers) - 1


def predict_parameters(config: Any, sizes: Mapping[str, int]) -> int:
    """Return the exact number of parameters (tied ones once) of `config` at these sizes, from its shapes."""
    anatomy, whole = describe(config), skeleton(config)
    lengths: dict[Place, int] = {}
    gone: list[str] = []
    # widths first: where an FFN follows the width, its own axis has the last word
    for name, size in sorted(sizes.items(), key=lambda item: anatomy.axis(item[0]).kind != "width"):
        axis = anatomy.axis(name)
        if axis.kind == "blocks":
            gone += [f"{axis.layers}.{layer}." for layer in range(size, axis.size)]
        for group in axis.groups:
            for slot in group.slots:
                old = whole.shapes[slot.parameter][slot.dim]
                lengths[slot.parameter, slot.dim] = old * group.kept(size) // group.units
    return sum(
        math.prod(lengths.get((name, dim), length) for dim, length in enumerate(whole.shapes[name]))
        for name, _ in whole.model.named_parameters()
        if not name.startswith(tuple(gone))
    )
