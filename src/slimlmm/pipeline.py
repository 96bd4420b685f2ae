"""The main job: teacher and data in, a plain checkpoint 10-40x smaller out, every round written down.

`run` reads like the diagram in the README: load -> [score -> choose -> repair -> cut -> recover -> evaluate]* -> measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slimlmm import certificate, checkpoint, choosing, data, plan, report, results, vocab
from slimlmm.anatomy import describe
from slimlmm.budget import by_shrink
from slimlmm.checkdata import alignment
from slimlmm.collate import Collator, texts_of
from slimlmm.distill import can_pack
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.labels import file_of, labelled
from slimlmm.measure import compare, environment
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, Stage, dump
from slimlmm.resizing import predict_parameters, resized
from slimlmm.results import Results
from slimlmm.rounds import Done, Job, Place, attempts, job_of
from slimlmm.runfolder import RunFolder, release
from slimlmm.saving import SAVE_EVERY
from slimlmm.selfcheck import self_check
from slimlmm.snapshot import evaluated, model_record
from slimlmm.teacher import TeacherCache, weights_fingerprint

#: rows on which the teacher is held against itself before a run
PROBED = 8


def run(
    model: str | Path,
    source: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    command: str | None = None,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
    cache: Path | None = None,
    save_every: float = SAVE_EVERY,
) -> Results:
    """Compress `model` on the rows of `source` by `recipe` into the run folder `out`; a run that was killed goes on.

    It goes on at the last state on disk: that of a round, of a training in it, or of a training's steps, which is written every
    `save_every` seconds. What the teacher said is kept in `cache`, which several runs may share (one after the other), else in
    the run folder.

    Raises:
        UserError: bad model, data or recipe, a budget or an axis that cannot be met, or a folder of another run.
    """
    tell = tell or Quiet()
    loaded = checkpoint.load(model, trust_remote_code=trust_remote_code, device=_device())
    if loaded.processor is None:
        raise UserError(f"{model}: has no processor that can be loaded. {loaded.note}")
    try:
        found = _compressed(loaded, source, (out, cache), recipe, tell, save_every)
        found = found.model_copy(update={"command": command, "remote_code": remote_code(loaded.model)})
        found.save(out / "results.json")
        report.write(found, out)
    finally:
        release(out)
    return found


def _compressed(
    loaded: checkpoint.Loaded,
    source: str | Path,
    where: tuple[Path, Path | None],
    recipe: Recipe,
    tell: Reporter,
    save_every: float,
) -> Results:
    """Make the rounds, hand over what they left, and measure it beside the model that it came from."""
    job, stages, facts, test = _prepared(loaded, source, where, recipe, tell)
    job.save_every = save_every
    _prove(loaded.model.config, stages, tell)
    job.teacher_validation = evaluated(job.folder, loaded, job.validation, tell, "teacher-validation")
    records, kept = _rounds(job, loaded, stages)
    _hand_over(job, kept, loaded.stored)
    found = _finish(job, loaded, checkpoint.load(job.folder.final, device=_device()), records, test)
    return found.model_copy(update={"data": facts})


def _prepared(
    loaded: checkpoint.Loaded, source: str | Path, where: tuple[Path, Path | None], recipe: Recipe, tell: Reporter
) -> tuple[Job, tuple[Stage, ...], results.Dataset, list[data.Row]]:
    """Read the rows, have those labelled that the recipe wants the teacher to, settle the stages, and open the run folder.

    `where`: that folder, and the cache that it shares with other runs, if any.
    """
    out, cache = where
    wanted, share = recipe.data.answers, recipe.data.max_bad_share
    splits = data.load(
        source,
        max_bad_share=share,
        seed=recipe.seed,
        unlabelled=wanted != "given",
        allowed=recipe.data.pictures,
    )
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
        file = file_of(RunFolder.open(out, identity, cache), loaded, rows["train"])
        rows["train"] = labelled(loaded, rows["train"], file, tell, every=wanted == "teacher")
    if recipe.sizes_by != "shares" and not recipe.stages:
        RunFolder.open(out, identity, cache)  # what the choice found is kept in it
    stages = schedule(loaded, rows, recipe, out, tell)
    plan.check_stages(loaded.model.config, stages, recipe.tensor_parallel)
    for note in (*splits.notes, *([] if recipe.stages else Grid.of(recipe).notes(loaded.model.config))):
        tell.say(note)
    folder = RunFolder.open(out, identity, cache)
    folder.keep_recipe(dump(recipe.model_copy(update={"stages": stages})))
    test = data.sample(rows["test"], recipe.data.test_rows, recipe.seed)
    return job_of(folder, recipe, rows, tell), stages, facts, test


def _hand_over(job: Job, kept: Done | None, stored: torch.dtype) -> None:
    """Save the last model that kept the promise as ``final/``, in the number format that the teacher's files have.

    It appears when a new process of stock classes has answered as the model in memory does (`certificate.certify`).
    """
    if kept is None:
        raise UserError(
            f"no round kept within {job.recipe.max_drop} points of the teacher; see {job.folder.path}/stages for what was tried."
        )
    model, processor = checkpoint.as_stored(kept.model, stored), kept.processor

    def prove(folder: Path) -> None:
        certificate.certify(folder, model, processor, job.validation, kept.record.parameters)

    if remote_code(model):
        job.tell.say("final/ has no certificate: its model's code is not the stock one, so no stock class can answer")
    checkpoint.save(model, processor, job.folder.final, prove=None if remote_code(model) else prove)


def remote_code(model: Any) -> str | None:
    """Return the module of the model's own code where it came with the model, None for stock classes."""
    module = type(model).__module__
    return module if module.startswith("transformers_modules") else None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def schedule(
    loaded: checkpoint.Loaded,
    rows: Mapping[str, list[data.Row]],
    recipe: Recipe,
    folder: Path | None = None,
    tell: Reporter | None = None,
) -> tuple[Stage, ...]:
    """Return the recipe's stages, or the default schedule for its shrink; a choice that runs the model is kept in `folder`.

    Raises:
        UserError: neither is said, or the shrink cannot be reached.
    """
    if recipe.stages:
        return recipe.stages
    if recipe.shrink is None:
        raise UserError("say how small: --shrink 18, or stages in the recipe.")
    config, grid = loaded.model.config, Grid.of(recipe)
    living = resized(config, lossless_sizes(loaded, rows))
    space = plan.space_of(living, grid, recipe.order)
    budget = by_shrink(living, recipe.shrink, predict_parameters(config, {}))
    final = choosing.sizes_for_run(space, budget, loaded, rows, recipe, folder, tell or Quiet())
    per_picture = data.rows_per_picture(rows["train"])
    return plan.stages_for(
        living, final, row_visits=recipe.row_visits, rows_per_picture=per_picture, order=recipe.order, grid=grid
    )


