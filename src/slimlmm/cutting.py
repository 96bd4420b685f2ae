"""The cuts of a round: choose the units of an axis, repair, cut, write down; and trial cuts of one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm import bridging, importance, lineage, plan, ranking, repair, surgery
from slimlmm.anatomy import describe
from slimlmm.axes import Keep, noun_of
from slimlmm.calibration import Calibration, calibration_of, loss_against
from slimlmm.collate import Collator
from slimlmm.consumers import linear_alone
from slimlmm.errors import UserError
from slimlmm.files import write_json
from slimlmm.importance import Loss
from slimlmm.job import Job
from slimlmm.packing import can_pack
from slimlmm.recipe import Round
from slimlmm.resizing import predict_parameters
from slimlmm.settling import settle_best

#: axes whose units the criterion `obs` chooses
NEURONS = ("ffn", "expert_ffn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What an uncut model shows of an axis, whatever size it is cut to.

    `scores` of its units, where those alone decide; `moments` for its repair (`repair.first_moments`), where one fits any;
    `stays`: blocks that are left at a larger size, where they are dropped one by one.
    """

    scores: importance.Scores = field(default_factory=dict)
    moments: repair.Statistics | None = None
    stays: tuple[int, ...] = ()


def criterion_of(turn: Round, model: PreTrainedModel, axis: str) -> str:
    """Return how this round chooses the units of an axis: by `obs` neurons of FFNs whose readers are refitted, and no others."""
    noun = noun_of(axis)
    ways = {"blocks": turn.blocks, "decoder_blocks": turn.blocks, "kv_groups": turn.groups, "queries": turn.groups}
    way = ways.get(noun, turn.criterion)
    if way != "obs":
        return way
    modules, groups = dict(model.named_modules()), describe(model.config).axis(axis).groups
    refitted = noun in NEURONS and "refit" in turn.repair and all(linear_alone(modules, group) for group in groups)
    return "obs" if refitted else "taylor"


def calibrated(job: Job, model: PreTrainedModel, processor: object) -> tuple[Calibration, Loss]:
    """Return the calibration rows as batches of this model, and the loss that they are judged by; the teacher is asked now."""
    assert job.cache is not None
    collator = Collator(processor, packed=can_pack(model, processor, job.calibration))
    calibration = calibration_of(job.calibration, collator, model.device)
    for batch in (*calibration.fit, *calibration.judge):
        job.cache.of(batch)  # now: the teacher may be the very model whose blocks are left out while they are judged
    job.cache.flush()  # a process that goes on behind these cuts would ask rows in other company, for other last bits
    return calibration, loss_against(job.cache)


def smaller(
    job: Job, model: PreTrainedModel, turn: Round, by: tuple[Calibration, Loss], folder: Path
) -> PreTrainedModel:
    """Cut all axes of the round in turn, then settle the stream of the result; returns `model` itself where nothing is cut."""
    student, kept = model, {}
    for axis, size in turn.sizes.items():
        found = describe(student.config).axis(axis)
        if size == found.size:
            continue
        student, keep = _cut(job, student, turn, (axis, size), by, folder, sight(job, student, turn, axis, by))
        if found.kind == "blocks":
            kept[axis] = found.groups[0].layers(keep[axis].tolist())
    lineage.keep(folder, kept)
    if student is model or "settle" not in turn.repair:
        return student
    student, tries = settle_best(student, model, kept, *by)
    if tries:
        job.tell.say("  settling", **{one.name: one.loss for one in tries})
        write_json(folder / "settling.json", {one.name: one.loss for one in tries})
    return student


def sight(
    job: Job, model: PreTrainedModel, turn: Round, axis: str, by: tuple[Calibration, Loss], *, moments: bool = True
) -> Sight:
    """Return what there is to see of an axis before its size is known; of blocks that are ranked one by one that is nothing."""
    (calibration, loss), anatomy = by, describe(model.config)
    criterion, blocks = criterion_of(turn, model, axis), anatomy.axis(axis).kind == "blocks"
    if blocks and criterion != "taylor":
        return Sight()
    batches = calibration.rank if criterion == "ablation" else calibration.fit
    wanted = moments and not blocks and bool({"refit", "rotate"} & set(turn.repair))
    listen = partial(repair.first_moments, model, anatomy, axis, calibration.fit)
    # obs looks at the moments; others need the room for gradients
    first = listen() if wanted and criterion == "obs" else None
    known = first.consumers if first else None
    scores = importance.score(model, anatomy, [axis], criterion, batches, loss, seed=job.recipe.seed, moments=known)
    return Sight(scores=scores, moments=first or (listen() if wanted else None))


