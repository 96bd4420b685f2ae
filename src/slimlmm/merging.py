"""Dropped attention heads merged into kept ones: the values of a kept head are fitted anew together with what reads them.

A refit (`repair.refit`) can only use what kept heads already put out. Here the whole path of a kept head, from the stream that
it pools to what it writes, is fitted to what the dropped heads wrote, at the rank that a head has: values are no longer those
that the kept head was trained for, but its attention pattern stays.

Shape legend: B sequences, T tokens, H width, X features of the pooled stream (H, and 1 where values have a bias that no bias
behind them can make up for), G key/value groups that are read, K kept query heads, D head_dim, O outputs of the attention (H).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.collate import Batch, samples_of
from slimlmm.forward import output_of
from slimlmm.importance import at_least_one, evaluating
from slimlmm.lowrank import Factors, fitted
from slimlmm.moments import ATTENTION_RIDGE, RIDGES, Moments, output_error, predict, products_of
from slimlmm.slots import attention_of
from slimlmm.views import View, view_of
from slimlmm.wiring import owner

#: axes whose units are heads
NOUNS = ("kv_groups", "queries")
#: ridge strengths, relative to the mean power of a channel of the pooled stream, tried in turn while the error falls
POOLED_RIDGES = (1.0, 3e-1, 1e-1, 1e-2, 1e-3)
#: alternations between values and reads; each can only lower the error of the fit, most of which the start has taken
SWEEPS = 3
#: those of a plain refit of an attention output
REFIT_RIDGES = tuple(ridge for ridge in RIDGES if ridge >= ATTENTION_RIDGE)
#: most features of all kept heads together: their Gram matrices take 16 bytes for each pair
MOST_FEATURES = 8192
#: largest relative error of heads computed from the pooled stream
EXACT = {torch.float32: 1e-3, torch.float64: 1e-6}
#: the same where numbers are rounded to 8 or 11 bits
ROUNDED = 3e-2
#: most that the norm of the fitted path may have grown
GROWTH = 3.0


class NotMergeableError(Exception):
    """Heads of this tower cannot be merged; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The values of one attention module on their way: who writes them, who reads them, and which query heads stay."""

    name: str
    attention: nn.Module
    value: nn.Linear
    output: nn.Linear
    dim: int
    kept: Tensor

    @property
    def heads(self) -> int:
        """Number of query heads before the cut."""
        return self.output.in_features // self.dim

    @property
    def of(self) -> Tensor:
        """The key/value group that each kept query head reads; [K]."""
        return self.kept // (self.heads * self.dim // self.value.out_features)

    @property
    def columns(self) -> Tensor:
        """Input columns of `output` that belong to kept heads, head by head; [K * D]."""
        return (self.kept[:, None] * self.dim + torch.arange(self.dim)).flatten()

    @property
    def constant(self) -> bool:
        """Tell whether the pooled stream needs a feature that is always 1: values have a bias, and their reader has none."""
        return self.value.bias is not None and self.output.bias is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What became of one attention: mean squared error on held-out samples relative to the power of what is lost.

    `ridge` is None where the plain refit was as good, and was made.
    """

    name: str
    error: float
    refit_error: float
    ridge: float | None


def merge(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep, batches: Sequence[Batch]) -> list[Merged]:
    """Merge the heads that a cut of `axis` drops into kept ones, in place on the uncut model, which then computes as if cut.

    With P_h = A_h X [T, X] the stream as head h pools it, M_h = O_h V_g(h) [O, X] its path, and y = sum of M_h P_h over the
    dropped heads, the new paths minimise E|y - sum_kept (M'_h - M_h) P_h|^2 + r d |M' - M|^2 over all M'_h = O'_h V'_g(h) of
    rank D, one V'_g for all queries of a group; d is the mean power of a feature (`lowrank.fitted`). r is the one of least
    error on the half of the samples that the fit has not seen, and where a plain refit of O alone has less, that is made.

    Attention after attention: each is fitted to the stream that those before it leave once they are merged. P_h is had
    exactly and for any kernel: the attention runs again with pieces of its own input in the place of the values.
    Costs one run of the model up to each attention, and H / D + 1 of that attention, per batch.

    Raises:
        NotMergeableError: the values are no matrix of their own, others read them too, what heads put out is not linear in
            them, or there are more than MOST_FEATURES features.
    """
    merged = []
    with evaluating(model), torch.no_grad():
        for path in paths(model, anatomy.axis(axis), keep):
            moments = listen(model, path, batches, text=axis.startswith("text."))
            merged.append(_fold(path, moments))
    return merged


