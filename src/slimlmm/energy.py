"""Energy of an answer, by the machine's own counters as CodeCarbon reads them: NVML's of a GPU, RAPL's of processor packages.

Measured, or refused. Only CodeCarbon's counters are used, never its tracker, which guesses from a table of processors where there
is no counter. Watts that the user declares are the one other way; what comes of them says so in every figure.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from scipy import stats

from slimlmm.annual import KWH
from slimlmm.budget import WARMUP, answerer, freed
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import Record, answer, answer_limit, evaluating
from slimlmm.measure import Side

#: seconds that one reading spans at least: counters are renewed up to every tenth of a second
SPAN, BENCH_SPAN = 0.5, 2.0
#: most readings of one shape, and least readings of one model
READINGS = 5
#: rows that one call answers in `bench`
BATCHES = (1, 32)
#: where Linux shows the counters of processor packages
POWERCAP = Path("/sys/class/powercap")
NOT_COUNTED = (
    "All that the {name} used meanwhile is in these joules, by whatever process, idle power included; memory, fans and power "
    "supply may not be."
)

Basis = Literal["measured", "declared"]


class Counter(Protocol):
    """A counter of energy that only rises."""

    @property
    def name(self) -> str:
        """What it counts, in words."""

    @property
    def basis(self) -> Basis:
        """Whether a sensor counts, or somebody said how many watts there are."""

    def joules(self) -> float:
        """Return the joules since some moment in the past."""


class Declared:
    """No sensor: so many watts, as the user declares, at every moment."""

    basis: Basis = "declared"

    def __init__(self, watts: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0 < watts < float("inf"):
            raise UserError(f"--watts {watts:g}: give the watts of the device while it answers, a number above 0.")
        self.name = f"{watts:g} W as declared, not measured"
        self._watts, self._clock = watts, clock

    def joules(self) -> float:
        """Return watts times the seconds of the clock."""
        return self._watts * self._clock()


class Rapl:
    """All processor packages that Linux shows; CodeCarbon follows restarts, and leaves out what another counter holds already."""

    basis: Basis = "measured"

    def __init__(self, root: Path = POWERCAP) -> None:
        self.name = "processor packages (RAPL)"
        cpu = _codecarbon("cpu")
        try:
            self._rapl = cpu.IntelRAPL(rapl_dir=str(root / "intel-rapl" / "subsystem"))
        except (OSError, SystemError) as error:
            raise UserError(f"{root} shows no processor package") from error
        self._rapl.start()
        self._total, self._last = 0.0, time.perf_counter()
        if not self._spent():
            raise UserError(
                f"{root} shows no processor package whose energy_uj may be read (the system's owner can allow it)"
            )

    def joules(self) -> float:
        """Return the joules of all packages since the counter was made."""
        self._total += KWH * sum(self._spent())
        return self._total

    def _spent(self) -> list[float]:
        """Return the kilowatt-hours of each package since the last look."""
        now = time.perf_counter()
        found = self._rapl.get_cpu_details(_codecarbon("units").Time.from_seconds(now - self._last))
        self._last = now
        return [value for name, value in found.items() if name.startswith("Processor Energy")]


class Gpu:
    """The energy counter of one CUDA device, read when the device has nothing left to do."""

    basis: Basis = "measured"

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.name, self._device = properties.name, device
        seen = _codecarbon("gpu").AllGPUDevices().devices
        mine = [one for one in seen if str(one.get_static_details()["uuid"]).endswith(str(properties.uuid))]
        if not mine:
            raise UserError(f"{self.name} is not among the {len(seen)} GPUs that NVML shows")
        self._gpu, self._total, self._last = mine[0], 0.0, time.perf_counter()
        self._gpu.start()
        if self._gpu.last_energy is None:
            raise UserError(f"{self.name} does not tell its energy")

    def joules(self) -> float:
        """Return the joules since the counter was made."""
        torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._gpu.delta(_codecarbon("units").Time.from_seconds(now - self._last))
        self._last = now
        self._total += KWH * self._gpu.energy_delta.kWh
        return self._total


def _codecarbon(part: str) -> Any:
    """Return a module of `codecarbon.core`; what it logs is left out, because what it cannot read is refused here."""
    try:
        module = importlib.import_module(f"codecarbon.core.{part}")
    except ImportError as error:
        raise UserError("the package codecarbon is not installed (pip install 'slimlmm[energy]')") from error
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return module


def found_counter(device: torch.device, root: Path = POWERCAP) -> Counter:
    """Return the energy counter of a device.

    Raises:
        UserError: there is none that can be read; the message says why.
    """
    try:
        return Gpu(device) if device.type == "cuda" else Rapl(root)
    except UserError as reason:
        raise UserError(f"no energy counter on this machine: {reason}") from reason


def counter_of(device: torch.device, root: Path = POWERCAP) -> Counter:
    """Return the energy counter of a device for `plan --energy-j`; see `found_counter`."""
    try:
        return found_counter(device, root)
    except UserError as reason:
        raise UserError(f"{reason}; give another budget.") from reason


class Reading(NamedTuple):
    """What one answer took, over as many as last long enough."""

    joules: float
    seconds: float


def reading(
    counter: Counter, call: Callable[[], object], clock: Callable[[], float] = time.perf_counter, span: float = SPAN
) -> Reading:
    """Return joules and seconds of one call, over as many as last `span` seconds.

    Raises:
        UserError: the counter stood still meanwhile.
    """
    before, began, count = counter.joules(), clock(), 0
    while count == 0 or clock() - began < span:
        call()
        count += 1
    spent, lasted = counter.joules() - before, clock() - began
    if spent <= 0:
        raise UserError(f"the energy counter of {counter.name} stood still over {count} answers in {lasted:.1f} s")
    return Reading(spent / count, lasted / count)


def joules_of(
    counter: Counter, clock: Callable[[], float] = time.perf_counter
) -> Callable[[Sequence[Any], torch.device, int], list[list[float]]]:
    """Return a function like `budget.answer_seconds` that counts joules an answer, in turns.

    One reading is the counter's difference over answers that last `SPAN` seconds or more, divided by their number; at most
    `READINGS` of each shape.
    """

    def measured(configs: Sequence[Any], device: torch.device, n: int) -> list[list[float]]:
        sides = [answerer(config, device) for config in configs]
        for answering in sides:
            for _ in range(WARMUP):
                answering()
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(min(n, READINGS)):
            for answering, values in zip(sides, found, strict=True):
                try:
                    values.append(reading(counter, answering, clock).joules)
                except UserError as reason:
                    raise UserError(f"{reason}; give another budget.") from reason
        del sides, answering
        freed(device)
        return found

    return measured


class PerRequest(Record):
    """Energy of one request, over several readings."""

    basis: Basis = Field(description="measured: by a sensor; declared: seconds times watts that the user stated.")
    source: str = Field(description="The counter, or the declared watts.")
    joules: float = Field(description="Mean joules a request: of a reading, divided by its requests.")
    sd: float = Field(description="Standard deviation of the readings, joules a request.")
    low: float = Field(description="Lower end of the 95 % interval of the mean (Student's t over the readings).")
    high: float = Field(description="Upper end of it.")
    n: int = Field(description="Readings; each lasts 2 s or more and answers one batch again and again.")
    seconds: float = Field(description="Mean seconds that a request holds the device: of a batch, divided by its rows.")


class InTurns(Record):
    """Energy of one model or two, read in turns on the same rows."""

    batch_size: int = Field(description="Rows answered by one call.")
    first: PerRequest = Field(description="The model that was asked for.")
    second: PerRequest | None = Field(description="The one of --against.")
    ratio: float | None = Field(description="Joules of the first over joules of the second.")


class Energy(Record):
    """What `bench` tells of energy; measured and declared figures never share a field."""

    measured: list[InTurns] | None = Field(description="By this machine's counter, per batch size; null without one.")
    reason: str | None = Field(description="Why nothing was measured.")
    declared: list[InTurns] | None = Field(description="By --watts alone; null unless that was given.")


def bench(
    sides: Sequence[Side],
    rows: Sequence[Row],
    stated: Declared | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Measure the energy of a request of one model or two, in turns; by declared watts also, where there are any."""

    def told(counter: Counter) -> list[InTurns]:
        return [in_turns(sides, rows, size, counter, clock=clock, span=BENCH_SPAN) for size in BATCHES]

    measured, reason = None, None
    try:
        measured = told(found_counter(sides[0].model.device))
    except UserError as error:
        reason = str(error)
    declared = None if stated is None else told(stated)
    return Energy(measured=measured, reason=reason, declared=declared)


