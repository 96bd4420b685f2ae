"""What a shape may cost: parameters, bytes and FLOPs by arithmetic on the configuration, time and energy by measuring models.

A cost is a function of axis sizes, as `resized` takes them; the planner (`plan.sizes_within`) knows no more of it than that.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from slimlmm.costs import PICTURE, Answer, generate
from slimlmm.errors import UserError
from slimlmm.families import stock_class
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import most_parameters, predict_parameters, resized, shapes_at

Cost = Callable[[Mapping[str, int]], float]
#: what letters behind a number multiply it by, by option
UNITS: Mapping[str, Mapping[str, float]] = {
    "--parameters": {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "--bytes": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    "--flops": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15},
}
#: generated tokens that FLOPs and times are told for
TOKENS = 8
#: timed answers of a candidate, after untimed ones
CALLS, WARMUP = 15, 3
NOT_TIMED = "Opening and preparing the picture and decoding the text are not in these times."
#: bytes that a random model in float32 takes while it answers, over those of its weights
ROOM = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a shape may cost at most.

    `asked` is the option as it was given, `cost` what sizes cost, in the unit of `limit`; `said` puts such a number into words,
    `again` the option that would have been met by it.
    """

    asked: str
    limit: float
    cost: Cost
    said: Callable[[float], str]
    again: Callable[[float], str]


def quantity(option: str, text: str) -> float:
    """Return the number of a text such as 300M, 1.2GB or 500G.

    Raises:
        UserError: no such number, or not more than 0; the message says what the option takes.
    """
    units = UNITS[option]
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper(), flags=re.ASCII)
    value = float(found[1]) * units[found[2]] if found and found[2] in units else 0.0
    if not 0 < value < math.inf:
        known = ", ".join(unit for unit in units if unit)
        raise UserError(f"{option} {text!r}: give a number above 0, alone or with one of {known}.")
    return value


def by_shrink(config: Any, shrink: float, whole: int) -> Budget:
    """Return the budget of ``whole / shrink`` parameters, where `whole` counts those of the original model."""
    return Budget(
        asked=f"--shrink {shrink:g}",
        limit=whole / shrink,
        cost=lambda sizes: most_parameters(config, sizes),
        said=lambda count: f"{count:,.0f} parameters ({whole / count:.1f}x)",
        again=lambda count: _shrink_again(whole / count),
    )


def _shrink_again(ratio: float) -> str:
    """Return what to ask for where a model can be shrunk by `ratio` at most."""
    return f"--shrink {math.floor(10 * ratio) / 10:g} or less" if ratio >= 1.1 else "smaller or fewer --floor and --fix"


def by_parameters(config: Any, limit: float, asked: str) -> Budget:
    """Return the budget of so many parameters, tied ones once."""
    return Budget(
        asked=asked,
        limit=limit,
        cost=lambda sizes: most_parameters(config, sizes),
        said=lambda count: f"{count:,.0f} parameters",
        again=lambda count: f"--parameters {count:.0f} or more",
    )


def by_bytes(config: Any, limit: float, asked: str, each: int) -> Budget:
    """Return the budget of so many bytes of weights, `each` of them a parameter."""
    return Budget(
        asked=asked,
        limit=limit,
        cost=lambda sizes: most_parameters(config, sizes) * each,
        said=lambda count: f"{count:,.0f} bytes",
        again=lambda count: f"--bytes {count:.0f} or more",
    )


def by_flops(config: Any, limit: float, asked: str, answer: Answer) -> Budget:
    """Return the budget of so many floating-point operations of one answer (`costs.Answer.flops`).

    Raises:
        UserError: no answer of this model can be counted; the message says why.
    """
    if answer.reason:
        raise UserError(f"{asked}: {answer.reason}; give another budget.")
    return Budget(
        asked=asked,
        limit=limit,
        cost=lambda sizes: flops_at(config, answer, sizes) or 0.0,
        said=lambda count: f"{count:,.0f} FLOPs an answer",
        again=lambda count: f"--flops {math.ceil(count)} or more",
    )


def flops_at(config: Any, answer: Answer, sizes: Mapping[str, int]) -> float | None:
    """Return the FLOPs of one answer at these sizes; None where they are not known."""
    found = answer.flops(shapes_at(config, sizes))
    return None if found is None else sum(found.values())


def by_latency(config: Any, limit: float, asked: str, watch: Stopwatch) -> Budget:
    """Return the budget of so many milliseconds an answer, each shape built and timed once; one too large to time is too slow."""
    return _by_measure(config, limit, asked, watch, "--latency-ms")


def by_energy(config: Any, limit: float, asked: str, watch: Stopwatch) -> Budget:
    """Return the budget of so many joules an answer (`energy`), each shape built and measured once."""
    return _by_measure(config, limit, asked, watch, "--energy-j")


