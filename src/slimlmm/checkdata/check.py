"""All checks of data before training, in one record."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimlmm import checkpoint
from slimlmm.checkdata import answers, duplicates, pictures, seeing
from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.look import Look
from slimlmm.checkdata.reading import Reading, read
from slimlmm.checkdata.record import CheckData, Lengths, Model
from slimlmm.data import told
from slimlmm.measure import environment
from slimlmm.pictures import MAX_PIXELS, USUAL, PictureSettings
from slimlmm.progress import Quiet, Reporter
from slimlmm.tables import SPLITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is still accepted, and how many rows are run through the model."""

    max_pixels: int = MAX_PIXELS
    near: int = 2
    max_answer: int = 128
    rows: int = 16
    seed: int = 0
    allowed: PictureSettings = USUAL


def check(
    source: Path,
    model: str | None = None,
    limits: Limits | None = None,
    *,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> CheckData:
    """Check the rows and pictures of `source`, and with `model` how that model would be trained on them.

    Raises:
        UserError: nothing that can be read as rows, or a model that cannot be loaded.
    """
    began, limits, tell, pad = time.perf_counter(), limits or Limits(), tell or Quiet(), Pad()
    loaded = checkpoint.load_to_answer(model, trust_remote_code=trust_remote_code) if model else None
    reading = read(source, pad, tell, limits.allowed)
    looks = pictures.looked_at(reading, limits.max_pixels, tell, limits.allowed)
    shown = pictures.judge(reading, looks, pad)
    duplicates.judge(reading, looks, limits.near, pad, tell)
    tasks = answers.balance(reading, pad)
    lengths, seen = _answers(loaded, model or "", reading, looks, limits, pad, tell)
    findings = pad.findings()
    counts = Counter(finding.severity for finding in findings)
    return CheckData(
        source=str(source),
        splits=dict(Counter(entry.split for entry in reading.entries)),
        errors=counts["error"],
        warnings=counts["warning"],
        findings=findings,
        pictures=shown,
        lengths=lengths,
        tasks=tasks,
        model=seen,
        seed=limits.seed,
        fingerprint=_fingerprint(reading, looks),
        environment=environment(),
        seconds=time.perf_counter() - began,
    )


def _fingerprint(reading: Reading, looks: Sequence[Look]) -> str:
    """Return `data.fingerprint` of the splits in order; a picture that was not read counts as empty."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for entry in (one for one in reading.entries if one.split == split):
            digest.update(told(entry.row) + looks[entry.picture].sha)
    return digest.hexdigest()


def _answers(
    loaded: checkpoint.Loaded | None,
    name: str,
    reading: Reading,
    looks: Sequence[Look],
    limits: Limits,
    pad: Pad,
    tell: Reporter,
) -> tuple[Lengths | None, Model | None]:
    """Check answers, in tokens and through the model where there is one, else in words."""
    if loaded is None:
        return answers.judge_words(reading, limits.max_answer, pad), None
    seen = seeing.judge(loaded, name, reading, looks, limits.rows, limits.seed, pad, tell)
    context = seen.record.context
    room = None if context is None or seen.added is None else (context, seen.added)
    embeddings: Any = loaded.model.get_input_embeddings()
    size = len(embeddings.weight)
    lengths = answers.judge_tokens(reading, loaded.processor, size, room, limits.max_answer, pad, tell)
    return lengths, seen.record
