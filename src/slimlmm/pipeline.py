"""The main job: teacher and data in, a plain checkpoint 10-40x smaller out, every round written down.

`run` reads like the diagram in the README: load -> [score -> choose -> repair -> cut -> recover -> evaluate]* -> measure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm import checkpoint, data, importance, plan, repair, report, results, surgery, vocab
from slimlmm.anatomy import describe
from slimlmm.axes import Keep, noun_of
from slimlmm.collate import Batch, Collator, Prompter
from slimlmm.deployable import unsplittable
from slimlmm.distill import TrainResult, can_pack, train
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, Score, drop, evaluate
from slimlmm.forward import answer_logits, to_device
from slimlmm.grid import Grid
from slimlmm.losses import Seen, combine
from slimlmm.measure import compare, environment
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, Round, Stage, dump
from slimlmm.resizing import dead_blocks, predict_parameters, resized
from slimlmm.results import Results
from slimlmm.runfolder import RunFolder, write_json
from slimlmm.selfcheck import self_check, shallow
from slimlmm.snapshot import evaluated, model_record
from slimlmm.teacher import TeacherCache, weights_fingerprint

CALIBRATION_LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0}


@dataclass(slots=True)
class _Job:
    """What every round of one run shares."""

    folder: RunFolder
    recipe: Recipe
    train_rows: list[data.Row]
    calibration: list[data.Row]
    validation: list[data.Row]
    vocabulary_rows: list[data.Row]
    tell: Reporter
    cache: TeacherCache | None = None
    teacher_validation: Evaluation | None = None


@dataclass(slots=True)
class _Done:
    """A finished round: the model it left, its record, and whether it kept the promise."""

    model: PreTrainedModel
    processor: Any
    record: results.Round
    folder: Path
    kept_promise: bool


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
) -> Results:
    """Compress `model` on the rows of `source` by `recipe` into the run folder `out`; resumes at the last finished round.

    What the teacher said is kept in `cache`, which several runs may share (one after the other), else in the run folder.

    Raises:
        UserError: bad model, data or recipe, a budget or an axis that cannot be met, or a folder of another run.
    """
    tell = tell or Quiet()
    loaded = checkpoint.load(model, trust_remote_code=trust_remote_code, device=_device())
    if loaded.processor is None:
        raise UserError(f"{model}: has no processor that can be loaded. {loaded.note}")
    splits = data.load(source, max_bad_share=recipe.data.max_bad_share, seed=recipe.seed)
    rows = {name: splits.need(name, source) for name in ("train", "validation", "test")}
    stages = schedule(loaded, rows, recipe)
    check_stages(loaded.model.config, stages, recipe.tensor_parallel)
    for note in (*splits.notes, *([] if recipe.stages else _grid(recipe).notes(loaded.model.config))):
        tell.say(note)
    facts = results.Dataset(
        name=str(source),
        fingerprint=data.fingerprint([row for part in rows.values() for row in part]),
        rows={name: len(part) for name, part in rows.items()},
        notes=tuple(splits.notes),
    )
    identity = {"model": weights_fingerprint(loaded.model), "data": facts.fingerprint, "recipe": dump(recipe)}
    folder = RunFolder.open(out, identity, dump(recipe.model_copy(update={"stages": stages})), cache)
    job = _job(folder, recipe, rows, tell)
    _prove(loaded.model.config, stages, tell)
    job.teacher_validation = evaluated(folder, loaded, job.validation, tell, "teacher-validation")
    done = _rounds(job, loaded, stages)
    _hand_over(job, done, loaded.stored)
    test = data.sample(rows["test"], recipe.data.test_rows, recipe.seed)
    found = _finish(job, loaded, checkpoint.load(folder.final, device=_device()), done, test)
    found = found.model_copy(update={"command": command, "data": facts})
    found.save(folder.path / "results.json")
    report.write(found, folder.path)
    return found


def _hand_over(job: _Job, done: Sequence[_Done], stored: torch.dtype) -> None:
    """Save the last model that kept the promise as ``final/``, in the number format that the teacher's files have."""
    last = next((one for one in reversed(done) if one.kept_promise), None)
    if last is None:
        raise UserError(
            f"no round kept within {job.recipe.max_drop} points of the teacher; see {job.folder.path}/stages for what was tried."
        )
    checkpoint.save(checkpoint.as_stored(last.model, stored), last.processor, job.folder.final)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def schedule(loaded: checkpoint.Loaded, rows: Mapping[str, list[data.Row]], recipe: Recipe) -> tuple[Stage, ...]:
    """Return the recipe's stages, or the default schedule for its shrink.

    Raises:
        UserError: neither is said, or the shrink cannot be reached.
    """
    if recipe.stages:
        return recipe.stages
    if recipe.shrink is None:
        raise UserError("say how small: --shrink 18, or stages in the recipe.")
    model, fixed = loaded.model, lossless_sizes(loaded, rows)
    grid = _grid(recipe)
    whole = predict_parameters(model.config, {})
    final = plan.sizes_for(model.config, recipe.shrink, whole, fixed, grid, recipe.order)
    per_picture = round(len(rows["train"]) / len({row.picture_key() for row in rows["train"]}))
    living = resized(model.config, fixed)
    return plan.stages_for(
        living, final, row_visits=recipe.row_visits, rows_per_picture=per_picture, order=recipe.order, grid=grid
    )