def paths(model: PreTrainedModel, axis: Axis, keep: Keep) -> Iterator[Path]:
    """Yield the value paths of the attention modules that lose heads."""
    if axis.noun not in NOUNS:
        raise NotMergeableError(f"{axis.name} has no heads")
    view = view_of(model.config, axis.name.partition(".")[0])
    if view.value(view.backbone.sharing):
        raise NotMergeableError("some blocks of this tower read the values of others")
    modules = dict(model.named_modules())
    stays: dict[str, Tensor] = {}
    for group in axis.groups:
        dropped = torch.ones(group.units, dtype=torch.bool)
        dropped[keep[group.name].cpu()] = False
        for slot in group.slots:
            if slot.role == "consume":
                width = model.get_parameter(slot.parameter).shape[slot.dim]
                mask = stays.setdefault(slot.parameter, torch.ones(width, dtype=torch.bool))
                mask[slot.rows(dropped.nonzero().flatten(), group.units)] = False
    for parameter, mask in stays.items():
        if not bool(mask.all()):
            yield _path(view, modules, parameter, mask)


def _path(view: View, modules: dict[str, nn.Module], parameter: str, stays: Tensor) -> Path:
    """Return the value path that ends in one attention output, of which only some columns stay."""
    name, attention = owner(parameter), attention_of(view, (parameter, 1))
    if attention is None or len(attention.produce) != 3 or attention.outer != 1 or attention.gated:
        raise NotMergeableError(f"the values of {name} are no matrix of their own")
    before = next(end for end in attention.consume if name.endswith(f".{attention.module}.{end}"))
    whole = name.removesuffix(f".{before}")
    value, output = modules.get(f"{whole}.{attention.produce[2]}"), modules[name]
    if not isinstance(value, nn.Linear) or not isinstance(output, nn.Linear):
        raise NotMergeableError(f"the values of {name} are not written and read by plain linear layers")
    groups = view.kv_of(view.locate(parameter)[0])
    if value.out_features % groups or output.in_features % (value.out_features // groups):
        raise NotMergeableError(f"the values of {name} do not split into {groups} groups")
    dim = value.out_features // groups
    kept = stays.view(-1, dim)[:, 0].nonzero().flatten()
    path = Path(name=name, attention=modules[whole], value=value, output=output, dim=dim, kept=kept)
    features = len(kept) * (value.in_features + path.constant)
    if features > MOST_FEATURES:
        raise NotMergeableError(f"{name} pools {features} features in {len(kept)} heads; {MOST_FEATURES} is the most")
    return path


def listen(model: PreTrainedModel, path: Path, batches: Sequence[Batch], *, text: bool) -> Moments:
    """Return the moments of (pooled stream of the kept heads, what the dropped ones write); [K * X + O]."""
    size = len(path.kept) * (path.value.in_features + path.constant) + path.output.out_features
    moments = Moments(size, model.device, products_of(path.value.weight))
    dropped = torch.ones(path.output.in_features, dtype=torch.bool)
    dropped[path.columns] = False
    lost = path.output.weight[:, dropped.to(path.output.weight.device)]
    for batch in at_least_one(batches, "merging heads"):
        stream_BTH, heads_BTC, again = _heard(model, path, batch)
        pooled_BTKX = pooled(path, stream_BTH, again)
        lost_BTO = heads_BTC[..., dropped.to(heads_BTC.device)] @ lost.T
        _, mask, first = samples_of(batch, text=text).of(heads_BTC)
        if mask is None:
            mask = torch.ones(heads_BTC.shape[:-1], dtype=torch.bool, device=heads_BTC.device)
        mask = mask.view(heads_BTC.shape[:-1])
        _check(path, pooled_BTKX[mask], heads_BTC[mask])
        moments.add(torch.cat((pooled_BTKX.flatten(-2), lost_BTO), -1), mask, first)
    return moments


def _heard(model: PreTrainedModel, path: Path, batch: Batch) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """Return what enters the values, what enters the output, and the call of the attention; the model stops behind it."""
    streams: list[Tensor] = []
    heads: list[Tensor] = []
    calls: list[tuple[Any, Any]] = []
    handles = [
        path.attention.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True),
        path.value.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])),
        path.output.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0])),
    ]
    try:
        output_of(model, path.attention, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not len(streams) == len(heads) == len(calls) == 1:
        raise NotMergeableError(f"{path.name} is not called once where its values are")
    return streams[0], heads[0], calls[0]


def pooled(path: Path, stream_BTH: Tensor, call: tuple[Any, Any]) -> Tensor:
    """Return the stream as each kept head pools it, P_h = A_h X; [B, T, K, X].

    A head puts out its attention times the values. With D channels of the stream as the values of all groups it puts out
    their pooled form, D channels a run.
    """
    dim, groups = path.dim, path.value.out_features // path.dim
    parts: list[Tensor] = []
    fed: list[Tensor] = []
    handles = [
        path.value.register_forward_hook(lambda *_: fed[-1]),
        path.output.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0])),
    ]
    args, named = call
    try:
        for piece in stream_BTH.split(dim, -1):
            padded = nn.functional.pad(piece, (0, dim - piece.shape[-1]))
            fed.append(padded.repeat(*(1,) * (piece.dim() - 1), groups))
            path.attention(*args, **named)
    finally:
        for handle in handles:
            handle.remove()
    every = [part.unflatten(-1, (path.heads, dim))[..., path.kept.to(part.device), :] for part in parts]
    found = torch.cat(every, -1)[..., : stream_BTH.shape[-1]]
    return torch.cat((found, torch.ones_like(found[..., :1])), -1) if path.constant else found


