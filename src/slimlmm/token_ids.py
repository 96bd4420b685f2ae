"""Token ids inside configurations: where they stand, and how they change with the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from slimlmm.axes import Group
from slimlmm.errors import UserError

#: a key that ends like this holds one token id or a list of them, in any configuration or processor
SUFFIXES = ("token_id", "token_ids", "token_index")
#: keys of other names that do
NAMES = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
#: keys of pairs of which one side holds ids: (ids, bias), as a list or a dict; (position, id)
BIASED, FORCED = "sequence_bias", "forced_decoder_ids"


def is_id(key: str) -> bool:
    """Tell whether `key` names token ids."""
    return key.endswith(SUFFIXES) or key in NAMES


def referenced(*settings: Mapping[str, Any]) -> Iterator[int]:
    """Yield every token id that these settings mention (their own keys only, not nested ones)."""
    for data in settings:
        for key, value in data.items():
            if is_id(key):
                yield from _flat(value)
            elif key in (BIASED, FORCED):
                yield from (one for pair in _pairs(value) for one in _flat(pair[key == FORCED]))


def _pairs(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, Mapping) else value or ())


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, int) and value >= 0:
        yield value


def new_ids(kept: Iterable[int], group: Group) -> dict[int, int]:
    """Map the ids of the tokens that stay to their new ones, those of placeholders behind the vocabulary included."""
    new = {old: index for index, old in enumerate(kept)}
    behind = max((slot.rest for slot in group.slots), default=0)
    return new | {group.units + index: len(new) + index for index in range(behind)}


def renumbered(data: Mapping[str, Any], new: Mapping[int, int], size: int) -> dict[str, Any]:
    """Return `data` with its token ids renamed by `new` (old id -> new id), all other keys as they are."""

    def changed(key: str, value: Any) -> Any:
        if key in (BIASED, FORCED) and value:
            return _renumbered_pairs(key, value, new, size)
        return renumber(key, value, new, size) if is_id(key) else value

    return {key: changed(key, value) for key, value in data.items()}


def _renumbered_pairs(key: str, value: Any, new: Mapping[int, int], size: int) -> Any:
    """Return pairs with the side of ids renamed; those of a dropped id go."""
    stay = [pair for pair in _pairs(value) if not any(_dropped(one, new, size) for one in _flat(pair[key == FORCED]))]
    if key == FORCED:
        return [[place, renumber(key, token, new, size)] for place, token in stay]
    found = [[renumber(key, ids, new, size), bias] for ids, bias in stay]
    return {tuple(ids): bias for ids, bias in found} if isinstance(value, Mapping) else found


def renumber(key: str, value: Any, new: Mapping[int, int], size: int) -> Any:
    """Return one id, or a list of them at any depth, renamed; ids outside 0..size-1 stay as they are.

    A dropped id leaves the list that holds it; one that stands alone (eos_token_id) is refused.
    """
    if isinstance(value, list | tuple):
        return [renumber(key, item, new, size) for item in value if not _dropped(item, new, size)]
    if _dropped(value, new, size):
        raise UserError(f"vocab: token {value} must stay, it is the {key} of the configuration.")
    return new.get(value, value) if isinstance(value, int) else value


def _dropped(value: Any, new: Mapping[int, int], size: int) -> bool:
    return isinstance(value, int) and 0 <= value < size and value not in new