def lossless_sizes(loaded: checkpoint.Loaded, rows: Mapping[str, list[data.Row]]) -> dict[str, int]:
    """Return the sizes after the lossless cuts: tokens that the rows use, blocks that reach the output."""
    model = loaded.model
    texts = texts_of(loaded.processor, rows["train"] + rows["validation"])
    kept = vocab.needed(model.config, model.generation_config, loaded.processor, texts)
    tokens = describe(model.config).axis("vocab").size
    return {"vocab": sum(token < tokens for token in kept)} | plan.living_blocks(model.config)


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
            _aligned(job, replace(loaded, model=model, processor=processor))
        sizes = plan.restated(describe(model.config), turn.sizes, planned)
        for one in attempts(
            job, model, processor, turn.model_copy(update={"sizes": sizes}), Place(number, len(turns), name, index)
        ):
            records.append(one.record)
            kept = one if one.record.kept_promise else kept
        job.folder.forget_previous()
        if not records[-1].kept_promise:
            job.tell.say(
                f"round {number}/{len(turns)} cannot keep the promise; stopping at the smallest model that does"
            )
            break
        assert kept is not None
        model, processor = kept.model, kept.processor
        planned |= turn.sizes
    return records, kept


def _aligned(job: Job, loaded: checkpoint.Loaded) -> None:
    """Refuse a model that, distilled from itself through this run's collator and cache, would not start at a loss of 0."""
    assert job.cache is not None
    found = alignment.probed(loaded, job.calibration[:PROBED], job.cache)
    most = alignment.limit(loaded.model.device)
    job.tell.say("the teacher against itself, nats an answer token", loss=found.loss)
    if not found.loss <= most:
        raise UserError(
            f"distilling the teacher from itself starts at {found.loss:.3g} nats an answer token, not at 0 (at most {most:g}): "
            "labels, pictures or what the teacher said do not belong together. `slimlmm check-data` with --model shows what the "
            "model reads of rows."
        )


def _finish(
    job: Job, teacher: checkpoint.Loaded, student: checkpoint.Loaded, rounds: list[results.Round], test: list[data.Row]
) -> Results:
    """Evaluate both on the test split, time them in turns, and gather the record."""
    evaluations = [
        evaluated(job.folder, side, test, job.tell, f"{name}-test")
        for name, side in (("teacher", teacher), ("student", student))
    ]
    latency = throughput = None
    if calls := job.recipe.bench_calls:
        job.tell.say("timing teacher and student in turns")
        latency = compare(teacher, student, test, n=calls)
        throughput = compare(teacher, student, test, batch_size=32, n=max(3, calls // 6), warmup=1)
    records = [
        model_record(side, evaluation, test, memory=calls > 0)
        for side, evaluation in zip((teacher, student), evaluations, strict=True)
    ]
    change = results.effect(*evaluations)
    missed = [one for one in rounds if not one.kept_promise]
    return Results(
        name=job.folder.path.name,
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
