"""The arms by name; ``python arms.py TASK.json`` carries out one in this environment."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared import Outcome, Task

from slimlmm.errors import UserError, nearest

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to a small model: its target, where its function is, and whose environment it needs."""

    target: str
    does: str
    """module:function, called with the `Task`"""
    told: str
    """what the table says of it"""
    environment: str = ""
    """name of a file in requirements/; empty for the environment that runs this"""

    @property
    def recipe(self) -> Path:
        """Our recipe at the same target."""
        return HERE / f"{self.target}.yaml"

    @property
    def own(self) -> str:
        """Name of our arm at the same target."""
        return f"ours-{self.target}"


ARMS = {
    "ours-18x": Arm(target="18x", does="own:ours", told="slimlmm: 18x.yaml"),
    "scratch-18x": Arm(target="18x", does="own:scratch", told="our shape from random weights, labels alone"),
    "paper-18x": Arm(
        target="18x",
        does="paper:reach",
        told="arXiv 2312.05795 reimplemented: masks, |sum grad x weight|, last blocks first, no repair",
    ),
    "torch-pruning-18x": Arm(
        target="18x",
        does="peer_torch_pruning:reach",
        environment="torch-pruning",
        told="torch-pruning cuts (DepGraph over the whole model, group magnitude), our trainings between its cuts",
    ),
    "modelopt-18x": Arm(
        target="18x",
        does="peer_modelopt:reach",
        environment="nvidia-modelopt",
        told="nvidia-modelopt's logits distillation in place of our last trainings, on the student that we cut and repaired",
    ),
    "ours-1.4x": Arm(target="1.4x", does="own:ours", told="slimlmm: 1.4x.yaml"),
    "optipfair-1.4x": Arm(
        target="1.4x",
        does="peer_optipfair:reach",
        environment="optipfair",
        told="optipfair: cosine depth and GLU neurons of the language model, its own distillation",
    ),
    "optipfair-cut-1.4x": Arm(
        target="1.4x",
        does="peer_optipfair:reach_with_our_training",
        environment="optipfair",
        told="optipfair's cuts, our training",
    ),
}


def arm(name: str) -> Arm:
    """Return the arm of that name, or refuse with the nearest one."""
    if name not in ARMS:
        raise UserError(f"unknown arm {name!r}. {nearest(name, list(ARMS))}")
    return ARMS[name]


def carry_out(task: Task) -> Outcome:
    """Do what the task's arm does, and write its outcome down when its student is there."""
    module, _, function = arm(task.arm).does.partition(":")
    does: Callable[[Task], Outcome] = getattr(importlib.import_module(module), function)
    found = does(task)
    found.save(task.out / "outcome.json")
    return found


if __name__ == "__main__":
    try:
        carry_out(Task.load(sys.argv[1]))
    except UserError as error:
        print(f"arms: {error}", file=sys.stderr)
        sys.exit(2)
