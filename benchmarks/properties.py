"""Cut random configurations of every family along every axis and count what does not hold (nothing should).

python benchmarks/properties.py --configs 1000 --seed 0 --out benchmarks/results/properties-DATE.json

A configuration is drawn by `tests/zoo/random_configs.py`; each of its axes is cut to a random legal size by a random choice and
has to equal the masked model within 1e-5 of the largest logit, and to count the parameters that were predicted, or be refused
with a reason. Configurations are drawn in parts of 20, the part of number n with the seed plus n, so that what is drawn does not
depend on the machine; the record is written anew after each part.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings

import slimlmm
from slimlmm.probing import key_of
from slimlmm.selfcheck import TOLERANCE

#: the generator and the laws stand with the tests
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
#: configurations of one part
PART = 20


@dataclass(slots=True)
class Tally:
    """What the laws said of some configurations."""

    drawn: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    axes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    illegal: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    different: set[str] = field(default_factory=set)
    worst: float = 0.0
    swaying: float = 0.0
    violations: list[dict[str, Any]] = field(default_factory=list)

    def model(self, name: str, config: Any) -> None:
        """Count a configuration that is a model."""
        self.drawn[config.model_type] += 1
        self.starts[name] += 1
        self.different.add(hashlib.sha256(key_of(config).encode()).hexdigest())

    def cell(self, name: str, config: Any, outcome: Any, kind: str) -> None:
        """Count what the laws said of one axis; `kind` is that of its refusal."""
        self.verdicts[outcome.verdict] += 1
        if outcome.verdict == "refused":
            self.refusals[f"{outcome.axis}: {kind}"] += 1
        elif outcome.verdict == "broken":
            self.violations.append(
                {"name": name, "axis": outcome.axis, "reason": outcome.reason, "config": key_of(config)}
            )
            print(f"{name} {outcome.axis}: {outcome.reason}", flush=True)
        elif outcome.verdict == "rounding":
            self.swaying = max(self.swaying, outcome.error)
        elif outcome.verdict == "proven":
            self.axes[outcome.axis] += 1
            self.worst = max(self.worst, outcome.error)


def work(count: int, start: int) -> dict[str, Any]:
    """Return what was found on `count` random configurations."""
    laws: Any = importlib.import_module("laws")
    configurations: Any = importlib.import_module("zoo.random_configs").configurations
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tally = Tally()

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations())
    def check(found: tuple[str, Any]) -> None:
        name, config = found
        try:
            outcomes = list(laws.outcomes(config, seed=sum(tally.drawn.values())))
        except laws.NoModelError as error:
            tally.illegal[f"{name}: {str(error).splitlines()[0]}"] += 1
            return
        tally.model(name, config)
        for outcome in outcomes:
            tally.cell(name, config, outcome, laws.kind_of(outcome.reason) if outcome.verdict == "refused" else "")

    check()
    return {one.name: getattr(tally, one.name) for one in fields(tally)}


def total(parts: list[dict[str, Any]], key: str) -> dict[str, int]:
    counted: Counter[str] = sum((part[key] for part in parts), Counter())
    return dict(counted.most_common())


def work_on(job: tuple[int, int]) -> dict[str, Any]:
    return work(*job)


def record(parts: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    verdicts = total(parts, "verdicts")
    return {
        "versions": {
            "slimlmm": slimlmm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hypothesis": hypothesis.__version__,
            "python": platform.python_version(),
        },
        "seed": options.seed,
        "part": PART,
        "workers": options.workers,
        "seconds": round(seconds, 1),
        "tolerance": TOLERANCE,
        "configurations": sum(sum(part["drawn"].values()) for part in parts),
        "different": len(set().union(*(part["different"] for part in parts))),
        "model_types": total(parts, "drawn"),
        "starts": total(parts, "starts"),
        "drawn_but_no_model": total(parts, "illegal"),
        "cells": sum(verdicts.values()),
        "verdicts": verdicts,
        "proven_by_axis": total(parts, "axes"),
        "worst_error": max(part["worst"] for part in parts),
        "worst_error_of_rounding": max(part["swaying"] for part in parts),
        "refusals": total(parts, "refusals"),
        "violations": [violation for part in parts for violation in part["violations"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    begun = time.monotonic()
    jobs = [(PART, options.seed + number) for number in range(-(-options.configs // PART))]
    parts: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for part in pool.imap_unordered(work_on, jobs):
            parts.append(part)
            found = record(parts, options, time.monotonic() - begun)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            told = ("configurations", "cells", "verdicts", "worst_error", "worst_error_of_rounding", "seconds")
            print({key: found[key] for key in told}, f"violations: {len(found['violations'])}", flush=True)
    sys.exit(bool(found["violations"]))


if __name__ == "__main__":
    main()
