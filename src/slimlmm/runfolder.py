"""The run folder: what belongs to which run, which rounds are done, and nothing half-written.

    RUN/recipe.yaml  run.json  .lock  owner.json  cache/  results.json  final/
        stages/01-blocks.1/{plan.json, parts/, training/, model/, metrics.json, done.json}

``done.json`` is written last; a round without it is redone. ``run.json`` says what the run was started with, so that another
model, data set or recipe is refused instead of mixed in.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from slimlmm.errors import UserError
from slimlmm.files import digests, read_json, write_json, write_text

#: what ``run.json`` holds
IDENTITY = TypeAdapter(dict[str, Any])


class OtherRunError(UserError):
    """A folder belongs to another run; `told` says by what."""

    def __init__(self, path: Path, told: str) -> None:
        super().__init__(f"{path} belongs to another run ({told}). Choose another --out, or remove that folder.")
        self.told = told


def claim(path: Path, identity: dict[str, Any], given: dict[str, Any] | None = None) -> None:
    """Create the folder and sign it with ``run.json``, or find that it has that signature.

    What was `given` beside, such as where the model lay, is written down and may differ when the run goes on.

    Raises:
        UserError: the folder holds something else, or ``run.json`` is damaged.
        OtherRunError: it is that of a run of another model, data set or recipe (each named).
    """
    record = path / "run.json"
    if record.exists():
        before = read_json(IDENTITY, record)
        changed = [key for key, value in identity.items() if before.get(key) != value]
        if changed:
            told = "; ".join(f"{key}: was {_short(before.get(key))}, now {_short(identity[key])}" for key in changed)
            raise OtherRunError(path, told)
        return
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} exists, is not empty and is no slimlmm run (no run.json). Choose another --out.")
    path.mkdir(parents=True, exist_ok=True)
    write_json(record, identity | ({"given": given} if given else {}))


#: locks that this process holds, by folder
_HELD: dict[Path, FileLock] = {}
LOCK, OWNER = ".lock", "owner.json"


def hold(path: Path) -> None:
    """Keep other processes out of the folder until `release`, or until this process ends, however it does.

    Raises:
        UserError: another process is at work in it; the message names it.
    """
    place = path.resolve()
    if place in _HELD:
        return
    lock = FileLock(place / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path}: {_owner(place)} is at work in it. Wait for it, stop it, or choose another --out."
        ) from None
    _HELD[place] = lock
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    write_json(place / OWNER, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})


def release(path: Path) -> None:
    """Let other processes in again; nothing where this process does not hold the folder."""
    place = path.resolve()
    if (lock := _HELD.pop(place, None)) is not None:
        (place / OWNER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def held(path: Path, identity: dict[str, Any] | None = None) -> Iterator[None]:
    """Hold the folder within the block; with an `identity`, `claim` it before."""
    if identity is not None:
        claim(path, identity)
    hold(path)
    try:
        yield
    finally:
        release(path)


def _owner(place: Path) -> str:
    try:
        told = json.loads((place / OWNER).read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']} (since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk; `shared` is a cache that it has in common with other runs."""

    path: Path
    shared: Path | None = None

    def open(self, identity: dict[str, Any], given: dict[str, Any] | None = None) -> RunFolder:
        """Create the folder, or take it up again if it belongs to the same run; refuses as `claim` and `hold` do."""
        claim(self.path, identity, given)
        hold(self.path)
        return self

    def keep_recipe(self, text: str) -> None:
        """Write down what is carried out, all defaults and planned sizes included."""
        write_text(self.path / "recipe.yaml", text)

    @property
    def recipe(self) -> Path | None:
        """What `keep_recipe` has written down, None where nothing was yet."""
        path = self.path / "recipe.yaml"
        return path if path.exists() else None

    @property
    def cache(self) -> Path:
        """Where the teacher's hidden states are kept."""
        return self.shared or self.path / "cache"

    @property
    def previous(self) -> Path:
        """Where the hidden states of the model that the round in work began with are kept, until that round is settled."""
        return self.path / "previous"

    def forget_previous(self) -> None:
        """Remove them: the next round begins with another model."""
        shutil.rmtree(self.previous, ignore_errors=True)

    @property
    def final(self) -> Path:
        """The finished checkpoint."""
        return self.path / "final"

    def stage(self, number: int, name: str) -> Path:
        """Return the folder of one round; what an interrupted run left there is looked through by its journal."""
        folder = self.path / "stages" / f"{number:02d}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self) -> list[Path]:
        """Return the folders of the rounds that are finished, in their order."""
        return [record.parent for record in sorted(self.path.glob("stages/*/done.json"))]

    def let_go(self, last: int, teacher: Path, kept: Path) -> None:
        """Remove models of finished rounds, but those of the `last` ones, those up to the teacher, and `kept`."""
        rounds = self.finished()
        models = [one / "model" for one in rounds]
        first = models.index(teacher) + 1 if teacher in models else 0
        for one in rounds[first:-last]:
            if one / "model" != kept:
                let_go(one / "done.json", one / "model")

    def forget_let_go(self) -> None:
        """Remove the rounds whose models were let go, so that they are made again."""
        for one in self.finished():
            if not any((one / "model").glob("*.safetensors")):
                shutil.rmtree(one)


def is_whole(record: Path, model: Path) -> bool:
    """Tell whether the files of a model folder are those that the record beside it was written with, but for those let go."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        found, gone = digests(model), set(told.get("let_go", ()))
        stayed = {name: value for name, value in told["files"].items() if name not in gone or name in found}
        return bool(told["files"]) and stayed == found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def let_go(record: Path, model: Path) -> None:
    """Remove the weights of a finished round's model; that they went is written down before they go."""
    told = json.loads(record.read_text(encoding="utf-8"))
    weights = sorted(path for path in model.glob("*.safetensors"))
    write_json(record, told | {"let_go": sorted({*told.get("let_go", ()), *(path.name for path in weights)})})
    for path in weights:
        path.unlink()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:12] + "..."
