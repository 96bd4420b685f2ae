"""An exported student against its teacher in eager PyTorch: answers of every row, and time from picture file to answer.

    python benchmarks/export.py --data DATA --out benchmarks/results/export-2026-11-28.json [--rows 2000] [--calls 60]

The bundled teacher and student, and exports of the student (ONNX Runtime and OpenVINO, fp32 and int8), made and checked by what
`slimlmm export` calls. Accuracy: the same test rows for all, exact match, paired bootstrap over pictures; exports answer them
one at a time. Time: one row at a time, all sides in turns (A B C ... A B C ...) in one process with the same threads; what
counts is the ratio to the teacher within a turn, because other jobs may share the machine. Rows are those of
`slimlmm adreview DATA --train 40000 --val 500 --test 2000`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import Field

from slimlmm import checkpoint, data, measure
from slimlmm.data import Row
from slimlmm.demo import bundled
from slimlmm.evaluate import Evaluation, Interval, Record, Score, agreement, answer, answer_limit, drop, evaluate
from slimlmm.exporting import runner
from slimlmm.exporting.export import Order, export
from slimlmm.measure import Side
from slimlmm.progress import reporter
from slimlmm.results import File

EXPORTS = (("onnx", False), ("onnx", True), ("openvino", False), ("openvino", True))
TEACHER, STUDENT = "teacher, eager PyTorch", "student, eager PyTorch"


class Time(Record):
    """Picture file to answer text, batch 1."""

    p50: float = Field(description="Median seconds.")
    p95: float = Field(description="95th percentile of seconds.")
    fastest: float = Field(description="Least seconds: what other jobs disturbed least.")
    ratio: float = Field(description="Median of the teacher over median of this one: times faster.")
    ratio_quartiles: tuple[float, float, float] = Field(description="Quartiles of that ratio within the turns.")
    ratio_fastest: float = Field(description="Least seconds of the teacher over those of this one.")
    cpu_p50: float = Field(description="Median CPU seconds of the process: what other jobs leave out of account.")
    ratio_cpu: float = Field(description="Median CPU seconds of the teacher over those of this one.")


class One(Record):
    """One way to answer."""

    name: str = Field(description="Model and runtime.")
    accuracy: Score = Field(description="Exact match on the test rows.")
    drop: Interval = Field(description="Accuracy of the student in eager PyTorch minus this one's.")
    agreement: float = Field(description="Share of rows answered as by the student in eager PyTorch.")
    bytes: int = Field(description="Bytes on disk.")
    latency: dict[str, Time] = Field(description="By threads.")


class Found(File):
    """What this benchmark writes."""

    n: int = Field(description="Test rows.")
    calls: int = Field(description="Turns that were timed, a row each.")
    seed: int = Field(description="Seed of the rows and of the bootstrap.")
    fingerprint: str = Field(description="Hash over the rows.")
    load_average: tuple[float, float, float] = Field(
        description="Load averages of the machine (1, 5, 15 minutes) at the end."
    )
    libraries: dict[str, str] = Field(description="Versions of the runtimes.")
    models: tuple[One, ...] = Field(description="Every way, the teacher first.")
    environment: measure.Environment = Field(description="Machine and versions.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=60, help="turns; each answers one row by every side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def timed(sides: Mapping[str, Side], rows: Sequence[Row], turns: int, limit: int) -> dict[str, Time]:
    """Answer one row by every side in turns; the first three turns warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(turns + 3):
        row = rows[turn % len(rows)]
        for name, side in sides.items():
            start, spent = time.perf_counter(), time.process_time()
            answer(side.model, side.processor, [row], limit)
            seconds[name].append((time.perf_counter() - start, time.process_time() - spent))
    kept = {name: np.array(values[3:]) for name, values in seconds.items()}
    return {name: summary(kept[TEACHER], values) for name, values in kept.items()}


def summary(teacher: Any, values: Any) -> Time:
    """Summarise turns x (wall seconds, CPU seconds) of a side against those of the teacher."""
    p50, cpu = (float(one) for one in np.median(values, axis=0))
    low, middle, high = (float(one) for one in np.quantile(teacher[:, 0] / values[:, 0], (0.25, 0.5, 0.75)))
    return Time(
        p50=p50,
        p95=float(np.quantile(values[:, 0], 0.95)),
        fastest=float(values[:, 0].min()),
        ratio=float(np.median(teacher[:, 0])) / p50,
        ratio_quartiles=(low, middle, high),
        ratio_fastest=float(teacher[:, 0].min() / values[:, 0].min()),
        cpu_p50=cpu,
        ratio_cpu=float(np.median(teacher[:, 1])) / cpu,
    )


