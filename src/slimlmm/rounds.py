"""One round of a run: score, choose, repair, cut, recover, evaluate; and what happens when it misses the promised accuracy."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from slimlmm import checkpoint, cutting, leaving, lineage, plan, results, room, surgery, vocab
from slimlmm.anatomy import describe
from slimlmm.collate import Collator, texts_of
from slimlmm.distill import TrainResult, train
from slimlmm.enduring import enduring, put_back
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, Score, drop, evaluate
from slimlmm.fading import Gate, Ramp, check_cut, cut_all, cuts_in_order, fading
from slimlmm.files import digests, read_json, write_json, write_text
from slimlmm.grid import Grid
from slimlmm.job import Done, Handed, Job, Place
from slimlmm.journal import Journal, Parts
from slimlmm.lineage import Kept
from slimlmm.packing import can_pack
from slimlmm.recipe import Round
from slimlmm.resizing import cut_in_turn, predict_parameters
from slimlmm.runfolder import is_whole
from slimlmm.saving import Saving
from slimlmm.spans import Span
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training

#: folder of a round in which its training writes its state
TRAINING = "training"


def attempts(job: Job, handed: Handed, turn: Round, place: Place) -> Iterator[Done]:
    """Yield the round; where it misses the promise even with more recovery, also half of its cut, from the same model.

    Rounds that an earlier run of this folder has finished are not made; the models between them are not even read.
    """
    one = _taken(job, handed, turn, place)
    yield one
    if one.record.kept_promise:
        return
    half = plan.halved(handed.config, turn.sizes, Grid.of(job.recipe))
    missed = f"{place} lost more than the promised {job.recipe.max_drop} points"
    if not half:
        job.tell.say(f"{missed}, and no smaller cut lies between; rolled back")
        return
    job.tell.say(f"{missed}; rolled back, half of it is tried", **half)
    yield _taken(job, handed, turn.model_copy(update={"sizes": half}), replace(place, half=True))


def _taken(job: Job, handed: Handed, turn: Round, place: Place) -> Done:
    folder = job.folder.stage(place.number, place.name)
    done = folder / "done.json"
    if done.exists() and not is_whole(done, folder / "model"):
        job.tell.say(f"{place}: {folder / 'model'} is not what was written; the round is made again")
        shutil.rmtree(folder)
        folder.mkdir()
    if not done.exists():
        job.tell.say(str(place), **turn.sizes)
        before, after = (predict_parameters(one, {}) for one in (handed.config, cut_in_turn(handed.config, turn.sizes)))
        room.refuse({folder: room.work_of(after, before, turn)}, f"{place}: parts and states")
        job.ask()
        return _round(job, handed.model, handed.processor, turn, place, folder)
    record = read_json(TypeAdapter(results.Round), folder / "metrics.json")
    job.tell.say(f"{place} was done", parameters=record.parameters)
    return Done(Handed(None, None, folder / "model", handed.device), record)


def _promise(job: Job, score: Score | None) -> bool:
    """Tell whether a validation score is within `max_drop` points of the teacher's."""
    if job.recipe.max_drop is None:
        return True
    assert score is not None
    assert job.teacher_validation is not None
    lost = job.teacher_validation.summary.overall.correct - score.correct
    return 100 * lost <= Fraction(str(job.recipe.max_drop)) * score.n  # exact: as floats 93.2 - 89.2 is more than 4.0


def _round(job: Job, model: PreTrainedModel, processor: Any, turn: Round, place: Place, folder: Path) -> Done:
    """Score, choose, repair, cut, recover, evaluate; written down before it counts."""
    journal = Journal(folder, job.start(place))
    before, counted = describe(model.config).sizes, model.num_parameters()
    given = model
    for what in turn.drop:
        model, processor = _drop(what, job, model, processor)
    as_given = place.number == 1 and model is given and not turn.sizes  # then it answers what the teacher has answered
    known = job.teacher_validation if as_given else None
    job = _beside_previous(job, model, processor, turn)
    model, processor, parts = _cut_part(job, model, processor, turn, place, journal, known)
    after = describe(model.config).sizes
    score = _recovered(job, model, processor, turn, place, journal, parts)
    faded, trained = parts.faded, parts.trained
    changed = [axis for axis in after if after[axis] != before[axis]]
    record = results.Round(
        number=place.number,
        stage=place.stage,
        round=place.index,
        half=place.half,
        criterion=", ".join(dict.fromkeys(cutting.criterion_of(turn, given, axis) for axis in turn.sizes)) or None,
        before={axis: before[axis] for axis in changed},
        after={axis: after[axis] for axis in changed},
        parameters_before=counted,
        parameters=model.num_parameters(),
        after_cut=parts.cut_score,
        after_recovery=score,
        kept_promise=_promise(job, score or parts.cut_score),
        fade=turn.fade if faded else 0,
        trainings=len(trained),
        seconds=journal.seconds,
        **_training_facts([*faded, *trained]),
    )
    checkpoint.save(model, processor, folder / "model")
    write_text(folder / "metrics.json", record.model_dump_json(indent=1) + "\n")
    files = digests(folder / "model")
    write_json(folder / "done.json", {"round": place.number, "parameters": record.parameters, "files": files})
    journal.forget()
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    return Done(Handed(model, processor, folder / "model", model.device), record)


