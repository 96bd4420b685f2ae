"""The main job: teacher and data in, a plain checkpoint 10-40x smaller out, every round written down.

`run` reads like the diagram in the README: load -> [score -> choose -> repair -> cut -> recover -> evaluate]* -> measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slimlmm import certificate, checkpoint, choosing, data, lineage, plan, report, results, room, staging, vocab
from slimlmm.anatomy import describe
from slimlmm.beginnings import Beginnings
from slimlmm.budget import by_shrink
from slimlmm.collate import Collator, Prompter, texts_of
from slimlmm.errors import UserError
from slimlmm.files import refuse_unwritable
from slimlmm.grid import Grid
from slimlmm.job import Done, Handed, Job, LetGoError, Place, job_of
from slimlmm.labels import file_of, labelled
from slimlmm.lossless import Lossless, lossless_of
from slimlmm.measure import compare, environment
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, Stage, dump, read
from slimlmm.resizing import predict_parameters, resized
from slimlmm.results import Results
from slimlmm.room import KEEPING, Keeping
from slimlmm.rounds import attempts
from slimlmm.runfolder import RunFolder, release
from slimlmm.selfcheck import self_check
from slimlmm.snapshot import evaluated, identity_of, model_record


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
    keeping: Keeping = KEEPING,
    beginnings: Beginnings | None = None,
) -> Results:
    """Compress `model` on the rows of `source` by `recipe` into the run folder `out`; a run that was killed goes on.

    It goes on at the last state on disk: that of a round, of a training in it, or of a training's steps, written as often as
    `keeping` says. What the teacher said is kept in `cache`, which several runs may share (one after the other), else in
    the run folder. `beginnings`: what it has in common with other runs of this model and these rows.

    Raises:
        UserError: bad model, data or recipe, a budget or an axis that cannot be met, a folder of another run, a full disk.
    """
    tell = tell or Quiet()
    refuse_unwritable(out)
    loaded = checkpoint.load_to_answer(model, trust_remote_code=trust_remote_code)
    try:
        told = {"model": _lasting(model), "data": _lasting(source), "trust_remote_code": trust_remote_code}
        told |= {"shared_cache": cache is not None}
        job, stages, facts, test = _prepared(loaded, source, RunFolder(out, cache), recipe, tell, told)
        job.keeping, job.beginnings = keeping, beginnings
        found = _compressed(job, loaded, stages, test).model_copy(update={"data": facts})
        found = found.model_copy(update={"command": command, "remote_code": remote_code(loaded.model)})
        found.save(out / "results.json")
        report.write(found, out)
    finally:
        release(out)
    return found


def _lasting(place: str | Path) -> str:
    """Return a path that holds wherever the command is given again; a hub id as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


def _compressed(job: Job, loaded: checkpoint.Loaded, stages: Sequence[Stage], test: list[data.Row]) -> Results:
    """Make the rounds, hand over what they left, and measure it beside the model that it came from."""
    _refuse_no_room(job, loaded, stages, {"train": job.vocabulary_rows, "validation": []})
    _prove(loaded.model.config, stages, job.tell)
    job.teacher_validation = evaluated(job.folder, loaded, job.validation, job.tell, "teacher-validation")
    records, kept = _rounds(job, loaded, stages)
    _hand_over(job, kept, loaded.stored)
    return _finish(job, loaded, checkpoint.load(job.folder.final, device=checkpoint.usual_device()), records, test)


