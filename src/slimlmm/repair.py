"""Closed-form lifts around a cut: what stays stands in for what goes, by calibration, without training.

All repairs change the *uncut* model in place, so that the slice which follows is the repaired student;
keeping everything changes nothing. Inner dimensions (FFN, KV groups, heads, projector interior): ridge refit
of the consumer; heads also by merging (`merging`). Residual width: rotation of the stream, then refit of its
readers. `fold` returns the keep-sets to cut with, because after a rotation the kept channels are the first ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm import merging, surgery
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.calibration import Calibration
from slimlmm.collate import Batch, samples_of
from slimlmm.consumers import Ears, in_parts, is_stream, linear_consumers
from slimlmm.errors import UserError
from slimlmm.forward import evaluating, forward
from slimlmm.importance import Loss, at_least_one, mean_loss
from slimlmm.merging import NotMergeableError, merge
from slimlmm.moments import ATTENTION_RIDGE, RIDGES, Moments, Prediction, predict
from slimlmm.rotation import Stream, listen, rotate
from slimlmm.wiring import NotRotatable, Wiring, owner, trace


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Calibration moments of one axis: of consumers' inputs by parameter name, and of the residual stream.

    `stream` is None where the axis has no residual group or its basis cannot be changed, and `consumers` lacks those that are no
    linear map; `reason` says why.
    """

    axis: str
    consumers: dict[str, Moments] = field(default_factory=dict)
    stream: Stream | None = None
    reason: str = ""


def collect(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    batches: Sequence[Batch],
    *,
    groups: Iterable[str] | None = None,
) -> Statistics:
    """Run the batches once; return the moments that `fold` needs for `axis` (or some of its `groups`).

    Every token counts the same; padding of the text tower does not. (Weighting
    tokens by the gradient at the consumer's output was tried and was worse: too few of them carry the fit.)
    Memory: 16 n^2 bytes per consumer with n inputs.
    """
    found = Statistics(axis=axis)
    modules = dict(model.named_modules())
    chosen = None if groups is None else set(groups)
    with ExitStack() as stack, evaluating(model), torch.no_grad():
        ears = Ears(stack)
        text = axis.startswith("text.")
        for group in anatomy.axis(axis).groups:
            if chosen is not None and group.name not in chosen:
                continue
            if is_stream(group, anatomy.axis(axis)):
                try:
                    wiring = trace(model, group, next(at_least_one(batches, f"repairing {axis}")))
                except NotRotatable as reason:
                    found.reason = str(reason)
                else:
                    found.stream = listen(model, group, wiring, ears.attach)
                continue
            slots = list(linear_consumers(modules, group))
            if not slots and any(slot.role == "consume" for slot in group.slots):
                found.reason = f"{group.name} is read by no linear layer, so nothing is refitted"
            for slot in slots:
                if (
                    slot.parameter in found.consumers
                ):  # groups of one block may share it: the heads of an attention output
                    continue
                found.consumers[slot.parameter] = ears.beside(modules[owner(slot.parameter)])
        for batch in at_least_one(batches, f"repairing {axis}"):
            ears.samples = samples_of(batch, text=text)
            forward(model, batch)
    return found


def fold(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    keep: Keep,
    statistics: Statistics,
    *,
    ridges: Sequence[float] = RIDGES,
    tied_power: float = 0.5,
    turn: bool = True,
) -> Keep:
    """Repair the coming cut of `axis` in place on the uncut model; return the keep-sets to cut with.

    Inner groups keep their units, and their consumers are refitted (`refit`). With `turn`, the residual group
    of a width axis is rotated and then keeps its first channels; without (or where it cannot be rotated) it
    keeps those of `keep`. Groups without statistics are left alone, so large models can be folded a few
    groups at a time. Consumers of attention use a ridge of at least ATTENTION_RIDGE.
    """
    named = dict(model.named_modules())
    final = dict(keep)
    for group in anatomy.axis(axis).groups:
        kept = keep[group.name]
        if len(kept) == group.units:
            continue
        if is_stream(group, anatomy.axis(axis)):
            if turn and statistics.stream is not None:
                size = len(kept)
                rescaled = rescales(statistics.stream.wiring)
                rotate(
                    model,
                    group,
                    statistics.stream,
                    size,
                    rescaled=rescaled,
                    tied_power=tied_power,
                    ridges=ridges,
                )
                final[group.name] = torch.arange(size)
            continue
    for parameter, (rows, attention) in _columns_that_go(named, anatomy.axis(axis), keep).items():
        if parameter in statistics.consumers:
            enough = [ridge for ridge in ridges if ridge >= ATTENTION_RIDGE] or [ATTENTION_RIDGE]
            moments = statistics.consumers[parameter]
            refit(named[owner(parameter)], rows, moments, enough if attention else ridges)
    return final


