"""When the teacher is asked instead: an answer's confidence, and the threshold that validation rows give for a wanted share.

Confidence is a function of the log-probabilities l_1 ... l_T of an answer's tokens. Source: R. El-Yaniv and Y. Wiener, "On the
foundations of noise-free selective classification", JMLR 11 (2010), for risk and coverage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from slimlmm.errors import UserError
from slimlmm.settings import Settings

Kind = Literal["least", "mean", "sum", "first"]
#: confidences by name: that of the least likely token, per token, of the whole answer, of its first token
KINDS: Mapping[Kind, Callable[[Sequence[float]], float]] = {
    "least": min,
    "mean": lambda values: sum(values) / len(values),
    "sum": sum,
    "first": lambda values: values[0],
}


class Escalation(Settings):
    """A threshold with what it is expected to do, as `slimlmm calibrate` writes it."""

    kind: Kind = Field(description="Which confidence.")
    threshold: float = Field(description="Nats; answers whose confidence is below go to the teacher.")
    rows: int = Field(gt=0, description="Rows that it was fitted on.")
    share: float = Field(ge=0, le=1, description="Share of them that goes to the teacher.")
    accuracy: float = Field(description="Share of right answers of the two together, on those rows.")
    student_accuracy: float = Field(description="Of the student alone.")
    teacher_accuracy: float = Field(description="Of the teacher alone.")
    student_fingerprint: str | None = Field(None, description="Hash over the student's configuration and weights.")
    teacher_fingerprint: str | None = Field(None, description="Hash over the teacher's.")
    rows_fingerprint: str | None = Field(None, description="Hash over those rows and their pictures.")
    environment: dict[str, Any] | None = Field(None, description="Machine and versions that it was made with.")

    def confidence(self, logprobs: Sequence[float] | None) -> float | None:
        """Return an answer's confidence; None where its tokens are not known, 0 where it has none."""
        if logprobs is None:
            return None
        return KINDS[self.kind](logprobs) if logprobs else 0.0

    def unsure(self, confidence: float | None) -> bool:
        """Tell whether the teacher is to be asked; an unknown confidence is none."""
        return confidence is None or confidence < self.threshold


def read(path: Path) -> Escalation:
    """Read a file of `slimlmm calibrate`.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        return Escalation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--escalate {path}: {getattr(error, 'strerror', error)}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"--escalate {path}: {where}: {first['msg']}. Make it with slimlmm calibrate.") from error


@dataclass(frozen=True, slots=True)
class Point:
    """One threshold of a curve: the share of answers that goes to the teacher, and how many are right then."""

    threshold: float
    share: float
    accuracy: float


def curve(confidences: Sequence[float], student: Sequence[bool], teacher: Sequence[bool]) -> list[Point]:
    """Return what each threshold does to n rows, the least share first; answers of equal confidence go together.

    accuracy(t) = 1/n (sum of c_i >= t of student_i + sum of c_i < t of teacher_i).
    """
    n = len(confidences)
    order = sorted(range(n), key=lambda row: confidences[row])
    right, points, taken = sum(student), [], 0
    while taken <= n:
        threshold = confidences[order[taken]] if taken < n else math.inf
        points.append(Point(threshold, taken / n, right / n))
        while taken < n and confidences[order[taken]] == threshold:
            right += teacher[order[taken]] - student[order[taken]]
            taken += 1
        if threshold == math.inf:
            break
    return points


def fitted(points: Sequence[Point], *, share: float | None = None, accuracy: float | None = None) -> Point:
    """Return the point of a curve that is best for at most this share, or of least share for at least this accuracy.

    Raises:
        UserError: no threshold reaches the accuracy.
    """
    if accuracy is not None:
        enough = [point for point in points if point.accuracy >= accuracy]
        if not enough:
            best = max(point.accuracy for point in points)
            raise UserError(
                f"no threshold keeps {100 * accuracy:.1f} % right on these rows; the best keeps {100 * best:.1f} %."
            )
        return min(enough, key=lambda point: point.share)
    within = [point for point in points if share is None or point.share <= share]
    return max(within, key=lambda point: (point.accuracy, -point.share))


def area(points: Sequence[Point]) -> float:
    """Return the mean accuracy over all shares (trapezoids): what a confidence is worth without naming a threshold."""
    pairs = itertools.pairwise(points)
    return sum((right.share - left.share) * (left.accuracy + right.accuracy) / 2 for left, right in pairs)
