"""Dropped attention heads merged into kept ones: the values of a kept head are fitted anew together with what reads them.

A refit (`repair.refit`) can only use what kept heads already put out. Here the whole path of a kept head, from the values that
it pools to what it writes, is fitted to what the dropped heads wrote, at the rank that a head has: its values become a mixture of
those of all groups, but its attention pattern stays.

Shape legend: B sequences, T tokens, H width, G key/value groups, D head_dim, R components of all values together, X features of
a head (R, and 1 where values have a bias that no bias behind them can make up for), K kept query heads, O outputs (H).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.collate import Batch, samples_of
from slimlmm.forward import evaluating, output_of
from slimlmm.importance import at_least_one
from slimlmm.lowrank import Factors, fitted
from slimlmm.moments import ATTENTION_RIDGE, RIDGES, Moments, Prediction, output_error, predict, products_of
from slimlmm.resuming import Memory
from slimlmm.slots import attention_of
from slimlmm.views import View, view_of
from slimlmm.wiring import owner

#: axes whose units are heads
NOUNS = ("kv_groups", "queries")
#: ridge strengths, relative to the mean power of a pooled component, tried in turn while the error falls
POOLED_RIDGES = (1.0, 3e-1, 1e-1, 1e-2, 1e-3)
#: alternations between values and reads; each can only lower the error of the fit, of which more than one took .0003 at most
SWEEPS = 1
#: share of the power of all values that their components hold at least
SHARE = 0.997
#: vectors for each number of all values, from which the components are taken
VECTORS = 8
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
    def most(self) -> int:
        """Most components of the values, whole heads of them, for which the features are no more than MOST_FEATURES."""
        return min(MOST_FEATURES // len(self.kept), self.value.out_features) // self.dim * self.dim

    @property
    def constant(self) -> bool:
        """Tell whether heads need a feature that is always 1: values have a bias, and their reader has none."""
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

    With v = V x [G D] the values of all groups, without bias, C [R, G D] their first principal components (`principal`),
    f_h = A_h C v the components as head h pools them, M_h = O_h S_g(h) C^T [O, X] its path (S_g picks group g), and y what the
    attention writes less the sum of M_h f_h over the kept heads, the new paths minimise
    E|y - sum_kept (M'_h - M_h) f_h|^2 + r d |M' - M|^2 over all M'_h = O'_h U_g(h) of rank D, one U_g [D, X] for all queries of a
    group; d is the mean power of a feature (`lowrank.fitted`). The new values are V'_g = U_g C V. r is the one of least error on
    the half of the samples that the fit has not seen, and where a plain refit of O alone has less, that is made.

    Attention after attention: each is fitted to the stream that those before it leave once they are merged. f_h is had
    exactly and for any kernel: the attention runs again with D components in the place of the values of each group.
    Costs one run of each block and R / D + 2 runs of its attention, per batch (`resuming.Memory`).

    Raises:
        NotMergeableError: the values are no matrix of their own, others read them too, what heads put out is not linear in
            them, or one component for each number of a head would be more than MOST_FEATURES.
    """
    merged, few = [], list(at_least_one(batches, "merging heads"))
    with evaluating(model), torch.no_grad():
        memory = Memory.of(model, anatomy, few)
        for path in paths(model, anatomy.axis(axis), keep):
            with memory.resumed(model, memory.before([f"{path.name}.weight"])):
                heard = partial(_heard, model, path, text=axis.startswith("text."))
                components = principal(path, map(heard, few))
                moments = listen(path, components, map(heard, few))
            merged.append(_fold(path, components, moments))
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
    if not path.most:
        raise NotMergeableError(
            f"{name} reads {len(kept)} heads of {dim} numbers, {len(kept) * dim} features at least; {MOST_FEATURES} is the most"
        )
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    """One call of an attention: its values without bias, what its heads put out, how to call it again, what counts."""

    values_BTC: Tensor
    heads_BTC: Tensor
    call: tuple[Any, Any]
    mask_BT: Tensor
    first: int | None


def _heard(model: PreTrainedModel, path: Path, batch: Batch, *, text: bool) -> _Heard:
    """Run the model on a batch up to the attention; padding of the `text` tower does not count."""
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
    if streams[0].shape[:-1] != heads[0].shape[:-1]:
        raise NotMergeableError(f"{path.name} reads the values of other tokens than it writes for")
    _, mask, first = samples_of(batch, text=text).of(heads[0])
    if mask is None:
        mask = torch.ones(heads[0].shape[:-1], dtype=torch.bool, device=heads[0].device)
    values_BTC = nn.functional.linear(streams[0], path.value.weight)
    mask = mask.view(heads[0].shape[:-1])
    return _Heard(values_BTC=values_BTC, heads_BTC=heads[0], call=calls[0], mask_BT=mask, first=first)


