"""Ask the configuration: build it on the meta device, change one field, and see which parameter axes moved.

Nothing here holds weights. A `Skeleton` is a configuration's model without memory; `moved` compares two of
them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from slimlmm.families import Backbone, Family, Tower

#: where a field stands: (sub-config key, field), "" for the top level
Field = tuple[str, str]
#: (parameter name, dimension)
Place = tuple[str, int]

_STOCK: Any = AutoModelForImageTextToText
_KEPT = 64
_cache: OrderedDict[str, Skeleton] = OrderedDict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model on the meta device: shapes by state-dict name, tied aliases (alias -> owner), module tree."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    model: nn.Module

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def owner(self, parameter: str) -> nn.Module:
        """Return the module that holds the parameter of that state-dict name."""
        return self.model.get_submodule(parameter.rpartition(".")[0])


def key_of(config: Any) -> str:
    """Return a text that two configurations share exactly when they describe the same model."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def skeleton(config: Any) -> Skeleton:
    """Build `config` on the meta device (0.1 s for 7 B parameters); the last few are remembered."""
    key = key_of(config)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    with torch.device("meta"):
        model = _STOCK.from_config(config)
    owners: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _cache[key] = Skeleton(shapes=shapes, tied=tied, model=model)
    if len(_cache) > _KEPT:
        _cache.popitem(last=False)
    return _cache[key]


def get(config: Any, place: Field) -> Any:
    """Return the value of a field in the dictionary of `config`, None where it is absent."""
    data = config.to_dict()
    return (data[place[0]] if place[0] else data).get(place[1])


def edited(config: Any, changes: Mapping[Field, Any]) -> Any:
    """Return a new configuration with these fields written, by real key; None lets the class derive one."""
    data = config.to_dict()
    data.pop("transformers_version", None)
    for (part, name), value in changes.items():
        target = data[part] if part else data
        target[name] = value
        if value is None:
            del target[name]
    return type(config).from_dict(data)


def moved(before: Any, after: Any) -> dict[Place, tuple[int, int]]:
    """Return every parameter axis whose length differs between two configurations: place -> (old, new)."""
    old, new = skeleton(before), skeleton(after)
    places: dict[Place, tuple[int, int]] = {}
    for name, shape in old.shapes.items():
        if name in old.tied or name not in new.shapes:
            continue
        for dim, (a, b) in enumerate(zip(shape, new.shapes[name], strict=True)):
            if a != b:
                places[name, dim] = (a, b)
    return places


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

    def value(self, name: str) -> Any:
        """Value of a field of this tower, None where absent."""
        return get(self.config, self.field(name)) if name else None

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
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.value(self.backbone.blocks))

    @property
    def ffn(self) -> int:
        """FFN width in neurons."""
        return int(self.value(self.backbone.ffn)) * (self.width if self.backbone.ffn_is_ratio else 1)

    @property
    def period(self) -> int:
        """Every how many blocks one is special (cross-attention of a Q-Former); 1 where none is."""
        return int(self.value(self.backbone.period) or 1)

    def pin(self) -> dict[Field, Any]:
        """Write head_dim out, so that changing W or Q leaves D alone."""
        return {self.field("head_dim"): int(self.value("head_dim") or self.width // self.heads)}

    @cached_property
    def free_heads(self) -> bool:
        """Tell whether this tower's modelling honours head_dim, i.e. whether heads are free of the width."""
        pinned = self.pin()
        doubled = {field: 2 * value for field, value in pinned.items()}
        return bool(moved(edited(self.config, pinned), edited(self.config, doubled)))

    def set_width(self, size: int) -> dict[Field, Any]:
        """Fields to write for a new width: itself, all that equal it by design, heads if they go with it."""
        changes: dict[Field, Any] = {self.field(self.backbone.width): size}
        follow = [self.field(name) for name in self.backbone.ties]
        follow += self.family.ties.get(f"{self.tower.name}.width", ())
        changes |= {field: size for field in follow if get(self.config, field) == self.width}
        if self.free_heads:
            return changes | self.pin()
        return changes | self.set_heads(self.heads * size // self.width)

    def set_heads(self, heads: int) -> dict[Field, Any]:
        """Fields to write for `heads` query heads at the same number of queries per key/value head."""
        changes: dict[Field, Any] = {self.field(self.backbone.heads): heads}
        if self.backbone.kv:
            changes[self.field(self.backbone.kv)] = heads * self.kv // self.heads
        return changes

    def locate(self, parameter: str) -> tuple[int | None, str]:
        """Return (layer, name inside the layer), or (None, name inside the tower) outside the layers."""
        inside = parameter.removeprefix(f"{self.tower.prefix}.")
        prefix = f"{self.backbone.layers}."
        if inside != parameter and inside.startswith(prefix):
            layer, _, rest = inside.removeprefix(prefix).partition(".")
            return int(layer), rest
        return None, inside
