"""Energy while it serves: the counter is read again and again, and recorded with the requests answered meanwhile."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from slimlmm.serving.metrics import Metrics
from slimlmm.serving.store import ENERGY, Store
from slimlmm.settings import Settings

if TYPE_CHECKING:  # a gateway that meters nothing loads no torch
    from slimlmm.energy import Counter


class Metering(Settings):
    """Whose energy is read, and how often."""

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="cpu: RAPL's packages; cuda: NVML's counter of the first GPU."
    )
    seconds: float = Field(60.0, gt=0, description="Seconds between two readings.")


@dataclass(slots=True, kw_only=True)
class Meter:
    """Reads a counter of the whole device: all that runs on it, answering or not, is in these joules."""

    counter: Counter
    seconds: float
    metrics: Metrics
    store: Store | None

    async def run(self) -> None:
        """Read until cancelled."""
        joules, answered, began = self.counter.joules(), self.metrics.answered, time.time()
        while True:
            await asyncio.sleep(self.seconds)
            now = (self.counter.joules(), self.metrics.answered, time.time())
            spent, requests, seconds = now[0] - joules, now[1] - answered, now[2] - began
            joules, answered, began = now
            self.metrics.joules.inc(spent)
            if self.store is not None:
                row = {
                    "at": began,
                    "seconds": seconds,
                    "joules": spent,
                    "requests": requests,
                    "source": self.counter.name,
                }
                await self.store.add(ENERGY, row)


def counter_of(metering: Metering) -> Counter:
    """Return the counter.

    Raises:
        UserError: this machine has none that can be read; the message says why.
    """
    import torch

    from slimlmm.energy import found_counter

    return found_counter(torch.device(metering.device))