def principal(path: Path, calls: Iterable[_Heard]) -> Tensor:
    """Return the first principal components of the values of all groups together, whole heads of them; [R, G * D], fp64.

    R is the least that holds SHARE of their mean square in the first calls (of their variance, where a bias takes the mean), or
    `path.most`.
    """
    size = path.value.out_features
    moments = Moments(size, path.value.weight.device, products_of(path.value.weight))
    for call in calls:
        moments.add(call.values_BTC, call.mask_BT, call.first)
        if float(moments.count_2.sum()) >= VECTORS * size:
            break
    power, vectors = torch.linalg.eigh(moments.gram(centred=_centred(path)))
    held = power.flip(0).cumsum(0)
    wanted = int((held < SHARE * held[-1]).sum()) + 1
    count = min(-(-wanted // path.dim) * path.dim, path.most)
    components: Tensor = vectors.flip(1).T[:count].contiguous()
    return components


def listen(path: Path, components: Tensor, calls: Iterable[_Heard]) -> Moments:
    """Return the moments of what kept heads pool of the components, put out, and what dropped ones write; [K X + K D + O]."""
    kept = path.columns.to(path.output.weight.device)
    dropped = torch.ones(path.output.in_features, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    size = len(path.kept) * (len(components) + path.constant) + len(kept) + path.output.out_features
    moments = Moments(size, path.value.weight.device, products_of(path.value.weight))
    before = _factors(path, components)
    for call in calls:
        pooled_BTKX, rest_BTKD = pooled(path, components, call)
        _check(path, before, pooled_BTKX[call.mask_BT], rest_BTKD[call.mask_BT], call.heads_BTC[call.mask_BT])
        lost_BTO = call.heads_BTC[..., dropped] @ path.output.weight[:, dropped].T
        every = torch.cat((pooled_BTKX.flatten(-2), call.heads_BTC[..., kept], lost_BTO), -1)
        moments.add(every, call.mask_BT, call.first)
    return moments


def pooled(path: Path, components: Tensor, call: _Heard) -> tuple[Tensor, Tensor]:
    """Return the components of the values as each kept head pools them [B, T, K, X], and what it pools beside them [B, T, K, D].

    A head puts out its attention times the values. With D components as the values of every group it puts out their pooled
    form, D of them a run; with what the components leave of the values, each group its own, it puts out the rest.
    """
    groups = path.value.out_features // path.dim
    turned_BTR = call.values_BTC @ components.T.to(call.values_BTC)
    feeds = [piece.repeat(*(1,) * (piece.dim() - 1), groups) for piece in turned_BTR.split(path.dim, -1)]
    *every, rest = _fed(path, [*feeds, call.values_BTC - turned_BTR @ components.to(call.values_BTC)], call)
    found = torch.cat(every, -1)
    return (torch.cat((found, torch.ones_like(found[..., :1])), -1) if path.constant else found), rest


def _fed(path: Path, feeds: Sequence[Tensor], call: _Heard) -> list[Tensor]:
    """Return what the kept heads put out for other values of all groups; [B, T, K, D] each."""
    parts: list[Tensor] = []
    fed: list[Tensor] = []
    handles = [
        path.value.register_forward_hook(lambda *_: fed[-1]),
        path.output.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0])),
    ]
    args, named = call.call
    try:
        for feed in feeds:
            fed.append(feed)
            path.attention(*args, **named)
    finally:
        for handle in handles:
            handle.remove()
    kept = path.kept.to(parts[0].device)
    return [part.unflatten(-1, (path.heads, path.dim))[..., kept, :] for part in parts]


def _check(path: Path, before: Factors, pooled_NKX: Tensor, rest_NKD: Tensor, heads_NC: Tensor) -> None:
    """Refuse where what the kept heads put out is not that of their values, part by part: something else stands between."""
    made = torch.einsum("nkx,kdx->nkd", pooled_NKX.double(), before.values[before.of]) + rest_NKD.double()
    if path.value.bias is not None and not path.constant:
        made += path.value.bias.double().view(-1, path.dim)[before.of]
    seen = heads_NC[..., path.columns.to(heads_NC.device)].double()
    error = (made.flatten(-2) - seen).norm() / seen.norm().clamp(min=1e-300)
    if not float(error) <= EXACT.get(heads_NC.dtype, ROUNDED):
        raise NotMergeableError(
            f"what the heads of {path.name} put out is not linear in its values ({float(error):.1e})"
        )


def _factors(path: Path, components: Tensor) -> Factors:
    """Return the values [G, D, X] of all groups by components, and what reads them [K, O, D] for each kept head, in fp64."""
    values = components.T
    if path.constant:
        values = torch.cat((values, path.value.bias.double()[:, None]), -1)
    reads = _reads_of(path).unflatten(-1, (-1, path.dim)).movedim(1, 0)
    return Factors(values.unflatten(0, (-1, path.dim)), reads, path.of.to(values.device))


