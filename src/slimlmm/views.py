"""One tower of one configuration: its sizes by name, and the fields to write for other ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from slimlmm.backbones import Backbone
from slimlmm.errors import UserError
from slimlmm.families import Family, Tower, backbone_of, family_of, matched, part_of
from slimlmm.probing import Field, Place, Skeleton, edited, get, key_of, moved, skeleton

T = TypeVar("T")
#: rotary settings that say how frequencies are scaled
ROPE_SCALING = frozenset(
    [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "attention_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    ]
)
#: every view of a tower asks this, and each answer takes two models: (configuration, field) -> what moved
_MOVED_BY_HEAD_DIM: dict[tuple[str, Field], dict[Place, tuple[int, int]]] = {}
_REMEMBERED = 128


@dataclass(frozen=True)
class View:
    """One tower of one configuration, with its current sizes."""

    config: Any
    family: Family
    tower: Tower
    backbone: Backbone

    def field(self, name: str) -> Field:
        """Address of a field of this tower."""
        return (self.tower.config, name)

    @cached_property
    def whole(self) -> Skeleton:
        """The model of the configuration without weights, looked up once."""
        return skeleton(self.config)

    @cached_property
    def _values(self) -> dict[str, Any]:
        data: dict[str, Any] = self.config.to_dict()
        return data[self.tower.config] if self.tower.config else data

    def value(self, name: str) -> Any:
        """Value of a field of this tower, None where absent."""
        return self._values.get(name) if name else None

    @property
    def width(self) -> int:
        """W."""
        return int(self.value(self.backbone.width))

    @property
    def heads(self) -> int:
        """Q."""
        return int(self.value(self.backbone.heads))

    @property
    def kv(self) -> int:
        """KV; equal to Q in plain multi-head attention."""
        return int(self.value(self.backbone.kv) or self.heads)

    @property
    def heads_by_list(self) -> tuple[int, ...]:
        """KV of each list of blocks, the tower's own first."""
        more = tuple(int(self.value(name)) for name in self.backbone.more_heads)
        return (self.kv, *(more or (self.kv,) * len(self.backbone.more_layers)))

    def list_of(self, parameter: str) -> int:
        """Return which list of blocks a parameter stands in: 0 the tower's own (or none), then the further ones."""
        inside = parameter.removeprefix(f"{self.tower.prefix}.")
        lists = enumerate(self.backbone.more_layers, start=1)
        return next((number for number, layers in lists if inside.startswith(f"{layers}.")), 0)

    def common_heads(self, parameter: str) -> str:
        """Return the name of the list of blocks all of which keep the same heads in this module, "" where each has its own."""
        inside = self.inside(parameter)[1]
        if not any(inside.startswith(f"{module}.") for module in self.backbone.common_heads):
            return ""
        lists = (self.backbone.layers, *self.backbone.more_layers)
        return lists[self.list_of(parameter)].partition(".")[0]

    def kv_of(self, layer: int | None) -> int:
        """KV of one block: that of the tower, if the block has no setting of its own."""
        return int(self._setting(layer, self.backbone.kv) or self.kv)

    def _setting(self, layer: int | None, name: str) -> Any:
        """Value of a field that is set for one block alone, None where it is not."""
        settings = (values for field in self.backbone.by_block for values in (self.value(field) or {}).items())
        return next((found[name] for number, found in settings if int(number) == layer and name in found), None)

    def keys_from(self, layer: int) -> int:
        """Return the number of the block whose keys and values a block uses: its own, but in a tower that shares them."""
        first = self.blocks - int(self.value(self.backbone.sharing) or 0)
        if layer < first:
            return layer
        kinds = self.value(self.backbone.per_layer[0])
        return max(number for number in range(first) if kinds[number] == kinds[layer])

    @property
    def queries(self) -> int:
        """G, query heads per key/value head."""
        return self.heads // self.kv

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.value(self.backbone.head_dim) or self.width // self.heads)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.value(self.backbone.blocks))

    @property
    def ffn(self) -> int:
        """FFN width in neurons."""
        return int(self.value(self.backbone.ffn) * (self.width if self.backbone.ffn_is_ratio else 1))

    @property
    def free_ratio(self) -> bool:
        """Tell whether the FFN width is a ratio that need not be whole."""
        return self.backbone.ffn_is_ratio and isinstance(self.value(self.backbone.ffn), float)

    @property
    def period(self) -> int:
        """Every how many blocks one is special (cross-attention of a Q-Former); 1 where none is."""
        return int(self.value(self.backbone.period) or 1)

    def pin(self) -> dict[Field, Any]:
        """Write head_dim out, so that changing W or Q leaves D alone."""
        return {self.field(self.backbone.head_dim): self.head_dim}

    @cached_property
    def free_heads(self) -> bool:
        """Tell whether this tower's modelling honours head_dim, i.e. whether heads are free of the width."""
        try:
            return bool(self.moved_by_head_dim())
        except StrictDataclassError:
            return False  # the config class itself derives or checks head_dim

    def moved_by_head_dim(self) -> Mapping[Place, tuple[int, int]]:
        """Return the parameter axes that move when D doubles, without factors for each rotary pair, which are too few then."""
        key = (key_of(self.config), self.field(self.backbone.head_dim))
        if key not in _MOVED_BY_HEAD_DIM:
            if len(_MOVED_BY_HEAD_DIM) >= _REMEMBERED:
                _MOVED_BY_HEAD_DIM.clear()
            _MOVED_BY_HEAD_DIM[key] = self._probe_head_dim()
        return _MOVED_BY_HEAD_DIM[key]

    def _probe_head_dim(self) -> dict[Place, tuple[int, int]]:
        base = self.pin()
        if settings := self.value("rope_parameters"):
            parts = settings.items() if all(isinstance(one, dict) for one in settings.values()) else [("", settings)]
            plain = {kind: {k: v for k, v in one.items() if k not in ROPE_SCALING} for kind, one in parts}
            plain = {kind: one | {"rope_type": "default"} for kind, one in plain.items()}
            base[self.field("rope_parameters")] = plain.get("", plain)
        twice = base | {self.field(self.backbone.head_dim): 2 * self.head_dim}
        return moved(edited(self.config, base), edited(self.config, twice))

    def set_width(self, size: int) -> dict[Field, Any]:
        """Fields to write for a new width: itself, all that equal it by design, heads if they go with it."""
        changes: dict[Field, Any] = {self.field(self.backbone.width): size}
        follow = [self.field(name) for name in self.backbone.ties]
        follow += self.family.ties.get(f"{self.tower.name}.width", ())
        changes |= {
            field: old // self.width * size
            for field in follow
            if (old := get(self.config, field)) and old % self.width == 0
        }
        if self.free_ratio:  # the FFN keeps its width
            changes[self.field(self.backbone.ffn)] = ratio(self.ffn, size)
        if self.free_heads:
            return changes | self.pin()
        return changes | self.set_heads(self.kv * size // self.width, self.queries)

    def set_heads(self, kv: int, queries: int) -> dict[Field, Any]:
        """Fields to write for `kv` key/value heads with `queries` query heads each."""
        name = self.backbone.kv
        changes: dict[Field, Any] = {self.field(self.backbone.heads): kv * queries}
        if name:
            changes[self.field(name)] = kv
        for field in self.backbone.by_block:
            changes[self.field(field)] = {
                number: found | ({name: kv * found[name] // self.kv} if name in found else {})
                for number, found in (self.value(field) or {}).items()
            }
        for name in self.backbone.more_heads:
            changes[self.field(name)] = int(self.value(name)) * kv // self.kv
        return changes

    def decoder(self) -> View:
        """Return the view of the same tower whose blocks are those of its decoder."""
        layers, blocks = self.backbone.decoder
        own = self.backbone.layers
        backbone = replace(
            self.backbone, layers=layers, blocks=blocks, more_layers=(own,), per_layer=(), no_fewer_than=""
        )
        return View(self.config, self.family, self.tower, backbone)

    def locate(self, parameter: str) -> tuple[int | None, str]:
        """Return (layer, name inside the layer), or (None, name inside the tower) outside the layers."""
        inside = parameter.removeprefix(f"{self.tower.prefix}.")
        prefix = f"{self.backbone.layers}."
        if inside != parameter and inside.startswith(prefix):
            layer, _, rest = inside.removeprefix(prefix).partition(".")
            return int(layer), rest
        return None, inside

    def inside(self, parameter: str) -> tuple[str, str]:
        """Return (label of the block, name inside the block) for any list of blocks, (``""``, name in the tower) elsewhere."""
        layer, inside = self.locate(parameter)
        if layer is not None:
            return f"[{layer}]", inside
        for layers in self.backbone.more_layers:
            if inside.startswith(f"{layers}."):
                number, _, rest = inside.removeprefix(f"{layers}.").partition(".")
                return f"[{layers.partition('.')[0]}.{number}]", rest
        return "", inside

    def layout(self, parameter: str) -> str:
        """Return the declared layout of a parameter, one letter per dimension, "" where none is."""
        return self._declared(self.family.layouts, self.backbone.layouts, parameter) or ""

    def pieces(self, parameter: str) -> tuple[int, tuple[str, ...]]:
        """Return the dimension of a parameter that is several axes in a row, and its declared pieces; (-1, ()) for none."""
        return self._declared(self.family.pieces, self.backbone.pieces, parameter) or (-1, ())

    def _declared(self, whole: Mapping[str, T], inner: Mapping[str, T], parameter: str) -> T | None:
        """Return what the family (by full name) or the backbone (by name inside a block) says of a parameter."""
        for names, name in ((whole, parameter), (inner, self.inside(parameter)[1])):
            for path, value in names.items():
                if matched(path, name) is not None:
                    return value
        return None


def ratio(ffn: int, width: int) -> float:
    """Return a number r with int(width * r) == ffn, as the stock classes compute it; ffn / width may fall short by rounding."""
    found = ffn / width
    return found if int(width * found) == ffn else math.nextafter(found, math.inf)


def view_of(config: Any, tower: str) -> View:
    """Return the tower of that name, or refuse where its model type is unknown."""
    family = family_of(config)
    found = family.tower(tower)
    backbone = backbone_of(config, found)
    if backbone is None:
        raise UserError(f"{tower}: backbone {part_of(config, found).model_type!r} is not supported.")
    return View(config, family, found, backbone)


def some_of(view: View) -> tuple[tuple[int, ...], ...]:
    """Return the sets of blocks of which one must stay: the kinds that the model needs, those that others read."""
    sets = []
    for name, value in view.backbone.essential:
        kinds = view.value(name) or ()
        sets += [tuple(layer for layer, kind in enumerate(kinds) if kind == value)]
    sets += [(layer % view.blocks,) for layer in view.backbone.fixed]
    sets += [(layer,) for layer in sorted({view.keys_from(other) for other in shared_blocks(view)})]
    for name in view.backbone.anchors:
        sets += [(layer,) for layer in view.value(name) or ()]
    if field := view.family.leading.get(f"{view.tower.name}.blocks"):
        sets += [(layer,) for layer in range(min(view.blocks, len(get(view.config, field) or ())))]
    sets += [tuple(range(number + 1)) for number in merges(view).values()]
    return tuple(units for units in sets if units)


def merges(view: View) -> dict[Field, int]:
    """Return the fields that number the block behind which patches are merged, with those numbers."""
    fields = view.family.behind if view.tower.name == "vision" else ()
    return {field: number for field in fields if (number := int(get(view.config, field))) >= 0}


def shared_blocks(view: View) -> range:
    """Return the blocks that take keys and values from earlier ones."""
    return range(view.blocks - int(view.value(view.backbone.sharing) or 0), view.blocks)


def vocab_fields(config: Any) -> list[Field]:
    """Return the field of the vocabulary and those that follow it."""
    family = family_of(config)
    own: Field = (family.tower("text").config, "vocab_size")
    return [own, *(field for field in family.ties.get("vocab", ()) if get(config, field) == get(config, own))]


def block_changes(view: View, layers: list[int], written: Mapping[Field, Any] | None = None) -> dict[Field, Any]:
    """Fields to write when only `layers` stay: depth, lists per block, block numbers, the feature layer.

    `written` are other changes, which settings by block number are taken from where they hold them.
    """
    if not layers:
        raise UserError(f"{view.tower.name}.blocks: at least one block must stay.")
    place = {old: new for new, old in enumerate(layers)}
    changes: dict[Field, Any] = {view.field(view.backbone.blocks): len(layers)}
    for name in view.backbone.per_layer:
        if (values := view.value(name)) is not None:
            changes[view.field(name)] = [values[layer] for layer in layers]
    for name in view.backbone.indexes:
        changes[view.field(name)] = [place[layer] for layer in view.value(name) if layer in place]
    for name in view.backbone.counts:
        if view.value(name) is not None:
            changes[view.field(name)] = sum(layer < view.value(name) for layer in layers)
    for name in view.backbone.by_block:
        latest = (written or {}).get(view.field(name), view.value(name)) or {}
        settings = {int(number): found for number, found in latest.items()}
        changes[view.field(name)] = {str(place[number]): settings[number] for number in settings if number in place}
    if view.backbone.sharing:
        changes[view.field(view.backbone.sharing)] = sum(layer in shared_blocks(view) for layer in layers)
    changes |= {field: sum(layer <= number for layer in layers) - 1 for field, number in merges(view).items()}
    changes |= {view.field(name): None for name in view.backbone.reset}
    field = view.family.feature_layer
    if view.tower.name == "vision" and field:
        old = get(view.config, field)
        new = [_moved_index(index, view.blocks, layers) for index in as_list(old)]
        changes[field] = new if isinstance(old, list | tuple) else new[0]
    return changes


def _moved_index(index: int, blocks: int, layers: list[int]) -> int:
    """Feature layer `index` when only `layers` stay: behind the same blocks, counted from the same end."""
    before = sum(layer < absolute(index, blocks) for layer in layers)
    return before if index >= 0 else before - len(layers) - 1


def as_list(value: Any) -> list[int]:
    """Return a list of one number as such a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def absolute(index: int, blocks: int) -> int:
    """Hidden state `index` as the number of blocks that ran before it (hidden state 0 is the embedding)."""
    return index if index >= 0 else blocks + 1 + index