def lossless_sizes(loaded: checkpoint.Loaded, rows: Mapping[str, list[data.Row]]) -> dict[str, int]:
    """Return the sizes after the lossless cuts: tokens that the rows use, blocks that reach the output."""
    anatomy = describe(loaded.model.config)
    kept = vocab.needed(loaded.model, loaded.processor, _texts(loaded.processor, rows["train"] + rows["validation"]))
    dead = dead_blocks(loaded.model.config)
    fixed = {"vocab": sum(token < anatomy.axis("vocab").size for token in kept)}
    return fixed | {axis: anatomy.axis(axis).size - len(gone) for axis, gone in dead.items()}


def _grid(recipe: Recipe) -> Grid:
    return Grid(multiples=recipe.multiples, tensor_parallel=recipe.tensor_parallel)


def _texts(processor: Any, rows: Sequence[data.Row]) -> list[str]:
    """Return every prompt and answer of the rows as the model sees them, once."""
    prompter = Prompter(processor)
    pairs = {(row.question, row.answer) for row in rows}
    return sorted({text for pair in pairs for text in prompter.turns(*pair)})


def check_stages(config: Any, stages: Sequence[Stage], tensor_parallel: int = 1) -> None:
    """Refuse axes and sizes that the config cannot say or the devices cannot split, all at once, before anything runs."""
    anatomy, problems = describe(config), []
    blocks = {name: axis.size for name, axis in anatomy.axes.items() if axis.kind == "blocks"}
    config = shallow(config)  # sizes other than those of blocks do not depend on the depth
    turns = [(stage.name, number, turn) for stage in stages for number, turn in enumerate(stage.rounds)]
    for stage, number, turn in turns:
        for name, size in turn.sizes.items():
            try:
                if anatomy.axis(name).kind == "tokens":
                    raise UserError(
                        f"{name} changes the prompt, and the teacher would read another one than the student: "
                        f"cut it first (slimlmm cut MODEL --set {name}={size}) and compress what comes out."
                    )
                if name not in blocks:
                    config = resized(config, {name: size})
                elif not 0 < size <= blocks[name]:
                    raise UserError(f"{name}={size}: the axis has {blocks[name]} by then; give 1 to {blocks[name]}.")
                else:
                    blocks[name] = size
            except UserError as error:
                problems.append(f"stages.{stage}.rounds.{number}.sizes: {error}")
    problems += unsplittable(config, tensor_parallel)
    if problems:
        raise UserError("the recipe cannot be carried out:\n  " + "\n  ".join(problems))


