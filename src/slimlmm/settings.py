"""What all files of settings share: a frozen base, YAML read safely, every problem with its path, the pages about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from slimlmm.errors import UserError, nearest

T = TypeVar("T")
#: values that a file of settings may hold
MOST_PLACES = 100_000


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds (safe loading), {} where it is empty; a UserError calls it a `what`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Return what a text of YAML holds, as `read_yaml` does."""
    try:
        found = yaml.safe_load(text) or {}
        if _places(found, {}) > MOST_PLACES:
            raise ValueError(f"its aliases stand for more than {MOST_PLACES:,} values")
        json.dumps(found, default=str, skipkeys=True, ensure_ascii=False).encode()  # refuses half characters
        return found
    # ValueError: a date that there is not, a number of thousands of digits, half a character, a list in itself
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {str(error).splitlines()[0]}") from error


def _places(value: Any, known: dict[int, int]) -> int:
    """Return how many values a value holds, those behind aliases as often as they are named."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_PLACES + 1  # where it is met within itself, it has no end
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_places(one, known) for one in inner)
    return known[id(value)]


def valid(adapter: TypeAdapter[T], raw: Any, source: str, kind: Callable[[tuple[Any, ...]], type[Settings]]) -> T:
    """Validate settings; a UserError lists every problem of the `source` (`problems`, which says what `kind` is)."""
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        lines = [f"  {line}" for line in problems(error, kind)]
        raise UserError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(lines)) from error


def problems(
    error: ValidationError, kind: Callable[[tuple[Any, ...]], type[Settings]], under: tuple[str, ...] = ()
) -> list[str]:
    """Return one line per problem: YAML path and what is wrong; an unknown key is answered with those that its place knows.

    `kind` says which settings stand at the path of a key's mapping; `under` comes before every path.
    """
    lines = []
    for one in error.errors():
        path = _path((*under, *one["loc"])) or "recipe"
        if one["type"] == "extra_forbidden":
            known = sorted(kind(one["loc"][:-1]).model_fields)
            lines.append(f"{path}: unknown key. {nearest(str(one['loc'][-1]), known)}")
        else:
            # where a validator of ours judges a whole mapping, it says what in it is wrong
            ours = one["type"] == "value_error"
            got = "" if ours and isinstance(one["input"], Mapping) else f" (got {one['input']!r})"
            lines.append(f"{path}: {_said(one['msg'])}{got}")
    return lines


def on_one_line(error: ValidationError) -> str:
    """Return the first eight problems of what was not written by hand: what is wrong, and where if not with the whole."""
    return "; ".join(": ".join(filter(None, (_path(one["loc"]), _said(one["msg"])))) for one in error.errors()[:8])


def _path(places: tuple[Any, ...]) -> str:
    """Return where a value lies as settings name it, "" for the whole."""
    return ".".join(map(str, places))


def _said(message: str) -> str:
    """Return a message of pydantic's without what it puts before those of our validators."""
    return message.removeprefix("Value error, ")


def fields(kind: type[Settings], title: str) -> list[str]:
    """Return the Markdown section of one kind of settings: its keys, defaults and meanings."""
    lines = ["", f"## {title}", "", str(kind.__doc__), "", "| key | default | meaning |", "|---|---|---|"]
    for name, one in kind.model_fields.items():
        default = "required" if one.is_required() else json.dumps(one.default, default=_plain)
        lines.append(f"| `{name}` | `{default}` | {one.description or 'See below.'} |")
    return lines


def _plain(value: Any) -> Any:
    return "see below" if isinstance(value, Settings) else list(value)
