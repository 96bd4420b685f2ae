"""Sizes for a budget in the way that a recipe asks for: by shares, by importance per cost, or by a short search."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, TypeAdapter
from transformers import PreTrainedModel

from slimlmm import checkpoint, data, plan, rounds, staging, surgery, sweeps, vocab
from slimlmm.allocation import Market, Sizes, least_loss, trades
from slimlmm.budget import Budget
from slimlmm.collate import Collator, texts_of
from slimlmm.costs import Answer
from slimlmm.errors import UntriedError
from slimlmm.files import read_json, write_json
from slimlmm.grid import Grid
from slimlmm.job import Handed, Job, Place, job_of
from slimlmm.lossless import lossless_of
from slimlmm.packing import can_pack
from slimlmm.pricing import fitted, table, within_measured
from slimlmm.progress import Reporter
from slimlmm.recipe import Recipe, SizesBy
from slimlmm.resizing import most_parameters
from slimlmm.results import Spent
from slimlmm.runfolder import RunFolder
from slimlmm.sensitivity import Curve, curves, movable
from slimlmm.stopping import validation_loss
from slimlmm.teacher import TeacherCache

Rows = Mapping[str, list[data.Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One shape of a search: what was predicted for it, and what a brief recovery made of it on validation rows.

    `loss` is the cross-entropy per answer token (nats), which ranks; `accuracy` the exact match of `n` rows.
    """

    name: str
    sizes: Sizes
    parameters: int
    predicted: float
    loss: float
    accuracy: float
    n: int
    row_visits: int
    flops: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The sizes that were chosen, and what they were chosen by: loss curves by axis, tried shapes from the best down.

    `line_error`: of a measured budget the median of |predicted / measured - 1| over the table that its line was drawn through.
    `note`: why they were chosen by shares, where that was not asked for.
    """

    by: str
    sizes: Sizes
    note: str = ""
    predicted: float | None = None
    line_error: float | None = None
    curves: Mapping[str, Curve] | None = None
    tried: tuple[Tried, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        found = [asdict(one) for one in (self.curves or {}).values()]
        tried = [asdict(one) for one in self.tried]
        told = {
            "by": self.by,
            "note": self.note,
            "sizes": self.sizes,
            "predicted": self.predicted,
            "line_error": self.line_error,
        }
        return told | {"curves": found, "candidates": tried}


class Recovered(BaseModel):
    """What a shape of a search took."""

    row_visits: int
    flops: float | None = None


class Chosen(BaseModel):
    """What is read back of that."""

    sizes: dict[str, int]
    note: str = ""
    seconds: float = 0.0
    candidates: tuple[Recovered, ...] = ()


CHOSEN = TypeAdapter(Chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What trial cuts start from: the model after the lossless cuts, its processor, rows; `kept`: the file of their losses."""

    job: Job
    model: PreTrainedModel
    processor: Any
    a_step: data.StepRows
    kept: Path


def ground_of(
    loaded: checkpoint.Loaded, rows: Rows, recipe: Recipe, folder: Path, tell: Reporter, kept: Path | None = None
) -> Ground:
    """Make the lossless cuts in memory, and a job that promises nothing; what the teacher says is kept in `folder`.

    Losses of trial cuts are kept in the file `kept`, in `folder` if it is not said.

    Raises:
        UntriedError: the recipe leaves labels to the teacher and there are rows without.
    """
    if any(not row.answer for row in rows["train"]):
        raise UntriedError("trial cuts look at answers, and train rows have none before the teacher labelled them.")
    texts = texts_of(loaded.processor, rows["train"] + rows["validation"])
    model, processor = loaded.model, loaded.processor
    if not lossless_of(model.config, model.generation_config, processor, texts).whole:
        model, processor = vocab.trim(model, processor, texts)
    model = surgery.living(model)
    few = recipe.data.model_copy(update={"calibration_rows": recipe.curve_rows})
    plain = recipe.model_copy(update={"max_drop": None, "data": few})
    job = job_of(RunFolder(folder), plain, rows, tell)
    packed = can_pack(model, processor, job.calibration)
    job.cache = TeacherCache(model, Collator(processor, packed=packed), folder / "cache")
    a_step = data.rows_a_step(job.train_rows)
    return Ground(job=job, model=model, processor=processor, a_step=a_step, kept=kept or folder / "trials.json")


