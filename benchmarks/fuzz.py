"""Thousands of spoilt files and requests against every parser: each ends in a value or in a refusal with its reason, in time.

    python benchmarks/fuzz.py --n 10000 --seed 0 --out benchmarks/results/fuzz-DATE.json
    python benchmarks/fuzz.py --engine atheris --n 10000 --out FILE     # where atheris can be imported; guided by coverage

Targets and mutations stand in `tests/fuzzing.py`: bytes are flipped, cut, repeated, spliced; trees of JSON, YAML, tables and
safetensors headers get values of other types, which hypothesis draws, in other places. `atheris` (libFuzzer) changes bytes
alone, and goes on from what reached new lines of slimlmm. Tables are read by the bare readers of `datasets`, and by all of it.
Each parser has a process of its own, whose memory is told before the first input and at its peak; one that dies is a find, with
the input that it died of. A find is counted once by its kind (exception, function of slimlmm), with the first input of it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: the targets stand with the tests
TESTS = Path(__file__).parent.parent / "tests"
#: bytes of an input that are written down with a find
SHOWN = 6000
#: values that are drawn for trees
VALUES = 500


@dataclass(slots=True)
class Tally:
    """What came of the inputs of one parser."""

    engine: str
    name: str
    out: Path
    began: float = field(default_factory=time.monotonic)
    before: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    outcomes: Counter[str] = field(default_factory=Counter)
    finds: dict[str, dict[str, Any]] = field(default_factory=dict)
    different: set[bytes] = field(default_factory=set)
    slowest: float = 0.0

    def one(self, outcome: Callable[[Any, bytes], tuple[str, str]], read: Any, raw: bytes) -> None:
        """Read one input and count how that ended; what is being read lies on disk in case this process dies of it."""
        self.out.with_suffix(".input").write_bytes(raw)
        began = time.perf_counter()
        how, said = outcome(read, raw)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        self.outcomes[how] += 1
        self.different.add(hashlib.blake2b(raw, digest_size=8).digest())
        if how == "found":
            known = self.finds.setdefault(said, {"what": said, "count": 0, "input": shown(raw)})
            known["count"] += 1
            if known["count"] == 1:
                print(f"{self.name}: {said}", file=sys.stderr, flush=True)
        if sum(self.outcomes.values()) % 250 == 0:
            self.write()

    def write(self) -> None:
        """Write down what is known so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {
            "parser": self.name,
            "engine": self.engine,
            "inputs": sum(self.outcomes.values()),
            "different": len(self.different),
            "accepted": self.outcomes["accepted"],
            "refused": self.outcomes["refused"],
            "found": self.outcomes["found"],
            "finds": list(self.finds.values()),
            "seconds": round(time.monotonic() - self.began, 1),
            "slowest_s": round(self.slowest, 2),
            "memory_mb": [round(self.before / 1e3), round(peak / 1e3)],
        }
        self.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shown(raw: bytes) -> str:
    """Return an input as base64, the first bytes of a long one."""
    return base64.b64encode(raw[:SHOWN]).decode() + (f" and {len(raw) - SHOWN} bytes" if len(raw) > SHOWN else "")


def target_of(name: str) -> tuple[Any, Any]:
    """Return the module of targets, and one of them."""
    sys.path.insert(0, str(TESTS))
    fuzzing: Any = importlib.import_module("fuzzing")
    return fuzzing, next(target for target in fuzzing.TARGETS if target.name == name)


def warmed(fuzzing: Any, read: Callable[[bytes], object], seeds: list[bytes]) -> None:
    """Read the seeds once, so that what is imported late takes no time of an input."""
    for raw in seeds:
        with contextlib.suppress(*fuzzing.REFUSALS):
            read(raw)


