"""What a cut changes in the processor: how many placeholders a picture becomes, where learned queries ask it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimlmm.errors import UserError
from slimlmm.families import family_of

SETTINGS = "processor_config.json"
#: a folder with one of these holds a processor
_ANY = (SETTINGS, "preprocessor_config.json")


def refuse_unsaid(folder: Path, config: Any, axes: Iterable[str]) -> None:
    """Raise a UserError if query tokens are cut and the processor in `folder` has no number of placeholders to change."""
    for axis, key in _keys(config).items():
        if axis in axes and any((folder / name).is_file() for name in _ANY) and key not in _settings(folder):
            raise UserError(
                f"{axis}: {folder / SETTINGS} does not say {key}, so a picture would get as many placeholders as before. "
                f"Add it (the number of learned queries, as in config.json) and cut again."
            )


def follow(folder: Path, config: Any, sizes: Mapping[str, int]) -> None:
    """Write the new number of placeholders into the processor's settings in `folder`, where query tokens were cut."""
    new = {key: sizes[axis] for axis, key in _keys(config).items() if axis in sizes}
    if new and (folder / SETTINGS).is_file():
        text = json.dumps(_settings(folder) | new, indent=2, sort_keys=True)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _keys(config: Any) -> dict[str, str]:
    """Return what the processor calls the size of each axis of query tokens."""
    return {axis: key for axis, (_, _, key) in family_of(config).query_tokens.items() if key}


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        return {}
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return found
