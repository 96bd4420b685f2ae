"""An export against its source: answers, first logits and time, on the same rows.

Shape legend: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimlmm import data, measure
from slimlmm.data import Row
from slimlmm.decoding import generation_settings, nothing_else
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, agreement, answer_limit, drop, encode, grade
from slimlmm.exporting.manifest import Check
from slimlmm.measure import Side
from slimlmm.progress import Reporter

#: rows answered together
BATCH = 16
#: largest difference of logits, over the largest logit, at which fp32 elsewhere is called the same function
SAME = 1e-3


def check(
    source: Side, export: Side, rows: Sequence[Row], *, split: str, calls: int, seed: int, tell: Reporter
) -> Check:
    """Let both answer all rows, and time `calls` of them one at a time in turns."""
    limit = answer_limit(source.processor, rows)
    first, wanted_nV = answered(source, rows, limit, tell, "source")
    second, found_nV = answered(export, rows, limit, tell, "export")
    return Check(
        n=len(rows),
        split=split,
        fingerprint=data.fingerprint(rows),
        seed=seed,
        source=first.summary,
        export=second.summary,
        drop=drop(first, second, seed=seed),
        agreement=agreement(first, second),
        logits_max=float((wanted_nV - found_nV).abs().max()),
        logits_scale=float(wanted_nV.abs().max()),
        latency=measure.compare(source, export, rows, n=calls, max_new_tokens=limit),
    )


@torch.inference_mode()
def answered(side: Side, rows: Sequence[Row], limit: int, tell: Reporter, name: str) -> tuple[Evaluation, Tensor]:
    """Return the greedy answers of a model, graded, and the logits [n, V] of every first token."""
    model, processor = side.model, side.processor
    settings: dict[str, Any] = generation_settings(model, processor, limit)
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    texts: list[str] = []
    logits = []
    for at in range(0, len(rows), BATCH):
        batch = encode(processor, rows[at : at + BATCH]).to(model.device, dtype=model.dtype)
        with nothing_else(model):
            found = model.generate(**batch, **settings)
        tokens_BT = found.sequences[:, batch["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
        logits.append(found.logits[0].float())
        tell.step(f"checking, {name}", len(texts), len(rows))
    keys = [row.picture_key() for row in rows]
    return grade(rows, texts, keys, max_new_tokens=limit), torch.cat(logits)


def refuse(found: Check, what: str, *, max_drop: float, exact: bool) -> None:
    """Raise a UserError where the export lost more than `max_drop` points, or (`exact`) computes something else."""
    lost = 100 * found.drop.mean
    if lost > max_drop:
        raise UserError(
            f"{what} answers {100 * found.export.overall.accuracy:.1f} % of {found.n} rows right, its source "
            f"{100 * found.source.overall.accuracy:.1f} %: {found.drop.points(1)} points "
            f"lost, and --max-drop allows {max_drop:g}. Nothing was written; leave "
            f"--int8 out or allow more."
        )
    if exact and found.logits_max > SAME * found.logits_scale:
        raise UserError(
            f"{what} gives logits up to {found.logits_max:.2g} off those of its source (largest {found.logits_scale:.2g}), in "
            f"fp32 both: it computes something else. Nothing was written; please report the model type."
        )