def _prepared(
    loaded: checkpoint.Loaded,
    source: str | Path,
    folder: RunFolder,
    recipe: Recipe,
    tell: Reporter,
    given: dict[str, Any],
) -> tuple[Job, tuple[Stage, ...], results.Dataset, list[data.Row]]:
    """Read the rows, have those labelled that the recipe wants the teacher to, settle the stages, and open the run folder."""
    wanted, share = recipe.data.answers, recipe.data.max_bad_share
    splits = data.load(
        source,
        max_bad_share=share,
        unlabelled=wanted != "given",
        allowed=recipe.data.pictures,
    )
    rows = {name: splits.need(name, source) for name in ("train", "validation", "test")}
    everything = [row for part in rows.values() for row in part]
    if not (folder.path / "run.json").exists():  # a run that was begun goes on as it began
        _refuse_vain(recipe, everything)
    identity = identity_of(loaded, rows) | {"recipe": dump(recipe)}
    facts = results.Dataset(
        name=str(source),
        fingerprint=identity["data"],
        rows={name: len(part) for name, part in rows.items()},
        notes=tuple(splits.notes),
    )
    noted = Prompter(loaded.processor).notes(everything)
    if wanted != "given":
        check(loaded, recipe.stages, recipe.tensor_parallel)
        file = file_of(folder.open(identity, given), loaded, rows["train"])
        others, every = rows["validation"] + rows["test"], wanted == "teacher"
        rows["train"], note = labelled(loaded, rows["train"], others, file, tell, every=every)
        noted = [*filter(None, [note]), *noted]
    # what a choice of sizes finds is kept in the folder
    stages, told = schedule(loaded, rows, recipe, lambda: folder.open(identity, given).path, tell)
    told = (*told, *noted)
    check(loaded, stages, recipe.tensor_parallel)
    folder.open(identity, given)
    if (kept := folder.recipe) is not None and (before := read(kept).stages) != stages:
        told, stages = (*told, f"the rounds are those of {kept}, which this version would plan otherwise"), before
    for note in (*splits.notes, *told, *([] if recipe.stages else Grid.of(recipe).notes(loaded.model.config))):
        tell.say(note)
    folder.keep_recipe(dump(recipe.resolved(stages)))
    test = data.sample(rows["test"], recipe.data.test_rows, recipe.seed)
    job = job_of(folder, recipe, rows, tell)
    job.notes, job.stored = told, loaded.stored
    return job, stages, facts, test


def _refuse_vain(recipe: Recipe, rows: Sequence[data.Row]) -> None:
    """Refuse what a recipe asks for in vain."""
    vain, tasks = recipe.unheard(), sorted({row.task for row in rows}) if recipe.spared_tasks else []
    if unknown := [task for task in recipe.spared_tasks if task not in tasks]:
        vain.append(
            f"spared_tasks: no row has the task {', '.join(unknown)}. Known: {', '.join(filter(None, tasks)) or 'none'}."
        )
    if vain:
        raise UserError("the recipe asks for what has no effect:\n  " + "\n  ".join(vain))


def check(loaded: checkpoint.Loaded, stages: Sequence[Stage], tensor_parallel: int) -> None:
    """Refuse stages that cannot be carried out on this model, all problems at once (`staging.check_stages`)."""
    config, asked = loaded.model.config, any("unused_tokens" in turn.drop for stage in stages for turn in stage.rounds)
    whole = vocab.refusal(config, loaded.model.generation_config, loaded.processor) if asked else ""
    staging.check_stages(config, stages, tensor_parallel, whole=whole)


def _hand_over(job: Job, kept: Done | None, stored: torch.dtype) -> None:
    """Save the last model that kept the promise as ``final/``, in the number format that the teacher's files have.

    It appears when a new process of stock classes has answered as the model in memory does (`certificate.certify`).
    """
    if kept is None:
        raise UserError(
            f"no round kept within {job.recipe.max_drop} points of the teacher; see {job.folder.path}/stages for what was tried."
        )
    model, processor = checkpoint.as_stored(kept.left.model, stored), kept.left.processor

    def prove(folder: Path) -> None:
        certificate.certify(folder, model, processor, job.validation, kept.record.parameters)

    if remote_code(model):
        job.tell.say("final/ has no certificate: its model's code is not the stock one, so no stock class can answer")
    checkpoint.save(model, processor, job.folder.final, prove=None if remote_code(model) else prove)


def remote_code(model: Any) -> str | None:
    """Return the module of the model's own code where it came with the model, None for stock classes."""
    module = type(model).__module__
    return module if module.startswith("transformers_modules") else None


def schedule(
    loaded: checkpoint.Loaded,
    rows: Mapping[str, list[data.Row]],
    recipe: Recipe,
    folder: Callable[[], Path] | None = None,
    tell: Reporter | None = None,
    *,
    a_step: data.StepRows | None = None,
    kept: Path | None = None,
) -> tuple[tuple[Stage, ...], tuple[str, ...]]:
    """Return the recipe's stages, or the default schedule for its shrink, and what a reader should know of it.

    A choice that runs the model is kept in `folder`, losses of its trial cuts in the file `kept`. `a_step`: row visits of a step,
    where not those of the recipe's train rows.

    Raises:
        UserError: neither is said, or the shrink cannot be reached.
    """
    if recipe.stages:
        return recipe.stages, ()
    if recipe.shrink is None:
        raise UserError("say how small: --shrink 18, or stages in the recipe.")
    config, grid = loaded.model.config, Grid.of(recipe)
    cuts = lossless(loaded, rows)
    living = resized(config, cuts.sizes())
    space = plan.space_of(living, grid, recipe.order)
    budget = by_shrink(living, recipe.shrink, predict_parameters(config, {}))
    final = choosing.sizes_for_run(space, budget, loaded, rows, recipe, folder, tell or Quiet(), kept)
    stages = staging.stages_for(
        living,
        final.sizes,
        row_visits=recipe.row_visits,
        a_step=a_step or data.rows_a_step(data.sample(rows["train"], recipe.data.train_rows, recipe.seed)),
        order=recipe.order,
        grid=grid,
        drops=cuts.drops,
        near=staging.near_of(recipe),
    )
    return stages, (*cuts.notes, *filter(None, [final.note]))


