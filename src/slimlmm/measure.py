"""Measurement: parameters, FLOPs, time, memory and disk, each measured or null, never guessed.

Time runs from the picture file to the answer text: opening, preprocessing, generation and decoding all count.
Two models are compared by alternation (A B A B ...) inside one process, so that a drifting machine hits both.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from pydantic import Field

from slimlmm.checkpoint import load
from slimlmm.costs import flop_counter
from slimlmm.data import Row
from slimlmm.decoding import generation_settings, nothing_else
from slimlmm.errors import UserError
from slimlmm.evaluate import Record, answer, answer_limit, evaluating
from slimlmm.parts import parts_of

#: versions that decide a figure
LIBRARIES = ("slimlmm", "torch", "transformers", "tokenizers", "pillow", "numpy")


class Side(Protocol):
    """One side of a comparison: a model with its processor (`checkpoint.Loaded` is one)."""

    @property
    def model(self) -> Any:
        """Stock transformers model."""

    @property
    def processor(self) -> Any:
        """Its processor."""


class Timing(Record):
    """Wall time of one call, over several calls."""

    p50: float = Field(description="Median seconds per call.")
    p95: float = Field(description="95th percentile of seconds per call.")
    n: int = Field(description="Calls timed, warm-up calls not counted.")
    batch_size: int = Field(description="Rows answered by one call.")
    rows_per_second: float = Field(description="batch_size / p50.")


class Comparison(Record):
    """Two models timed in turns (A B A B ...) on the same rows in one process."""

    first: Timing = Field(description="The first model (teacher).")
    second: Timing = Field(description="The second model (student).")
    ratio: float = Field(description="Median seconds of the first over median seconds of the second: times faster.")
    ratio_min: float = Field(description="Smallest ratio among the pairs of calls.")
    ratio_median: float = Field(description="Median ratio among the pairs of calls.")
    ratio_max: float = Field(description="Largest ratio among the pairs of calls.")


class Memory(Record):
    """High-water mark of memory during one call."""

    kind: Literal["rss", "cuda"] = Field(
        description="rss: resident memory of the process; cuda: allocated on the device."
    )
    before: int = Field(description="Bytes just before the call.")
    peak: int = Field(description="Highest number of bytes during the call.")


class Environment(Record):
    """Where and with what the figures were measured; null where the machine does not say."""

    created: str = Field(description="UTC time, ISO 8601.")
    python: str = Field(description="Python version.")
    versions: dict[str, str] = Field(description="Versions of the libraries that decide the figures.")
    git: str | None = Field(description="Commit of the slimlmm source, with '+' if it has changes; null if installed.")
    system: str = Field(description="Operating system and machine architecture.")
    cpu: str | None = Field(description="CPU model.")
    cores: int | None = Field(description="CPU cores that this process may use.")
    threads: int = Field(description="Threads that torch uses for one operation.")
    memory: int = Field(description="Bytes of main memory.")
    gpu: str | None = Field(description="GPU model, null if torch sees none.")
    gpu_memory: int | None = Field(description="Bytes of GPU memory.")


def parameters(model: Any) -> dict[str, int]:
    """Return parameters by part, and their `total`; tied ones count once (as embeddings), buffers do not.

    Parts: vision, projector, qformer, text (blocks and final norm), embeddings (token and position tables of
    the text tower), head, other (`parts.parts_of`). Parts that the model does not have are left out.
    """
    counts = dict.fromkeys(("vision", "projector", "qformer", "text", "embeddings", "head", "other"), 0)
    parts = parts_of(model.config)
    for name, parameter in model.named_parameters():
        part = parts[name]
        counts["embeddings" if part == ("text", "embeddings") else part[0]] += parameter.numel()
    found = {part: count for part, count in counts.items() if count}
    return {**found, "total": sum(found.values())}


def flops(model: Any, processor: Any, batch: Any, answer_tokens: int = 8) -> float:
    """Return floating-point operations per answer: one prefill and `answer_tokens` - 1 decoding steps.

    Counted while the model really runs (matrix products, convolutions and attention; a multiply-add is 2),
    with a key-value cache and greedy decoding forced to exactly `answer_tokens` tokens; divided by the rows
    of the batch. `batch`: what `evaluate.encode` returns. Padding counts, so a batch of one row is the plain
    figure.
    """
    settings = generation_settings(model, processor, answer_tokens) | {"min_new_tokens": answer_tokens}
    inputs = batch.to(model.device, dtype=model.dtype)
    counter = flop_counter()
    with evaluating(model), _frozen(model), nothing_else(model), torch.no_grad(), counter:
        model.generate(**inputs, **settings)
    return float(counter.get_total_flops() / len(inputs["input_ids"]))


def latency(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    n: int = 50,
    warmup: int = 3,
    max_new_tokens: int | None = None,
) -> Timing:
    """Time `n` rows one at a time, picture file to answer text; rows in order, and again from the start."""
    return throughput(model, processor, rows, batch_size=1, n=n, warmup=warmup, max_new_tokens=max_new_tokens)


def throughput(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    n: int = 5,
    warmup: int = 1,
    max_new_tokens: int | None = None,
) -> Timing:
    """Time `n` batches of `batch_size` rows, picture files to answer texts; see `Timing.rows_per_second`."""
    limit = max_new_tokens or answer_limit(processor, rows)
    with evaluating(model):
        seconds = [_seconds(model, processor, batch, limit) for batch in islice(_batches(rows, batch_size), warmup + n)]
    return _timing(seconds[warmup:], batch_size)


def compare(
    a: Side,
    b: Side,
    rows: Sequence[Row],
    *,
    batch_size: int = 1,
    n: int = 50,
    warmup: int = 3,
    max_new_tokens: int | None = None,
) -> Comparison:
    """Time two models in turns on the same batches: A B A B ..., `n` pairs after `warmup` pairs.

    ratio = median(seconds of a) / median(seconds of b): how many times b is faster. The spread is that of the
    ratios within the pairs. Both answer up to the same number of tokens.
    """
    limit = max_new_tokens or max(answer_limit(side.processor, rows) for side in (a, b))
    with evaluating(a.model), evaluating(b.model):
        pairs = [
            [_seconds(side.model, side.processor, batch, limit) for side in (a, b)]
            for batch in islice(_batches(rows, batch_size), warmup + n)
        ]
    first, second = np.array(pairs[warmup:]).T
    ratios = first / second
    return Comparison(
        first=_timing(first, batch_size),
        second=_timing(second, batch_size),
        ratio=float(np.median(first) / np.median(second)),
        ratio_min=float(ratios.min()),
        ratio_median=float(np.median(ratios)),
        ratio_max=float(ratios.max()),
    )


def peak_memory(call: Callable[[], object], *, device: torch.device | str = "cpu", interval: float = 0.002) -> Memory:
    """Return the memory high-water mark while `call` runs.

    On a CUDA device torch's own exact mark of allocated bytes; else the resident memory of this process,
    sampled every `interval` seconds by a thread and raised to the kernel's own mark when the call set a new
    one for the process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return Memory(kind="cuda", before=before, peak=torch.cuda.max_memory_allocated(device))
    process, mark = psutil.Process(), _resident_mark()
    before = process.memory_info().rss
    samples, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    after = _resident_mark()
    raised = [after] if mark is not None and after is not None and after > mark else []
    return Memory(kind="rss", before=before, peak=max([*samples, process.memory_info().rss, *raised]))