def _columns_that_go(modules: dict[str, nn.Module], axis: Axis, keep: Keep) -> dict[str, tuple[Tensor, bool]]:
    """Return the input columns that each linear consumer loses to all groups together, and whether it is one of attention."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for group in axis.groups:
        if is_stream(group, axis) or len(keep[group.name]) == group.units:
            continue
        dropped = torch.ones(group.units, dtype=torch.bool)
        dropped[keep[group.name].cpu()] = False
        for slot in linear_consumers(modules, group):
            rows = slot.rows(dropped.nonzero().flatten(), group.units)
            before = found.get(slot.parameter, (rows[:0], False))[0]
            found[slot.parameter] = torch.cat((before, rows)), slot.inner > 1 or axis.noun == "head_dim"
    return found


def refit(linear: nn.Module, goes: Tensor, moments: Moments, ridges: Sequence[float] = RIDGES) -> Prediction:
    """Refit one consumer in place to the columns that stay, those of `goes` to zero: it computes as if cut.

    W'_S = W_S + W_D A and, with a bias, b' = b + W_D (m_D - A m_S) for A = C_DS (C_SS + r d I)^-1
    (`moments.predict`). All columns that go, go at once: what one unit leaves must not lean on another that leaves too.
    """
    weight = linear.get_parameter("weight")
    bias = linear.bias if isinstance(linear.bias, Tensor) else None
    everything = torch.ones(weight.shape[1], dtype=torch.bool)
    everything[goes] = False
    stays, goes = everything.nonzero()[:, 0].to(weight.device), (~everything).nonzero()[:, 0].to(weight.device)
    found = predict(moments, stays, goes, weight.detach(), bias=bias is not None, ridges=ridges)
    with torch.no_grad():
        dropped = weight[:, goes].double()
        weight[:, stays] += (dropped @ found.matrix).to(weight)
        weight[:, goes] = 0
        if bias is not None:
            bias += (dropped @ found.offset).to(bias)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to repair a cut, by measured loss of the cut model on calibration rows."""

    name: str
    loss: float


def judged(name: str, model: PreTrainedModel, batches: Sequence[Batch], loss: Loss) -> Choice:
    """Return a way to repair a cut with the calibration loss of the model that it gives, in evaluation mode."""
    with evaluating(model):
        return Choice(name=name, loss=mean_loss(model, batches, loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """The repaired cut of least loss: its model and keep-sets, all ways that were tried, and why another was not."""

    model: PreTrainedModel
    keep: Keep
    tries: list[Choice]
    reason: str


def fold_best(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    keep: Keep,
    calibration: Calibration,
    loss: Loss,
    ways: Collection[str] = ("refit", "rotate", "merge"),
    first: Statistics | None = None,
) -> Folded:
    """Try ways to repair this cut; return the cut model of least loss on unseen rows.

    Ways: no repair; refit of consumers on the chosen units; rotation (three of them where the head is tied to
    the embedding); dropped heads merged into kept ones. Measured, because a rotation is approximate behind tied heads and
    opening norms. A way that turns out to be impossible is left out, and the reason is told. Holds one more copy
    and two cut models, and the moments of two parts of `in_parts`. `first`: the `first_moments`, where they are known.
    """
    parts, fit = in_parts(model, anatomy.axis(axis)), calibration.fit
    if first is None:
        wanted = {"refit", "rotate"} & set(ways)
        first = first_moments(model, anatomy, axis, fit) if wanted else Statistics(axis=axis)

    def folded(trial: PreTrainedModel, power: float | None = None) -> Keep:
        """Rotate the stream, where a power says how, and refit consumers, part by part."""
        final = fold(trial, anatomy, axis, keep, first, tied_power=power or 0.0, turn=power is not None)
        for part in parts[1:]:
            fold(trial, anatomy, axis, keep, collect(model, anatomy, axis, fit, groups=part), turn=False)
        return final

    made: list[tuple[str, Callable[[PreTrainedModel], Keep]]] = [("slice", lambda _: keep)]
    if "refit" in ways:
        made.append(("refit", folded))
    for power in tied_powers(first) if "rotate" in ways else ():
        made.append((f"rotate:{power:g}", partial(folded, power=power)))
    if "merge" in ways and anatomy.axis(axis).noun in merging.NOUNS:
        made.append(("merge", _merging(anatomy, axis, keep, fit)))
    return _least(model, anatomy, axis, (calibration, loss), made, first.reason)


def first_moments(model: PreTrainedModel, anatomy: Anatomy, axis: str, batches: Sequence[Batch]) -> Statistics:
    """Return the moments that `fold_best` begins with: of the first of the axis' parts, which all its sizes share."""
    return collect(model, anatomy, axis, batches, groups=in_parts(model, anatomy.axis(axis))[0])


def _least(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    by: tuple[Calibration, Loss],
    made: Sequence[tuple[str, Callable[[PreTrainedModel], Keep]]],
    reason: str,
) -> Folded:
    """Make the ways on copies of the model, cut each, and return the one of least loss."""
    calibration, loss = by
    tries: list[Choice] = []
    best: tuple[Choice, PreTrainedModel, Keep] | None = None
    for name, way in made:
        trial = copy.deepcopy(model)
        try:
            kept = way(trial)
        except NotMergeableError as impossible:
            reason = str(impossible)
            continue
        cut = surgery.cut(trial, anatomy, axis, kept)
        del trial
        tries.append(judged(name, cut, calibration.judge, loss))
        if best is None or tries[-1].loss < best[0].loss:
            best = tries[-1], cut, kept
    assert best is not None
    if math.isinf(best[0].loss):
        names = ", ".join(one.name for one in tries)
        raise UserError(
            f"{axis}: the loss of the cut model is no number, whatever the repair ({names}), so it was not cut."
        )
    return Folded(model=best[1], keep=best[2], tries=tries, reason=reason)


def tied_powers(statistics: Statistics) -> tuple[float, ...]:
    """Return the values of `tied_power` worth a try: one without a tied head, none without a stream."""
    if statistics.stream is None:
        return ()
    return (0.0, 0.5, 1.0) if statistics.stream.wiring.tied else (0.0,)


def rescales(wiring: Wiring) -> bool:
    """Tell whether surgery.cut rescales the norms of this stream itself: RMSNorm yes, LayerNorm no."""
    return "layer" not in wiring.kinds.values()


def _merging(anatomy: Anatomy, axis: str, keep: Keep, batches: Sequence[Batch]) -> Callable[[PreTrainedModel], Keep]:
    def way(model: PreTrainedModel) -> Keep:
        merge(model, anatomy, axis, keep, batches)
        return keep

    return way