def _fold(path: Path, components: Tensor, moments: Moments) -> Merged:
    """Fit the path and write it into the model; the columns of dropped heads become zero."""
    before = _factors(path, components)
    plain, refit_error = _refitted(path, moments)
    beside = moments.transformed(_beside(path, before))
    gram, seen = (beside.gram(half, centred=_centred(path)) for half in (0, 1))
    shift = beside.mean(1) - beside.mean(0) if _centred(path) else None
    errors: dict[float, float] = {}
    for ridge in POOLED_RIDGES if float(moments.count_2.min()) else ():  # without held-out samples nothing tells which
        found = fitted(before, gram, ridge, sweeps=SWEEPS)
        if found.whole().norm() <= GROWTH * before.whole().norm():
            errors[ridge] = _error(before, found, seen, shift)
            if errors[ridge] > min(errors.values()):
                break
    power = _lost(path, moments)
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or errors[best] >= refit_error * power:
        _write_reads(path, _reads_of(path) + plain.matrix, plain.offset)
        return Merged(name=path.name, error=refit_error, refit_error=refit_error, ridge=None)
    found = fitted(before, beside.gram(centred=_centred(path)), best, sweeps=SWEEPS)
    _write(path, components, beside.mean(), before, found.like(before))
    return Merged(name=path.name, error=errors[best] / power, refit_error=refit_error, ridge=best)


def _centred(path: Path) -> bool:
    return path.output.bias is not None


def _reads_of(path: Path) -> Tensor:
    """Return what reads the kept heads, side by side, in fp64; [O, K * D]."""
    return path.output.weight.double()[:, path.columns.to(path.output.weight.device)]


def _lost(path: Path, moments: Moments) -> float:
    """Return the mean square of what dropped heads write, on the held-out half."""
    return max(float(moments.last(path.output.out_features).gram(1).diagonal().sum()), 1e-300)


def _refitted(path: Path, moments: Moments) -> tuple[Prediction, float]:
    """Return how the reads alone change if they are refitted (`repair.refit`), and the share of what is lost that this leaves."""
    count, outputs = len(path.columns), path.output.out_features
    reads = _reads_of(path)
    kept, lost = torch.arange(count + outputs, device=reads.device).split([count, outputs])
    weight = torch.cat((reads, torch.eye(outputs, dtype=reads.dtype, device=reads.device)), 1)
    found = predict(moments.last(count + outputs), kept, lost, weight, bias=_centred(path), ridges=REFIT_RIDGES)
    return found, found.error / max(found.plain_error, 1e-300) if found.ridge < math.inf else 1.0


def _beside(path: Path, before: Factors) -> Tensor:
    """Return the map from what is listened to, to (f, y): y is what the attention writes less the paths of the components."""
    whole = before.whole()
    outputs, features = whole.shape
    view = torch.zeros(
        features + outputs, features + len(path.columns) + outputs, dtype=whole.dtype, device=whole.device
    )
    view[:features, :features].fill_diagonal_(1.0)
    view[features:] = torch.cat((-whole, _reads_of(path), torch.eye(outputs).to(whole)), 1)
    return view


def _error(before: Factors, after: Factors, gram: Tensor, shift: Tensor | None) -> float:
    """Return E|y - (M' - M) f|^2 by the held-out half's Gram matrix, `shift` from the fit half's mean where a bias takes that."""
    change = after.whole() - before.whole()
    outputs, features = change.shape
    read = torch.zeros(outputs, features + outputs, dtype=change.dtype, device=change.device)
    read[:, features:].fill_diagonal_(1.0)
    stays, lost = torch.arange(features + outputs, device=change.device).split([features, outputs])
    return output_error(gram, shift, stays, lost, read, change)


def _write(path: Path, components: Tensor, mean: Tensor, before: Factors, after: Factors) -> None:
    """Put the fitted values, reads and bias into the layers."""
    reads, value = after.reads.movedim(0, 1).flatten(1), path.value
    features = before.whole().shape[1]
    offset = mean[features:] - (after.whole() - before.whole()) @ mean[:features]
    if value.bias is not None and not path.constant:  # stays, and is read otherwise
        bias = value.bias.double().view(-1, path.dim)[after.of]
        offset -= torch.einsum("kod,kd->o", after.reads, bias)
    _write_reads(path, reads, offset)
    flat = after.values.flatten(0, 1)
    if path.constant:
        value.bias.copy_(flat[:, -1])
        flat = flat[:, :-1]
    value.weight.copy_(flat @ components @ value.weight.double())


def _write_reads(path: Path, reads: Tensor, offset: Tensor) -> None:
    """Put these reads of the kept heads [O, K * D] into the output, zeros for the dropped ones, and add to its bias, if any."""
    weight = torch.zeros_like(path.output.weight, dtype=torch.float64)
    weight[:, path.columns.to(weight.device)] = reads
    path.output.weight.copy_(weight)
    if path.output.bias is not None:
        path.output.bias.add_(offset.to(path.output.bias))