def _by_measure(config: Any, limit: float, asked: str, watch: Stopwatch, option: str) -> Budget:
    return Budget(
        asked=asked,
        limit=limit,
        cost=lambda sizes: value if (value := watch.timed(config, sizes).value) is not None else math.inf,
        said=lambda value: f"{value:.3g} {watch.unit}" if value < math.inf else "more memory than there is",
        again=lambda value: f"{option} {upwards(value):g} or more" if value < math.inf else "another budget",
    )


def upwards(value: float) -> float:
    """Return the number rounded up: to a tenth, or to two digits where it is below 1."""
    step = 10.0 ** min(-1, math.floor(math.log10(value)) - 1) if value > 0 else 0.1
    return math.ceil(value / step) * step


def available_bytes(device: torch.device) -> int:
    """Return the bytes that are free on the device, or in main memory."""
    return int(torch.cuda.mem_get_info(device.index)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def answer_seconds(configs: Sequence[Any], device: torch.device, n: int) -> list[list[float]]:
    """Return the seconds of `n` answers of a random model of each configuration, in turns, after `WARMUP` untimed turns each."""
    sides = [answerer(config, device) for config in configs]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(WARMUP + n):
        for answer, found in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            answer()
            found.append(time.perf_counter() - start)
    del sides, answer
    freed(device)
    return [found[WARMUP:] for found in seconds]


def answerer(config: Any, device: torch.device) -> Callable[[], None]:
    """Return a call that lets a random model of a configuration answer a picture prompt, to the device's last operation."""
    model = _random(config, device)
    batch = {key: value.to(device) for key, value in picture_prompt(config, pixels=PICTURE).items()}

    def answer() -> None:
        with torch.no_grad():
            generate(model, batch, TOKENS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return answer


def freed(device: torch.device) -> None:
    """Give the memory of models back that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _random(config: Any, device: torch.device) -> Any:
    """Return a model with the random weights that the stock class begins with, made on the device itself."""
    config = copy.deepcopy(config)  # the number format is written into it
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return stock_class(config).from_config(config, dtype=torch.float32).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One shape, its parameters, and the median of `n` measurements of an answer; `value` is None where `reason` says why."""

    sizes: Mapping[str, int]
    parameters: int
    value: float | None
    n: int
    reason: str = ""

    @property
    def ms(self) -> float | None:
        """What a stopwatch of milliseconds measured."""
        return self.value


@dataclass(slots=True, kw_only=True)
class Stopwatch:
    """Times answers of random models of configurations, and remembers: picture prompt in, `TOKENS` tokens out, batch 1.

    Weights are float32, as `bench` loads them. Opening and preparing a picture and decoding text are not in the time.
    `seconds` times models in turns (`answer_seconds`), or counts their joules (`energy.joules_of`); `available` tells the bytes
    of memory for them. A value is `scale` times what was measured, in `unit`.
    """

    device: torch.device
    seconds: Callable[[Sequence[Any], torch.device, int], list[list[float]]] = answer_seconds
    available: Callable[[torch.device], int] = available_bytes
    tell: Callable[[Timed], None] = lambda _: None
    unit: str = "ms"
    scale: float = 1e3
    note: str = NOT_TIMED
    found: dict[tuple[tuple[str, int], ...], Timed] = field(default_factory=dict)

    def timed(self, config: Any, sizes: Mapping[str, int]) -> Timed:
        """Return the time of `config` at these sizes, measured the first time that they are asked for."""
        key = tuple(sorted(sizes.items()))
        if key not in self.found:
            self.found[key] = self.alone(config, sizes)
            self.tell(self.found[key])
        return self.found[key]

    def alone(self, config: Any, sizes: Mapping[str, int]) -> Timed:
        """Return the time of `config` at these sizes, measured now."""
        count = predict_parameters(config, sizes)
        if reason := self.no_room(count):
            return Timed(sizes=dict(sizes), parameters=count, value=None, n=0, reason=reason)
        seconds = self.seconds([resized(config, sizes)], self.device, CALLS)[0]
        return Timed(sizes=dict(sizes), parameters=count, value=self.scale * float(np.median(seconds)), n=len(seconds))

    def pair(self, one: Any, other: Any) -> tuple[list[float], list[float]] | str:
        """Return the seconds of two configurations timed in turns, or why both cannot be held at once."""
        count = sum(predict_parameters(config, {}) for config in (one, other))
        if reason := self.no_room(count):
            return reason
        first, second = self.seconds([one, other], self.device, CALLS)
        return first, second

    def no_room(self, parameters: int) -> str:
        """Say that random weights of so many parameters do not fit into the memory that is left; "" where they do."""
        needed, left = int(ROOM * 4 * parameters), self.available(self.device)
        if needed <= left:
            return ""
        return f"needs about {needed / 1e9:.1f} GB in float32, and {left / 1e9:.1f} GB are free"
