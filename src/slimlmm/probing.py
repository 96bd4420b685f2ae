"""Ask the configuration: build it on the meta device, change one field, and see which parameter axes moved.

Nothing here holds weights. A `Skeleton` is a configuration's model without memory; `moved` compares two of
them.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from slimlmm.families import stock_class

#: where a field stands: (sub-config key, field), "" for the top level
Field = tuple[str, str]
#: (parameter name, dimension)
Place = tuple[str, int]

_KEPT = 64
_cache: OrderedDict[str, Skeleton] = OrderedDict()
#: a class of configurations takes milliseconds to check what it is given, and every second edit was asked for before
_EDITS_KEPT = 256
_edits: OrderedDict[tuple[type, str], Any] = OrderedDict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model on the meta device: shapes by state-dict name, tied aliases (alias -> owner), names of parameters, modules.

    `weights` names every parameter once, under its owner's name; buffers are in `shapes` alone.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    weights: tuple[str, ...]
    model: nn.Module

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def owner(self, parameter: str) -> nn.Module:
        """Return the module that holds the parameter of that state-dict name."""
        return self.model.get_submodule(parameter.rpartition(".")[0])


def key_of(config: Any) -> str:
    """Return a text that two configurations share exactly when they describe the same model, number format aside."""
    return json.dumps(_without_dtype(config.to_dict()), sort_keys=True, default=str)


def _without_dtype(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_dtype(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if key != "dtype"
    }


def skeleton(config: Any) -> Skeleton:
    """Build `config` on the meta device (0.1 s for 7 B parameters); the last few are remembered."""
    key = key_of(config)
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    with torch.device("meta"), no_init_weights():  # there is nothing to fill, and asking for it takes half the time
        model = stock_class(config).from_config(config)
        model.tie_weights()
    owners: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _cache[key] = Skeleton(shapes=shapes, tied=tied, weights=tuple(owners.values()), model=model)
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
    key = type(config), repr(data)
    if key not in _edits:
        _edits[key] = type(config)(**data)
        if len(_edits) > _EDITS_KEPT:
            _edits.popitem(last=False)
    _edits.move_to_end(key)
    return copy.deepcopy(_edits[key])  # the caller's own: building a model writes into it


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