def quietly() -> None:
    """Keep libraries from telling what is wrong with each input."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"


def by_mutation(name: str, n: int, seed: int, out: Path) -> None:
    """Read `n` inputs that are seeds changed at random, with values that hypothesis draws."""
    fuzzing, target = target_of(name)
    with tempfile.TemporaryDirectory() as folder:
        seeds, read = target.made(Path(folder))
        values = fuzzing.drawn(VALUES, seed)
        warmed(fuzzing, read, seeds)
        tally = Tally("mutation", name, out)
        for number in range(n):
            rng = random.Random(f"{seed} {name} {number}")
            tally.one(fuzzing.outcome, read, fuzzing.spoilt(rng, rng.sample(values, 3), seeds, target.codec))
    tally.write()


def by_atheris(name: str, n: int, seed: int, out: Path) -> None:
    """Read `n` inputs that libFuzzer makes, guided by which lines of slimlmm they reach; does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["slimlmm"]):
        fuzzing, target = target_of(name)
        folder = Path(tempfile.mkdtemp())
        place = folder / "place"
        place.mkdir()
        seeds, read = target.made(place)
        warmed(fuzzing, read, seeds)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, raw in enumerate(seeds):
        (corpus / str(number)).write_bytes(raw)
    words = folder / "words"
    words.write_text("".join(f'"{"".join(f"{chr(92)}x{one:02x}" for one in word[:60])}"\n' for word in fuzzing.WORDS))
    tally = Tally("atheris", name, out)

    def one(raw: bytes) -> None:
        tally.one(fuzzing.outcome, read, raw)
        if sum(tally.outcomes.values()) >= n:
            tally.write()
            os._exit(0)

    options = [
        f"-seed={seed + 1}",
        f"-dict={words}",
        "-max_len=200000",
        "-timeout=60",
        "-rss_limit_mb=8000",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


ENGINES = {"mutation": by_mutation, "atheris": by_atheris}


def run(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Fuzz one parser in a process of its own; one that dies is a find."""
    out = scratch / f"{name.replace(' ', '-').replace('/', '-')}.json"
    command = [sys.executable, __file__, "--one", name, "--engine", options.engine, "--out", str(out)]
    command += ["--n", str(options.n), "--seed", str(options.seed)]
    done = subprocess.run(command, check=False, env=os.environ | {"TMPDIR": str(scratch)})
    found: dict[str, Any] = json.loads(out.read_bytes()) if out.exists() else {"parser": name, "inputs": 0, "finds": []}
    if done.returncode:
        last = out.with_suffix(".input")
        raw = last.read_bytes() if last.exists() else b""
        found["finds"].append({"what": f"the process ended with {done.returncode}", "count": 1, "input": shown(raw)})
    return found


def environment() -> dict[str, Any]:
    """Return what is known of this machine and these versions."""
    from importlib.metadata import version

    from slimlmm.measure import environment

    names = ("hypothesis", "datasets", "pyarrow", "pillow", "safetensors", "transformers", "pydantic", "pyyaml")
    return environment().model_dump(mode="json") | {"parsers": {name: version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="inputs of each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=list(ENGINES), default="mutation")
    parser.add_argument("--parsers", nargs="*", help="some of them, by name; what a record has of others stays")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quietly()
    if options.one:
        ENGINES[options.engine](options.one, options.n, options.seed, options.out)
        return
    sys.path.insert(0, str(TESTS))
    fuzzing: Any = importlib.import_module("fuzzing")
    names = options.parsers or [target.name for target in fuzzing.TARGETS]
    before = json.loads(options.out.read_bytes())["parsers"] if options.out.exists() else []
    found: list[dict[str, Any]] = [one for one in before if one["parser"] not in names]
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            found.append(run(name, options, Path(scratch)))
        one = {key: value for key, value in found[-1].items() if key != "finds"}
        print(one, f"kinds of finds: {len(found[-1]['finds'])}", flush=True)
        record: dict[str, Any] = {
            "what": "inputs per parser, and what came of them",
            "seed": options.seed,
            "limit_s": fuzzing.SECONDS,
            "inputs": sum(one["inputs"] for one in found),
            "finds": sum(len(one["finds"]) for one in found),
            "parsers": found,
            "environment": environment()
            if name == names[-1]
            else None,  # last: the memory of a child begins at its parent's
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(one["finds"] for one in found))


if __name__ == "__main__":
    main()
