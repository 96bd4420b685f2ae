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

from torch import nn

from slimlmm.axes import Anatomy, Axis, Group, Kind, Slot
from slimlmm.families import Family, Tower, backbone_of, family_of, part_of
from slimlmm.probing import Field, Place, Skeleton, edited, get, key_of, moved, skeleton
from slimlmm.slots import RefusedError, attention_of, place_name, refuse_norm_over_heads, slots_of
from slimlmm.views import View, block_changes, some_of, view_of, vocab_fields

Places = Mapping[Place, tuple[int, int]]
_KINDS: Mapping[str, Kind] = {"blocks": "blocks", "ffn": "inner", "kv_groups": "inner", "width": "width"}
#: grouped matrix products want rows of whole 16 bytes
_GROUPED = 8
_REMEMBERED = 64
_ANATOMIES: dict[str, Anatomy] = {}


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
        for name, field in family.projector.items():
            axes[name] = _inner_axis(view_of(config, "vision"), name, field, int(get(config, field)))
        axes["vocab"] = _vocab_axis(config, family)
        towers = {tower.name: f"{tower.prefix}." for tower in family.towers} | {"projector": f"{family.joint}."}
        for name, refusal in family.refusals.items():
            axes[name] = _refused(axes[name], refusal)
        tied = skeleton(config).tied
        _ANATOMIES[key] = Anatomy(model_type=config.model_type, axes=axes, tied=tied, towers=towers)
    return _ANATOMIES[key]


def _tower_axes(config: Any, family: Family, tower: Tower) -> Iterable[Axis]:
    backbone = backbone_of(config, tower)
    if backbone is None:
        model_type = part_of(config, tower).model_type
        reason = f"the backbone {model_type!r} is not known to families.py"
        for noun, kind in _KINDS.items():
            yield Axis(name=f"{tower.name}.{noun}", kind=kind, size=0, refusal=reason)
        return
    view = View(config, family, tower, backbone)
    makers = {"blocks": _blocks_axis, "ffn": _ffn_axis, "kv_groups": _kv_axis, "width": _width_axis}
    for noun, make in makers.items():
        if refusal := backbone.refusals.get(noun):
            yield Axis(name=f"{tower.name}.{noun}", kind=_KINDS[noun], size=0, refusal=refusal)
        else:
            yield make(view)
    if backbone.expert_ffn and view.value(backbone.expert_ffn):
        field = view.field(backbone.expert_ffn)
        axis = _inner_axis(view, f"{tower.name}.expert_ffn", field, int(get(config, field)))
        aligned = math.lcm(axis.multiple, _GROUPED)
        yield axis if axis.refusal else replace(axis, multiple=aligned, minimum=aligned)


