"""What a mean over pictures could be with other pictures: interval and p-value of a paired difference, for many pictures or few.

A picture g has n_g rows and D_g, the sum of its rows' differences (each -1, 0 or 1); the estimate is sum D_g / sum n_g. Shape
legend: G pictures, S samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
#: fewer pictures than this that differ from the rest do not show what other pictures would do, so nothing is resampled
FEW = 10


@dataclass(frozen=True)
class Pictures:
    """The pictures of a comparison: `sums` D [G] and `sizes` n [G]; how many samples are drawn of them, by which seed."""

    sums: Floats
    sizes: Floats
    samples: int
    seed: int

    def interval(self, level: float) -> tuple[float, float] | None:
        """Return the interval of sum D_g / sum n_g; None below two pictures.

        Percentiles of the bootstrap, unless fewer than `FEW` pictures say otherwise than the commonest D_g / n_g: what is not in
        the sample is not in its resamples, so that three rows without a difference would make [0, 0]; then `bounded`. Of tens of
        pictures percentiles are a little short, as they always are: 95 % ones of 60 held the truth in 92 % of 300 simulations.
        """
        if len(self.sums) < 2:
            return None
        tails = (1 - level) / 2, (1 + level) / 2
        if len(self.sums) - np.unique(self.sums / self.sizes, return_counts=True)[1].max() < FEW:
            return self.bounded(tails)
        low, high = np.quantile(self.means, tails)
        return float(low), float(high)

    def p_value(self) -> float | None:
        """Return the two-sided p-value of "no difference"; None below two pictures.

        p = min(1, 2 (1 + min(#{m <= 0}, #{m >= 0})) / (1 + S)), m the means of the bootstrap; it is never 0 (Davison and
        Hinkley 1997, section 4.2). Where fewer than `FEW` pictures differ, the exact test that flips their signs: the share of
        the 2^x sign patterns s with |sum s_g D_g| >= |sum D_g| (Fisher 1935, "The Design of Experiments", section 21; of one row
        a picture it is McNemar's exact test). 1 where no picture differs.
        """
        if len(self.sums) < 2:
            return None
        differing = self.sums[self.sums != 0]
        if len(differing) < FEW:
            patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differing))))
            return float((np.abs(patterns @ differing) >= abs(differing.sum()) - 1e-9).mean())
        fewer = min(int((self.means <= 0).sum()), int((self.means >= 0).sum()))
        return min(1.0, 2 * (1 + fewer) / (1 + self.samples))

    @cached_property
    def means(self) -> Floats:
        """Means [S] of samples of G pictures drawn with replacement: sum D_g / sum n_g over those drawn."""
        rng = np.random.default_rng(self.seed)

        def drawn(count: int) -> Floats:
            picked = rng.integers(len(self.sums), size=(count, len(self.sums)))
            found: Floats = self.sums[picked].sum(axis=1) / self.sizes[picked].sum(axis=1)
            return found

        return self._in_parts(drawn)

    def bounded(self, tails: tuple[float, float]) -> tuple[float, float]:
        """Return bounds that hold for few pictures: those seen, and on either side one unseen at the end of the range.

        With weights w ~ Dirichlet(1, ..., 1) over G + 1 pictures, the last of mean size and with D = n (upper bound) or -n
        (lower), they are the `tails` quantiles of sum w_g D_g / sum w_g n_g (Gaffke 2005; Learned-Miller and Thomas 2019, "A New
        Confidence Interval for the Mean of a Bounded Random Variable", arXiv:1905.06208). Of one row a picture and no gain the
        upper one is that of Clopper and Pearson; with no loss seen it is 1 - tail^(1/G), about 3.7 / G at 95 % (the rule of
        three).
        """
        rng = np.random.default_rng(self.seed)
        unseen = self.sizes.mean()

        def drawn(count: int) -> Floats:
            weights = rng.exponential(size=(count, len(self.sums) + 1))
            seen, beyond = weights[:, :-1], weights[:, -1] * unseen
            rows, difference = seen @ self.sizes + beyond, seen @ self.sums
            return np.stack(((difference - beyond) / rows, (difference + beyond) / rows), axis=1)

        lows, highs = self._in_parts(drawn).T
        return float(np.quantile(lows, tails[0])), float(np.quantile(highs, tails[1]))

    def _in_parts(self, drawn: Callable[[int], Floats]) -> Floats:
        """Return what is drawn for all samples, in parts that fit into memory."""
        chunk = max(1, 4_000_000 // len(self.sums))
        return np.concatenate([drawn(min(chunk, self.samples - at)) for at in range(0, self.samples, chunk)])
