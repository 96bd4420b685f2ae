"""The axes inside attention: key/value groups, query heads of each group, and the dimensions of a head.

Legend: Q query heads, KV key/value heads, G = Q / KV queries per group, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from slimlmm import rope
from slimlmm.axes import Axis, Group, Norm, Role, Slot
from slimlmm.backbones import Attention
from slimlmm.norms import kind_of
from slimlmm.probing import Place, edited, moved
from slimlmm.slots import (
    RefusedError,
    attention_of,
    grouped,
    labels,
    place_name,
    refuse_norm_over_heads,
    refused,
)
from slimlmm.views import View

Places = Mapping[Place, tuple[int, int]]


def _draft(view: View, noun: str, size: int, *fields: str) -> Axis:
    found = labels(view.field(field) for field in fields if field)
    return Axis(name=f"{view.tower.name}.{noun}", kind="inner", size=size, fields=found)


def _twice_as_wide(view: View) -> Mapping[tuple[str, str], object]:
    """Fields of twice the width, so that twice the heads divide it."""
    return view.set_width(2 * view.width)


def kv_axis(view: View) -> Axis:
    """Return the axis of key/value heads, each with its queries."""
    draft = _draft(view, "kv_groups", view.kv, view.backbone.heads, view.backbone.kv)
    if not view.free_heads:
        reason = (
            f"head_dim is {view.backbone.width} / {view.backbone.heads} in this tower, so fewer heads would "
            f"re-cut the same matrices into wider heads; heads go with {view.tower.name}.width"
        )
        return refused(draft, reason)
    wide = _twice_as_wide(view)
    places = moved(
        edited(view.config, wide), edited(view.config, {**wide, **view.set_heads(2 * view.kv, view.queries)})
    )

    def group_of(place: Place, length: int) -> Group:
        refuse_norm_over_heads(view, place)
        layer, label = view.locate(place[0])[0], place_name(view, draft.name, place)
        if layer is not None and (giver := view.keys_from(layer)) != layer:
            layer, label = giver, f"{draft.name}[{giver}]"
        if common := view.common_heads(place[0]):
            layer, label = None, f"{draft.name}.{common}"
        units = view.kv_of(layer)
        whole = math.gcd(units, view.kv)
        return Group(
            name=label, axis=draft.name, units=units, stride=view.kv // whole, rate=units // whole, layer=layer
        )

    axis = grouped(view, _dividing(view, draft, view.queries), places, group_of)
    multiple = math.lcm(1, *(group.stride for group in axis.groups))
    return axis if axis.refusal else replace(axis, multiple=multiple, minimum=multiple)


def _dividing(view: View, draft: Axis, others: int) -> Axis:
    """Let an axis go only to sizes at which size x others heads divide the width, where the config class wants that."""
    if not view.backbone.width_by_heads:
        return draft
    allowed = tuple(n for n in range(1, draft.size + 1) if view.width % (others * n) == 0)
    note = f"width {view.width} must be a multiple of the number of heads ({others} for each one of these)"
    return replace(draft, allowed=allowed, note=note)


def queries_axis(view: View) -> Axis:
    """Return the axis of query heads per key/value head: each group chooses its own, all groups the same number."""
    draft = _draft(view, "queries", view.queries, view.backbone.heads)
    wide = _twice_as_wide(view)
    places = moved(
        edited(view.config, wide), edited(view.config, {**wide, **view.set_heads(view.kv, 2 * view.queries)})
    )
    slots: dict[Group, list[Slot]] = {}
    try:
        for place, (old, new) in places.items():
            known = attention_of(view, place) is not None or view.layout(place[0])[place[1] : place[1] + 1] == "P"
            if not known or (new - old) % view.heads:
                raise RefusedError(f"{place[0]} moves with it, but holds no rows for each query head")
            dim = (new - old) // view.heads  # queries stand first where keys and values follow in the same matrix
            heads = view.kv_of(view.locate(place[0])[0])  # a block of fewer key/value heads has more queries for each
            units = view.heads // heads
            whole = math.gcd(units, view.queries)
            for kv in range(heads):
                group = _one_of(
                    view, draft, place, f"[{kv}]", units=units, stride=view.queries // whole, rate=units // whole
                )
                role: Role = "consume" if place[1] else "produce"
                offset = kv * units * dim
                slot = Slot(parameter=place[0], dim=place[1], role=role, inner=dim, offset=offset)
                slots.setdefault(group, []).append(slot)
    except RefusedError as reason:
        return refused(draft, str(reason))
    multiple = math.lcm(1, *(group.stride for group in slots))
    return _with_groups(_dividing(view, replace(draft, multiple=multiple), view.kv), slots)


def _one_of(view: View, draft: Axis, place: Place, suffix: str, *, units: int, stride: int = 1, rate: int = 1) -> Group:
    """Return an empty group of one block of the tower."""
    name = f"{place_name(view, draft.name, place)}{suffix}"
    layer = view.locate(place[0])[0]
    return Group(name=name, axis=draft.name, units=units, stride=stride, rate=rate, layer=layer)


def _with_groups(draft: Axis, slots: Mapping[Group, list[Slot]]) -> Axis:
    if not slots:
        return refused(draft, f"changing {', '.join(draft.fields)} moves no parameter")
    groups = [replace(group, slots=tuple(found)) for group, found in slots.items()]
    groups.sort(key=lambda group: (group.layer is not None, group.layer or 0))
    return replace(draft, groups=tuple(groups), minimum=draft.multiple)


@dataclass
class _Heads:
    """Collects the slots of the dimensions of a head, parameter by parameter.

    What scores are made of (queries, keys) is chosen once for the whole tower where positions rotate, because all blocks share
    the frequencies; else for each key/value head of each block, as values are.
    """

    view: View
    draft: Axis
    runs: list[rope.Run]
    slots: dict[Group, list[Slot]] = field(default_factory=dict)

    def score(self, place: Place, attention: Attention, norm: Norm, heads: int, base: int, step: int) -> None:
        """Add the dimensions of some heads of queries or keys: head h begins at row base + h * step."""
        view, dim = self.view, self.view.head_dim
        for head in range(0 if self.runs else heads):
            suffix = f".{attention.group}.scores[{head * view.kv // heads}]"
            self._add(_one_of(view, self.draft, place, suffix, units=dim), place, norm, 1, base + head * step, step, 1)
        for run in self.runs:
            group, stretches = self._run_group(run), run.places(rope.rotated(view), neighbours=view.backbone.neighbours)
            if step == len(stretches) * run.units * stretches[0][1]:  # the halves of all heads, one behind the other
                self._add(group, place, norm, len(stretches) * heads, base, step // len(stretches), stretches[0][1])
                continue
            for offset, inner in stretches:
                self._add(group, place, norm, heads, base + offset, step, inner)

    def value(self, place: Place, attention: Attention, heads: int, base: int, step: int) -> None:
        """Add the dimensions of some heads of values, of what gates them, or of what reads them."""
        for head in range(heads):
            suffix = f".{attention.group}.values[{head * self.view.kv // heads}]"
            group = _one_of(self.view, self.draft, place, suffix, units=self.view.head_dim)
            self._add(group, place, "", 1, base + head * step, step, 1)

    def _run_group(self, run: rope.Run) -> Group:
        step = rope.proportion(self.view.head_dim, self.runs)
        rate = run.units * step // self.view.head_dim
        name = f"{self.draft.name}.{run.name}"
        some_of = ((0,),) if run.prefix else ()
        return Group(name=name, axis=self.draft.name, units=run.units, stride=step, rate=rate, some_of=some_of)

    def _add(self, group: Group, place: Place, norm: Norm, heads: int, base: int, step: int, inner: int) -> None:
        name, dim = place
        module = name.rpartition(".")[0]
        scale = any(module.endswith(f".{norm}") for one in self.view.backbone.attention for norm in one.norms)
        role: Role = "consume" if dim else "affine" if scale else "produce"
        whole = step == group.units * inner
        for offset in [base] if whole else [base + head * step for head in range(heads)]:
            outer = heads if whole else 1
            slot = Slot(parameter=name, dim=dim, role=role, outer=outer, inner=inner, offset=offset, norm=norm)
            self.slots.setdefault(group, []).append(slot)


def head_dim_axis(view: View) -> Axis:
    """Return the axis of the dimensions of every head: rotary pairs for queries and keys, single ones for values.

    Scores are sums over D, divided by sqrt(D) (but for towers of a `fixed_scale`): with D' of them left, queries are multiplied
    by c = sqrt(D'/D). Where an RMSNorm over D stands before the rotation, queries and keys are multiplied by c, so that it
    divides by what it divided by before, and what is then too much or too little of c goes into its weight.
    """
    draft = _draft(view, "head_dim", view.head_dim, view.backbone.head_dim)
    places = view.moved_by_head_dim()
    try:
        found = _Heads(view, draft, rope.runs(view))
        normed = any(_norm_index(view, place) is not None for place in places)
        for place, (old, new) in places.items():
            if new != 2 * old:
                raise RefusedError(f"{place[0]} dim {place[1]} went from {old} to {new}, which is not in proportion")
            _add_place(found, place, old, normed=normed)
    except RefusedError as reason:
        return refused(draft, str(reason))
    step = rope.proportion(view.head_dim, found.runs) if found.runs else 1
    return _with_groups(replace(draft, multiple=step, minimum=step), found.slots)


def _norm_index(view: View, place: Place) -> tuple[Attention, int] | None:
    """Return the attention whose norm of queries (0) or keys (1) this is."""
    inside = view.inside(place[0])[1]
    for attention in view.backbone.attention:
        for index, norm in enumerate(attention.norms):
            if inside.rpartition(".")[0] == f"{attention.module}.{norm}":
                return attention, index
    return None


def _add_place(found: _Heads, place: Place, length: int, *, normed: bool) -> None:
    """Sort one moved parameter axis into queries, keys, values, and what reads or norms them."""
    view, dim = found.view, found.view.head_dim
    fixed = view.backbone.fixed_scale
    if (norm := _norm_index(view, place)) is not None:
        attention, index = norm
        kind = kind_of(view.whole.owner(place[0]))
        if kind not in ("rms", "rms1") or length != dim:
            raise RefusedError(f"{place[0]} is no RMSNorm over head_dim, and takes the mean over what goes")
        found.score(place, attention, kind if fixed or index else "", 1, 0, dim)
        return
    for attention, what, heads, start, step in _parts(view, place, length):
        if what == "values":
            found.value(place, attention, heads, start, step)
        else:
            scaled = normed or (what == "queries" and not fixed)
            found.score(place, attention, "write" if scaled else "", heads, start, step)


def _parts(view: View, place: Place, length: int) -> Iterator[tuple[Attention, str, int, int, int]]:
    """Yield (attention, queries | keys | values, heads, first row, rows from head to head) of one parameter axis."""
    attention, dim = attention_of(view, place), view.head_dim
    if attention is None:
        raise RefusedError(f"{place[0]} moves with it, but is no known part of attention")
    if place[1]:
        yield attention, "values", view.heads, 0, dim
        return
    if len(attention.produce) == 1:  # queries, keys and values one behind the other in one matrix
        for what, heads, before in (
            ("queries", view.heads, 0),
            ("keys", view.kv, view.heads),
            ("values", view.kv, view.heads + view.kv),
        ):
            yield attention, what, heads, before * dim, dim
        return
    module = view.inside(place[0])[1].removeprefix(f"{attention.module}.").rpartition(".")[0]
    what = ("queries", "keys", "values")[attention.produce.index(module)]
    heads = view.heads if what == "queries" else view.kv
    step = 2 * dim if what == "queries" and attention.gated else dim
    if length != heads * step:
        raise RefusedError(f"{place[0]} has {length} rows, not {step} for each of {heads} heads")
    yield attention, what, heads, 0, step
    if step > dim:
        yield attention, "values", heads, dim, step
