"""One model measured for the record: sizes, parameters, bytes, FLOPs, memory."""

from __future__ import annotations

from collections.abc import Sequence

from slimlmm import checkpoint, measure, results
from slimlmm.anatomy import describe
from slimlmm.data import Row
from slimlmm.evaluate import Evaluation, answer_limit, encode

#: answer tokens that FLOPs are counted with
ANSWER_TOKENS = 8


def model_record(side: checkpoint.Loaded, evaluation: Evaluation | None, rows: Sequence[Row]) -> results.Model:
    """Return the record of one model; memory is that of a new process which loads the folder and answers one row."""
    limit = answer_limit(side.processor, rows)
    return results.Model(
        name=side.path.name,
        model_type=side.model.config.model_type,
        sizes=describe(side.model.config).sizes,
        parameters=measure.parameters(side.model),
        disk_bytes=measure.disk_bytes(side.path),
        accuracy=evaluation.summary if evaluation else None,
        flops=measure.flops(side.model, side.processor, encode(side.processor, rows[:1]), ANSWER_TOKENS),
        flops_answer_tokens=ANSWER_TOKENS,
        memory=measure.answering_memory(side.path, rows[0], max_new_tokens=limit),
    )
