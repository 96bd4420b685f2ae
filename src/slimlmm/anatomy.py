"""What can be cut: every axis of a configuration, its groups of units, and where they live. Meta device only.

Shapes come from `probing` (change one field, see what moved), roles from the class of the module that holds a
parameter, and only what neither can tell from `families`. Legend: W residual width, Q query heads, KV
key/value heads, D head_dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from slimlmm.axes import Anatomy, Axis, Group, Kind, Slot
from slimlmm.blocks import rows_of_blocks
from slimlmm.families import Family, Tower, backbone_of, family_of, part_of
from slimlmm.heads import head_dim_axis, kv_axis, queries_axis
from slimlmm.probing import Field, Place, edited, get, key_of, moved, skeleton
from slimlmm.slots import (
    RefusedError,
    attention_of,
    grouped,
    labels,
    place_name,
    refuse_norm_over_heads,
    refused,
)
from slimlmm.views import View, some_of, view_of, vocab_fields

Places = Mapping[Place, tuple[int, int]]
_KINDS: Mapping[str, Kind] = {
    "blocks": "blocks",
    "decoder_blocks": "blocks",
    "ffn": "inner",
    "expert_ffn": "inner",
    "experts": "experts",
    "kv_groups": "inner",
    "queries": "inner",
    "head_dim": "inner",
    "width": "width",
}
#: what every tower has, and what is refused in one that is not known
_ALWAYS = ("blocks", "ffn", "kv_groups", "width")
#: grouped matrix products want rows of whole 16 bytes
_GROUPED = 8
_REMEMBERED = 64
_ANATOMIES: dict[str, Anatomy] = {}


class _Axes(Mapping[str, Axis]):
    """Axes by name, each probed when it is first asked for: of a configuration on the way to another one few are."""

    def __init__(self, makers: Mapping[str, Callable[[], Axis]]) -> None:
        self._makers = makers
        self._found: dict[str, Axis] = {}

    def __getitem__(self, name: str) -> Axis:
        if name not in self._found:
            self._found[name] = self._makers[name]()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def describe(config: Any) -> Anatomy:
    """Return all axes of `config` by probing it; no weights are read or made."""
    key = key_of(config)
    if key not in _ANATOMIES:
        if len(_ANATOMIES) >= _REMEMBERED:
            del _ANATOMIES[next(iter(_ANATOMIES))]
        config = copy.deepcopy(config)  # axes are probed later, and the caller may write into its own
        family = family_of(config)
        makers: dict[str, Callable[[], Axis]] = {}
        for tower in family.towers:
            makers |= _tower_makers(config, family, tower)
        for name, field in family.projector.items():
            makers[name] = partial(_projector_axis, config, name, field)
        for name, (part, field_name, _) in family.query_tokens.items():
            makers[name] = partial(_tokens_axis, config, name, (part, field_name))
        makers["vocab"] = partial(_vocab_axis, config, family)
        towers = {tower.name: f"{tower.prefix}." for tower in family.towers} | {"projector": f"{family.joint}."}
        for name, refusal in family.refusals.items():
            makers[name] = partial(_refused, makers[name], refusal)
        tied = skeleton(config).tied
        _ANATOMIES[key] = Anatomy(model_type=config.model_type, axes=_Axes(makers), tied=tied, towers=towers)
    return _ANATOMIES[key]


def _tower_makers(config: Any, family: Family, tower: Tower) -> dict[str, Callable[[], Axis]]:
    """Return how to find each axis of a tower, by name."""
    backbone = backbone_of(config, tower)
    if backbone is None:
        model_type = part_of(config, tower).model_type
        reason = f"the backbone {model_type!r} is not known to families.py"
        return {f"{tower.name}.{noun}": partial(_uncut, tower, noun, reason) for noun in _ALWAYS}
    view = View(config, family, tower, backbone)
    return {
        f"{tower.name}.{noun}": partial(_uncut, tower, noun, refusal)
        if (refusal := backbone.refusals.get(noun))
        else partial(make, view)
        for noun, make in _makers(view).items()
    }


def _uncut(tower: Tower, noun: str, reason: str) -> Axis:
    return Axis(name=f"{tower.name}.{noun}", kind=_KINDS[noun], size=0, refusal=reason)


def _refused(make: Callable[[], Axis], reason: str) -> Axis:
    return refused(make(), reason)


def _projector_axis(config: Any, name: str, field: Field) -> Axis:
    return _inner_axis(view_of(config, "vision"), name, field, int(get(config, field)))


def _makers(view: View) -> dict[str, Callable[[View], Axis]]:
    """Return how to find each axis that this tower has, by noun."""
    backbone = view.backbone
    found: dict[str, Callable[[View], Axis]] = {"blocks": lambda view: _blocks_axis(view, "blocks")}
    if backbone.decoder[0]:
        found["decoder_blocks"] = lambda view: _blocks_axis(view.decoder(), "decoder_blocks")
    if "ffn" in backbone.refusals or view.value(backbone.ffn):
        found["ffn"] = _ffn_axis
    if view.value(backbone.expert_ffn):
        found["expert_ffn"] = _expert_ffn_axis
    if view.value(backbone.experts):
        found["experts"] = _experts_axis
    found["kv_groups"] = kv_axis
    if "kv_groups" not in backbone.refusals and view.free_heads:  # else heads are no axes of their own (`Anatomy.axis`)
        found |= {"queries": queries_axis} if backbone.kv else {}
        found["head_dim"] = head_dim_axis
    return found | {"width": _width_axis}


def _blocks_axis(view: View, noun: str) -> Axis:
    name, period = f"{view.tower.name}.{noun}", view.period
    layers = f"{view.tower.prefix}.{view.backbone.layers}"
    group = Group(name=name, axis=name, units=view.blocks // period, stride=period, some_of=some_of(view))
    refusal = ""
    try:
        group = _with_rows(view, layers, group)
    except RefusedError as refused:
        refusal = str(refused)
    if view.blocks % period:
        refusal = f"{view.blocks} blocks are no whole number of {view.backbone.period} = {period}"
    note = f"blocks go {period} at a time ({view.backbone.period})" if period > 1 else ""
    must = sorted(units[0] for units in group.some_of if len(units) == 1)
    return Axis(
        name=name,
        kind="blocks",
        size=view.blocks,
        fields=labels((view.field(view.backbone.blocks),)),
        groups=() if refusal else (group,),
        multiple=period,
        minimum=max(group.least * period, int(view.value(view.backbone.no_fewer_than) or 0)),
        layers=layers,
        refusal=refusal,
        note=f"block {', '.join(map(str, must))} must stay: read elsewhere, or needed at its place" if must else note,
    )


def _with_rows(view: View, layers: str, group: Group) -> Group:
    """Return a group of blocks with what has rows for each of them elsewhere, having tried to leave one out."""
    if group.units == 1:
        return group
    free = [unit for unit in range(group.units) if group.allows(set(range(group.units)) - {unit})]
    if not free:
        raise RefusedError("all blocks must stay: the output of each is read elsewhere")
    kept = [layer for layer in range(view.blocks) if layer // view.period != free[-1]]
    return replace(group, slots=rows_of_blocks(view, layers, kept, group.units))


def _ffn_axis(view: View) -> Axis:
    multiple = view.width if view.backbone.ffn_is_ratio and not view.free_ratio else 1
    note = f"the config holds the whole number FFN / width ({view.backbone.ffn})" if multiple > 1 else ""
    axis = _inner_axis(view, f"{view.tower.name}.ffn", view.field(view.backbone.ffn), view.ffn)
    return axis if axis.refusal else replace(axis, multiple=multiple, minimum=multiple, note=note)


def _expert_ffn_axis(view: View) -> Axis:
    field = view.field(view.backbone.expert_ffn)
    axis = _inner_axis(view, f"{view.tower.name}.expert_ffn", field, int(get(view.config, field)))
    aligned = math.lcm(axis.multiple, _GROUPED)
    return axis if axis.refusal else replace(axis, multiple=aligned, minimum=aligned)


def _experts_axis(view: View) -> Axis:
    """Return the axis of whole experts: each block keeps its own, of which a token still takes as many as before."""
    backbone, field = view.backbone, view.field(view.backbone.experts)
    size, least = int(get(view.config, field)), int(view.value(backbone.experts_per_token))
    places = moved(view.config, edited(view.config, {field: 2 * size}))
    draft = Axis(name=f"{view.tower.name}.experts", kind="experts", size=size, fields=labels((field,)))
    if (teams := int(view.value(backbone.expert_teams) or 1)) > 1:
        return refused(draft, f"its experts are sorted into {teams} sets of one size ({backbone.expert_teams})")

    def group_of(place: Place, length: int) -> Group:
        return Group(
            name=place_name(view, draft.name, place), axis=draft.name, units=size, layer=view.locate(place[0])[0]
        )

    note = f"a token takes {least} of them ({backbone.experts_per_token})"
    least = max(least, 2) if view.value(backbone.expert_teams) else least  # a set is ranked by its best two
    axis = grouped(view, draft, places, group_of)
    return axis if axis.refusal else replace(axis, minimum=least, note=note)


def _tokens_axis(config: Any, name: str, field: Field) -> Axis:
    """Return the axis of learned queries that ask the picture: fewer of them, fewer placeholders in the prompt."""
    view = view_of(config, "vision")
    size = int(get(config, field))
    draft = Axis(name=name, kind="tokens", size=size, fields=labels((field,)), note="cut together with the processor")
    places = moved(config, edited(config, {field: 2 * size}))
    return grouped(view, draft, places, lambda place, length: Group(name=name, axis=name, units=size))


def _inner_axis(view: View, name: str, field: Field, size: int) -> Axis:
    """Return the axis of a size inside modules that one field holds; each block and each declared part chooses for itself."""
    places = moved(view.config, edited(view.config, {field: 2 * get(view.config, field)}))
    draft = Axis(name=name, kind="inner", size=size, fields=labels((field,)))
    units: dict[str, int] = {}
    try:
        for place, (old, _) in places.items():
            label = place_name(view, name, place)
            units[label] = min(old, units.get(label, old))
        if wrong := [label for label, count in units.items() if count % size and size % count]:
            raise RefusedError(f"{wrong[0]} has {units[wrong[0]]} units, which is out of proportion to {size}")
    except RefusedError as reason:
        return refused(draft, str(reason))

    def group_of(place: Place, length: int) -> Group:
        label = place_name(view, name, place)
        count = units[label]
        stride, rate = max(1, size // count), max(1, count // size)
        return Group(name=label, axis=name, units=count, stride=stride, rate=rate, layer=view.locate(place[0])[0])

    axis = grouped(view, draft, places, group_of)
    multiple = math.lcm(1, *(group.stride for group in axis.groups))
    return replace(axis, multiple=multiple, minimum=multiple)


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
            refuse_norm_over_heads(view, place)
        if attention is not None:
            where = f"{name}{view.inside(place[0])[0]}.{attention.group}"
            heads = view.heads_by_list[view.list_of(place[0])]
            return Group(name=where, axis=name, units=heads, stride=width // heads, layer=layer)
        if place in ffn and view.inside(place[0])[0]:
            where = f"{place_name(view, name, place)}.ffn"
            return Group(name=where, axis=name, units=length, rate=length // width, layer=layer)
        if part := view.family.interior(name, *place):
            return Group(name=f"{name}.{part}", axis=name, units=inside[part], rate=inside[part] // width)
        return Group(name=name, axis=name, units=width)

    stride = math.lcm(*(width // heads for heads in view.heads_by_list))
    multiple = stride if not free else view.heads if view.backbone.width_by_heads else 1
    if any(view.layout(parameter).startswith("-") for parameter, _ in places):  # one matrix per expert
        multiple = math.lcm(multiple, _GROUPED)
    fields = tuple(field for field in changes if field[1] != "head_dim")
    draft = Axis(name=name, kind="width", size=width, fields=labels(fields), multiple=multiple)
    return _with_note(view, grouped(view, draft, places, group_of))


def _with_note(view: View, axis: Axis) -> Axis:
    """Say whether a cut of this width equals the masked model, and mark what has to make up for it, by the norms that read it."""
    slots = [slot for group in axis.groups if group.name == axis.name for slot in group.slots]
    if "layer" in {slot.norm for slot in slots}:
        note = "LayerNorm takes the mean over all channels: cut == masked with norms over the kept ones alone"
        return replace(axis, exact=False, note=note)
    if not {slot.norm for slot in slots} & {"rms", "rms1"}:
        return axis
    groups = [
        replace(group, slots=tuple(_made_up(view, slot) for slot in group.slots)) if group.name == axis.name else group
        for group in axis.groups
    ]
    scalars = tuple(
        (name, view.backbone.made_up[inside])
        for name, shape in view.whole.shapes.items()
        if not shape and (inside := view.inside(name)[1]) in view.backbone.made_up
    )
    axis = replace(axis, groups=tuple(groups), scalars=scalars)
    norm, undone = view.family.heavier_eps.get(axis.name, ("", ""))
    if not norm or view.value(undone):
        return axis
    note = (
        "the epsilon of the norm behind the pooler weighs more: cut == masked with that epsilon / the share that stays"
    )
    return replace(axis, heavier_eps=norm, exact=False, note=note)


def _made_up(view: View, slot: Slot) -> Slot:
    """Say what a cut of the width does to one place of a stream that RMSNorms read."""
    family, module = view.family, slot.parameter.rpartition(".")[0]
    if norm := view.backbone.made_up.get(view.inside(slot.parameter)[1]):
        return replace(slot, norm=norm)
    if slot.role == "produce":
        scaled = view.backbone.root_of_width and isinstance(view.whole.owner(slot.parameter), nn.Embedding)
        return slot if scaled or module in family.raw else replace(slot, norm="write")
    if slot.role == "consume":
        return replace(slot, norm="read") if module in family.raw_readers else slot
    if slot.norm not in ("rms", "rms1"):
        return slot
    label, inside = view.inside(slot.parameter)
    if inside.removesuffix(".weight") in view.backbone.post_norms or module in family.post_norms:
        return replace(slot, norm="")
    tied = any(name.startswith(f"{view.tower.prefix}.") for name in view.whole.tied.values())
    if tied and not view.backbone.root_of_width and not label and inside == view.backbone.final_norm:
        return replace(slot, norm="last1" if slot.norm == "rms1" else "last")
    return slot


def _vocab_axis(config: Any, family: Family) -> Axis:
    tower = family.tower("text")
    field = (tower.config, "vocab_size")
    size = int(get(config, field))
    places = moved(config, edited(config, {other: 2 * size for other in vocab_fields(config)}))
    # a table may have rows for placeholders behind the vocabulary
    slots = tuple(
        Slot(parameter=name, dim=dim, role="produce", rest=old - size) for (name, dim), (old, _) in places.items()
    )
    refusal = (
        "" if places and all(new == old + size for old, new in places.values()) else "vocab_size moves no parameter"
    )
    first = int(get(config, family.first_position)) + 1 if family.first_position else 0
    some_of = tuple((token,) for token in range(first))
    groups = () if refusal else (Group(name="vocab", axis="vocab", units=size, slots=slots, some_of=some_of),)
    return Axis(
        name="vocab",
        kind="vocab",
        size=size,
        fields=labels((field,)),
        groups=groups,
        minimum=max(1, first),
        refusal=refusal,
        note="cut together with the tokenizer",
    )
