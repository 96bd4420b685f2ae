"""The main job: teacher and data in, a plain checkpoint 10-40x smaller out, every round written down.

`run` reads like the diagram in the README: load -> [score -> choose -> repair -> cut -> recover -> evaluate]* -> measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slimlmm import checkpoint, data, plan, report, results, vocab
from slimlmm.anatomy import describe
from slimlmm.collate import Collator, texts_of
from slimlmm.distill import can_pack
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, evaluate
from slimlmm.grid import Grid
from slimlmm.labels import labelled
from slimlmm.measure import compare, environment
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, Stage, dump
from slimlmm.resizing import predict_parameters, resized
from slimlmm.results import Results
from slimlmm.rounds import Done, Job, Place, attempts
from slimlmm.runfolder import RunFolder
from slimlmm.selfcheck import self_check
from slimlmm.snapshot import model_record
from slimlmm.teacher import TeacherCache, weights_fingerprint


def run(
    model: str | Path,
    source: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    command: str | None = None,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> Results:
    """Compress `model` on the rows of `source` by `recipe` into the run folder `out`; resumes at the last finished round.

    Raises:
        UserError: bad model, data or recipe, a budget or an axis that cannot be met, or a folder of another run.
    """
    tell = tell or Quiet()
    loaded = checkpoint.load(model, trust_remote_code=trust_remote_code, device=_device())
    if loaded.processor is None:
        raise UserError(f"{model}: has no processor that can be loaded. {loaded.note}")
    job, stages, facts, test = _prepared(loaded, source, out, recipe, tell)
    _prove(loaded.model.config, stages, tell)
    job.teacher_validation = _evaluation(
        job.folder.path / "teacher-validation.json", loaded, job.validation, tell, "teacher, validation"
    )
    records, kept = _rounds(job, loaded, stages)
    _hand_over(job, kept, loaded.stored)
    found = _finish(job, loaded, checkpoint.load(job.folder.final, device=_device()), records, test)
    found = found.model_copy(update={"command": command, "data": facts})
    found.save(job.folder.path / "results.json")
    report.write(found, job.folder.path)
    return found


def _prepared(
    loaded: checkpoint.Loaded, source: str | Path, out: Path, recipe: Recipe, tell: Reporter
) -> tuple[Job, tuple[Stage, ...], results.Dataset, list[data.Row]]:
    """Read the rows, have those labelled that the recipe wants the teacher to, settle the stages, and open the run folder."""
    wanted = recipe.data.answers
    splits = data.load(source, max_bad_share=recipe.data.max_bad_share, seed=recipe.seed, unlabelled=wanted != "given")
    rows = {name: splits.need(name, source) for name in ("train", "validation", "test")}
    facts = results.Dataset(
        name=str(source),
        fingerprint=data.fingerprint([row for part in rows.values() for row in part]),
        rows={name: len(part) for name, part in rows.items()},
        notes=tuple(splits.notes),
    )
    identity = {"model": weights_fingerprint(loaded.model), "data": facts.fingerprint, "recipe": dump(recipe)}
    if wanted != "given":
        plan.check_stages(loaded.model.config, recipe.stages, recipe.tensor_parallel)
        file = RunFolder.open(out, identity).path / "teacher-answers.json"
        rows["train"] = labelled(loaded, rows["train"], file, tell, every=wanted == "teacher")
    stages = _stages(loaded, rows, recipe)
    plan.check_stages(loaded.model.config, stages, recipe.tensor_parallel)
    for note in (*splits.notes, *([] if recipe.stages else _grid(recipe).notes(loaded.model.config))):
        tell.say(note)
    folder = RunFolder.open(out, identity)
    folder.keep_recipe(dump(recipe.model_copy(update={"stages": stages})))
    test = data.sample(rows["test"], recipe.data.test_rows, recipe.seed)
    return _job(folder, recipe, rows, tell), stages, facts, test


def _hand_over(job: Job, kept: Done | None, stored: torch.dtype) -> None:
    """Save the last model that kept the promise as ``final/``, in the number format that the teacher's files have."""
    if kept is None:
        raise UserError(
            f"no round kept within {job.recipe.max_drop} points of the teacher; see {job.folder.path}/stages for what was tried."
        )
    checkpoint.save(checkpoint.as_stored(kept.model, stored), kept.processor, job.folder.final)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stages(loaded: checkpoint.Loaded, rows: Mapping[str, list[data.Row]], recipe: Recipe) -> tuple[Stage, ...]:
    """Return the recipe's stages, or the default schedule for its shrink."""
    if recipe.stages:
        return recipe.stages
    if recipe.shrink is None:
        raise UserError("say how small: --shrink 18, or stages in the recipe.")
    model = loaded.model
    texts = texts_of(loaded.processor, rows["train"] + rows["validation"])
    kept = vocab.needed(model.config, model.generation_config, loaded.processor, texts)
    fixed = {"vocab": sum(token < describe(model.config).axis("vocab").size for token in kept)}
    fixed |= plan.living_blocks(model.config)
    grid = _grid(recipe)
    final = plan.sizes_for(model.config, recipe.shrink, predict_parameters(model.config, {}), fixed, grid)
    per_picture = data.rows_per_picture(rows["train"])
    living = resized(model.config, fixed)
    return plan.stages_for(
        living, final, row_visits=recipe.row_visits, rows_per_picture=per_picture, order=recipe.order, grid=grid
    )