def _blocks_axis(view: View) -> Axis:
    name, period = f"{view.tower.name}.blocks", view.period
    layers = f"{view.tower.prefix}.{view.backbone.layers}"
    group = Group(name=name, axis=name, units=view.blocks // period, stride=period, some_of=some_of(view))
    refusal = "" if group.units == 1 else _last_block_goes(view, layers, group)
    if view.blocks % period:
        refusal = f"{view.blocks} blocks are no whole number of {view.backbone.period} = {period}"
    note = f"blocks go {period} at a time ({view.backbone.period})" if period > 1 else ""
    must = sorted(units[0] for units in group.some_of if len(units) == 1)
    return Axis(
        name=name,
        kind="blocks",
        size=view.blocks,
        fields=_labels((view.field(view.backbone.blocks),)),
        groups=() if refusal else (group,),
        multiple=period,
        minimum=group.least * period,
        layers=layers,
        refusal=refusal,
        note=f"block {', '.join(map(str, must))} must stay: their output is read elsewhere" if must else note,
    )


def _last_block_goes(view: View, layers: str, group: Group) -> str:
    """Return why one block fewer does not remove exactly the last layer of `layers`, "" when it does."""
    free = [unit for unit in range(group.units) if group.allows(set(range(group.units)) - {unit})]
    if not free:
        return "all blocks must stay: the output of each is read elsewhere"
    kept = [layer for layer in range(view.blocks) if layer // view.period != free[-1]]
    fewer = skeleton(edited(view.config, block_changes(view, kept)))
    gone = set(skeleton(view.config).shapes) - set(fewer.shapes)
    last = f"{layers}.{view.blocks - 1}"
    right = bool(gone) and all(_behind(parameter, layers, view.blocks - view.period) for parameter in gone)
    return "" if right else f"one block fewer does not remove exactly {last}"


def _behind(parameter: str, layers: str, first: int) -> bool:
    """Tell whether `parameter` belongs to a layer from number `first` on."""
    number = parameter.removeprefix(f"{layers}.").partition(".")[0]
    return parameter.startswith(f"{layers}.") and int(number) >= first


def _ffn_axis(view: View) -> Axis:
    multiple = view.width if view.backbone.ffn_is_ratio and not view.free_ratio else 1
    note = f"the config holds the whole number FFN / width ({view.backbone.ffn})" if multiple > 1 else ""
    axis = _inner_axis(view, f"{view.tower.name}.ffn", view.field(view.backbone.ffn), view.ffn)
    return axis if axis.refusal else replace(axis, multiple=multiple, minimum=multiple, note=note)


def _inner_axis(view: View, name: str, field: Field, size: int) -> Axis:
    """Return the axis of a size inside modules that one field holds; each block and each declared part chooses for itself."""
    places = moved(view.config, edited(view.config, {field: 2 * get(view.config, field)}))
    draft = Axis(name=name, kind="inner", size=size, fields=_labels((field,)))
    units: dict[str, int] = {}
    try:
        for place, (old, _) in places.items():
            label = place_name(view, name, place)
            units[label] = min(old, units.get(label, old))
        if wrong := [label for label, count in units.items() if count % size and size % count]:
            raise RefusedError(f"{wrong[0]} has {units[wrong[0]]} units, which is out of proportion to {size}")
    except RefusedError as refused:
        return _refused(draft, str(refused))

    def group_of(place: Place, length: int) -> Group:
        label = place_name(view, name, place)
        count = units[label]
        stride, rate = max(1, size // count), max(1, count // size)
        return Group(name=label, axis=name, units=count, stride=stride, rate=rate, layer=view.locate(place[0])[0])

    axis = _axis(view, draft, places, group_of)
    multiple = math.lcm(1, *(group.stride for group in axis.groups))
    return replace(axis, multiple=multiple, minimum=multiple)


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
        refuse_norm_over_heads(view, skeleton(view.config), place)
        return Group(name=place_name(view, name, place), axis=name, units=view.kv, layer=view.locate(place[0])[0])

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
    inside: dict[str, int] = {}
    for place, (old, _) in places.items():
        if part := view.family.interior(name, *place):
            inside[part] = min(old, inside.get(part, old))

    def group_of(place: Place, length: int) -> Group:
        layer = view.locate(place[0])[0]
        attention = None if free else attention_of(view, place)
        if not free:
            refuse_norm_over_heads(view, skeleton(view.config), place)
        if attention is not None:
            where = f"{name}{view.inside(place[0])[0]}.{attention.group}"
            return Group(name=where, axis=name, units=view.kv, stride=width // view.kv, layer=layer)
        if place in ffn:
            where = f"{place_name(view, name, place)}.ffn"
            return Group(name=where, axis=name, units=length, rate=length // width, layer=layer)
        if part := view.family.interior(name, *place):
            return Group(name=f"{name}.{part}", axis=name, units=inside[part], rate=inside[part] // width)
        return Group(name=name, axis=name, units=width)

    multiple = width // view.kv if not free else view.heads if view.backbone.width_by_heads else 1
    if any(view.layout(parameter).startswith("-") for parameter, _ in places):  # one matrix per expert
        multiple = math.lcm(multiple, _GROUPED)
    fields = tuple(field for field in changes if field[1] != "head_dim")
    draft = Axis(name=name, kind="width", size=width, fields=_labels(fields), multiple=multiple)
    return _with_note(view, _axis(view, draft, places, group_of))


def _labels(fields: Iterable[Field]) -> tuple[str, ...]:
    return tuple(".".join(field).removeprefix(".") for field in fields)


def _with_note(view: View, axis: Axis) -> Axis:
    """Say whether a cut of this width equals the masked model, and mark what has to make up for it, by the norms that read it."""
    slots = [slot for group in axis.groups if group.name == axis.name for slot in group.slots]
    if "layer" in {slot.norm for slot in slots}:
        note = "LayerNorm takes the mean over all channels: cut == masked with norms over the kept ones alone"
        return replace(axis, exact=False, note=note)
    if not {slot.norm for slot in slots} & {"rms", "rms1"}:
        return axis
    whole = skeleton(view.config)
    groups = [
        replace(group, slots=tuple(_made_up(view, whole, slot) for slot in group.slots))
        if group.name == axis.name
        else group
        for group in axis.groups
    ]
    return replace(axis, groups=tuple(groups))


def _made_up(view: View, whole: Skeleton, slot: Slot) -> Slot:
    """Say what a cut of the width does to one place of a stream that RMSNorms read."""
    family, module = view.family, slot.parameter.rpartition(".")[0]
    if slot.role == "produce":
        scaled = view.backbone.root_of_width and isinstance(whole.owner(slot.parameter), nn.Embedding)
        return slot if scaled or module in family.raw else replace(slot, norm="write")
    if slot.role == "consume":
        return replace(slot, norm="read") if module in family.raw_readers else slot
    if slot.norm not in ("rms", "rms1"):
        return slot
    label, inside = view.inside(slot.parameter)
    if inside.removesuffix(".weight") in view.backbone.post_norms or module in family.post_norms:
        return replace(slot, norm="")
    tied = any(name.startswith(f"{view.tower.prefix}.") for name in whole.tied.values())
    if tied and not view.backbone.root_of_width and not label and inside == view.backbone.final_norm:
        return replace(slot, norm="last1" if slot.norm == "rms1" else "last")
    return slot


def _vocab_axis(config: Any, family: Family) -> Axis:
    tower = family.tower("text")
    field = (tower.config, "vocab_size")
    size = int(get(config, field))
    places = moved(config, edited(config, {other: 2 * size for other in vocab_fields(config)}))
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
                raise RefusedError(f"{place[0]} dim {place[1]} went from {old} to {new}, which is not in proportion")
            group = group_of(place, old)
            slots.setdefault(group, []).extend(slots_of(view, whole, place, group))
    except RefusedError as refused:
        return _refused(draft, str(refused))
    groups = [replace(group, slots=tuple(found)) for group, found in slots.items()]
    groups.sort(key=lambda group: (group.layer is not None, group.layer or 0))
    return replace(draft, groups=tuple(groups), minimum=draft.multiple)


def _refused(draft: Axis, reason: str) -> Axis:
    return Axis(name=draft.name, kind=draft.kind, size=draft.size, fields=draft.fields, refusal=reason)
