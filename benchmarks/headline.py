"""The headline: the bundled teacher to 1/18 of its parameters on AdReview, with its control arms.

    python benchmarks/headline.py --out runs/headline                      # hours on 2 cores, minutes on a GPU; resumes
    python benchmarks/headline.py --out runs/headline --controls scratch random-init random-units
    python benchmarks/headline.py --out runs/headline --publish            # bundle the student beside the teacher

Control arms reach the same shape on the same rows with the same row visits: ``scratch`` (random weights, answers only),
``random-init`` (random weights, same distillation), ``random-units`` (same rounds, units and blocks drawn at random, no repair).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from slimlmm import adreview, checkpoint, data, measure, pipeline, report
from slimlmm.collate import Collator
from slimlmm.demo import BUNDLE, bundled
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, evaluate, paired_bootstrap
from slimlmm.progress import Reporter, reporter
from slimlmm.recipe import LEVELS, Recipe, Training, read
from slimlmm.results import Control, Results
from slimlmm.teacher import TeacherCache

#: towers as shallow as the teacher's lose most with their blocks (docs/lab-notes.md)
ORDER = ("inner", "width", "blocks")
#: those of the published run; the teacher's nine heads leave hardly a width that is a multiple of 64
MULTIPLES = {"width": 16, "ffn": 16, "text.width": 1}
DESCRIPTIONS = {
    "scratch": "same shape, random weights, cross-entropy on the same rows for as many row visits",
    "random-init": "same shape, random weights, same distillation losses for as many row visits",
    "random-units": "same rounds and trainings; units and blocks drawn at random, no repair",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--shrink", type=float, default=18.0)
    parser.add_argument("--row-visits", type=int, default=3_000_000)
    parser.add_argument("--train-rows", type=int, default=400_000)
    parser.add_argument("--test-rows", type=int, default=5_000)
    parser.add_argument("--order", nargs=3, choices=LEVELS, default=ORDER, help="order of the levels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controls", nargs="*", choices=sorted(DESCRIPTIONS), default=[])
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    teacher, folder = bundled("teacher"), arguments.out / "adreview"
    with reporter(quiet=False) as tell:
        if not (folder / "version.json").exists():
            tell.say("writing AdReview", rows=arguments.train_rows)
            adreview.write(folder, train=arguments.train_rows, val=2_000, test=arguments.test_rows, seed=arguments.seed)
        recipe = Recipe(
            shrink=arguments.shrink,
            row_visits=arguments.row_visits,
            order=arguments.order,
            multiples=MULTIPLES,
            seed=arguments.seed,
        )
        run = arguments.out / "run"
        found = pipeline.run(teacher, folder, run, recipe, command=_command(arguments), tell=tell)
        for name in DESCRIPTIONS:
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
    told = {name: getattr(arguments, name) for name in ("shrink", "row_visits", "train_rows", "test_rows", "seed")}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in told.items()]
    return " ".join(["python benchmarks/headline.py", *words, "--order", *arguments.order])


def control(name: str, out: Path, folder: Path, found: Results, tell: Reporter) -> Control:
    """Run one control arm, evaluate it on the same test rows, and compare it with the student, paired."""
    tell.say(f"control: {name}")
    run, where = out / "run", out / f"control-{name}"
    rows = data.load(folder)
    student = Evaluation.model_validate_json((run / "student-test.json").read_bytes())
    if name == "random-units":
        settings = read(run / "recipe.yaml")
        stages = tuple(
            stage.model_copy(update={"rounds": tuple(map(_at_random, stage.rounds))}) for stage in settings.stages
        )
        other = pipeline.run(
            bundled("teacher"), folder, where, settings.model_copy(update={"stages": stages}), tell=tell
        )
        answers = Evaluation.model_validate_json((where / "student-test.json").read_bytes())
        visits, seconds = (other.totals.row_visits, other.totals.seconds) if other.totals else (None, None)
    else:
        answers, visits, seconds = _untrained(name, where, run, rows, found, tell)
    assert found.student is not None
    gap = paired_bootstrap(student.correct, answers.correct, student.clusters, samples=10_000, seed=0)
    return Control(
        name=name,
        description=DESCRIPTIONS[name],
        parameters=found.student.parameters["total"],
        accuracy=answers.summary,
        behind=gap,
        row_visits=visits,
        seconds=seconds,
    )


def _at_random(turn: Any) -> Any:
    return turn.model_copy(update={"criterion": "random", "groups": "random", "blocks": "random", "repair": "none"})


def _untrained(
    name: str, where: Path, run: Path, rows: data.Splits, found: Results, tell: Reporter
) -> tuple[Evaluation, int, float]:
    """Train the student's shape from random weights for as many row visits as the whole run."""
    torch.manual_seed(found.seed)
    processor = checkpoint.load(run / "final").processor
    # trained in full precision as the student was, whatever format its files are in
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(run / "final"), dtype=torch.float32)
    assert found.totals is not None
    last = read(run / "recipe.yaml").stages[-1].rounds[-1].train[-1]
    losses: dict[Any, float] = {"cross_entropy": 1.0} if name == "scratch" else last.losses
    settings = Training(
        steps=max(1, found.totals.row_visits // 160), pictures_per_step=16, learning_rate=1e-3, freeze=(), losses=losses
    )
    teacher = None
    if name == "random-init":
        first = checkpoint.load(run / "stages" / "01-lossless.1" / "model")
        teacher = TeacherCache(first.model, Collator(first.processor, packed=True), run / "cache")
    trained = train(
        model,
        processor,
        rows.train,
        settings,
        where,
        teacher=teacher,
        seed=found.seed,
        progress=lambda facts: tell.step(f"control {name}", facts["step"], facts["steps"], loss=facts["loss"]),
    )
    return evaluate(model.eval(), processor, rows.test), trained.row_visits, trained.seconds


def publish(run: Path, target: Path) -> None:
    """Copy the student and the run's results into the package."""
    final = checkpoint.load(run / "final")
    checkpoint.save(checkpoint.as_stored(final.model, final.stored), final.processor, target / "model")
    shutil.copy(run / "results.json", target / "results.json")
    print(json.dumps({"bytes": measure.disk_bytes(target)}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"headline: {error}", file=sys.stderr)
        sys.exit(2)
