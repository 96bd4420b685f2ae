"""Kill a small whole run with SIGKILL at random moments, let it go on, and hold what it leaves against one that was not killed.

    python benchmarks/faults.py --kills 50 --out benchmarks/results/faults-DATE.json    # half an hour

The tiny LLaVA (DINOv2 + Llama) on a small AdReview: lossless cuts, a block, inner sizes with state matches and own answers,
widths; states are written after every step. Each run is killed five times, after .15 to .45 of the time that a whole run
takes, and is then let to its end. ``equal`` are runs whose final files (but the dated certificate), answers and results (times,
paths and machine aside) are byte for byte those of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import yaml

from slimlmm import adreview, checkpoint
from slimlmm.measure import environment
from slimlmm.reproducing import left_by, unlike
from tiny import tiny  # type: ignore[import-not-found]

NAME = "llava-dinov2-llama"
KILLS_A_RUN = 5
#: differences of a run that are written down
MOST = 20
STATES = {"cross_entropy": 1.0, "forward_kl": 1.0, "answer_states": 1.0, "picture_states": 1.0}
RECIPE: dict[str, Any] = {
    "bench_calls": 0,
    "data": {"calibration_rows": 20, "validation_rows": 20, "test_rows": 20},
    "stages": [
        {"name": "lossless", "rounds": [{"drop": ["unused_tokens", "dead_blocks"]}]},
        {"name": "blocks", "rounds": [{"sizes": {"text.blocks": 2}, "train": {"steps": 20}}]},
        {
            "name": "inner",
            "rounds": [
                {
                    "sizes": {"text.ffn": 32, "vision.ffn": 64},
                    "train": [
                        {"steps": 20, "losses": STATES, "pictures_per_step": 4},
                        {"steps": 10, "own_answers": 0.5, "losses": {"cross_entropy": 1.0, "forward_kl": 1.0}},
                    ],
                }
            ],
        },
        {"name": "width", "rounds": [{"sizes": {"text.width": 36}, "train": {"steps": 20, "validate_every": 5}}]},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model, processor = tiny(NAME)
        checkpoint.save(model, processor, root / "teacher")
        adreview.write(root / "ads", train=120, val=40, test=40, seed=5)
        (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        began = time.monotonic()
        finish(root, root / "whole")
        whole = time.monotonic() - began
        runs: list[dict[str, Any]] = []
        while sum(len(run["kills"]) for run in runs) < arguments.kills:
            runs.append(killed(root, root / f"run-{len(runs)}", whole, draw) | {"number": len(runs)})
            differs = unlike(left_by(root / "whole"), left_by(root / f"run-{len(runs) - 1}"))
            runs[-1]["equal"] = not differs
            runs[-1]["differs"] = [one.model_dump() for one in differs[:MOST]]
            shutil.rmtree(root / f"run-{len(runs) - 1}")
            print(json.dumps(runs[-1]), flush=True)
            write(arguments, whole, runs)


def start(root: Path, out: Path) -> subprocess.Popen[str]:
    """Start or go on with the run in `out`."""
    command = [sys.executable, "-m", "slimlmm", "compress", str(root / "teacher"), "--data", str(root / "ads")]
    command += ["--recipe", str(root / "recipe.yaml"), "--out", str(out), "--save-minutes", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(root: Path, out: Path) -> str:
    """Let the run come to its end; return what it told."""
    process = start(root, out)
    _, told = process.communicate()
    if process.returncode:
        raise SystemExit(f"{out}: exit code {process.returncode}\n{told}")
    return told


def killed(root: Path, out: Path, whole: float, draw: random.Random) -> dict[str, Any]:
    """Kill the run some times, then let it go on to its end; return where it was each time."""
    kills: list[dict[str, Any]] = []
    while len(kills) < KILLS_A_RUN:
        process = start(root, out)
        after = draw.uniform(0.15, 0.45) * whole
        try:
            _, told = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, told = process.communicate()
        if process.returncode == 0:
            break  # it was quicker than the clock
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{out}: exit code {process.returncode} after {len(kills)} kills\n{told}")
        kills.append({"after_s": round(after, 2), "at": last_word(told)})
    finish(root, out)
    return {"kills": kills}


def last_word(told: str) -> str:
    """Return the last thing that a process told before it was killed, "loading" where it had not begun."""
    for line in reversed(told.splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # a line that was cut, or no line of ours
            continue
        if isinstance(record, dict) and ("event" in record or "work" in record):
            return str(record.get("event") or record["work"]).strip()
    return "loading"


def stage(at: str) -> str:
    """Return what a process was at, in a word or two of the last thing that it told."""
    first, _, rest = at.partition(" ")
    found = f"{first} {rest.partition(' ')[0]}" if first in ("the", "round", "student,", "teacher,") else first
    return found.rstrip(":,")


def write(arguments: argparse.Namespace, whole: float, runs: list[dict[str, Any]]) -> None:
    """Write the record so far."""
    kills = [kill for run in runs for kill in run["kills"]]
    record = {
        "what": "runs killed with SIGKILL at random moments against one that was not",
        "seed": arguments.seed,
        "kills": len(kills),
        "runs": len(runs),
        "equal": sum(run["equal"] for run in runs),
        "whole_run_s": round(whole, 1),
        "killed_at": dict(Counter(stage(kill["at"]) for kill in kills)),
        "each": runs,
        "environment": environment().model_dump(mode="json"),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
