"""Second moments of activations, streamed, and what they predict: dropped inputs of a map from kept ones.

Shape legend: N features, K kept, D dropped, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlmm.errors import NO_NUMBERS, UserError

#: ridge strengths tried, relative to the mean of the kept diagonal of the Gram matrix
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
#: least ridge for attention outputs: with 1e-3 a refit blew weights up in our first trial (rms .07 -> 1.1)
ATTENTION_RIDGE = 3e-2


def products_of(weight: Tensor) -> torch.dtype:
    """Return the format that products of activations are made in beside this weight: its own, fp32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


class Moments:
    """Count, sum and Gram matrix of vectors, fp64, apart for two halves of the samples (fit, held out).

    `products` is the number format that the products of one call are made in before they are summed up in fp64. Coarser than
    that, they are of vectors less the mean of the first call: where the mean is large, squares would lose what varies.
    """

    def __init__(
        self, features: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float64
    ) -> None:
        self.products = products
        self.gram_2NN = torch.zeros(2, features, features, dtype=torch.float64, device=device)
        self.total_2N = torch.zeros(2, features, dtype=torch.float64, device=device)
        self.count_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self.shift_N = torch.zeros(features, dtype=torch.float64, device=device)
        self.shifted = False
        self.calls = 0

    def add(self, values: Tensor, weight: Tensor | None = None, first: int | None = None) -> None:
        """Add the vectors of `values` [samples, ..., N], each `weight` [samples, ...] times (once, if None).

        The `first` samples (half of them, if None) go to one half of the moments and the rest to the other, so that tokens of
        one sample never stand on both sides; the sides change from call to call.
        """
        middle = values.shape[0] // 2 if first is None else first
        side = self.calls % 2
        for half, part in ((side, slice(middle, None)), (1 - side, slice(0, middle))):
            rows = values[part].detach().reshape(-1, values.shape[-1]).to(self.products)
            times = rows.new_ones(len(rows)) if weight is None else weight[part].reshape(-1).to(rows)
            self._add(half, rows, times)
        self.calls += 1

    def _add(self, half: int, rows: Tensor, times: Tensor) -> None:
        """Add rows [samples, N], less the shift, to one half."""
        if self.products != torch.float64:
            if not self.shifted and len(rows):
                self.shift_N, self.shifted = rows.mean(0).double(), True
            rows = rows - self.shift_N.to(rows)
        with torch.autocast(rows.device.type, enabled=False):
            weighted = rows * times[:, None]
            self.gram_2NN[half] += weighted.T @ rows
        self.total_2N[half] += weighted.sum(0, dtype=torch.float64)
        self.count_2[half] += times.sum(dtype=torch.float64)

    def _sums(self, half: int | None) -> tuple[Tensor, Tensor]:
        """Return E[(x - s)(x - s)^T] and E[x - s] of one half or of both."""
        if half is None:
            gram, total, count = self.gram_2NN.sum(0), self.total_2N.sum(0), self.count_2.sum()
        else:
            gram, total, count = self.gram_2NN[half], self.total_2N[half], self.count_2[half]
        if not bool(gram.diagonal().isfinite().all()):
            raise UserError(f"activations of the calibration rows are not finite: {NO_NUMBERS}")
        count = count.clamp(min=1e-300)
        return gram / count, total / count

    def gram(self, half: int | None = None, *, centred: bool = False) -> Tensor:
        """Return E[x x^T], or the covariance if `centred`, of one half or of both; [N, N]."""
        gram, mean = self._sums(half)
        if centred:
            return gram - torch.outer(mean, mean)
        if not self.shifted:
            return gram
        across = torch.outer(mean, self.shift_N)
        return gram + across + across.T + torch.outer(self.shift_N, self.shift_N)

    def mean(self, half: int | None = None) -> Tensor:
        """Return E[x] of one half or of both; [N]."""
        return self._sums(half)[1] + self.shift_N

    def last(self, count: int) -> Moments:
        """Return the moments of the last `count` features."""
        new = Moments(0, self.gram_2NN.device, self.products)
        new.gram_2NN, new.total_2N = self.gram_2NN[:, -count:, -count:], self.total_2N[:, -count:]
        new.shift_N, new.shifted = self.shift_N[-count:], self.shifted
        new.count_2, new.calls = self.count_2, self.calls
        return new

    def transformed(self, matrix: Tensor) -> Moments:
        """Return the moments of ``matrix @ x``; matrix [M, N]."""
        matrix = matrix.to(self.gram_2NN)
        new = Moments(matrix.shape[0], self.gram_2NN.device)
        new.gram_2NN = matrix @ self.gram_2NN @ matrix.T
        new.total_2N = self.total_2N @ matrix.T
        new.shift_N, new.shifted = matrix @ self.shift_N, self.shifted
        new.count_2, new.calls = self.count_2, self.calls
        return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Dropped features from kept ones: x_D ~ matrix [D, K] x_K + offset [D], the ridge, its held-out error.

    `error` and `plain_error` are mean squared errors of the consumer's output on held-out samples relative to
    its own (centred) power, with the prediction and with the dropped inputs simply cut off.
    """

    matrix: Tensor
    offset: Tensor
    ridge: float
    error: float
    plain_error: float


def predict(
    moments: Moments,
    kept: Tensor,
    dropped: Tensor,
    weight_ON: Tensor,
    *,
    bias: bool,
    ridges: Sequence[float] = RIDGES,
    growth: float = 3.0,
) -> Prediction:
    """Fit x_D ~ A x_K (+ c where the consumer has a bias) by ridge regression, for the consumer W of x.

    A = G_DK (G_KK + r d I)^-1 with d = mean diag G_KK; with a bias G is the covariance and c = mean_D - A
    mean_K exactly. Folding it, W'_K = W_K + W_D A, minimises E|W x - W'_K x_K|^2 + r d |W'_K - W_K|^2: the
    least-squares refit W G_NK G_KK^-1 of GRAIL (arXiv 2602.23795), with the ridge drawn to the sliced weights
    instead of to zero, so that keeping everything is the identity and r -> infinity is the plain slice. r is
    chosen on the half of the samples that the fit has not seen, then refitted on all; r whose W'_K has more
    than `growth` times the rms of W_K are passed over.
    """
    weight = weight_ON.detach().double()
    if not float(moments.count_2.sum()):  # a consumer that nothing depends on
        nothing = torch.zeros(len(dropped), len(kept), dtype=torch.float64, device=weight.device)
        zero = torch.zeros(len(dropped), dtype=torch.float64, device=weight.device)
        return Prediction(matrix=nothing, offset=zero, ridge=0.0, error=0.0, plain_error=0.0)
    ridge, error, matrix = _best_ridge(moments, kept, dropped, weight, bias, ridges, growth)
    plain = _Held(moments.gram(1), None, kept, dropped, weight).alone
    power = float((weight @ moments.gram(1, centred=True) * weight).sum()) or 1e-300
    mean = moments.mean()
    offset = mean[dropped] - matrix @ mean[kept] if bias else torch.zeros_like(mean[dropped])
    return Prediction(matrix=matrix, offset=offset, ridge=ridge, error=error / power, plain_error=float(plain) / power)


def _best_ridge(
    moments: Moments,
    kept: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: bool,
    ridges: Sequence[float],
    growth: float,
) -> tuple[float, float, Tensor]:
    """Return the ridge of least held-out error whose weights do not grow (inf if all do), that error, and A [D, K]."""
    fitted, seen = (moments.gram(half, centred=bias) for half in (0, 1))
    held = _Held(seen, moments.mean(1) - moments.mean(0) if bias else None, kept, dropped, weight)
    inner, wanted = fitted[kept][:, kept], held.outer @ fitted[dropped][:, kept]
    error = {ridge: held.error(_solve(inner, wanted, ridge)) for ridge in ridges}
    order = sorted(ridges, key=lambda ridge: error[ridge])
    if not float(moments.count_2.min()):  # nothing held out: the most careful first
        order = sorted(ridges, reverse=True)
    limit = growth * weight[:, kept].norm()
    everything = moments.gram(centred=bias)
    inner, wanted = everything[kept][:, kept], everything[dropped][:, kept]
    for ridge in order:
        matrix = _solve(inner, wanted, ridge)
        if (weight[:, kept] + weight[:, dropped] @ matrix).norm() <= limit or not limit:
            return ridge, error[ridge], matrix
    return float("inf"), error[order[-1]], torch.zeros_like(wanted)


def _solve(inner_KK: Tensor, wanted_MK: Tensor, ridge: float) -> Tensor:
    """Return M (G_KK + ridge mean diag(G_KK) I)^-1; a larger ridge where rounding left G_KK indefinite."""
    scale = inner_KK.diagonal().mean().clamp(min=1e-300)
    identity = torch.eye(len(inner_KK), dtype=inner_KK.dtype, device=inner_KK.device)
    while True:
        factor, info = torch.linalg.cholesky_ex(inner_KK + ridge * scale * identity)
        if not int(info):
            return torch.cholesky_solve(wanted_MK.T, factor).T
        ridge = max(10 * ridge, 1e-12)


class _Held:
    """E|W_D (x_D - A x_K)|^2 under a Gram matrix, for many A: what is the same for all of them is computed once.

    With R [M, D], M = min(O, D), such that |R v| = |W_D v| (the triangle of W_D's QR factors where O > D), and P = R A it is
    tr R G_DD R^T - 2 tr P G_KD R^T + tr P G_KK P^T; M K^2 operations for each A instead of O N^2. `shift` s, the distance of
    another mean, adds |R s_D - P s_K|^2.
    """

    def __init__(self, gram: Tensor, shift: Tensor | None, kept: Tensor, dropped: Tensor, weight: Tensor) -> None:
        outer = weight[:, dropped]
        self.outer = torch.linalg.qr(outer, mode="r").R if len(outer) > len(dropped) else outer
        self.inner, self.across = gram[kept][:, kept], self.outer @ gram[dropped][:, kept]
        self.alone = (self.outer @ gram[dropped][:, dropped] * self.outer).sum()
        self.shift = None if shift is None else (self.outer @ shift[dropped], shift[kept])

    def error(self, change_MK: Tensor) -> float:
        """Return it for P = R A."""
        error = self.alone + ((change_MK @ self.inner - 2 * self.across) * change_MK).sum()
        if self.shift is not None:
            error = error + (self.shift[0] - change_MK @ self.shift[1]).square().sum()
        return float(error.clamp(min=0))


def output_error(
    gram: Tensor, shift: Tensor | None, kept: Tensor, dropped: Tensor, weight: Tensor, matrix: Tensor
) -> float:
    """Return E|W_D (x_D - A x_K)|^2 under `gram`, plus what the fit half's other mean (`shift`) adds."""
    held = _Held(gram, shift, kept, dropped, weight)
    return held.error(held.outer @ matrix)