def _check(path: Path, pooled_NKX: Tensor, heads_NC: Tensor) -> None:
    """Refuse where what the kept heads put out is not V P_h + b: something else stands between values and output."""
    values, _ = _factors(path)
    made = torch.einsum("nkx,kdx->nkd", pooled_NKX.double(), values[path.of])
    if path.value.bias is not None and not path.constant:
        made += path.value.bias.double().view(-1, path.dim)[path.of.to(made.device)]
    seen = heads_NC[..., path.columns.to(heads_NC.device)].double()
    error = (made.flatten(-2) - seen).norm() / seen.norm().clamp(min=1e-300)
    if not float(error) <= EXACT.get(heads_NC.dtype, ROUNDED):
        raise NotMergeableError(
            f"what the heads of {path.name} put out is not linear in its values ({float(error):.1e})"
        )


def _factors(path: Path) -> tuple[Tensor, Tensor]:
    """Return the values [G, D, X] of all groups and what reads them [K, O, D] for each kept head, in fp64."""
    values = path.value.weight.double()
    if path.constant:
        values = torch.cat((values, path.value.bias.double()[:, None]), -1)
    reads = path.output.weight.double()[:, path.columns.to(path.output.weight.device)]
    return values.unflatten(0, (-1, path.dim)), reads.unflatten(-1, (-1, path.dim)).movedim(1, 0)


