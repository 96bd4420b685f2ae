"""The headline: the bundled teacher to 1/18 of its parameters on AdReview by headline-18x.yaml, with its control arms.

    python benchmarks/headline.py --out runs/headline                      # hours on 2 cores, minutes on a GPU; resumes
    python benchmarks/headline.py --out runs/headline --controls scratch random-init random-units
    python benchmarks/headline.py --out runs/headline --publish            # bundle the student beside the teacher

Control arms reach the same shape on the same rows with the same row visits: ``scratch`` (random weights, answers only),
``random-init`` (random weights, same distillation), ``random-units`` (same rounds, units and blocks drawn at random, no repair).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from slimlmm import adreview, controls, measure, pipeline, report
from slimlmm.demo import BUNDLE, bundled
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, paired_bootstrap
from slimlmm.leaving import LeftError, heeding
from slimlmm.progress import Reporter, reporter
from slimlmm.recipe import read
from slimlmm.results import Control, Results

RECIPE = Path(__file__).with_name("headline-18x.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--train-rows", type=int, default=1_200_000)
    parser.add_argument("--test-rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controls", nargs="*", choices=sorted(controls.DESCRIPTIONS), default=[])
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    teacher, folder = bundled("teacher"), arguments.out / "adreview"
    with heeding(), reporter(quiet=False) as tell:
        if not (folder / "version.json").exists():
            tell.say("writing AdReview", rows=arguments.train_rows)
            adreview.write(folder, train=arguments.train_rows, val=2_000, test=arguments.test_rows, seed=0)
        recipe = read(arguments.recipe).model_copy(update={"seed": arguments.seed})
        run = arguments.out / "run"
        found = pipeline.run(teacher, folder, run, recipe, command=_command(arguments), tell=tell)
        for name in controls.DESCRIPTIONS:
            done = arguments.out / f"control-{name}" / "control.json"
            if name in arguments.controls and not done.exists():
                text = control(name, arguments.out, folder, found, tell).model_dump_json(indent=1)
                done.parent.mkdir(exist_ok=True)
                done.write_text(text + "\n", encoding="utf-8")
            if done.exists():
                told = Control.model_validate_json(done.read_bytes())
                found = found.model_copy(update={"controls": (*found.controls, told)})
                found.save(run / "results.json")
                report.write(found, run)
    if arguments.publish:
        publish(run, BUNDLE / "student")
    print(json.dumps(found.model_dump(mode="json")["ratios"]))


def _command(arguments: argparse.Namespace) -> str:
    """Return the command that makes this run, with what decides it."""
    told = {"recipe": os.path.relpath(arguments.recipe)}
    told |= {name: getattr(arguments, name) for name in ("train_rows", "test_rows", "seed")}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in told.items()]
    return " ".join(["python benchmarks/headline.py", *words])


def control(name: str, out: Path, folder: Path, found: Results, tell: Reporter) -> Control:
    """Run one control arm, evaluate it on the same test rows, and compare it with the student, paired."""
    tell.say(f"control: {name}")
    run, where = out / "run", out / f"control-{name}"
    student = Evaluation.model_validate_json((run / "student-test.json").read_bytes())
    if name == "random-units":
        settings = read(run / "recipe.yaml")
        settings = settings.model_copy(update={"stages": controls.at_random(settings.stages)})
        other = pipeline.run(bundled("teacher"), folder, where, settings, tell=tell)
        answers = Evaluation.model_validate_json((where / "student-test.json").read_bytes())
        visits, seconds = (other.totals.row_visits, other.totals.seconds) if other.totals else (None, None)
    else:
        kind: Any = name
        done = controls.untrained(kind, run, bundled("teacher"), folder, where, tell=tell)
        answers, visits, seconds = done.answers, done.row_visits, done.seconds
    assert found.student is not None
    gap = paired_bootstrap(student.correct, answers.correct, student.clusters, samples=10_000, seed=0)
    return Control(
        name=name,
        description=controls.DESCRIPTIONS[name],
        parameters=found.student.parameters["total"],
        accuracy=answers.summary,
        behind=gap,
        row_visits=visits,
        seconds=seconds,
    )


def publish(run: Path, target: Path) -> None:
    """Copy the student with its certificate and the run's results into the package."""
    shutil.rmtree(target / "model", ignore_errors=True)
    shutil.copytree(run / "final", target / "model")
    shutil.copy(run / "results.json", target / "results.json")
    print(json.dumps({"bytes": measure.disk_bytes(target)}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"headline: {error}", file=sys.stderr)
        sys.exit(2)
    except LeftError as error:
        print(f"headline: {error}.", file=sys.stderr)
        sys.exit(error.code)
