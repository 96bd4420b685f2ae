"""Kill the other verbs that write, and fill the disk under a run, at random moments; then give the same command again.

    python benchmarks/faults_more.py --kills 10 --fills 10 --out benchmarks/results/faults-more-DATE.json    # half an hour

Killed with SIGKILL: `finetune` (two trainings, states after every step), `cut`, and `export` to ONNX where the extra is
installed. After a kill OUT is not there or is all that a run without one writes; after the same command again it is that, and
nothing else is left beside it. Filled: a tmpfs (root mounts it; skipped aloud otherwise) under a small whole run of `compress`
until nothing is free; it must end with exit code 2 and say so, without a traceback, and, given room and the same command, leave
byte for byte what a run with room leaves.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import yaml
from faults import NAME, RECIPE, last_word

from slimlmm import adreview, checkpoint
from slimlmm.files import digests
from slimlmm.measure import environment
from slimlmm.reproducing import left_by
from tiny import tiny  # type: ignore[import-not-found]

TRAINING = {"steps": 12, "pictures_per_step": 4, "learning_rate": 1e-3, "losses": {"cross_entropy": 1.0}}
#: bytes of the tmpfs: several times what the small run takes
DISK = 64_000_000
#: where in a command's time it is killed or its disk filled, as parts of a whole one's
WHEN = (0.1, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each verb")
    parser.add_argument("--fills", type=int, default=10)
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
        (root / "trainings.yaml").write_text(yaml.safe_dump([TRAINING, TRAINING]))
        found: dict[str, Any] = {"what": "other verbs killed, disks filled, at random moments", "seed": arguments.seed}
        found["killed"] = [killed(root, name, words, arguments.kills, draw) for name, words in verbs(root).items()]
        found["filled"] = filled(root, arguments.fills, draw)
        found["environment"] = environment().model_dump(mode="json")
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def verbs(root: Path) -> dict[str, list[str]]:
    """Return the words of each verb but its --out."""
    teacher, data = str(root / "teacher"), ["--data", str(root / "ads")]
    found = {
        "finetune": [teacher, *data, "--recipe", str(root / "trainings.yaml"), "--save-minutes", "0", "--quiet"],
        "cut": [teacher, *data, "--criterion", "taylor", "--set", "text.ffn=32", "--set", "vision.blocks=2"],
    }
    if find_spec("onnxruntime") and find_spec("onnx"):
        found["export"] = [teacher, *data, "--to", "onnx", "--rows", "20", "--quiet"]
    else:
        print("export is not killed: pip install -e '.[export]' first", file=sys.stderr)
    return found


def start(verb: str, words: list[str], out: Path) -> subprocess.Popen[str]:
    """Start a verb."""
    command = [sys.executable, "-m", "slimlmm", verb, *words, "--out", str(out)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def finish(verb: str, words: list[str], out: Path) -> float:
    """Let a verb come to its end; return the seconds it took."""
    began = time.monotonic()
    process = start(verb, words, out)
    _, told = process.communicate()
    if process.returncode:
        raise SystemExit(f"{verb}: exit code {process.returncode}\n{told}")
    return time.monotonic() - began


def written(verb: str, out: Path) -> dict[str, str]:
    """Return the hashes of what a verb wrote; an export's record has times in it."""
    return {name: value for name, value in digests(out).items() if (verb, name) != ("export", "slimlmm.json")}


def killed(root: Path, verb: str, words: list[str], kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a verb so many times at random moments, each time beginning anew; return what was found."""
    folder = root / verb
    finish(verb, words, folder / "cold")
    whole = finish(verb, words, folder / "whole")
    wanted = written(verb, folder / "whole")
    each: list[dict[str, Any]] = []
    while len(each) < kills:
        out = folder / f"out-{len(each)}"
        after = draw.uniform(*WHEN) * whole
        process = start(verb, words, out)
        try:
            process.communicate(timeout=after)
            continue  # it was quicker than the clock
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        nothing = not out.exists()
        sound = nothing or written(verb, out) == wanted
        finish(verb, words, out)
        beside = [path.name for path in folder.iterdir() if path.name.startswith(f".{out.name}")]
        each.append(
            {
                "after_s": round(after, 2),
                "nothing_there": nothing,
                "sound": sound,
                "equal": written(verb, out) == wanted,
                "left_beside": beside,
            }
        )
        shutil.rmtree(out)
    fine = sum(one["sound"] and one["equal"] and not one["left_beside"] for one in each)
    record = {"verb": verb, "whole_s": round(whole, 1), "kills": kills, "sound": fine, "each": each}
    print(json.dumps(record), flush=True)
    return record


def filled(root: Path, fills: int, draw: random.Random) -> dict[str, Any] | None:
    """Fill the disk under a run so many times; None where none may be mounted here."""
    words = [str(root / "teacher"), "--data", str(root / "ads"), "--recipe", str(root / "recipe.yaml")]
    words += ["--save-minutes", "0"]
    whole = finish("compress", words, root / "whole")
    wanted, each = left_by(root / "whole"), []
    disk = root / "disk"
    disk.mkdir()
    for number in range(fills):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], check=False)
        if mounted.returncode:
            print("no disk is filled: mounting one needs root", file=sys.stderr)
            return None
        try:
            each.append(fill(words, disk, draw.uniform(*WHEN) * whole) | {"number": number})
            each[-1]["equal"] = left_by(disk / "run") == wanted
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(json.dumps(each[-1]), flush=True)
    caught = sum(one["exit_code"] == 2 and bool(one["told"]) and not one["traceback"] for one in each)
    finished = sum(one["exit_code"] == 0 for one in each)
    equal = sum(one["equal"] for one in each)
    return {"fills": fills, "finished": finished, "caught": caught, "equal": equal, "each": each}


def fill(words: list[str], disk: Path, after: float) -> dict[str, Any]:
    """Fill the disk under one run after some seconds, see how it ends, give it room and let it end well."""
    process = start("compress", words, disk / "run")
    time.sleep(after)
    filler = disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
                file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    _, told = process.communicate()
    filler.unlink()
    last = [line for line in told.splitlines() if line.startswith("slimlmm:")]
    if process.returncode:  # else nothing had to be written any more
        finish("compress", words, disk / "run")
    return {
        "after_s": round(after, 2),
        "at": last_word(told),
        "exit_code": process.returncode,
        "told": last[-1] if last else "",
        "traceback": "Traceback" in told,
    }


if __name__ == "__main__":
    main()
