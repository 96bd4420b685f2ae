"""Where the units of a group live: role, layout and name of every parameter axis that moved with a field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import nn

from slimlmm.axes import Axis, Group, Norm, Role, Slot
from slimlmm.backbones import Attention
from slimlmm.norms import kind_of
from slimlmm.probing import Field, Place
from slimlmm.views import View

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RefusedError(Exception):
    """The probe found something that the slots cannot say; the text is the reason."""


def place_name(view: View, axis: str, place: Place) -> str:
    """Name the group of a place: ``axis[block]``, or ``axis.part`` for a declared part outside the blocks."""
    label, inside = view.inside(place[0])
    for parts, name in ((view.backbone.parts, inside), (view.family.parts, place[0])):
        for prefix, part in parts.items():
            if name.startswith(f"{prefix}."):
                return f"{axis}{label}.{part}"
    if label or axis in view.family.projector:
        return axis + label
    raise RefusedError(f"{place[0]} moves with it, but lies in no known part of the tower")


def attention_of(view: View, place: Place) -> Attention | None:
    """Return the attention module whose head axis this place is, None for every other axis."""
    inside = view.inside(place[0])[1]
    for attention in view.backbone.attention:
        names = attention.produce if place[1] == 0 else attention.consume
        leaves = {f"{attention.module}.{name}{leaf}" for name in names for leaf in ("", ".weight", ".bias")}
        if inside in leaves and not (place[1] == 0 and inside.rpartition(".")[0] in attention.consume):
            return attention
    return None


def refuse_norm_over_heads(view: View, place: Place) -> None:
    """Raise where this is a norm of all queries or keys at once: it takes its mean over every head, so none can go alone."""
    module = view.inside(place[0])[1].rpartition(".")[0]
    beside = {
        f"{attention.module}.{name}".rpartition(".")[0]
        for attention in view.backbone.attention
        for name in attention.produce
    }
    if module.rpartition(".")[0] in beside and kind_of(view.whole.owner(place[0])) in ("layer", "rms", "rms1"):
        raise RefusedError(f"{module} is a norm over all heads at once, so that fewer heads are another mean")


def slots_of(view: View, place: Place, group: Group) -> list[Slot]:
    """Return the slots of one parameter axis: one, or one for each declared piece."""
    role, norm = _role(view, place)
    length = view.whole.shapes[place[0]][place[1]]
    attention = attention_of(view, place)
    outer = attention.outer if attention is not None and place[1] == 0 else 1
    per_unit = length // group.units
    if attention is None:
        # constants that multiply a plain channel axis vary slowest, if nothing else is declared
        outer = 1 if view.layout(place[0])[place[1] : place[1] + 1].isupper() else per_unit
    if length % (group.units * outer):
        raise RefusedError(f"{place[0]} dim {place[1]} of length {length} does not split into {group.units} units")
    slot = Slot(parameter=place[0], dim=place[1], role=role, outer=outer, inner=per_unit // outer, norm=norm)
    dim, pieces = view.pieces(place[0])
    if dim != place[1]:
        return [slot]
    if "R" in pieces:  # one constant each, then the rest
        rest = per_unit - pieces.count("1")
        sizes = [1 if piece == "1" else rest for piece in pieces]
    else:
        weights = [1 if piece == "1" else view.heads // view.kv for piece in pieces]
        sizes = [per_unit * weight // sum(weights) for weight in weights]
    offsets = [group.units * sum(sizes[:index]) for index in range(len(sizes))]
    return [replace(slot, outer=1, inner=size, offset=offset) for size, offset in zip(sizes, offsets, strict=True)]


def _role(view: View, place: Place) -> tuple[Role, Norm]:
    """Tell what a parameter axis does with its channels, from the module that holds it."""
    name, dim = place
    module, leaf = view.whole.owner(name), name.rpartition(".")[2]
    if letters := view.layout(name):
        return ("consume" if letters[dim] in "cC" else "produce"), ""
    if isinstance(module, _LINEAR) or (isinstance(module, nn.MultiheadAttention) and leaf.startswith("in_proj")):
        return ("produce" if dim == 0 else "consume"), ""
    if len(view.whole.shapes[name]) > 1 or view.inside(name)[1] in view.backbone.tokens or name in view.family.tokens:
        return "produce", ""
    return "affine", _norm(view, name)


def _norm(view: View, name: str) -> Norm:
    """Return the kind of norm whose weight or bias this is."""
    kind = kind_of(view.whole.owner(name))
    if kind == "layer":
        return "layer"
    return kind if kind in ("rms", "rms1") and name.endswith("weight") else ""


def labels(fields: Iterable[Field]) -> tuple[str, ...]:
    """Return the names of fields as users write them: text_config.hidden_size."""
    return tuple(".".join(field).removeprefix(".") for field in fields)


def grouped(
    view: View, draft: Axis, places: Mapping[Place, tuple[int, int]], group_of: Callable[[Place, int], Group]
) -> Axis:
    """Sort the moved places into groups of slots; refuse the axis, with the reason, where they do not fit."""
    slots: dict[Group, list[Slot]] = {}
    if not places:
        return refused(draft, f"changing {', '.join(draft.fields)} moves no parameter")
    try:
        for place, (old, new) in places.items():
            if new != 2 * old:
                raise RefusedError(f"{place[0]} dim {place[1]} went from {old} to {new}, which is not in proportion")
            group = group_of(place, old)
            slots.setdefault(group, []).extend(slots_of(view, place, group))
    except RefusedError as reason:
        return refused(draft, str(reason))
    groups = [replace(group, slots=tuple(found)) for group, found in slots.items()]
    groups.sort(key=lambda group: (group.layer is not None, group.layer or 0))
    return replace(draft, groups=tuple(groups), minimum=draft.multiple)


def refused(draft: Axis, reason: str) -> Axis:
    """Return an axis that cannot be cut, and why."""
    return Axis(name=draft.name, kind=draft.kind, size=draft.size, fields=draft.fields, refusal=reason)
