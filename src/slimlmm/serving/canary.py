"""Two students behind one address: how much goes to the candidate, and the rules that take it back.

Each rule is a bet (`slimlmm.sequential.Bet`) against the claim that the candidate keeps it, looked at after every answer. If it
keeps them all, the probability that any ever takes it back is at most `alpha`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from slimlmm.sequential import Bet
from slimlmm.settings import Settings

#: share of answers that may take longer than the bound: the bound is on the 95th percentile
TAIL = 0.05
#: latest answers and pairs that are held, and the least that a 95th percentile needs
RECENT, ENOUGH = 500, 50


class CanarySettings(Settings):
    """What a candidate gets and must keep."""

    weight: float = Field(0.05, ge=0, le=1, description="Share of requests that go to the candidate.")
    margin: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="Agreement with the teacher that the candidate may lack against the student (shadow pairs).",
    )
    slower: float = Field(1.5, gt=0, description="Its 95th percentile of seconds over the student's, at most.")
    errors: float = Field(0.01, gt=0, lt=1, description="Share of its answers that may fail (5xx).")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Probability that a candidate that keeps all rules is taken back."
    )


@dataclass(slots=True)
class Canary:
    """The weight now, and the evidence for and against the candidate."""

    settings: CanarySettings
    rng: random.Random = field(default_factory=random.Random)
    weight: float = 0.0
    _bets: dict[str, Bet] = field(default_factory=dict)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _student: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))
    _candidate: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def __post_init__(self) -> None:
        """Begin with the weight of the settings and no evidence."""
        self.put(self.settings.weight)

    def put(self, weight: float) -> None:
        """Set the weight; evidence begins anew, as the one who sets it has seen what there was."""
        self.weight = weight
        margin, errors = self.settings.margin, self.settings.errors
        self._bets = {"agreement": Bet(-1 - margin), "latency": Bet(-TAIL), "errors": Bet(-errors)}
        self._student.clear()
        self._candidate.clear()

    def draws_candidate(self) -> bool:
        """Tell whether the next request is the candidate's."""
        return self.weight > 0 and self.rng.random() < self.weight

    def answered(self, arm: str, seconds: float, *, failed: bool) -> str | None:
        """Take note of an answer; returns the rule that it broke for good, if any.

        Latency: x = [seconds > slower * p95 of the student's latest answers] - 0.05; errors: x = [failed] - errors.
        """
        if arm != "candidate":
            if not failed:
                self._seconds.append(seconds)
            return None
        self._bets["errors"].add(failed - self.settings.errors)
        if not failed and len(self._seconds) >= ENOUGH:
            tail = sorted(self._seconds)[int((1 - TAIL) * len(self._seconds))]
            self._bets["latency"].add((seconds > self.settings.slower * tail) - TAIL)
        return self._broken()

    def compared(self, arm: str, *, agreed: bool) -> str | None:
        """Take note of a shadow pair; returns the rule that it broke for good, if any.

        A pair of the candidate meets all of the student that came since the last one: x = mean of [student agreed] -
        [candidate agreed] - margin, whose mean is at most 0 while the candidate is not inferior.
        """
        (self._candidate if arm == "candidate" else self._student).append(agreed)
        if not (self._candidate and self._student):
            return None
        usual = sum(self._student) / len(self._student)
        self._student.clear()
        self._bets["agreement"].add(usual - self._candidate.popleft() - self.settings.margin)
        return self._broken()

    def _broken(self) -> str | None:
        """Return a rule whose bet was won, at alpha shared by all (Bonferroni); the candidate gets nothing more then."""
        level = self.settings.alpha / len(self._bets)
        rule = next((name for name, bet in self._bets.items() if bet.p <= level), None)
        if rule is None or self.weight == 0:
            return None
        self.weight = 0.0
        return rule

    def state(self) -> Mapping[str, Any]:
        """Return the weight, and of each rule how many observations it had and the p-value against it."""
        return {"weight": self.weight, "rules": {name: {"n": bet.n, "p": bet.p} for name, bet in self._bets.items()}}
