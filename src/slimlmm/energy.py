"""Energy of an answer, by the machine's own counters: NVML's of a GPU, RAPL's of the processor packages. Measured, or refused."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from slimlmm.budget import WARMUP, answerer, freed
from slimlmm.errors import UserError

#: seconds that one reading spans at least: counters are renewed up to every tenth of a second
SPAN = 0.5
#: most readings of one shape
READINGS = 5
#: where Linux shows the counters of processor packages
POWERCAP = Path("/sys/class/powercap")
NOT_COUNTED = (
    "All that the {name} used meanwhile is in these joules, by whatever process, idle power included; memory, fans and power "
    "supply may not be."
)


class Counter(Protocol):
    """A counter of energy that only rises."""

    @property
    def name(self) -> str:
        """What it counts, in words."""

    def joules(self) -> float:
        """Return the joules since some moment in the past."""


class Rapl:
    """The sum over all processor packages that Linux shows under `root`; a counter that starts again from 0 is followed."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self.name = "processor packages (RAPL)"
        self._files = [folder / "energy_uj" for folder in sorted(root.glob("*rapl:*")) if _is_package(folder)]
        self._turns = [0] * len(self._files)
        if not self._files:
            raise UserError(f"{root} shows no processor package")
        self._last = [self._read(file) for file in self._files]

    def joules(self) -> float:
        """Return the joules of all packages."""
        for number, file in enumerate(self._files):
            value = self._read(file)
            if value < self._last[number]:
                self._turns[number] += self._read(file.with_name("max_energy_range_uj"))
            self._last[number] = value
        return 1e-6 * (sum(self._last) + sum(self._turns))

    @staticmethod
    def _read(file: Path) -> int:
        try:
            return int(file.read_text(encoding="ascii"))
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})") from error


def _is_package(folder: Path) -> bool:
    """Tell a whole package from a part of one, which it counts already (intel-rapl:0:0), and from other domains."""
    name = folder / "name"
    return folder.name.count(":") == 1 and name.is_file() and name.read_text(encoding="ascii").startswith("package")


class Nvml:
    """The energy counter of one CUDA device, through the package nvidia-ml-py."""

    def __init__(self, device: torch.device) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise UserError("the package nvidia-ml-py is not installed (pip install nvidia-ml-py)") from error
        properties = torch.cuda.get_device_properties(device)
        self.name = properties.name
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            self.joules()
        except self._nvml.NVMLError as error:
            raise UserError(f"{self.name} does not tell its energy ({error})") from error

    def joules(self) -> float:
        """Return the joules since the driver was loaded."""
        return 1e-3 * float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def counter_of(device: torch.device, root: Path = POWERCAP) -> Counter:
    """Return the energy counter of a device.

    Raises:
        UserError: there is none that can be read; the message says why.
    """
    try:
        return Nvml(device) if device.type == "cuda" else Rapl(root)
    except UserError as reason:
        raise UserError(f"no energy counter on this machine: {reason}; give another budget.") from reason


def joules_of(
    counter: Counter, clock: Callable[[], float] = time.perf_counter
) -> Callable[[Sequence[Any], torch.device, int], list[list[float]]]:
    """Return a function like `budget.answer_seconds` that counts joules an answer, in turns.

    One reading is the counter's difference over answers that last `SPAN` seconds or more, divided by their number; at most
    `READINGS` of each shape.
    """

    def measured(configs: Sequence[Any], device: torch.device, n: int) -> list[list[float]]:
        sides = [answerer(config, device) for config in configs]
        for answer in sides:
            for _ in range(WARMUP):
                answer()
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(min(n, READINGS)):
            for answer, values in zip(sides, found, strict=True):
                values.append(reading(counter, answer, clock))
        del sides, answer
        freed(device)
        return found

    return measured


def reading(counter: Counter, answer: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the joules of one answer, over as many as last `SPAN` seconds.

    Raises:
        UserError: the counter stood still meanwhile.
    """
    before, began, count = counter.joules(), clock(), 0
    while count == 0 or clock() - began < SPAN:
        answer()
        count += 1
    spent = counter.joules() - before
    if spent <= 0:
        raise UserError(
            f"the energy counter of {counter.name} stood still over {count} answers in {clock() - began:.1f} s; "
            "give another budget."
        )
    return spent / count
