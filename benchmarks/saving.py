"""What it costs to write a training's state, and to take it up again: the bundled teacher as its own student, on AdReview.

    python benchmarks/saving.py --out benchmarks/results/saving-DATE.json

A training of 12 steps of 4 pictures, written after every step and not at all, in turns; the difference over the number of states
is what one costs; ``share`` is that over the interval between two states (300 s). ``resume_s``: from the start of a new process,
libraries and data included, to its first step after the state.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from slimlmm import adreview, checkpoint, data
from slimlmm.collate import Collator
from slimlmm.demo import bundled
from slimlmm.distill import train
from slimlmm.measure import environment
from slimlmm.packing import can_pack
from slimlmm.saving import SAVE_EVERY, Saving
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training

STEPS = 12
SETTINGS = Training(steps=STEPS, pictures_per_step=4, learning_rate=1e-5, log_every=STEPS)


class _EnoughError(Exception):
    """The first step was made."""


def trained(folder: Path, out: Path, seconds: float, stop: int | None = None) -> tuple[float, list[float]]:
    """Train a copy of the teacher; return the seconds of training and the times at which steps were told."""
    loaded = checkpoint.load(bundled("teacher"))
    rows = data.load(folder).train
    collator = Collator(loaded.processor, packed=can_pack(loaded.model, loaded.processor, rows))
    cache = TeacherCache(checkpoint.load(bundled("teacher")).model, collator, folder / "cache")
    told: list[float] = []

    def progress(facts: dict[str, float]) -> None:
        told.append(time.time())
        if facts["step"] == stop:
            raise _EnoughError

    settings = SETTINGS if stop is None else SETTINGS.model_copy(update={"log_every": 1})
    found = train(
        loaded.model, loaded.processor, rows, settings, out, teacher=cache, saving=Saving(seconds, "it", print), progress=progress
    )  # fmt: skip
    return found.seconds, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--go-on", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.go_on:
        root = arguments.go_on.parent
        print(json.dumps(trained(root / "ads", arguments.go_on, 0.0, stop=0)[1][:1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        adreview.write(root / "ads", train=2_000, val=20, test=20, seed=5)
        trained(root / "ads", root / "warm", 1e9)
        pairs = [
            (trained(root / "ads", root / f"all-{turn}", 0.0)[0], trained(root / "ads", root / f"none-{turn}", 1e9)[0])
            for turn in range(arguments.turns)
        ]
        state = sum(path.stat().st_size for path in (root / "all-0" / f"checkpoint-{STEPS - 1}").iterdir())
        found = record(pairs, state, [resumed(root, root / f"killed-{turn}") for turn in range(arguments.turns)])
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def resumed(root: Path, out: Path) -> float:
    """Return the seconds from the start of a process to its first step after the state of a killed training."""
    with suppress(_EnoughError):
        trained(root / "ads", out, 0.0, stop=STEPS - 1)
    began = time.time()
    command = [sys.executable, __file__, "--go-on", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(json.loads(done.stdout.splitlines()[-1])[0] - began)


def record(pairs: list[tuple[float, float]], state: int, resumes: list[float]) -> dict[str, Any]:
    """Return the figures with their spread."""
    costs = [(whole - none) / (STEPS - 1) for whole, none in pairs]
    return {
        "what": "seconds to write the state of a training and to take it up",
        "parameters": sum(one.numel() for one in checkpoint.load(bundled("teacher")).model.parameters()),
        "state_bytes": state,
        "seconds_a_state": {"median": statistics.median(costs), "all": costs, "n": len(costs)},
        "share": statistics.median(costs) / SAVE_EVERY,
        "resume_s": {"median": statistics.median(resumes), "all": resumes, "n": len(resumes)},
        "threads": torch.get_num_threads(),
        "environment": environment().model_dump(mode="json"),
    }


if __name__ == "__main__":
    main()
