"""One model measured for the record: sizes, parameters, bytes, FLOPs, memory; its answers, kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from slimlmm import checkpoint, data, measure, results
from slimlmm.anatomy import describe
from slimlmm.data import Row
from slimlmm.evaluate import Evaluation, answer_limit, encode, evaluate
from slimlmm.files import read_json, write_text
from slimlmm.progress import Reporter
from slimlmm.runfolder import RunFolder
from slimlmm.teacher import identity, weights_fingerprint

#: answer tokens that FLOPs are counted with
ANSWER_TOKENS = 8
EVALUATION = TypeAdapter(Evaluation)


def evaluated(folder: RunFolder, side: checkpoint.Loaded, rows: list[Row], tell: Reporter, name: str) -> Evaluation:
    """Evaluate once, into ``NAME.json``; afterwards read that. Runs that share a cache share what a teacher answered there."""
    path = folder.path / f"{name}.json"
    if path.exists():
        return read_json(EVALUATION, path)
    if folder.shared and name.startswith("teacher"):
        shared = folder.shared / f"answers-{key_of(side, rows)}.json"
        if not shared.exists():
            folder.shared.mkdir(parents=True, exist_ok=True)
            write_text(shared, _answered(side, rows, tell, name).model_dump_json())
        found = read_json(EVALUATION, shared)
    else:
        found = _answered(side, rows, tell, name)
    write_text(path, found.model_dump_json())
    return found


def _answered(side: checkpoint.Loaded, rows: list[Row], tell: Reporter, name: str) -> Evaluation:
    what = name.replace("-", ", ")
    found = evaluate(
        side.model, side.processor, rows, progress=lambda done, total: tell.step(f"evaluating the {what}", done, total)
    )
    tell.say(f"{what}: {100 * found.accuracy:.1f} % of {found.summary.overall.n}")
    return found


def key_of(side: checkpoint.Loaded, rows: Sequence[Row]) -> str:
    """Return the content hash of model, processor and rows in order."""
    return hashlib.sha256(identity(side.model, side.processor) + data.fingerprint(rows).encode()).hexdigest()[:32]


def identity_of(side: checkpoint.Loaded, rows: Mapping[str, Sequence[data.Row]]) -> dict[str, Any]:
    """Return what a run or a study on these splits is known by: hashes of weights, rules and rows, and where the splits end.

    Rules are what the processor does to pictures and texts, and the checkpoint's settings of generation.
    """
    generation = side.model.generation_config.to_diff_dict() if side.model.generation_config else {}
    generation.pop("transformers_version", None)
    rules = identity(side.model, side.processor) + json.dumps(generation, sort_keys=True, default=str).encode()
    return {
        "model": weights_fingerprint(side.model),
        "rules": hashlib.sha256(rules).hexdigest(),
        "data": data.fingerprint([row for part in rows.values() for row in part]),
        "rows": ", ".join(f"{len(part)} {name}" for name, part in rows.items()),
    }


def model_record(
    side: checkpoint.Loaded, evaluation: Evaluation | None, rows: Sequence[Row], *, memory: bool = True
) -> results.Model:
    """Return the record of one model; `memory` is that of a new process which loads the folder and answers one row."""
    limit, prompt = answer_limit(side.processor, rows), encode(side.processor, rows[:1])
    return results.Model(
        name=side.path.name,
        model_type=side.model.config.model_type,
        fingerprint=weights_fingerprint(side.model),
        sizes=describe(side.model.config).sizes,
        parameters=measure.parameters(side.model),
        disk_bytes=measure.disk_bytes(side.path),
        accuracy=evaluation.summary if evaluation else None,
        flops=measure.flops(side.model, side.processor, prompt, ANSWER_TOKENS),
        flops_answer_tokens=ANSWER_TOKENS,
        flops_prompt_tokens=prompt["input_ids"].shape[1],
        memory=measure.answering_memory(side.path, rows[0], max_new_tokens=limit) if memory else None,
    )