def chosen(
    space: plan.Space,
    budget: Budget,
    by: SizesBy | None,
    ground: Callable[[], Ground],
    measured: Answer | None = None,
) -> Choice:
    """Return the sizes for a budget and how they came about. `measured`: how answers use the model, of a budget that is measured.

    Where nothing is asked for (`by`) it is importance, or shares where an axis cannot be tried.

    Raises:
        UserError: no shape meets the budget.
        UntriedError: what an axis loses cannot be measured, and that was asked for.
    """
    by_shares = (plan.sizes_within if measured is None else lambda *of: plan.scaled_within(*of)[1])(space, budget)
    if by == "shares" or space.whole(by_shares) or not movable(space):
        return Choice(by="shares", sizes=by_shares)
    try:
        return _tried(space, budget, ground(), by_shares, search=by == "search", measured=measured)
    except UntriedError as error:
        if by is not None:
            raise
        return Choice(by="shares", sizes=by_shares, note=f"sizes by shares, not by importance: {error}")


def _tried(
    space: plan.Space, budget: Budget, here: Ground, by_shares: Sizes, *, search: bool, measured: Answer | None
) -> Choice:
    """Return the sizes of least predicted loss, or those that come off best in a search from there."""
    found = curves(here.job, here.model, here.processor, space, here.kept)
    error = None
    if measured is None:
        market, limit = Market(space, budget.cost, found), budget.limit
        sizes = least_loss(market, limit, [by_shares])
    else:
        shapes = table(space, lambda scale: plan.scaled(space, scale))
        held, costs = _measured(space, budget, shapes)
        line = fitted(space, measured, held, costs)
        off = [abs(line.cost(space.stated(one)) / cost - 1) for one, cost in zip(held, costs, strict=True)]
        error = statistics.median(off)
        market, limit, sizes = within_measured(space, budget, line.cost, found, by_shares)
    first = Choice(by="importance", sizes=sizes, predicted=market.loss(sizes), line_error=error, curves=found)
    return _searched(here, market, limit, budget, first, by_shares) if search else first


def _measured(space: plan.Space, budget: Budget, shapes: list[Sizes]) -> tuple[list[Sizes], list[float]]:
    """Return those shapes that the machine can hold, and what they cost."""
    costs = [(one, budget.cost(space.stated(one))) for one in shapes]
    held = [(one, cost) for one, cost in costs if cost < float("inf")]
    return [one for one, _ in held], [cost for _, cost in held]


def _searched(ground: Ground, market: Market, limit: float, budget: Budget, first: Choice, by_shares: Sizes) -> Choice:
    """Cut and briefly recover the shapes of `candidates`; return the one of least validation loss, with all figures."""
    space, recipe = market.space, ground.job.recipe
    shapes = {"importance": first.sizes} | ({} if by_shares == first.sizes else {"shares": by_shares})
    count = recipe.search_candidates - len(shapes)
    others = trades(market, limit, first.sizes, [by_shares], 2 * count)
    fitting = [one for one in others if budget.cost(space.stated(one)) <= budget.limit]
    shapes |= {_traded(first.sizes, one): one for one in fitting[:count]}
    tried = [
        tried_shape(ground, space, (name, sizes), (number, len(shapes)), market.loss(sizes))
        for number, (name, sizes) in enumerate(shapes.items(), 1)
    ]
    tried.sort(key=lambda one: one.loss)
    return replace(first, by="search", sizes=tried[0].sizes, predicted=tried[0].predicted, tried=tuple(tried))


