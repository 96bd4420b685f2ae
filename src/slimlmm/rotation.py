"""Change of basis of a residual stream, so that a slice of its first channels loses least.

y = s B x with B orthogonal: everything that writes the stream is multiplied by s B, everything that reads it
by B^T / s, and what stands between (norm weights and biases, LayerScale) is folded into its neighbours first.
Source: SliceGPT (arXiv 2401.15024), section 3, extended here to LayerNorm without turning it into RMSNorm, to
LayerScale and to tied heads.

Shape legend: N channels of the stream, K kept ones, O outputs of a reader, U units of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Group, Slot
from slimlmm.importance import per_unit
from slimlmm.moments import RIDGES, Moments, predict, products_of
from slimlmm.wiring import Wiring, owner


@dataclass(slots=True, kw_only=True)
class Stream:
    """What is known of a residual stream: its wiring, and moments of what each reader gets.

    `moments`: by norm (its input after normalisation, before weight and bias), and by parameter for readers
    without norm.
    """

    wiring: Wiring
    moments: dict[str, Moments]


def listen(model: PreTrainedModel, group: Group, wiring: Wiring, attach: Callable[..., None]) -> Stream:
    """Attach moments to norms and raw readers of the stream; they fill as batches run.

    `attach` (module, moments, view) makes the module's inputs, as `view` shows them, count (see
    `repair.collect`).
    """
    modules = dict(model.named_modules())
    first = next(model.parameters())
    device, products = first.device, products_of(first)
    moments: dict[str, Moments] = {}
    for name, kind in wiring.kinds.items():
        if kind != "scale":
            moments[name] = Moments(group.units, device, products)
            attach(modules[name], moments[name], partial(_normalised, centred=kind == "layer"))
    for slot in wiring.raw:
        moments[slot.parameter] = Moments(group.units, device, products)
        attach(
            modules[owner(slot.parameter)],
            moments[slot.parameter],
            partial(_chunks, slot=slot, units=group.units),
        )
    return Stream(wiring=wiring, moments=moments)


def basis(stream: Stream, size: int) -> Tensor:
    """Return the orthogonal B [N, N] whose first `size` rows span the directions of most variance; fp64.

    The variance is pooled over all readers, each scaled to the same total power: C = sum_r G_r / tr G_r. With
    LayerNorm the mean must survive the slice: B = diag(R, I) U^T with U = [1/sqrt N, leading directions
    orthogonal to it] and R [K, K] orthogonal with first column 1/sqrt K, so that the all-ones vector of N
    channels becomes that of K channels, scaled.
    """
    wiring = stream.wiring
    used = [name for name in (*wiring.readers, *(slot.parameter for slot in wiring.raw)) if name != wiring.entry]
    grams = [stream.moments[name].gram() for name in used]
    pooled = torch.stack([gram / gram.trace().clamp(min=1e-300) for gram in grams]).sum(0)
    if "layer" not in wiring.kinds.values():
        vectors: Tensor = torch.linalg.eigh(pooled).eigenvectors
        return vectors.flip(1).T.contiguous()
    rest = _reflection(len(pooled)).to(pooled)[:, 1:]
    leading = torch.linalg.eigh(rest.T @ pooled @ rest).eigenvectors.flip(1)
    ones = torch.full((len(pooled), 1), len(pooled) ** -0.5, dtype=pooled.dtype, device=pooled.device)
    change = torch.cat([ones, rest @ leading], 1).T.contiguous()
    change[:size] = _reflection(size).to(change) @ change[:size]
    return change


def rotate(
    model: PreTrainedModel,
    group: Group,
    stream: Stream,
    size: int,
    *,
    rescaled: bool,
    tied_power: float = 0.5,
    ridges: Sequence[float] = RIDGES,
) -> None:
    """Rotate the stream in place so that its first `size` channels lose least; then refit the readers.

    At ``size == N`` the function of the model is unchanged, except through an opening norm (`Wiring.entry`)
    and a tied head, where it is approximate. `rescaled` says that the slice which follows rescales norms by
    sqrt(N/K) (RMSNorm under surgery.cut); where it does not (LayerNorm), the stream is scaled by s =
    sqrt(K/N) instead, which is exact with the same epsilon. Norm weights become one number that keeps the rms
    of the readers (Adam sees weights of the usual size), multiplied by the square root of the share of
    variance that the kept channels carry. `tied_power` p in [0, 1]: a head tied to the embedding becomes E (1
    + p (diag(w)/c - 1)) B^T, so p = 0 keeps the embedding exact and p = 1 the head.
    """
    work = _Rotation(
        named=dict(model.named_parameters(remove_duplicate=False)),
        group=group,
        stream=stream,
        change=basis(stream, size),
        scale=1.0 if rescaled else (size / group.units) ** 0.5,
        size=size,
        tied_power=tied_power,
    )
    with torch.no_grad():
        work.producers()
        work.readers(ridges)
        work.norms()


@dataclass(slots=True, kw_only=True)
class _Rotation:
    """One rotation in progress: the pieces that producers, readers and norms need of each other.

    `size_of` holds the one number that a norm or a LayerScale (by its linear layer) keeps, `bias_of`
    what a norm's bias adds to readers that have no bias to take it, `done` the places already rotated.
    """

    named: dict[str, nn.Parameter]
    group: Group
    stream: Stream
    change: Tensor
    scale: float
    size: int
    tied_power: float
    done: set[tuple[int, int, int]] = field(default_factory=set)
    size_of: dict[str, float] = field(default_factory=dict)
    bias_of: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def wiring(self) -> Wiring:
        """The wiring of the stream."""
        return self.stream.wiring

    @property
    def _centres(self) -> bool:
        """Whether the norm that opens the stream takes the mean away: a LayerNorm does, an RMSNorm does not."""
        return self.wiring.kinds[self.wiring.entry] == "layer"

    def producers(self) -> None:
        """Multiply what writes the stream by s B, with LayerScale or the opening norm's weight folded in."""
        for slot in self.group.slots:
            name = owner(slot.parameter)
            if slot.role != "produce" or not self._first(slot):
                continue
            matrix = self.change * self.scale
            if slot.parameter in self.wiring.before_entry:
                matrix = matrix * self._weight(self.wiring.entry)
                if self._centres:
                    matrix = matrix - matrix.mean(1, keepdim=True)
            elif name in self.wiring.scaled:
                matrix = matrix * self._weight(self.wiring.scaled[name]) / self._scale_size(name)
            elif slot.parameter == self.wiring.tied:
                weight = self._weight(self.wiring.final)
                self.size_of[self.wiring.final] = float(weight.mean()) or 1.0
                matrix = matrix * (1 + self.tied_power * (weight / self.size_of[self.wiring.final] - 1))
            _apply(self.named[slot.parameter], slot, self.group.units, matrix)

    def readers(self, ridges: Sequence[float]) -> None:
        """Multiply what reads the stream by B^T, with norm weights and biases folded in, and refit it."""
        for norm, slots in self.wiring.readers.items():
            if not slots:
                continue
            weight = self._weight(norm)
            parts = [(self._split(slot), slot) for slot in slots]
            before = sum(float(part.square().sum()) for part, _ in parts)
            folded = sum(float((part * weight[:, None]).square().sum()) for part, _ in parts)
            size = self.size_of.setdefault(norm, (folded / before) ** 0.5 if before and folded else 1.0)
            self._fold_bias(norm, slots)
            moments = self.stream.moments[norm].transformed(self.change)
            for slot in slots:
                _apply(self.named[slot.parameter], slot, self.group.units, self.change * weight / size)
                self._refit(slot, moments, size, ridges)
        for slot in self.wiring.raw:
            _apply(self.named[slot.parameter], slot, self.group.units, self.change / self.scale)
            moments = self.stream.moments[slot.parameter].transformed(self.change * self.scale)
            self._refit(slot, moments, 1.0, ridges)
        for slot in self.group.slots:
            if slot.role == "consume" and slot.parameter in self.wiring.dead and self._first(slot):
                _apply(self.named[slot.parameter], slot, self.group.units, self.change)

    def norms(self) -> None:
        """Give every norm and LayerScale its one number, and the biases that no reader could take."""
        for name, kind in self.wiring.kinds.items():
            weight = self._parameter(name)
            bias = self.named.get(f"{name}.bias")
            if kind == "scale":
                linear = next(key for key, value in self.wiring.scaled.items() if value == name)
                weight.fill_(self.size_of[linear])
            elif name == self.wiring.entry:
                opening = self.change * self._weight(name)
                if self._centres:
                    opening[: self.size] -= opening[: self.size].mean(0)
                share = self._share(name, opening)
                if bias is not None:
                    bias.copy_(self.scale * self.change @ bias.double())
                weight.fill_(share)
            else:
                tied = self.scale if name == self.wiring.final else 1.0
                value = self.size_of[name] * self._share(name, self.change) / self.scale / tied
                if bias is not None:
                    self._rest_of_bias(name, bias, tied)
                weight.fill_(value - (kind == "rms1"))

    def _refit(self, slot: Slot, moments: Moments, size: float, ridges: Sequence[float]) -> None:
        """Let kept channels stand in for dropped ones in one reader; moments, weights in the new basis."""
        kept = torch.arange(self.size, device=self.change.device)
        dropped = torch.arange(self.size, self.group.units, device=self.change.device)
        if not len(dropped):
            return
        columns = self._split(slot)
        bias = self.named.get(f"{owner(slot.parameter)}.bias")
        flat = columns.movedim(-2, -1).reshape(-1, self.group.units)
        found = predict(moments, kept, dropped, flat, bias=bias is not None, ridges=ridges)
        if bias is not None:
            gained = torch.einsum("aoui,u->a", columns[..., dropped, :] * size, found.offset)
            bias.add_(gained.to(bias))
        columns[..., kept, :] += torch.einsum("aodi,dk->aoki", columns[..., dropped, :], found.matrix)
        self._join(slot, columns)

    def _fold_bias(self, norm: str, slots: list[Slot]) -> None:
        """Move the norm's bias into the readers' biases where all have one: b_r += W b."""
        bias = self.named.get(f"{norm}.bias")
        if bias is None or not bool(bias.any()) or norm == self.wiring.final:
            return
        targets = [self.named.get(f"{owner(slot.parameter)}.bias") for slot in slots]
        gains = [torch.einsum("aoui,u->a", self._split(slot), bias.double()) for slot in slots]
        if all(target is not None for target in targets):
            for target, gain in zip(targets, gains, strict=True):
                assert target is not None
                target.add_(gain.to(target))
        else:
            self.bias_of[norm] = gains

    def _rest_of_bias(self, name: str, bias: Tensor, tied: float) -> None:
        """Set the norm's bias: what its readers could not take, fitted on the kept channels, or zero."""
        new = torch.zeros_like(self.change[0])
        if name == self.wiring.final:
            new = self.change @ bias.double() / tied
        elif name in self.bias_of:
            slots = self.wiring.readers[name]
            rows = torch.cat([self._split(slot).sum((1, 3))[:, : self.size] for slot in slots])
            wanted = torch.cat(self.bias_of[name])
            new[: self.size] = (torch.linalg.pinv(rows, rtol=1e-6) @ wanted[:, None])[:, 0]
        bias.copy_(new)

    def _share(self, norm: str, matrix: Tensor) -> float:
        """Return sqrt(kept part of tr M G M^T / tr G): what the norm's denominator loses by the cut."""
        gram = self.stream.moments[norm].gram()
        kept = ((matrix @ gram) * matrix).sum(1)[: self.size].sum()
        return float((kept / gram.trace().clamp(min=1e-300)).sqrt()) or 1.0

    def _scale_size(self, linear: str) -> float:
        """Return the one LayerScale value that keeps the rms of the weight which the scale is folded into."""
        if linear not in self.size_of:
            weight = self.named[f"{linear}.weight"].double()
            scale = self._weight(self.wiring.scaled[linear])
            ratio = (weight * scale[:, None]).norm() / weight.norm().clamp(min=1e-300)
            self.size_of[linear] = float(ratio) or 1.0
        return self.size_of[linear]

    def _weight(self, name: str) -> Tensor:
        """Return the factors that a norm or scale applies, [N] fp64 (1 + w for that kind of RMSNorm)."""
        weight = self._parameter(name).double()
        return weight + 1 if self.wiring.kinds[name] == "rms1" else weight

    def _parameter(self, name: str) -> nn.Parameter:
        """Return the weight of a norm or scale module, whatever it is called."""
        found = [s.parameter for s in self.group.slots if s.role == "affine" and owner(s.parameter) == name]
        return self.named[next(p for p in found if not p.endswith(".bias"))]

    def _split(self, slot: Slot) -> Tensor:
        """Return a fp64 copy of a reader's columns, [O, outer, U, inner]."""
        weight = self.named[slot.parameter].detach().double().movedim(slot.dim, -1)
        return per_unit(weight.reshape(-1, weight.shape[-1]), slot, self.group.units).clone()

    def _join(self, slot: Slot, columns: Tensor) -> None:
        """Write columns [O, outer, U, inner] back."""
        parameter = self.named[slot.parameter]
        view = parameter.detach().movedim(slot.dim, -1)
        width = slot.outer * self.group.units * slot.inner
        target = view.narrow(-1, slot.offset, width)
        target.copy_(columns.reshape(target.shape))

    def _first(self, slot: Slot) -> bool:
        """Tell whether this place of this tensor comes up for the first time."""
        place = (id(self.named[slot.parameter]), slot.dim, slot.offset)
        fresh = place not in self.done
        self.done.add(place)
        return fresh


def _apply(parameter: nn.Parameter, slot: Slot, units: int, matrix: Tensor) -> None:
    """Replace the slot's rows v_u by sum_w matrix[u, w] v_w, in place; matrix [U, U]."""
    view = parameter.detach().movedim(slot.dim, -1)
    target = view.narrow(-1, slot.offset, slot.outer * units * slot.inner)
    values = target.reshape(*target.shape[:-1], slot.outer, units, slot.inner).to(matrix)
    target.copy_(torch.einsum("uv,...ovi->...oui", matrix, values).reshape(target.shape))


def _normalised(values: Tensor, centred: bool) -> Tensor:
    """Return what a norm makes of its input before weight and bias (epsilon aside), fp64."""
    values = values.double()
    if centred:
        values = values - values.mean(-1, keepdim=True)
    unit: Tensor = values / values.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return unit


def _chunks(values: Tensor, slot: Slot, units: int) -> Tensor:
    """Return a reader's input as vectors over the units, [..., outer * inner, U]."""
    return per_unit(values, slot, units).transpose(-1, -2).flatten(-3, -2)


def _reflection(size: int) -> Tensor:
    """Return the Householder reflection [K, K] whose first column is 1/sqrt K; fp64."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1
    return torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.square().sum()