def _job(folder: RunFolder, recipe: Recipe, rows: Mapping[str, list[data.Row]], tell: Reporter) -> _Job:
    settings = recipe.data
    training = data.sample(rows["train"], settings.train_rows, recipe.seed)
    return _Job(
        folder=folder,
        recipe=recipe,
        train_rows=training,
        calibration=data.sample(training, settings.calibration_rows, recipe.seed + 1),
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


def _rounds(job: _Job, loaded: checkpoint.Loaded, stages: Sequence[Stage]) -> list[_Done]:
    """Make the rounds in order; stop after one that breaks the promised floor."""
    done: list[_Done] = []
    model, processor = loaded.model, loaded.processor
    turns = [(stage.name, index, turn) for stage in stages for index, turn in enumerate(stage.rounds, 1)]
    for number, (name, index, turn) in enumerate(turns, 1):
        if job.cache is None and not turn.drop:
            job.cache = TeacherCache(
                model, Collator(processor, packed=can_pack(model, processor, job.calibration)), job.folder.cache
            )
        folder = job.folder.stage(number, f"{name}.{index}")
        if (folder / "done.json").exists():
            one = _resumed(job, folder)
            job.tell.say(f"round {number}/{len(turns)} {name}.{index} was done", parameters=one.record.parameters)
        else:
            job.tell.say(f"round {number}/{len(turns)} {name}.{index}", **turn.sizes)
            one = _round(job, model, processor, turn, (number, name, index), folder)
        done.append(one)
        model, processor = one.model, one.processor
        if not one.kept_promise:
            job.tell.say(
                f"round {number} lost more than the promised {job.recipe.max_drop} points; stopping at the round before"
            )
            break
    return done


def _resumed(job: _Job, folder: Path) -> _Done:
    loaded = checkpoint.load(folder / "model", device=_device())
    record = results.Round.model_validate_json((folder / "metrics.json").read_bytes())
    return _Done(loaded.model, loaded.processor, record, folder, _promise(job, record))


def _promise(job: _Job, record: results.Round) -> bool:
    """Tell whether the round's validation score is within `max_drop` points of the teacher's."""
    if job.recipe.max_drop is None:
        return True
    score = record.after_recovery or record.after_cut
    assert score is not None
    assert job.teacher_validation is not None
    lost = job.teacher_validation.summary.overall.correct - score.correct
    return 100 * lost <= job.recipe.max_drop * score.n  # counts, because 93.2 - 89.2 is more than 4.0


def _round(
    job: _Job, model: PreTrainedModel, processor: Any, turn: Round, place: tuple[int, str, int], folder: Path
) -> _Done:
    """Score, choose, repair, cut, recover, evaluate; written down before it counts."""
    number, name, index = place
    began = time.perf_counter()
    before = describe(model.config).sizes
    counted = model.num_parameters()
    for what in turn.drop:
        model, processor = _drop(what, job, model, processor)
    for axis, size in turn.sizes.items():
        model = _cut(job, model, processor, turn, (axis, size), folder)
    after = describe(model.config).sizes
    cut_score = _score(job, model, processor, f"{name}.{index} after the cut")
    trained = [
        _train(job, model, processor, turn, part, (number, f"{name}.{index}"), folder)
        for part in range(len(turn.train))
    ]
    score = _score(job, model, processor, f"{name}.{index} recovered") if trained else None
    changed = [axis for axis in after if after[axis] != before[axis]]
    record = results.Round(
        number=number,
        stage=name,
        round=index,
        criterion=", ".join(dict.fromkeys(_criterion(turn, axis) for axis in turn.sizes)) or None,
        before={axis: before[axis] for axis in changed},
        after={axis: after[axis] for axis in changed},
        parameters_before=counted,
        parameters=model.num_parameters(),
        after_cut=cut_score,
        after_recovery=score,
        seconds=time.perf_counter() - began,
        **_training_facts(trained),
    )
    checkpoint.save(model, processor, folder / "model")
    (folder / "metrics.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_json(folder / "done.json", {"round": number, "parameters": record.parameters})
    return _Done(model, processor, record, folder, _promise(job, record))


def _train(
    job: _Job, model: PreTrainedModel, processor: Any, turn: Round, part: int, place: tuple[int, str], folder: Path
) -> TrainResult:
    number, name = place
    what = f"round {number} {name} training" + (f" {part + 1}/{len(turn.train)}" if len(turn.train) > 1 else "")
    return train(
        model,
        processor,
        job.train_rows,
        turn.train[part],
        folder / "training",
        teacher=job.cache,
        seed=job.recipe.seed + number + 1000 * part,
        progress=lambda facts: job.tell.step(what, facts["step"], facts["steps"], loss=facts["loss"]),
    )


def _criterion(turn: Round, axis: str) -> str:
    """Return how this round chooses the units of an axis."""
    return {"blocks": turn.blocks, "kv_groups": turn.groups, "queries": turn.groups}.get(noun_of(axis), turn.criterion)


def _training_facts(trained: Sequence[TrainResult]) -> dict[str, Any]:
    """Return the sums over a round's trainings and the last losses."""
    last = trained[-1].history[-1] if trained and trained[-1].history else {}
    return {
        "losses": {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")},
        "steps": sum(one.steps for one in trained),
        "row_visits": sum(one.row_visits for one in trained),
        "flops": sum(one.flops for one in trained) if trained else None,
    }


def _drop(what: str, job: _Job, model: PreTrainedModel, processor: Any) -> tuple[PreTrainedModel, Any]:
    """Make one lossless cut."""
    if what == "unused_tokens":
        return vocab.trim(model, processor, _texts(processor, job.vocabulary_rows))
    for axis, dead in dead_blocks(model.config).items():
        anatomy = describe(model.config)
        alive = [unit for unit in range(anatomy.axis(axis).size) if unit not in dead]
        model = surgery.cut(model, anatomy, axis, {axis: torch.tensor(alive)})
    return model, processor


def _cut(
    job: _Job, model: PreTrainedModel, processor: Any, turn: Round, what: tuple[str, int], folder: Path
) -> PreTrainedModel:
    """Choose the units of one axis, repair, cut, and write the plan with its scores."""
    axis, size = what
    anatomy = describe(model.config)
    found = anatomy.axis(axis)
    if size == found.size:
        return model
    collator = Collator(processor, packed=can_pack(model, processor, job.calibration))
    batches = [to_device(collator(group), model.device) for group in _chunks(data.by_picture(job.calibration, 16), 4)]
    scores: dict[str, Tensor] = {}
    tries: list[repair.Choice] = []
    if found.kind == "blocks":
        keep: Keep = {axis: _blocks(job, model, turn, (axis, size), batches)}
    else:
        scores = importance.score(
            model, anatomy, [axis], _criterion(turn, axis), batches, _calibration_loss(job), seed=job.recipe.seed
        )
        keep = plan.choose(scores, anatomy, axis, size)
    if scores and turn.repair == "best":
        statistics = repair.collect(model, anatomy, axis, batches)
        student, keep, tries = repair.fold_best(model, anatomy, axis, keep, statistics, batches, _calibration_loss(job))
    else:
        student = surgery.cut(model, anatomy, axis, keep)
    kept = {axis: keep[axis].tolist()} if found.kind == "blocks" else None  # blocks may differ in size
    predicted = predict_parameters(model.config, {axis: size}, kept)
    if student.num_parameters() != predicted:
        raise UserError(
            f"{axis}={size}: {predicted:,} parameters were predicted, {student.num_parameters():,} counted."
        )
    if scores:
        save_file({name: values.contiguous() for name, values in scores.items()}, folder / f"scores-{axis}.safetensors")
    write_json(
        folder / f"plan-{axis}.json",
        {
            "axis": axis,
            "before": found.size,
            "after": size,
            "repairs_tried": {one.name: one.loss for one in tries},
            "keep": {name: units.tolist() for name, units in keep.items()},
        },
    )
    job.tell.say(f"  {axis} {found.size} -> {size}", **{one.name: one.loss for one in tries})
    return student


def _blocks(job: _Job, model: PreTrainedModel, turn: Round, what: tuple[str, int], batches: list[Batch]) -> Tensor:
    """Return the blocks that stay."""
    axis, size = what
    anatomy = describe(model.config)
    group = anatomy.axis(axis).groups[0]
    count = group.kept(size)
    if turn.blocks == "last":
        return group.first(count)
    if turn.blocks == "taylor":
        scores = importance.score(model, anatomy, [axis], "taylor", batches, _calibration_loss(job))
        return plan.choose(scores, anatomy, axis, size)[group.name]
    if turn.blocks == "random":
        generator = torch.Generator().manual_seed(job.recipe.seed)
        return group.best(torch.rand(group.units, generator=generator), count)
    return torch.tensor(importance.greedy_blocks(model, anatomy, axis, batches, _calibration_loss(job), count))


def _calibration_loss(job: _Job) -> importance.Loss:
    """Cross-entropy + forward KL against the teacher, mean per answer token."""

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        assert job.cache is not None
        logits_AV, labels_A, _ = answer_logits(model, batch)
        teacher_AV = job.cache.logits(job.cache.of(batch).to(model.device))
        return combine(CALIBRATION_LOSSES, Seen(logits_AV, labels_A, teacher_AV))["total"] / labels_A.numel()

    return loss


def _chunks(groups: list[list[data.Row]], size: int) -> list[list[list[data.Row]]]:
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _score(job: _Job, model: PreTrainedModel, processor: Any, what: str) -> Score:
    found = evaluate(
        model, processor, job.validation, progress=lambda done, total: job.tell.step(f"validation, {what}", done, total)
    )
    overall = found.summary.overall
    lost = None
    if job.teacher_validation is not None:
        lost = 100 * drop(job.teacher_validation, found, samples=1000).mean
    job.tell.say(
        f"  {what}: {100 * overall.accuracy:.1f} % of {overall.n}", **({} if lost is None else {"points_lost": lost})
    )
    return overall


def _finish(
    job: _Job, teacher: checkpoint.Loaded, student: checkpoint.Loaded, done: list[_Done], test: list[data.Row]
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
    rounds = tuple(one.record for one in done)
    kept = [one for one in done if one.kept_promise]
    notes = () if len(kept) == len(done) else (f"Stopped: round {done[-1].record.number} broke the promised floor.",)
    return Results(
        name=job.folder.path.name,
        seed=job.recipe.seed,
        environment=environment(),
        data=results.Dataset(name="", rows={}),
        teacher=records[0].model_copy(
            update={"validation": job.teacher_validation.summary.overall if job.teacher_validation else None}
        ),
        rounds=rounds,
        student=records[1],
        effect=results.effect(*evaluations),
        latency=latency,
        throughput=throughput,
        ratios=results.ratios(records[0], records[1], latency, throughput),
        totals=results.totals(rounds, sum(one.seconds for one in evaluations)),
        notes=notes,
    )