def answering_memory(
    folder: str | Path,
    row: Row,
    *,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    threads: int | None = None,
) -> Memory:
    """Return the memory high-water mark of a new process that loads a checkpoint folder and answers one row.

    Nothing else that this process holds is counted; `Memory.before` is what Python and the libraries take.
    """
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "picture"
        picture.write_bytes(row.picture_bytes())
        order = {
            "folder": str(folder),
            "picture": str(picture),
            "question": row.question,
            "system": row.system,
            "limit": max_new_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device or "cpu",
            "threads": threads or torch.get_num_threads(),
        }
        command = [sys.executable, "-m", "slimlmm.measure", json.dumps(order)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the memory of {folder} could not be measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return Memory.model_validate_json(done.stdout.splitlines()[-1])


def disk_bytes(folder: str | Path) -> int:
    """Return the bytes of all files of a checkpoint folder: weights, configuration, tokenizer."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def environment() -> Environment:
    """Return what is known of this machine and these versions."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return Environment(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        versions={name: found for name in LIBRARIES if (found := _version(name)) is not None},
        git=_git_commit(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        gpu=gpu.name if gpu else None,
        gpu_memory=gpu.total_memory if gpu else None,
    )


def _load_and_answer(order: dict[str, Any]) -> Memory:
    """Do what `answering_memory` asks of the new process."""
    torch.set_num_threads(order["threads"])
    row = Row("row", Path(order["picture"]), order["question"], "", system=order["system"])

    def call() -> None:
        side = load(order["folder"], dtype=getattr(torch, order["dtype"]), device=order["device"])
        answer(side.model, side.processor, [row], order["limit"])

    return peak_memory(call, device=order["device"])


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no parameter require a gradient (the counter's module tracker stumbles over views of those)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Yield batches of `size` rows in order, from the start again at the end, for ever."""
    if not rows:
        raise UserError("nothing to measure on: there are no rows.")
    endless = cycle(rows)
    while True:
        yield list(islice(endless, size))


def _seconds(model: Any, processor: Any, rows: Sequence[Row], limit: int) -> float:
    """Return the seconds that one batch takes from picture files to texts (decoding waits for the device)."""
    start = time.perf_counter()
    answer(model, processor, rows, limit)
    return time.perf_counter() - start


def _timing(seconds: Any, batch_size: int) -> Timing:
    """Summarise seconds per call."""
    p50, p95 = (float(q) for q in np.quantile(seconds, [0.5, 0.95]))
    return Timing(p50=p50, p95=p95, n=len(seconds), batch_size=batch_size, rows_per_second=batch_size / p50)


def _resident_mark() -> int | None:
    """Return the kernel's high-water mark of resident bytes of this process; None where there is none."""
    try:
        import resource
    except ImportError:
        return None
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if platform.system() == "Darwin" else mark * 1024


def _version(name: str) -> str | None:
    """Return the installed version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the repository that tracks this very file, with '+' if it has changes."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str | None:
    """Return the CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


if __name__ == "__main__":
    print(_load_and_answer(json.loads(sys.argv[1])).model_dump_json())
