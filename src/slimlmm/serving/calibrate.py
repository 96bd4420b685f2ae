"""`slimlmm calibrate`: which answers of a student the teacher should give, fitted on validation rows and judged on test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimlmm import checkpoint, data
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, answer_limit, evaluate, grade, one_look, paired_bootstrap
from slimlmm.files import refuse_unwritable, write_text
from slimlmm.measure import environment
from slimlmm.pictures import USUAL, PictureSettings
from slimlmm.probes import turns_before
from slimlmm.progress import Reporter
from slimlmm.serving.answering import Answerer
from slimlmm.serving.asks import Ask
from slimlmm.serving.escalation import KINDS, Escalation, Kind, Point, area, curve, fitted
from slimlmm.teacher import weights_fingerprint

#: rows that are answered together
BATCH = 32


@dataclass(frozen=True, slots=True)
class Answers:
    """A student's answers to rows with the log-probabilities of their tokens, and the teacher's answers."""

    student: Evaluation
    logprobs: Sequence[Sequence[float]]
    teacher: Evaluation

    def curve(self, kind: Kind) -> list[Point]:
        """Return what thresholds on a confidence do."""
        confidences = [KINDS[kind](values) if values else 0.0 for values in self.logprobs]
        return curve(confidences, self.student.correct.tolist(), self.teacher.correct.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a threshold is to do: at most a share of calls to the teacher, or at most so many points lost against it."""

    share: float | None = None
    points: float | None = None
    kind: Kind | None = None