def _fold(path: Path, moments: Moments) -> Merged:
    """Fit the path and write it into the model; the columns of dropped heads become zero."""
    values, reads = _factors(path)
    before = Factors(values, reads, path.of.to(values.device))
    plain, refit_error = _refitted(path, moments, before)
    errors: dict[float, float] = {}
    for ridge in POOLED_RIDGES if float(moments.count_2.min()) else ():  # without held-out samples nothing tells which
        found = fitted(before, moments.gram(0, centred=_centred(path)), ridge, sweeps=SWEEPS)
        if found.whole().norm() <= GROWTH * before.whole().norm():
            errors[ridge] = _error(path, moments, before, found)
            if errors[ridge] > min(errors.values()):
                break
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] >= refit_error:
        _write(path, moments, before, plain)
        return Merged(name=path.name, error=refit_error, refit_error=refit_error, ridge=None)
    _write(
        path, moments, before, fitted(before, moments.gram(centred=_centred(path)), best, sweeps=SWEEPS).like(before)
    )
    return Merged(name=path.name, error=errors[best], refit_error=refit_error, ridge=best)


def _centred(path: Path) -> bool:
    return path.output.bias is not None


def _refitted(path: Path, moments: Moments, before: Factors) -> tuple[Factors, float]:
    """Return the path with its reads alone refitted (`repair.refit`), and its held-out error."""
    rows, outputs = before.rows(), path.output.out_features
    inner, features = rows.shape
    view = torch.zeros(inner + outputs, features + outputs, dtype=rows.dtype, device=rows.device)
    view[:inner, :features] = rows
    view[inner:, features:].fill_diagonal_(1.0)
    heads = moments.transformed(view)
    reads = before.reads.movedim(0, 1).flatten(1)
    weight = torch.cat((reads, torch.eye(outputs, dtype=rows.dtype, device=rows.device)), 1)
    kept, lost = torch.arange(inner + outputs, device=rows.device).split([inner, outputs])
    found = predict(heads, kept, lost, weight, bias=_centred(path), ridges=REFIT_RIDGES)
    after = (reads + found.matrix).unflatten(-1, (-1, path.dim)).movedim(1, 0)
    error = found.error / max(found.plain_error, 1e-300) if found.ridge < math.inf else 1.0
    return Factors(before.values, after, before.of), error


def _error(path: Path, moments: Moments, before: Factors, after: Factors) -> float:
    """Return the share of E|y|^2 that is left on the held-out half, with the fit half's mean where a bias takes it."""
    change = after.whole() - before.whole()
    outputs, features = change.shape
    gram = moments.gram(1, centred=_centred(path))
    shift = moments.mean(1) - moments.mean(0) if _centred(path) else None
    read = torch.zeros(outputs, features + outputs, dtype=change.dtype, device=change.device)
    read[:, features:].fill_diagonal_(1.0)
    stays, lost = torch.arange(features + outputs, device=change.device).split([features, outputs])
    power = float(moments.gram(1).diagonal()[features:].sum())
    return output_error(gram, shift, stays, lost, read, change) / max(power, 1e-300)


def _write(path: Path, moments: Moments, before: Factors, after: Factors) -> None:
    """Put the fitted values, reads and bias into the layers."""
    output, value = path.output, path.value
    columns = path.columns.to(output.weight.device)
    reads = torch.zeros_like(output.weight, dtype=torch.float64)
    reads[:, columns] = after.reads.movedim(0, 1).flatten(1)
    if output.bias is not None:
        change = after.whole() - before.whole()
        features = change.shape[1]
        mean = moments.mean()
        offset = mean[features:] - change @ mean[:features]
        if value.bias is not None:  # stays, and is read otherwise
            bias = value.bias.double().view(-1, path.dim)[after.of]
            offset -= torch.einsum("kod,kd->o", after.reads - before.reads, bias)
        output.bias.add_(offset.to(output.bias))
    output.weight.copy_(reads)
    flat = after.values.flatten(0, 1)
    if path.constant:
        value.bias.copy_(flat[:, -1])
        flat = flat[:, :-1]
    value.weight.copy_(flat)
