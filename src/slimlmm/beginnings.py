"""Beginnings that runs have in common: where the first of them got, the others start.

    key_0 of a round = hash(h, its cuts), h = the last key of the round before; key_n = hash(key_(n-1), its n-th training)

The first h is a hash of all that the recipe says beside its rounds, and of the versions. Runs of one model on one data set with
an equal key make the same choices with the same seed up to there, so one model will do for all of them.

    DIR/KEY/{part/{model/, part.json}, what the round wrote down about its cuts}
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slimlmm import __version__
from slimlmm.recipe import Recipe, Round, dump
from slimlmm.runfolder import is_whole

#: keys of a recipe that say nothing to the model that its rounds make
UNHEARD = {"stages": (), "bench_calls": 0}


def keys_of(recipe: Recipe) -> list[tuple[str, ...]]:
    """Return the keys of every round of a recipe: that of the model behind its cuts, then those behind each training."""
    last = _hash(__version__, torch.__version__, dump(recipe.model_copy(update=UNHEARD)))
    found = []
    for stage in recipe.stages:
        for index, turn in enumerate(stage.rounds, 1):
            keys = [_hash(last, f"{stage.name}.{index}", _cuts(turn).model_dump_json())]
            for one in turn.train:
                keys.append(_hash(keys[-1], one.model_dump_json()))
            found.append(tuple(keys))
            last = keys[-1]
    return found


def _cuts(turn: Round) -> Round:
    """Return a round without its trainings; units that fade do so in the first."""
    return turn.model_copy(update={"train": turn.train[: 1 if turn.fade else 0]})


def _hash(*what: str) -> str:
    return hashlib.sha256("\x1f".join(what).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Start:
    """Where one round may begin, and what others want of it: its `keys` in the `folder`, those that are `wanted`."""

    folder: Path
    keys: tuple[str, ...]
    wanted: frozenset[str]
    say: Callable[[str], None]

    def take(self, of: Path) -> int | None:
        """Put the last part that another run has made of this round into the folder `of`; return its number, None for none."""
        for number, key in reversed(list(enumerate(self.keys))):
            found = self.folder / key
            if is_whole(found / "part" / "part.json", found / "part" / "model"):
                _link_files(found, of)
                _link(found / "part", of / "parts" / str(number))
                return number
            shutil.rmtree(found, ignore_errors=True)
        return None

    def keep(self, number: int, of: Path) -> None:
        """Keep a part of the round in the folder `of` for those that begin with it; where there is no room, say so."""
        if number >= len(self.keys) or self.keys[number] not in self.wanted:
            return
        place = self.folder / self.keys[number]
        new = place.with_suffix(".new")
        for one in (new, place):
            shutil.rmtree(one, ignore_errors=True)
        try:
            _link(of / "parts" / str(number), new / "part")
            _link_files(of, new)
            new.rename(place)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            self.say(f"cannot keep what other runs could begin with ({error}); they make it themselves")


def _link(folder: Path, to: Path) -> None:
    """Make the files of a folder, with those in folders of it, appear in another one."""
    _link_files(folder, to)
    for one in folder.iterdir():
        if one.is_dir():
            _link(one, to / one.name)


def _link_files(folder: Path, to: Path) -> None:
    """Make the files of a folder appear in another one: no file of a run is written into, so one on disk will do."""
    to.mkdir(parents=True, exist_ok=True)
    for one in folder.iterdir():
        if one.is_file():
            (to / one.name).unlink(missing_ok=True)
            try:
                os.link(one, to / one.name)
            except OSError:  # a file system that cannot
                shutil.copy2(one, to / one.name)


@dataclass(frozen=True, slots=True)
class Beginnings:
    """What runs that are still to be made have in common, kept in a folder."""

    folder: Path
    wanted: frozenset[str]

    @classmethod
    def of(cls, folder: Path, recipes: Sequence[Recipe]) -> Beginnings:
        """Return those of the runs of these recipes; what lies in the folder for none of them goes."""
        owners: dict[str, set[int]] = defaultdict(set)
        runs = [keys_of(one) for one in recipes]
        for number, rounds in enumerate(runs):
            for key in (key for keys in rounds for key in keys):
                owners[key].add(number)
        for entry in folder.glob("*/"):
            if entry.name not in owners:
                shutil.rmtree(entry)
        if not owners:
            shutil.rmtree(folder, ignore_errors=True)
        return cls(folder, frozenset(_wanted(owners, [keys for rounds in runs for keys in rounds])))

    def start(self, recipe: Recipe, number: int, say: Callable[[str], None]) -> Start:
        """Return where the round of a number, from 1, may begin; `say` hears what could not be kept."""
        return Start(self.folder, keys_of(recipe)[number - 1], self.wanted, say)


def _wanted(owners: dict[str, set[int]], rounds: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the keys that several runs have, but those behind which, in the same round, they all go on alike."""
    for keys in rounds:
        for key, behind in zip(keys, (*keys[1:], None), strict=True):
            if len(owners[key]) > 1 and (behind is None or owners[behind] != owners[key]):
                yield key