def _cut_part(
    job: Job,
    model: PreTrainedModel,
    processor: Any,
    turn: Round,
    place: Place,
    journal: Journal,
    known: Evaluation | None,
) -> tuple[PreTrainedModel, Any, Parts]:
    """Return the model after its cuts, or after the last training that this or another run finished, and what was found so far.

    `known`: its answers to the validation rows, where nothing was cut.
    """
    if (number := journal.last()) is not None:
        job.tell.say(f"{place} goes on", trainings_done=number)
    elif (number := journal.take_over()) is not None:
        job.tell.say(f"{place} begins with what another run has made", trainings_done=number)
    if number is not None:
        return *journal.model(number, model.device), journal.taken_up(number)
    start = model
    model, faded = _without(job, model, processor, turn, place, journal.round)
    if model is start and turn.train:  # a training works in place, and what the round began with may be its teacher
        model = copy.deepcopy(model)
    score = known.summary.overall if known else _score(job, model, processor, f"{place.name} after the cut")
    parts = Parts(cut_score=score, faded=faded)
    if turn.train:
        journal.keep(0, model, processor, parts)
        leaving.heed(f" after the cuts of {place}, which are on disk")
    return model, processor, parts


def _beside_previous(job: Job, model: PreTrainedModel, processor: Any, turn: Round) -> Job:
    """Return the job with `model` as the teacher ``previous``, where a training asks it; the run's teacher, where it is that."""
    if job.cache is None or not any("previous" in one.teachers for one in turn.train):
        return job
    if model is job.cache.model:
        return replace(job, previous=job.cache)
    collator = Collator(processor, packed=can_pack(model, processor, job.calibration))
    return replace(job, previous=TeacherCache(model, collator, job.folder.previous))


def _recovered(
    job: Job, model: PreTrainedModel, processor: Any, turn: Round, place: Place, journal: Journal, parts: Parts
) -> Score | None:
    """Make the round's trainings that are not made yet; the last one again, up to `patience` times, if it must be.

    The first begins behind the steps in which units faded. What each leaves is written down.
    """
    trainings = list(turn.train)

    def make() -> None:
        number = len(parts.trained)
        settings = trainings[min(number, len(trainings) - 1)]
        span = Span(first=turn.fade, last=settings.steps) if parts.faded and not number else None
        reset = lambda: put_back(journal.model(number, model.device)[0], model)  # noqa: E731
        done = _train(job, model, processor, settings, (place, number), journal.round, span, reset)
        parts.trained.append(done)
        journal.keep(number + 1, model, processor, parts)
        leaving.heed(f" after {place} training {number + 1}, which is on disk")

    while len(parts.trained) < len(trainings):
        make()
    score = _score(job, model, processor, f"{place.name} recovered") if trainings else None
    while trainings and not _promise(job, score) and len(parts.trained) < len(trainings) + job.recipe.patience:
        make()
        score = _score(job, model, processor, f"{place.name} recovered further")
    return score