def in_turns(
    sides: Sequence[Side],
    rows: Sequence[Row],
    batch_size: int,
    counter: Counter,
    *,
    clock: Callable[[], float] = time.perf_counter,
    span: float,
) -> InTurns:
    """Read the energy of each side in turns: reading r of every side answers batch r, until `span` seconds have passed.

    Raises:
        UserError: the counter stood still.
    """
    limit = max(answer_limit(side.processor, rows) for side in sides)
    found: list[list[Reading]] = [[] for _ in sides]
    endless = cycle(rows)
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluating(side.model))
            answer(side.model, side.processor, rows[:batch_size], limit)
        for _ in range(READINGS):
            batch = list(islice(endless, batch_size))
            for side, values in zip(sides, found, strict=True):
                call = lambda side=side, batch=batch: answer(side.model, side.processor, batch, limit)  # noqa: E731
                values.append(reading(counter, call, clock, span))
    told = [_per_request(values, batch_size, counter) for values in found]
    second = told[1] if len(told) > 1 else None
    ratio = told[0].joules / second.joules if second else None
    return InTurns(batch_size=batch_size, first=told[0], second=second, ratio=ratio)


def _per_request(values: Sequence[Reading], batch_size: int, counter: Counter) -> PerRequest:
    joules = np.array([value.joules for value in values]) / batch_size
    sd = float(joules.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / len(values) ** 0.5
    mean = float(joules.mean())
    return PerRequest(
        basis=counter.basis,
        source=counter.name,
        joules=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        n=len(values),
        seconds=float(np.mean([value.seconds for value in values])) / batch_size,
    )
