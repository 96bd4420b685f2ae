"""One alarm that may be looked at after every answer: an e-detector that takes many observations at once.

A watch takes observations x whose mean is at most 0 while all is as is allowed, x >= -b, and rings as `slimlmm.sequential.Alarm`
does. Source: J. Shin, A. Ramdas and A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", NEJSDS
2 (2024). While E[x | what came before] <= 0, it rings falsely once in `every` observations on average, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slimlmm.monitoring.reading import Values
from slimlmm.monitoring.records import Ring, Watch
from slimlmm.sequential import STAKES

#: observations that are taken at once; more would underflow, as a factor may be 1 / 2
TAKEN = 512


@dataclass(slots=True)
class Detector:
    """One watch. It takes observations later than `begin`."""

    name: str
    kind: str
    what: str
    usual: float
    allowed: float
    least: float
    #: observations a day in the reference
    rate: float
    every: float = 2.0
    begin: float = 0.0
    #: seconds that it rests after an alarm, so that a lasting change does not ring at every turn
    rest: float = 0.0
    n: int = 0
    rings: list[Ring] = field(default_factory=list)
    _values: Values = field(default_factory=lambda: np.zeros_like(STAKES))
    #: of the product of each stake's factors: its log, the least that it was, when and after how many observations
    _log: Values = field(default_factory=lambda: np.zeros_like(STAKES))
    _least_log: Values = field(default_factory=lambda: np.full_like(STAKES, np.inf))
    _turned: Values = field(default_factory=lambda: np.zeros_like(STAKES))
    _turned_n: Values = field(default_factory=lambda: np.zeros_like(STAKES))

    @property
    def value(self) -> float:
        """Return R_n."""
        return float(self._values.mean())

    def add(self, times: Values, xs: Values) -> None:
        """Take observations in the order of time."""
        place = int(np.searchsorted(times, self.begin, "right"))
        while place < len(xs):
            place += self._take(times[place : place + TAKEN], xs[place : place + TAKEN])
            place = max(place, int(np.searchsorted(times, self.begin, "right")))

    def _take(self, times: Values, xs: Values) -> int:
        """Take observations up to the first alarm; returns how many.

        With C_k the product of the first k factors 1 + s x / b, R_k = C_k (R_0 + sum over i < k of 1 / C_i).
        """
        with np.errstate(over="ignore"):  # beyond the first alarm
            product = np.cumprod(1 + STAKES * (xs / -self.least)[:, None], axis=0)
            before = np.vstack((np.ones_like(STAKES), product[:-1]))
            path = product * (self._values + np.cumsum(1 / before, axis=0))
        over = path.mean(axis=1) >= self.every
        rung = bool(over.any())
        n = int(over.argmax()) + 1 if rung else len(xs)
        self._turn(times[:n], before[:n])
        self._log = self._log + np.log(product[n - 1])
        self._values = path[n - 1]
        self.n += n
        if rung:
            self._ring(float(times[n - 1]))
        return n

    def _turn(self, times: Values, before: Values) -> None:
        """Keep where each stake's evidence was least; `before` is by what it had grown before each observation."""
        places = before.argmin(axis=0)
        lows = self._log + np.log(before.min(axis=0))
        lower = lows < self._least_log
        self._least_log = np.where(lower, lows, self._least_log)
        self._turned = np.where(lower, times[places], self._turned)
        self._turned_n = np.where(lower, self.n + places, self._turned_n)

    def _ring(self, at: float) -> None:
        best = int((self._log - self._least_log).argmax())
        began, since = float(self._turned[best]), int(self.n - self._turned_n[best])
        self.rings.append(Ring(watch=self.name, at=at, began=began, observations=since))
        self.begin = at + self.rest
        self._values = np.zeros_like(STAKES)
        self._log, self._least_log = np.zeros_like(STAKES), np.full_like(STAKES, np.inf)

    def told(self, earlier: Sequence[Ring]) -> Watch:
        """Return it as a record, after the alarms that were written before."""
        return Watch(
            name=self.name,
            kind=self.kind,
            what=self.what,
            usual=self.usual,
            allowed=self.allowed,
            every=self.every,
            n=self.n,
            level=float(np.log1p(self.value) / np.log1p(self.every)),
            rings=(*earlier, *self.rings),
        )
