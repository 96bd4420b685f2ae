"""Tests that may be looked at after every observation: bets against a bound on a mean, and alarms for a change of it.

Sources: I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024), section 4;
J. Shin, A. Ramdas and A. Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", NEJSDS 2 (2024).
"""

from __future__ import annotations

import numpy as np

#: shares of the whole purse that are bet, side by side
STAKES = np.geomspace(0.005, 0.5, 12)


class Bet:
    """A bet that the mean of bounded observations is above 0.

    K_n = mean over stakes s of prod_i (1 + s x_i / b), x_i >= -b. While E[x_i | what came before] <= 0, K is a nonnegative
    supermartingale that starts at 1, so it ever reaches 1 / alpha with probability alpha at most, however often it is looked at.
    """

    def __init__(self, least: float) -> None:
        """Begin with 1; `least` is the bound -b < 0 below which no observation lies."""
        if least >= 0:
            raise ValueError(f"observations must be able to fall below 0, least is {least}")
        self.least, self.n = least, 0
        self._logs = np.zeros_like(STAKES)
        self._most = 0.0

    def add(self, x: float) -> None:
        """Take one observation.

        Raises:
            ValueError: it lies below the bound.
        """
        self._logs += np.log1p(STAKES * _scaled(x, self.least))
        self.n += 1
        self._most = max(self._most, self.log_capital)

    @property
    def log_capital(self) -> float:
        """Return log K_n."""
        return float(np.logaddexp.reduce(self._logs) - np.log(len(STAKES)))

    @property
    def p(self) -> float:
        """Return the anytime-valid p-value, 1 / max over n of K_n."""
        return float(np.exp(-self._most))


class Alarm:
    """An alarm for the moment from which the mean of bounded observations is above 0.

    Shiryaev-Roberts e-detector, R_n = mean over stakes s of (R_{n-1,s} + 1) (1 + s x_n / b). While the mean is at most 0,
    E[R_n] <= n, so the expected number of observations up to a false alarm at R_n >= A is at least A. Good times before a change
    do not delay the alarm, as they would with `Bet`.
    """

    def __init__(self, least: float, every: float) -> None:
        """Begin; `every` is A, the observations between two false alarms on average, at least."""
        if least >= 0 or every <= 1:
            raise ValueError(f"least must be below 0 and every above 1, they are {least} and {every}")
        self.least, self.every, self.n = least, every, 0
        self._values = np.zeros_like(STAKES)

    def add(self, x: float) -> bool:
        """Take one observation and tell whether the alarm rings; it goes on from 0 then."""
        self._values = (self._values + 1) * (1 + STAKES * _scaled(x, self.least))
        self.n += 1
        if self.value < self.every:
            return False
        self._values = np.zeros_like(STAKES)
        return True

    @property
    def value(self) -> float:
        """Return R_n."""
        return float(self._values.mean())


def _scaled(x: float, least: float) -> float:
    if x < least - 1e-12:
        raise ValueError(f"{x} lies below the bound {least}")
    return x / -least
