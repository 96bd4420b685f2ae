"""The kinds of findings, as data, and the pad on which they are counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from slimlmm.checkdata.record import Example, Finding, Noun, Severity
from slimlmm.pictures import REASONS

#: examples that are kept of one kind
KEPT = 5
ORDER: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a finding is about, how bad it is, and what it means."""

    check: str
    severity: Severity
    noun: Noun
    said: str


def _leak(severity: Severity, where: str) -> Kind:
    said = f"the same picture file is in {where}: scores on it say nothing. Take it out of one of them"
    return Kind("duplicates", severity, "pictures", said)


def _near(where: str) -> Kind:
    said = f"a picture in {where} looks like one in the other (difference hashes). Look at them; take it out if it is a copy"
    return Kind("duplicates", "warning", "pictures", said)


#: name -> kind, in the order in which they are told among equals
KINDS: dict[str, Kind] = {
    "unreadable row": Kind("rows", "error", "rows", "not in a form that is read. Mend it or take it out"),
    **{kind: Kind("pictures", "error", "pictures", said) for kind, said in REASONS.items()},
    "large picture": Kind("pictures", "warning", "pictures", "more than --max-pixels; it was not decoded"),
    "animated picture": Kind("pictures", "warning", "pictures", "more than one frame; the data loader shows the first"),
    "transparent picture": Kind(
        "pictures",
        "warning",
        "pictures",
        "conversion to RGB drops the transparency, nothing is laid under it: colours that were hidden show",
    ),
    "CMYK picture": Kind(
        "pictures", "warning", "pictures", "converted to RGB without its colour profile, so colours shift"
    ),
    "deep picture": Kind(
        "pictures",
        "warning",
        "pictures",
        "conversion to RGB clips values above 255, it does not scale them: mostly white. Scale to 8 bits before",
    ),
    "other colours": Kind("pictures", "info", "pictures", "not RGB; conversion to RGB keeps what is seen"),
    "rotated picture": Kind("pictures", "info", "pictures", "its EXIF rotation is applied by the data loader"),
    "linked picture": Kind("pictures", "info", "pictures", "a link, to a file inside the data folder"),
    "leak train-test": _leak("error", "train and test"),
    "leak train-validation": _leak("error", "train and validation"),
    "leak validation-test": _leak("warning", "validation and test"),
    "near train-test": _near("test"),
    "near train-validation": _near("validation"),
    "near validation-test": _near("test"),
    "contradiction": Kind(
        "duplicates", "warning", "rows", "the same question about the same picture has another answer elsewhere"
    ),
    "repeated picture": Kind(
        "duplicates", "info", "pictures", "the same picture file, within a split, under another path"
    ),
    "identical row": Kind("duplicates", "info", "rows", "picture, question and answer occur before in the same split"),
    "blank answer": Kind("answers", "error", "rows", "no answer to compare with. Give it one or take it out"),
    "blank train answer": Kind(
        "answers",
        "warning",
        "rows",
        "no answer to train on; the teacher gives it with data.answers: filled in the recipe",
    ),
    "no room": Kind("answers", "error", "rows", "prompt, picture and answer are longer than the model's context"),
    "no place": Kind("answers", "error", "rows", "the model's chat template has no place for a system turn"),
    "long answer": Kind("answers", "warning", "rows", "longer than --max-answer"),
    "lopsided task": Kind(
        "answers", "warning", "tasks", "one answer makes up most of the task: a constant scores well"
    ),
    "untrained task": Kind("answers", "warning", "tasks", "is asked about in this split, but has no train rows"),
    "unasked task": Kind("answers", "warning", "tasks", "has train rows, but no rows in this split"),
    "unknown tokens": Kind(
        "answers", "warning", "rows", "the tokenizer has no tokens for this text, so it cannot be said"
    ),
    "special tokens": Kind(
        "answers", "warning", "rows", "the text spells a special token of the model, which will not read it as text"
    ),
    "foreign tokens": Kind("model", "error", "rows", "the tokenizer gives ids that the model has no embedding for"),
    "placeholders": Kind(
        "model", "error", "rows", "the prompt has another number of picture tokens than the tower gives"
    ),
    "label mask": Kind("model", "error", "rows", "what is trained on is not the answer that the row gives"),
    "misaligned": Kind("model", "error", "rows", "distilling the model from itself does not start at a loss of 0"),
    "not run": Kind("model", "error", "rows", "the model cannot run these rows as training would"),
    "cross-entropy": Kind("model", "info", "rows", "nats an answer token of the given answers, before any training"),
}


@dataclass(slots=True)
class _Count:
    of: int = 0
    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(slots=True)
class Pad:
    """Counts findings by kind and keeps the first few of each."""

    _counts: dict[str, _Count] = field(default_factory=dict)

    def add(self, kind: str, example: Example, of: int = 0, times: int = 1) -> None:
        """Count a finding of a kind in `KINDS`, among `of` that were looked at; `times` where the example stands for several."""
        one = self._counts.setdefault(kind, _Count())
        one.of = max(of, one.of)
        one.count += times
        if len(one.examples) < KEPT:
            one.examples.append(example)

    def among(self, kind: str, of: int) -> None:
        """Say how many were looked at, where that is known only after the last was counted."""
        if kind in self._counts:
            self._counts[kind].of = of

    def findings(self) -> tuple[Finding, ...]:
        """Return all findings, errors first."""
        names = [name for name in KINDS if name in self._counts]
        return tuple(
            self._finding(name, KINDS[name])
            for name in sorted(names, key=lambda name: ORDER.index(KINDS[name].severity))
        )

    def _finding(self, name: str, kind: Kind) -> Finding:
        one = self._counts[name]
        return Finding(
            check=kind.check,
            kind=name,
            severity=kind.severity,
            count=one.count,
            of=max(one.of, one.count),
            noun=kind.noun,
            said=kind.said,
            examples=tuple(one.examples),
        )