def _train(
    job: Job,
    model: PreTrainedModel,
    processor: Any,
    settings: Training,
    where: tuple[Place, int],
    folder: Path,
    span: Span | None,
    reset: Callable[[], None],
) -> TrainResult:
    place, part = where
    seed = job.recipe.seed + place.number + 1000 * part + (500 if span and span.first else 0)

    before: Kept = job.kept if "first" in settings.teachers else {}
    fades = span is not None and not span.first  # what fades is still there

    def make(settings: Training) -> TrainResult:
        of = f"{place.name}, training {part}, seed {seed}, {span and (span.first, span.last)}, {settings.model_dump_json()}"
        return train(
            model,
            processor,
            job.train_rows,
            settings,
            folder / TRAINING,
            teacher=job.cache,
            previous=job.previous,
            kept=before if fades else lineage.after(folder, before),
            taught=job.taught,
            validation=job.validation,
            seed=seed,
            progress=lambda facts: job.tell.step(
                f"{place} training {part + 1}", facts["step"], facts["steps"], loss=facts["loss"]
            ),
            span=span,
            saving=Saving(job.keeping.seconds, of, job.tell.say),
        )

    return enduring(make, settings, reset, lambda text: job.tell.say(f"{place} training {part + 1}: {text}"))


def _training_facts(trained: Sequence[TrainResult]) -> dict[str, Any]:
    """Return the sums over a round's trainings and the last losses."""
    last = trained[-1].history[-1] if trained and trained[-1].history else {}
    looks = trained[-1].looks if trained else []
    return {
        "looks": tuple(results.Look(step=step, loss=loss) for step, loss in looks),
        "kept_step": trained[-1].kept_step if looks else None,
        "remarks": tuple(remark for one in trained for remark in one.remarks),
        "losses": {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")},
        "steps": sum(one.steps for one in trained),
        "row_visits": sum(one.row_visits for one in trained),
        "flops": sum(one.flops for one in trained) if trained else None,
    }


def _drop(what: str, job: Job, model: PreTrainedModel, processor: Any) -> tuple[PreTrainedModel, Any]:
    """Make one lossless cut."""
    if what == "unused_tokens":
        return vocab.trim(model, processor, texts_of(processor, job.vocabulary_rows))
    return surgery.living(model), processor


def _without(
    job: Job, model: PreTrainedModel, processor: Any, turn: Round, place: Place, folder: Path
) -> tuple[PreTrainedModel, list[TrainResult]]:
    """Return the model without what goes in this round, and the training in which that faded, if it did."""
    anatomy = describe(model.config)
    sizes = {axis: size for axis, size in turn.sizes.items() if size != anatomy.axis(axis).size}
    if not sizes:
        return model, []
    by = cutting.calibrated(job, model, processor)
    if not turn.fade:
        return cutting.smaller(job, model, turn, by, folder), []
    if reason := turn.cannot_fade():  # of a recipe that another was made from
        raise UserError(f"{place}: fade={turn.fade}: {reason}.")
    keeps, gate = {}, Gate()
    for axis in cuts_in_order(anatomy, sizes):
        seen = cutting.sight(job, model, turn, axis, by, moments=False)
        keeps[axis] = cutting.chosen(job, model, turn, (axis, sizes[axis]), by, seen)
        cutting.written(job, (axis, anatomy.axis(axis).size, sizes[axis]), keeps[axis], seen.scores, folder)
    blocks = [axis for axis in keeps if anatomy.axis(axis).kind == "blocks"]
    lineage.keep(folder, {axis: anatomy.axis(axis).groups[0].layers(keeps[axis][axis].tolist()) for axis in blocks})
    student = copy.deepcopy(model)  # the model itself may be the teacher, or what a rollback hands over
    with fading(student, anatomy, keeps, gate):
        check_cut(student, keeps, gate, by[0].judge[0])
        settings = turn.train[0].model_copy(update={"validate_every": None})
        span = Span(first=0, last=turn.fade, callbacks=(Ramp(gate, turn.fade),))
        trained = _train(job, student, processor, settings, (place, 0), folder, span, lambda: put_back(model, student))
    return cut_all(student, keeps), [trained]


def _score(job: Job, model: PreTrainedModel, processor: Any, what: str) -> Score:
    """Return the score on validation rows of the weights as they would be handed over."""

    def progress(done: int, total: int) -> None:
        job.tell.step(f"validation, {what}", done, total)

    with checkpoint.valued_as_stored(model, job.stored):
        found = evaluate(model, processor, job.validation, progress=progress)
    overall = found.summary.overall
    lost = None
    if job.teacher_validation is not None:
        lost = 100 * drop(job.teacher_validation, found, samples=1000).mean
    job.tell.say(
        f"  {what}: {100 * overall.accuracy:.1f} % of {overall.n}", **({} if lost is None else {"points_lost": lost})
    )
    return overall