def calibrate(
    student: str,
    teacher: str,
    source: Path,
    wanted: Wanted,
    out: Path,
    *,
    count: int | None,
    tell: Reporter,
    allowed: PictureSettings = USUAL,
) -> dict[str, Any]:
    """Fit a threshold on validation rows, write it with the curve's plot, and return what it does on test rows too.

    Without a `kind`, the confidence of the largest area under the curve is taken.

    Raises:
        UserError: no rows, or no threshold does what is wanted.
    """
    refuse_unwritable(out.parent)
    splits = data.load(source, allowed=allowed)
    rows = {"validation": data.sample(splits.need("validation", source), count, 0)}
    if splits.test:
        rows["test"] = data.sample(splits.test, count, 0)
    found, prints = _answered(student, teacher, rows, tell)
    fitting = found["validation"]
    curves = {kind: fitting.curve(kind) for kind in ([wanted.kind] if wanted.kind else KINDS)}
    kind = max(curves, key=lambda one: area(curves[one]))
    accuracy = None if wanted.points is None else fitting.teacher.accuracy - wanted.points / 100
    point = fitted(curves[kind], share=wanted.share, accuracy=accuracy)
    threshold = Escalation(
        kind=kind,
        threshold=min(point.threshold, 1.0),  # no log-probability is above 0; JSON knows no infinity
        rows=len(rows["validation"]),
        share=point.share,
        accuracy=point.accuracy,
        student_accuracy=fitting.student.accuracy,
        teacher_accuracy=fitting.teacher.accuracy,
        student_fingerprint=prints[0],
        teacher_fingerprint=prints[1],
        rows_fingerprint=data.fingerprint(rows["validation"]),
        environment=environment().model_dump(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, threshold.model_dump_json(indent=1) + "\n")
    plot(curves, threshold, fitting, out.with_suffix(".png"))
    told = {name: judged(threshold, answers) for name, answers in found.items()}
    areas = {name: area(points) for name, points in curves.items()}
    return {"escalation": threshold.model_dump(), "areas": areas, "splits": told}


def judged(threshold: Escalation, answers: Answers) -> dict[str, Any]:
    """Return what a threshold does on rows: share to the teacher, accuracies, and the difference to the teacher's."""
    unsure = np.array([threshold.unsure(threshold.confidence(values)) for values in answers.logprobs])
    together = np.where(unsure, answers.teacher.correct, answers.student.correct)
    lost = paired_bootstrap(answers.teacher.correct, together, answers.student.clusters)
    return {
        "rows": len(together),
        "share": float(unsure.mean()),
        "student": answers.student.accuracy,
        "teacher": answers.teacher.accuracy,
        "together": float(together.mean()),
        "lost": lost.model_dump(),
    }


def _answered(
    student: str, teacher: str, rows: Mapping[str, Sequence[Row]], tell: Reporter
) -> tuple[dict[str, Answers], tuple[str, str]]:
    """Return both models' answers to each split, and their hashes; one model is in memory at a time."""
    loaded = checkpoint.load_to_answer(student)
    first = weights_fingerprint(loaded.model)
    mine = {}
    for name, part in rows.items():
        mine[name] = graded(Answerer(loaded.model, loaded.processor), part, tell, f"student, {name}")
    loaded = checkpoint.load_to_answer(teacher)
    answers = {}
    for name, part in rows.items():
        theirs = evaluate(loaded.model, loaded.processor, part, progress=partial(tell.step, f"teacher, {name}"))
        answers[name] = Answers(*mine[name], theirs)
    return answers, (first, weights_fingerprint(loaded.model))


def graded(answerer: Answerer, rows: Sequence[Row], tell: Reporter, what: str) -> tuple[Evaluation, list[list[float]]]:
    """Answer rows as the embedded engine would; returns the evaluation and each answer's log-probabilities."""
    limit = answer_limit(answerer.processor, rows)
    answerer.prompter.refuse_unplaced(row.system for row in rows)  # as `evaluate` does
    keys = [row.picture_key() for row in rows]
    order = sorted(range(len(rows)), key=lambda row: keys[row])
    texts, logprobs = [""] * len(rows), [[0.0]] * len(rows)
    for first in range(0, len(rows), BATCH):
        part = order[first : first + BATCH]
        pictures = {keys[row]: rows[row].open() for row in part}
        asks = [
            Ask(messages=turns_before(*rows[row].asked), pictures=[pictures[keys[row]]], max_tokens=limit)
            for row in part
        ]
        with one_look(answerer.model, [keys[row] for row in part]):
            said = answerer.answer(asks)
        for row, one in zip(part, said, strict=True):
            texts[row], logprobs[row] = one.text, [token.logprob for token in one.tokens]
        tell.step(what, first + len(part), len(rows))
    return grade(rows, texts, keys, max_new_tokens=limit), logprobs


def plot(curves: Mapping[Kind, Sequence[Point]], threshold: Escalation, answers: Answers, path: Path) -> None:
    """Draw accuracy over the teacher's share for each confidence, the teacher alone, and the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, points in curves.items():
        axes.plot(
            [100 * one.share for one in points],
            [100 * one.accuracy for one in points],
            label=f"{kind} (area {100 * area(points):.1f})",
            linewidth=2 if kind == threshold.kind else 1,
        )
    axes.axhline(100 * answers.teacher.accuracy, color="black", linestyle=":", linewidth=1, label="teacher alone")
    axes.scatter([100 * threshold.share], [100 * threshold.accuracy], color="black", zorder=3, label="threshold")
    axes.set_xlabel("calls to the teacher, %")
    axes.set_ylabel(f"right of {threshold.rows:,} validation rows, %")
    axes.legend(fontsize=9, title="confidence", loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def wanted(share: float | None, points: float | None, kind: str | None) -> Wanted:
    """Return what the options ask for.

    Raises:
        UserError: both or neither of share and points, or an unknown confidence.
    """
    if (share is None) == (points is None):
        raise UserError("give either --share (of calls to the teacher) or --within (points below the teacher).")
    found = next((name for name in KINDS if name == kind), None)
    if kind is not None and found is None:
        raise UserError(f"--kind {kind!r}: known: {', '.join(KINDS)}.")
    return Wanted(share=share, points=points, kind=found)
