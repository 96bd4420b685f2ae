"""The weights of a checkpoint folder under their in-memory names, one at a time, and the way back to their names on disk.

Both ways are transformers' own conversion (`get_model_conversion_mapping`): legacy prefixes, experts stored one by one,
transposed or fused matrices. Nothing of it is written here; what is added is that it runs part by part, so that the
whole is never in memory.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from slimlmm.errors import UserError
from slimlmm.probing import Skeleton
from slimlmm.shards import FLOATS, INDEX, Entry, Shards, first_of

#: rows that are compared at a time where two tied weights both lie on disk
_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Keys on disk that become parameters together: mostly one and one; `converter` where more than a name changes."""

    name: str
    keys: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    def made(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name; `read` gives the tensor of a key on disk."""
        if self.converter is None:
            return {self.name: read(self.keys[0][0])}
        converter: Any = copy.deepcopy(self.converter)
        for key, pattern in self.keys:
            converter.add_tensor(self.name, key, pattern, read(key))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Weights(Mapping[str, Tensor]):
    """Parameter name -> tensor as stored, read when asked for; each set of tied parameters once, under its owner's name.

    Raises a UserError, before any tensor is read, where keys, shapes or number formats do not fit the configuration, and
    where tied parameters lie on disk with different values.
    """

    def __init__(self, folder: Path, config: Any, skeleton: Skeleton) -> None:
        self.shards, self.config, self._skeleton = Shards(folder), config, skeleton
        self._model: Any = skeleton.model
        self._last: dict[str, Tensor] = {}
        parts, self.left = parts_of(self._model, self.shards.entries)
        self._refuse_formats(parts)
        self._parts: dict[str, Part] = {}
        self.meta: dict[str, Tensor] = {}
        self._find(parts)
        self._source = {name: self._on_disk(name) for name in skeleton.shapes if name not in skeleton.tied}
        self._refuse_gaps()
        self._refuse_unequal_ties()

    def _find(self, parts: list[Part]) -> None:
        """Note shape and number format of every parameter as it will be in memory."""
        for part in parts:
            try:
                made = part.made(self._model, lambda key: self.shards.entries[key].meta)
            except (RuntimeError, ValueError, IndexError, AttributeError) as error:
                keys = first_of(key for key, _ in part.keys)
                raise UserError(
                    f"{self.shards.folder}: {part.name} cannot be put together from {keys}: {error}."
                ) from error
            self.meta |= made
            self._parts |= dict.fromkeys(made, part)

    def _on_disk(self, name: str) -> str:
        """Return under which of its tied names a parameter lies on disk, "" where it lies under none."""
        names = [name, *(alias for alias, owner in self._skeleton.tied.items() if owner == name)]
        return next((one for one in names if one in self._parts), "")

    def _refuse_formats(self, parts: list[Part]) -> None:
        expected = self._model.state_dict()
        odd: list[tuple[str, Entry]] = []
        for part in parts:
            floating = expected[part.name].is_floating_point()
            entries = [(key, self.shards.entries[key]) for key, _ in part.keys]
            odd += [(key, entry) for key, entry in entries if (entry.kind in FLOATS) != floating]
        if odd:
            key, entry = odd[0]
            raise UserError(
                f"{self.shards.folder}: {len(odd)} weights are of a number format that does not fit the model, first {key} "
                f"({entry.kind}, {list(entry.shape)}) in {entry.file.name}. Weights must be {', '.join(FLOATS)}: load the "
                f"original, not quantised, weights."
            )

    def _refuse_gaps(self) -> None:
        """Raise where a weight is missing, or of another shape than the configuration says."""
        folder, ignored = self.shards.folder, self._model._keys_to_ignore_on_load_missing or ()
        missing = [name for name, found in self._source.items() if not found]
        needed = [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
        if needed:
            raise UserError(
                f"{folder}: {len(needed)} weights are missing that its config asks for: {first_of(needed)}."
                f"{_tie_note(self.config)}{_left_note(self.left)}"
            )
        for name in missing:  # the class starts them anew by itself
            del self._source[name]
        wrong = [
            f"{name} {list(self.meta[found].shape)} (config: {list(self._skeleton.shapes[name])})"
            for name, found in self._source.items()
            if tuple(self.meta[found].shape) != self._skeleton.shapes[name]
        ]
        if wrong:
            raise UserError(
                f"{folder}: {len(wrong)} weights are of another shape than its config says: {first_of(wrong)}. "
                f"config.json and the weights are of different models."
            )

    def _refuse_unequal_ties(self) -> None:
        for alias, owner in self._skeleton.tied.items():
            first = self._source.get(owner)
            if alias in self._parts and first not in (None, alias) and not self._equal(str(first), alias):
                raise UserError(
                    f"{self.shards.folder}: its config ties {alias} to {owner}, but both are on disk with different values. "
                    f"If the head has weights of its own, write tie_word_embeddings: false into config.json (top level and "
                    f"text_config); else delete {alias}.{_tie_note(self.config)}"
                )

    def _equal(self, one: str, other: str) -> bool:
        """Compare two parameters some rows at a time."""
        if self.meta[one].shape != self.meta[other].shape:
            return False
        a, b = (self._made(name)[name] for name in (one, other))
        rows = range(0, len(a), _ROWS)
        return all(torch.equal(a[at : at + _ROWS].float(), b[at : at + _ROWS].float()) for at in rows)

    def _made(self, name: str) -> dict[str, Tensor]:
        return self._parts[name].made(self._model, self.shards.read)

    def __getitem__(self, name: str) -> Tensor:
        """Read one parameter; what is made together with it is kept until another part is read."""
        found = self._source[name]
        if found in self._last:
            return self._last.pop(found)
        self._last = {}
        made = self._made(found)
        tensor = made.pop(found)
        self._last = made
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format in which a parameter is stored."""
        return self.meta[self._source[name]].dtype


def _tie_note(config: Any) -> str:
    """Say that the configuration contradicts itself about tied weights, where it does."""
    top = getattr(config, "tie_word_embeddings", None)
    text = getattr(config.get_text_config(), "tie_word_embeddings", top)
    if top == text:
        return ""
    return (
        f" Its tie_word_embeddings is {str(top).lower()} on the top level and {str(text).lower()} in the text part; "
        f"the class goes by the first. Make both say what the weights are."
    )


def _left_note(left: list[str]) -> str:
    return f" On disk are {len(left)} keys that it has no place for: {first_of(left)}." if left else ""


def parts_of(model: Any, keys: Mapping[str, Any]) -> tuple[list[Part], list[str]]:
    """Sort keys on disk into parts as ``from_pretrained`` does; also return those that the model has no place for."""
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[str, str]]] = {}
    left = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:  # it had its new name already
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name in expected:
            found.setdefault(name, []).append((key, pattern or ""))
        else:
            left.append(key)
    parts = [
        Part(name=name, keys=tuple(sources), converter=by_pattern.get(sources[0][1])) for name, sources in found.items()
    ]
    return parts, left