def _grid(recipe: Recipe) -> Grid:
    return Grid(multiples=recipe.multiples, tensor_parallel=recipe.tensor_parallel)


def _job(folder: RunFolder, recipe: Recipe, rows: Mapping[str, list[data.Row]], tell: Reporter) -> Job:
    settings = recipe.data
    training = data.sample(rows["train"], settings.train_rows, recipe.seed)
    asked = data.sample(training, settings.teacher_rows, recipe.seed)
    return Job(
        folder=folder,
        recipe=recipe,
        train_rows=training,
        calibration=data.sample(asked, settings.calibration_rows, recipe.seed + 1),
        taught=None if settings.teacher_rows is None else frozenset(row.picture_key() for row in asked),
        validation=data.sample(rows["validation"], settings.validation_rows, recipe.seed),
        vocabulary_rows=rows["train"] + rows["validation"],
        tell=tell,
    )


def _prove(config: Any, stages: Sequence[Stage], tell: Reporter) -> None:
    """Prove on a shallow copy that every axis of the recipe is cut rightly for this very configuration."""
    axes = sorted({name for stage in stages for turn in stage.rounds for name in turn.sizes})
    failed = []
    for check in self_check(config, axes):
        tell.say(f"self-check {check.axis}", **({"error": check.error} if check.ok else {"failed": check.reason}))
        if not check.ok:
            failed.append(f"{check.axis}: {check.reason}")
    if failed:
        raise UserError("this configuration cannot be cut as asked:\n  " + "\n  ".join(failed))


def _rounds(job: Job, loaded: checkpoint.Loaded, stages: Sequence[Stage]) -> tuple[list[results.Round], Done | None]:
    """Make the rounds in order; return their records and the last one that kept the promise.

    A round that misses it is rolled back and half of it is tried; the run stops where that misses it too.
    """
    records: list[results.Round] = []
    kept: Done | None = None
    model, processor = loaded.model, loaded.processor
    planned = dict(describe(model.config).sizes)
    turns = [(stage.name, index, turn) for stage in stages for index, turn in enumerate(stage.rounds, 1)]
    for number, (name, index, turn) in enumerate(turns, 1):
        if job.cache is None and not turn.drop:
            job.cache = TeacherCache(
                model, Collator(processor, packed=can_pack(model, processor, job.calibration)), job.folder.cache
            )
        sizes = plan.restated(describe(model.config), turn.sizes, planned)
        for one in attempts(
            job, model, processor, turn.model_copy(update={"sizes": sizes}), Place(number, len(turns), name, index)
        ):
            records.append(one.record)
            kept = one if one.kept_promise else kept
        if not records[-1].kept_promise:
            job.tell.say(
                f"round {number}/{len(turns)} cannot keep the promise; stopping at the smallest model that does"
            )
            break
        assert kept is not None
        model, processor = kept.model, kept.processor
        planned |= turn.sizes
    return records, kept


def _evaluation(path: Path, loaded: checkpoint.Loaded, rows: list[data.Row], tell: Reporter, what: str) -> Evaluation:
    """Evaluate once; afterwards read the result from the run folder."""
    if path.exists():
        return Evaluation.model_validate_json(path.read_bytes())
    found = evaluate(
        loaded.model,
        loaded.processor,
        rows,
        progress=lambda done, total: tell.step(f"evaluating the {what}", done, total),
    )
    temporary = path.with_suffix(".part")
    temporary.write_text(found.model_dump_json(), encoding="utf-8")
    temporary.replace(path)
    tell.say(f"{what}: {100 * found.accuracy:.1f} % of {found.summary.overall.n}")
    return found


def _finish(
    job: Job, teacher: checkpoint.Loaded, student: checkpoint.Loaded, rounds: list[results.Round], test: list[data.Row]
) -> Results:
    """Evaluate both on the test split, time them in turns, and gather the record."""
    folder = job.folder.path
    evaluations = [
        _evaluation(folder / f"{name}-test.json", side, test, job.tell, f"{name}, test")
        for name, side in (("teacher", teacher), ("student", student))
    ]
    job.tell.say("timing teacher and student in turns")
    calls = job.recipe.bench_calls
    latency = compare(teacher, student, test, n=calls)
    throughput = compare(teacher, student, test, batch_size=32, n=max(3, calls // 6), warmup=1)
    records = [
        model_record(side, evaluation, test) for side, evaluation in zip((teacher, student), evaluations, strict=True)
    ]
    change = results.effect(*evaluations)
    missed = [one for one in rounds if not one.kept_promise]
    return Results(
        name=folder.name,
        seed=job.recipe.seed,
        environment=environment(),
        data=results.Dataset(name="", rows={}),
        teacher=records[0].model_copy(
            update={"validation": job.teacher_validation.summary.overall if job.teacher_validation else None}
        ),
        rounds=tuple(rounds),
        student=records[1],
        effect=change,
        promise=results.promise(change, job.recipe),
        latency=latency,
        throughput=throughput,
        ratios=results.ratios(records[0], records[1], latency, throughput),
        totals=results.totals(rounds, sum(one.seconds for one in evaluations)),
        notes=tuple(results.told(one) for one in missed),
    )