def chosen(
    job: Job, model: PreTrainedModel, turn: Round, what: tuple[str, int], by: tuple[Calibration, Loss], seen: Sight
) -> Keep:
    """Return what stays of an axis."""
    (axis, size), (calibration, loss) = what, by
    anatomy = describe(model.config)
    if seen.scores:
        return plan.choose(seen.scores, anatomy, axis, size)
    group = anatomy.axis(axis).groups[0]
    count = group.kept(size)
    if turn.blocks == "last":
        return {axis: group.first(count)}
    if turn.blocks == "random":
        generator = torch.Generator().manual_seed(job.recipe.seed)
        return {axis: group.best(torch.rand(group.units, generator=generator), count)}
    left = seen.stays if len(seen.stays) >= count else ()
    if "bridge" in turn.repair:
        return {axis: torch.tensor(bridging.greedy_bridged(model, anatomy, axis, calibration, loss, count, left))}
    return {axis: torch.tensor(ranking.greedy_blocks(model, anatomy, axis, calibration.judge, loss, count, left))}


def _cut(
    job: Job,
    model: PreTrainedModel,
    turn: Round,
    what: tuple[str, int],
    by: tuple[Calibration, Loss],
    folder: Path,
    seen: Sight,
) -> tuple[PreTrainedModel, Keep]:
    """Choose the units of one axis, repair, cut, and write the plan with its scores."""
    (axis, size), (calibration, loss) = what, by
    anatomy = describe(model.config)
    found = anatomy.axis(axis)
    tries: list[repair.Choice] = []
    reason = ""
    keep = chosen(job, model, turn, what, by, seen)
    if found.kind == "blocks" and "bridge" in turn.repair:
        student, tries = bridging.bridge_best(model, anatomy, axis, keep, calibration, loss)
    elif found.kind != "blocks" and {"refit", "rotate", "merge"} & set(turn.repair):
        done = repair.fold_best(model, anatomy, axis, keep, calibration, loss, turn.repair, first=seen.moments)
        student, keep, tries, reason = done.model, done.keep, done.tries, done.reason
    else:
        student = surgery.cut(model, anatomy, axis, keep)
    kept = {axis: keep[axis].tolist()} if found.kind == "blocks" else None  # blocks may differ in size
    predicted = predict_parameters(model.config, {axis: size}, kept)
    if student.num_parameters() != predicted:
        raise UserError(
            f"{axis}={size}: {predicted:,} parameters were predicted, {student.num_parameters():,} counted."
        )
    written(job, (axis, found.size, size), keep, seen.scores, folder, tries, reason)
    return student, keep


def written(
    job: Job,
    what: tuple[str, int, int],
    keep: Keep,
    scores: dict[str, Tensor],
    folder: Path,
    tries: list[repair.Choice] | None = None,
    reason: str = "",
) -> None:
    """Write down what one axis loses, by which scores, and what repairs were tried."""
    axis, before, after = what
    losses = {one.name: one.loss for one in tries or []}
    if scores:
        save_file({name: values.contiguous() for name, values in scores.items()}, folder / f"scores-{axis}.safetensors")
    write_json(
        folder / f"plan-{axis}.json",
        {
            "axis": axis,
            "before": before,
            "after": after,
            "repairs_tried": losses,
            "not_tried_because": reason or None,
            "keep": {name: units.tolist() for name, units in keep.items()},
        },
    )
    job.tell.say(f"  {axis} {before} -> {after}", **losses)


class Trials:
    """Cuts of one axis at a time with the repairs of a round, untrained, and the loss of each on rows that no fit saw.

    Sizes of one axis share its scores and moments, or the blocks that a larger size leaves; those of the axis that was tried
    last are held.
    """

    def __init__(self, job: Job, model: PreTrainedModel, processor: object, turn: Round, folder: Path) -> None:
        self.job, self.model, self.turn, self.folder = job, model, turn, folder
        self.by = calibrated(job, model, processor)
        self._seen: tuple[str, Sight] = "", Sight()

    def uncut(self) -> float:
        """Return the loss of the whole model."""
        return self._judged(self.model)

    def loss(self, axis: str, size: int) -> float:
        """Return the loss with one axis cut."""
        if self._seen[0] != axis:
            self._seen = "", Sight()  # not both at once
            self._seen = axis, sight(self.job, self.model, self.turn, axis, self.by)
        seen = self._seen[1]
        student, keep = _cut(self.job, self.model, self.turn, (axis, size), self.by, self.folder, seen)
        if describe(self.model.config).axis(axis).kind == "blocks":
            self._seen = axis, replace(seen, stays=tuple(keep[axis].tolist()))
        return self._judged(student)

    def _judged(self, model: PreTrainedModel) -> float:
        (calibration, loss) = self.by
        return repair.judged("", model, calibration.judge, loss).loss