class Layout:
    """Where and under which key every parameter of a model goes on disk: as ``save_pretrained`` would have it.

    `model` is the model on the meta device (its own, it is marked), `meta` its parameters without memory, tied ones once.
    """

    def __init__(self, model: PreTrainedModel, meta: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        self.model: Any = model
        dropped = set(self.model._keys_to_ignore_on_save or ())
        state = {name: tensor for name, tensor in meta.items() if name not in dropped}
        whole = revert_weight_conversion(self.model, dict(state))
        self.split = split_torch_state_dict_into_shards(
            whole, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self.groups: list[tuple[str, ...]] = []
        self.group_of: dict[str, int] = {}
        self._sort(state)
        assert set(self.group_of) == set(whole), set(self.group_of) ^ set(whole)

    def _sort(self, state: Mapping[str, Tensor]) -> None:
        """Group the parameters that go to disk together, and note which keys each group makes."""
        mapping = get_model_conversion_mapping(self.model, add_legacy=False)
        mapping = [one for one in mapping if not isinstance(one, PrefixChange)]
        reverse: Any = [one.reverse_transform() for one in mapping[::-1] if isinstance(one, WeightConverter)]
        groups: dict[str, list[str]] = {}
        for name in state:
            groups.setdefault(rename_source_key(name, [], reverse)[0], []).append(name)
        self.model._weight_conversions = mapping  # what revert_weight_conversion would look up again for every group
        for number, names in enumerate(groups.values()):
            self.groups.append(tuple(names))
            made = revert_weight_conversion(self.model, {name: state[name] for name in names})
            self.group_of |= dict.fromkeys(made, number)

    def _wanted(self, keys: list[str]) -> dict[int, list[str]]:
        """Return the keys by the group that makes them."""
        wanted: dict[int, list[str]] = {}
        for key in keys:
            wanted.setdefault(self.group_of[key], []).append(key)
        return wanted

    def write(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """Write every file in turn, holding one at a time; `read` gives a parameter in its final form."""
        for file, keys in self.split.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for number, wanted in self._wanted(keys).items():
                made = revert_weight_conversion(self.model, {name: read(name) for name in self.groups[number]})
                shard |= {key: made[key].contiguous() for key in wanted}
            save_file({key: shard[key] for key in keys}, folder / file, metadata={"format": "pt"})
        if self.split.is_sharded:
            total = sum(parameter.numel() for parameter in self.model.parameters())
            index = {
                "metadata": {"total_parameters": total, **self.split.metadata},
                "weight_map": self.split.tensor_to_filename,
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
