"""A finished run made again from what its folder says, and held against it: weights, answers, results, machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from slimlmm import certificate, pipeline, recipe
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, Interval, Record, drop
from slimlmm.files import digests, read_json
from slimlmm.progress import Reporter
from slimlmm.results import File, Results
from slimlmm.runfolder import IDENTITY, OtherRunError, claim
from slimlmm.settings import parse_yaml
from slimlmm.snapshot import EVALUATION

#: what of results is not of the arithmetic: times, the machine, memory, where things lie
APART = frozenset(
    {"seconds", "environment", "totals", "name", "memory", "command", "created", "latency", "throughput", "ratios"}
)
#: what of a machine may differ without a bit of the results doing so
ALIKE = frozenset({"created", "memory", "git"})
#: answers that a run keeps
ANSWERS = ("teacher-validation.json", "teacher-test.json", "student-test.json")
RECORD = "reproduction.json"
ON_A_GPU = (
    "on a GPU sums of atomics (index_add, scatter in backward passes), the choice of kernels, fused attention and reduced "
    "precision may differ from run to run"
)
Outcome = Literal["to the byte", "same answers", "within chance", "different"]


class Difference(Record):
    """Something that is not alike."""

    what: str = Field(description="Field, file or key.")
    first: str = Field(description="In the run that was reproduced.")
    again: str = Field(description="Now.")


#: rows that another run had the teacher asked about, in other company, have other last bits
SHARED = Difference(what="cache", first="shared with other runs", again="its own")


class Reproduction(File):
    """A run against the same run made again."""

    WHAT: ClassVar[str] = "record of a reproduction"

    run: str = Field(description="The run that was reproduced.")
    again: str = Field(description="Folder of the run that was made now.")
    outcome: Outcome = Field(
        description="to the byte: files of final/ (but the dated certificate), answers and results are equal; same answers: "
        "every answer is; within chance: the student's accuracy is, by the paired interval; different: it is not."
    )
    machine: tuple[Difference, ...] = Field(
        description="What of machine, versions and cache differs; empty where all bits must be equal."
    )
    files: tuple[Difference, ...] = Field(description="Files of final/ by SHA-256.")
    answers: dict[str, int] = Field(description="Rows whose answers differ, by file.")
    results: tuple[Difference, ...] = Field(description="Entries of results.json, times apart.")
    difference: Interval = Field(
        description="Student's accuracy then minus now on the same test rows, paired bootstrap over pictures, 0 to 1."
    )
    seconds: tuple[float | None, float | None] = Field(description="Wall time of rounds and evaluations, then and now.")

    @property
    def failed(self) -> bool:
        """Whether this should not be: other bits on the same CPU and versions, or another accuracy anywhere."""
        return self.outcome == "different" or (self.outcome != "to the byte" and not self.machine and not on_a_gpu())


def on_a_gpu() -> bool:
    """Tell whether runs calculate on a GPU here."""
    return torch.cuda.is_available()


def reproduce(
    run: Path,
    out: Path,
    *,
    model: str | None = None,
    source: Path | None = None,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> Reproduction:
    """Make a finished run again in `out`, from its own recipe, model and data (or where these lie now), and compare both.

    Raises:
        UserError: the run is not finished or does not say what it began with, model or data are others by their hashes, or it
            ran code of its model and that is not allowed here.
    """
    signed, settings = signed_of(run)
    first = Results.load(run / "results.json")
    if first.student is None or not (run / "final").is_dir():
        raise UserError(f"{run}: is not finished. Give its command again: {first.command or 'slimlmm compress ...'}")
    given = signed.get("given", {})
    model, source = model or given.get("model"), source or (Path(given["data"]) if "data" in given else None)
    if model is None or source is None:
        raise UserError(f"{run}/run.json does not say where model and data lie; give them with --model and --data.")
    if given.get("trust_remote_code") and not trust_remote_code:
        raise UserError(f"{run} ran code that came with its model; --trust-remote-code lets that code run again.")
    if out.resolve() == run.resolve():
        raise UserError(f"--out {out} is the run itself; choose another folder.")
    torch.set_num_threads(max(1, min(first.environment.threads, os.cpu_count() or 1)))
    try:
        claim(out, {key: value for key, value in signed.items() if key != "given"}, given | {"reproduces": str(run)})
        again = pipeline.run(model, source, out, settings, trust_remote_code=trust_remote_code, tell=tell)
    except OtherRunError as error:
        raise UserError(
            f"{run} began with something else ({error.told}). Give --model and --data as they were then."
        ) from error
    found = compared(run, out, first, again, shared=bool(given.get("shared_cache")))
    found.save(out / RECORD)
    return found


def signed_of(run: Path) -> tuple[dict[str, Any], recipe.Recipe]:
    """Return what a run folder is signed with, and its recipe as it was given.

    Raises:
        UserError: the folder is not that of a run of compress.
    """
    record = run / "run.json"
    if not record.is_file():
        raise UserError(f"{run}: is no run of slimlmm compress: there is no run.json.")
    signed = read_json(IDENTITY, record)
    wanted = {"model": str, "data": str, "recipe": str, "given": dict}
    missing = [name for name, kind in wanted.items() if not isinstance(signed.get(name, kind()), kind)]
    missing += [name for name in ("model", "data", "recipe") if name not in signed]
    given = signed.get("given", {})
    missing += [f"given.{name}" for name in ("model", "data") if isinstance(given, dict) and not _is_text(given, name)]
    if missing:
        raise UserError(f"{record}: has no {', '.join(sorted(missing))}; only runs of compress can be reproduced.")
    return signed, recipe.parse(parse_yaml(signed["recipe"], str(record)), str(record))


def _is_text(given: Mapping[str, Any], name: str) -> bool:
    return isinstance(given.get(name, ""), str)


def compared(run: Path, out: Path, first: Results, again: Results, *, shared: bool = False) -> Reproduction:
    """Hold two finished runs against each other; the first may have `shared` what the teacher said with other runs."""
    files = unlike(_final(run), _final(out))
    figures = unlike(_plain(first), _plain(again))
    pairs = {name: [read_json(EVALUATION, one / name) for one in (run, out)] for name in ANSWERS}
    answers = {name: _unlike(*pair) for name, pair in pairs.items()}
    difference = drop(*pairs["student-test.json"])
    outcome: Outcome = "different"
    if not (files or figures or any(answers.values())):
        outcome = "to the byte"
    elif not any(answers.values()):
        outcome = "same answers"
    elif difference.ends[0] <= 0 <= difference.ends[1]:
        outcome = "within chance"
    machines = [
        {key: value for key, value in one.environment.model_dump().items() if key not in ALIKE}
        for one in (first, again)
    ]
    return Reproduction(
        run=str(run),
        again=str(out),
        outcome=outcome,
        machine=(*unlike(*machines), *([SHARED] if shared else [])),
        files=files,
        answers=answers,
        results=figures,
        difference=difference,
        seconds=(first.totals and first.totals.seconds, again.totals and again.totals.seconds),
    )


def left_by(run: Path) -> dict[str, Any]:
    """Return all that a finished run left and that must be equal to the byte: files, answers, results without what is `APART`."""
    answers = {name: without(json.loads((run / name).read_text(encoding="utf-8"))) for name in ANSWERS}
    return {"files": _final(run), "results": _plain(Results.load(run / "results.json")), "answers": answers}


def unlike(first: Any, again: Any) -> tuple[Difference, ...]:
    """Return every leaf in which two records differ."""
    return tuple(_differences(_flat(first), _flat(again)))


def without(found: Any) -> Any:
    """Return a record without the keys in `APART`, at any depth."""
    if isinstance(found, dict):
        return {key: without(value) for key, value in found.items() if key not in APART}
    return [without(one) for one in found] if isinstance(found, list) else found


def _final(run: Path) -> dict[str, str]:
    return {name: value for name, value in digests(run / "final").items() if name != certificate.NAME}


def _plain(results: Results) -> Any:
    return without(results.model_dump(mode="json"))


def _unlike(one: Evaluation, other: Evaluation) -> int:
    return sum(a != b for a, b in zip(one.answers, other.answers, strict=True))


def _flat(found: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a record by their dotted path."""
    if isinstance(found, Mapping):
        return {key: leaf for name, value in found.items() for key, leaf in _flat(value, f"{path}{name}.").items()}
    if isinstance(found, list | tuple):
        return {key: leaf for index, value in enumerate(found) for key, leaf in _flat(value, f"{path}{index}.").items()}
    return {path.removesuffix("."): found}


def _differences(first: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[Difference]:
    for name in sorted(first.keys() | again.keys()):
        if first.get(name) != again.get(name):
            yield Difference(what=name, first=str(first.get(name)), again=str(again.get(name)))