def answered(plain: bool, side: Side, rows: Sequence[Row], limit: int) -> Evaluation:
    """Answer all rows; exports one at a time, as they are timed: in int8 a range of activations is that of the whole batch."""
    return evaluate(side.model, side.processor, rows, batch_size=32 if plain else 1, max_new_tokens=limit)


def name_of(target: str, int8: bool) -> str:
    return f"student, {target}, {'int8' if int8 else 'fp32'}"


def exports(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write all exports of the student, whatever they lose: the accuracy here is the figure, not a limit."""
    made: dict[str, Path] = {}
    libraries: dict[str, str] = {}
    for target, int8 in EXPORTS:
        out = folder / f"{target}-{int8}"
        order = Order(target=target, int8=int8, out=out, rows=20, calls=1, max_drop=100.0, threads=1, seed=options.seed)
        with reporter(True) as tell:
            manifest = export(str(student_folder()), options.data, order, tell)
        made[name_of(target, int8)] = out
        libraries |= manifest.libraries
    return made, libraries


def student_folder() -> Path:
    return bundled("student") / "model"


def run(options: argparse.Namespace) -> Found:
    torch.set_num_threads(1)
    plain = {TEACHER: checkpoint.load(bundled("teacher")), STUDENT: checkpoint.load(student_folder())}
    rows = data.sample(data.load(options.data).need("test", options.data), options.rows, options.seed)
    # a row from every picture in turn, so that no picture is timed twice running
    spread = data.spread(rows, options.calls, 1, options.seed)
    limit = answer_limit(plain[STUDENT].processor, rows)
    latency: dict[str, dict[str, Time]] = {}
    with TemporaryDirectory() as scratch:
        made, libraries = exports(options, Path(scratch))
        for threads in options.threads:
            torch.set_num_threads(threads)
            sides: dict[str, Side] = {
                **plain,
                **{name: runner.load(path, threads=threads) for name, path in made.items()},
            }
            for name, times in timed(sides, spread, options.calls, limit).items():
                latency.setdefault(name, {})[str(threads)] = times
        torch.set_num_threads(1)
        sides = {**plain, **{name: runner.load(path, threads=1) for name, path in made.items()}}
        answers = {name: answered(name in plain, side, rows, limit) for name, side in sides.items()}
        folders = {TEACHER: plain[TEACHER].path, STUDENT: plain[STUDENT].path, **made}
        models = tuple(one(name, answers, folders[name], latency[name], options.seed) for name in sides)
    return Found(
        n=len(rows),
        calls=options.calls,
        seed=options.seed,
        fingerprint=data.fingerprint(rows),
        load_average=os.getloadavg(),
        libraries=libraries,
        models=models,
        environment=measure.environment(),
    )


def one(name: str, answers: Mapping[str, Evaluation], folder: Path, latency: dict[str, Time], seed: int) -> One:
    mine, student = answers[name], answers[STUDENT]
    return One(
        name=name,
        accuracy=mine.summary.overall,
        drop=drop(student, mine, seed=seed),
        agreement=agreement(student, mine),
        bytes=measure.disk_bytes(folder),
        latency=latency,
    )


def main() -> None:
    options = arguments()
    found = run(options)
    found.save(options.out)
    for model in found.models:
        print(
            f"{model.name}: {100 * model.accuracy.accuracy:.2f} %, {-100 * model.drop.mean:+.2f} points, {model.bytes:,} bytes"
        )
        for threads, at in model.latency.items():
            quartiles = "/".join(f"{value:.2f}" for value in at.ratio_quartiles)
            wall = (
                f"p50 {1e3 * at.p50:.1f} ms, {at.ratio:.2f}x (quartiles {quartiles}, fastest {at.ratio_fastest:.2f}x)"
            )
            print(f"  {threads} thread(s): {wall}, CPU {1e3 * at.cpu_p50:.1f} ms, {at.ratio_cpu:.2f}x")


if __name__ == "__main__":
    main()