def lossless(loaded: checkpoint.Loaded, rows: Mapping[str, list[data.Row]]) -> Lossless:
    """Return the cuts that lose nothing for these rows."""
    model, texts = loaded.model, texts_of(loaded.processor, rows["train"] + rows["validation"])
    return lossless_of(model.config, model.generation_config, loaded.processor, texts)


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
    while True:
        try:
            return _walked(job, loaded, stages)
        except LetGoError as error:
            job.tell.say(f"{error}; the rounds whose models were let go are made again")
            job.folder.forget_let_go()


def _walked(job: Job, loaded: checkpoint.Loaded, stages: Sequence[Stage]) -> tuple[list[results.Round], Done | None]:
    records: list[results.Round] = []
    kept: Done | None = None
    handed, job.kept = Handed.of(loaded), {}
    planned = dict(describe(handed.config).sizes)
    turns = [(stage.name, index, turn) for stage in stages for index, turn in enumerate(stage.rounds, 1)]
    for number, (name, index, turn) in enumerate(turns, 1):
        if job.teacher is None and not turn.drop:
            job.teacher = handed
        sizes = plan.restated(describe(handed.config), turn.sizes, planned)
        sizes, told = plan.carried(handed.config, sizes, Grid.of(job.recipe))
        restated, place = turn.model_copy(update={"sizes": sizes}), Place(number, len(turns), name, index)
        for line in told:
            job.tell.say(f"{place}: {line}")
        for one in attempts(job, handed, restated, place):
            records.append(one.record.model_copy(update={"remarks": (*told, *one.record.remarks)}))
            kept = one if one.record.kept_promise else kept
        job.folder.forget_previous()
        if not records[-1].kept_promise:
            job.tell.say(
                f"round {number}/{len(turns)} cannot keep the promise; stopping at the smallest model that does"
            )
            break
        assert kept is not None
        handed = kept.left
        job.kept = lineage.after(handed.folder.parent, job.kept) if not turn.drop else {}
        planned |= turn.sizes
        if job.keeping.rounds is not None and job.teacher is not None:
            job.folder.let_go(job.keeping.rounds, job.teacher.folder, handed.folder)
    return records, kept


def _refuse_no_room(
    job: Job, loaded: checkpoint.Loaded, stages: Sequence[Stage], rows: Mapping[str, list[data.Row]]
) -> None:
    """Say what the run will need on disk at most, or refuse it where less is free.

    What the lossless cuts will spare takes a look at all texts, so it is looked at where it decides.
    """
    hidden = loaded.model.get_output_embeddings().weight.shape[1]
    cache = room.cache_of(Collator(loaded.processor, packed=False), job.asked, stages, hidden)
    drops = {what for stage in stages for turn in stage.rounds for what in turn.drop}

    def refuse(config: Any) -> None:
        need = room.need_of(config, stages, loaded.stored.itemsize, cache, job.keeping)
        needs = {job.folder.path: need.total}
        if job.folder.shared:
            job.folder.shared.mkdir(parents=True, exist_ok=True)
            needs = {job.folder.path: need.total - cache, job.folder.shared: cache}
        room.refuse(needs, str(need))
        job.tell.say(f"disk: at most {room.readable(need.total)} will be needed ({need})")

    try:
        refuse(loaded.model.config)
    except UserError:
        if not drops:
            raise
        refuse(resized(loaded.model.config, lossless(loaded, rows).sizes(drops)))


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
    ratios = results.ratios(records[0], records[1], latency, throughput)
    short = results.short_of(job.recipe, ratios.parameters, missed)
    for note in short:
        job.tell.say(note)
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
        ratios=ratios,
        totals=results.totals(rounds, sum(one.seconds for one in evaluations), choosing.spent(job.folder.path)),
        notes=(*job.notes, *(results.told(one) for one in missed), *results.remarks(rounds), *short),
    )
