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


def work(count: int, start: int) -> dict[str, Any]:
    """Return what was found on `count` random configurations."""
    laws: Any = importlib.import_module("laws")
    configurations: Any = importlib.import_module("zoo.random_configs").configurations
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    drawn: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    axes: Counter[str] = Counter()
    starts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    illegal: Counter[str] = Counter()
    different: set[str] = set()
    worst, swaying = 0.0, 0.0
    violations: list[dict[str, Any]] = []

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
        nonlocal worst, swaying
        name, config = found
        try:
            outcomes = list(laws.outcomes(config, seed=sum(drawn.values())))
        except laws.NoModelError as error:
            illegal[f"{name}: {str(error).splitlines()[0]}"] += 1
            return
        drawn[config.model_type] += 1
        starts[name] += 1
        different.add(hashlib.sha256(key_of(config).encode()).hexdigest())
        for outcome in outcomes:
            verdicts[outcome.verdict] += 1
            if outcome.verdict == "refused":
                refusals[f"{outcome.axis}: {laws.kind_of(outcome.reason)}"] += 1
            elif outcome.verdict == "broken":
                violations.append(
                    {"name": name, "axis": outcome.axis, "reason": outcome.reason, "config": key_of(config)}
                )
                print(f"{name} {outcome.axis}: {outcome.reason}", flush=True)
            elif outcome.verdict == "rounding":
                swaying = max(swaying, outcome.error)
            elif outcome.verdict == "proven":
                axes[outcome.axis] += 1
                worst = max(worst, outcome.error)

    check()
    return {
        "drawn": drawn,
        "verdicts": verdicts,
        "axes": axes,
        "refusals": refusals,
        "illegal": illegal,
        "starts": starts,
        "different": different,
        "worst": worst,
        "swaying": swaying,
        "violations": violations,
    }


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