def _traded(before: Sizes, after: Sizes) -> str:
    """Name a trade: "text.ffn+ vision.width-"."""
    changed = [name for name in before if before[name] != after[name]]
    return " ".join(f"{name}{'+' if after[name] > before[name] else '-'}" for name in changed)


def tried_shape(
    ground: Ground, space: plan.Space, shape: tuple[str, Sizes], place: tuple[int, int], predicted: float
) -> Tried:
    """Cut to a shape at once and recover it for `search_row_visits` with the losses of the default schedule, as a round does."""
    (name, sizes), (number, of), job = shape, place, ground.job
    began, recipe = time.perf_counter(), job.recipe
    planned = staging.stages_for(
        space.config,
        sizes,
        row_visits=recipe.search_row_visits,
        a_step=ground.a_step,
        order=recipe.order,
        grid=Grid.of(recipe),
        near=staging.near_of(recipe),
    )
    turn = sweeps.one_shot(planned, space.config)[-1].rounds[-1]
    told = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8]  # a run that goes on must find this very shape
    where = Place(1, 1, f"candidate-{told}", 1)  # the same for all, as the order of rows is drawn by it
    start = Handed(ground.model, ground.processor, job.folder.path, ground.model.device)
    done = next(rounds.attempts(job, start, turn, where))
    assert done.record.after_recovery is not None
    model, processor = done.left.model, done.left.processor
    collator = Collator(processor, packed=can_pack(model, processor, job.validation))
    groups = data.by_picture(job.validation, 16)
    loss = validation_loss(model, [collator(groups[at : at + 16]) for at in range(0, len(groups), 16)])
    job.tell.say(f"candidate {number}/{of}", shape=name, validation_loss=loss)
    return Tried(
        name=name,
        sizes=sizes,
        parameters=most_parameters(space.config, space.stated(sizes)),
        predicted=predicted,
        loss=loss,
        accuracy=done.record.after_recovery.accuracy,
        n=done.record.after_recovery.n,
        row_visits=done.record.row_visits or 0,
        flops=done.record.flops,
        seconds=time.perf_counter() - began,
    )


def sizes_for_run(
    space: plan.Space,
    budget: Budget,
    loaded: checkpoint.Loaded,
    rows: Rows,
    recipe: Recipe,
    folder: Callable[[], Path] | None,
    tell: Reporter,
    kept: Path | None = None,
) -> Chosen:
    """Return the sizes for a run; a choice that ran the model is read from its `folder` (``sizes.json``) where it is finished.

    The folder is asked for once it is sure that the budget can be met, so that a refused run leaves none.
    """
    by_shares = plan.sizes_within(space, budget)
    if recipe.sizes_by == "shares":
        return Chosen(sizes=by_shares)
    with TemporaryDirectory() as scratch:
        place = (Path(scratch) if folder is None else folder()) / "sizes"
        record = place.with_suffix(".json")
        if not record.exists():
            place.mkdir(exist_ok=True)
            ground = lambda: ground_of(loaded, rows, recipe, place, tell, kept)  # noqa: E731 - only where it is needed
            began = time.perf_counter()
            found = chosen(space, budget, recipe.sizes_by, ground).record()
            write_json(record, found | {"seconds": time.perf_counter() - began})
            shutil.rmtree(place)
        return read_json(CHOSEN, record)


def spent(folder: Path) -> Spent:
    """Return what choosing the sizes of a run took, of the last process that was at it."""
    record = folder / "sizes.json"
    if not record.exists():
        return Spent()
    found = read_json(CHOSEN, record)
    flops = [one.flops for one in found.candidates]
    known = [one for one in flops if one is not None]
    return Spent(
        seconds=found.seconds,
        row_visits=sum(one.row_visits for one in found.candidates),
        flops=sum(known) if len(known) == len(flops) else None,
    )
