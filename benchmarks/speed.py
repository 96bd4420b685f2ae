"""Speed of a teacher against its student, in turns in one process: latency and throughput.

    python benchmarks/speed.py TEACHER STUDENT --data DATA --out speed.json [--n 50] [--batches 6]

Rows of the test split are drawn with the seed; times run from picture file to answer text, at batch 1 and at
batch 32. The record holds both timings with n, the ratio of medians with its spread, the settings,
machine and versions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from pydantic import Field

from slimlmm import checkpoint, data, measure
from slimlmm.errors import UserError
from slimlmm.evaluate import Record, answer_limit


class Speed(Record):
    """What this benchmark writes."""

    teacher: str = Field(description="Folder or id of the first model.")
    student: str = Field(description="Folder or id of the second model.")
    data: str = Field(description="Data set.")
    rows: int = Field(description="Rows drawn from the test split.")
    seed: int = Field(description="Seed of the draw.")
    max_new_tokens: int = Field(description="Answers were cut at this many tokens.")
    dtype: str = Field(description="Number format of weights and activations.")
    device: str = Field(description="Device that both models ran on.")
    latency: measure.Comparison = Field(description="Batch 1.")
    throughput: measure.Comparison = Field(description="Larger batch.")
    environment: measure.Environment = Field(description="Machine and versions.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=50, help="pairs of calls at batch 1")
    parser.add_argument("--batches", type=int, default=6, help="pairs of calls at the larger batch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def run(options: argparse.Namespace) -> Speed:
    if options.threads:
        torch.set_num_threads(options.threads)
    kind = {"dtype": getattr(torch, options.dtype), "device": options.device}
    teacher, student = (checkpoint.load(name, **kind) for name in (options.teacher, options.student))
    test = data.load(options.data).need("test", options.data)
    rows = data.sample(test, max(options.n, options.batches * options.batch_size), options.seed)
    limit = max(answer_limit(side.processor, rows) for side in (teacher, student))
    return Speed(
        teacher=options.teacher,
        student=options.student,
        data=options.data,
        rows=len(rows),
        seed=options.seed,
        max_new_tokens=limit,
        dtype=options.dtype,
        device=options.device,
        latency=measure.compare(teacher, student, rows, n=options.n, max_new_tokens=limit),
        throughput=measure.compare(
            teacher,
            student,
            rows,
            batch_size=options.batch_size,
            n=options.batches,
            warmup=1,
            max_new_tokens=limit,
        ),
        environment=measure.environment(),
    )


def main() -> int:
    options = arguments()
    try:
        found = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for name, one in (("latency", found.latency), ("throughput", found.throughput)):
        a, b = one.first, one.second
        print(
            f"{name}, batch {a.batch_size}, n {a.n}: {a.p50:.4f} s -> {b.p50:.4f} s, {one.ratio:.2f}x "
            f"(pairs {one.ratio_min:.2f} to {one.ratio_max:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
