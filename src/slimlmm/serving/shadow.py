"""A share of what was answered also goes to the teacher, off the users' path; beyond the queue it is dropped and counted."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageStat
from pydantic import Field

from slimlmm.serving.arms import Arm, Reply, agree
from slimlmm.serving.chat import RefusedError, decoded, file_of, opened
from slimlmm.serving.metrics import Metrics
from slimlmm.serving.store import PAIRS, PICTURES, Store
from slimlmm.settings import Settings

#: pixels of the side of the square in which a picture's features are reckoned
LOOKED_AT = 128


class Shadowing(Settings):
    """How much is compared with the teacher."""

    share: float = Field(0.05, ge=0, le=1, description="Share of answered requests that also go to the teacher.")
    at_once: int = Field(
        1, gt=0, description="Of them at once; the teacher may have the same processors as the student."
    )
    waiting: int = Field(64, gt=0, description="That wait; more are dropped.")
    keep_pictures: bool = Field(
        False, description="Whether their pictures are kept in the store, or their features alone."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request that was answered: what the teacher is asked, and what the arm said."""

    id: str
    task: str
    arm: str
    raw: Mapping[str, Any]
    pictures: tuple[str, ...]
    text: str
    seconds: float
    tokens: int | None


@dataclass(slots=True, kw_only=True)
class Shadow:
    """The queue to the teacher. `compared` is told of each pair's arm and whether they agreed."""

    settings: Shadowing
    teacher: Arm
    store: Store
    metrics: Metrics
    deadline_s: float
    pixels: int
    compared: Callable[[str, bool], Awaitable[None]]
    rng: random.Random = field(default_factory=random.Random)
    _queue: asyncio.Queue[Seen] = field(init=False)
    _workers: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with an empty queue."""
        self._queue = asyncio.Queue(self.settings.waiting)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._queue.qsize()

    def start(self) -> None:
        """Start to work the queue, in the running event loop."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.settings.at_once)]

    async def stop(self) -> None:
        """Drop what waits, and end."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def offer(self, seen: Seen) -> None:
        """Take a request with probability `share`, where there is room."""
        if self.rng.random() >= self.settings.share:
            return
        try:
            self._queue.put_nowait(seen)
        except asyncio.QueueFull:
            self._count(seen, "dropped")

    async def idle(self) -> None:
        """Return once nothing waits and nothing is under way."""
        await self._queue.join()

    async def _work(self) -> None:
        while True:
            seen = await self._queue.get()
            try:
                await self._one(seen)
            except Exception:  # one request must not end the worker
                logging.getLogger(__name__).exception("shadow of %s", seen.id)
                self._count(seen, "failed")
            finally:
                self._queue.task_done()

    async def _one(self, seen: Seen) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.deadline_s):
                reply = await self.teacher.answer(seen.raw)
        except (RefusedError, TimeoutError):
            self._count(seen, "failed")
            return
        if reply.text is None:
            self._count(seen, "failed")
            return
        record = pair(seen, reply, time.perf_counter() - began, "shadow")
        self._count(seen, "agreed" if record["agree"] else "disagreed")
        await self.compared(seen.arm, record["agree"])
        await self.store.add(PAIRS, record)
        try:
            rows = await asyncio.to_thread(self._pictures, seen)
        except RefusedError:  # an engine may read what we do not
            return
        for row in rows:
            await self.store.add(PICTURES, row)

    def _pictures(self, seen: Seen) -> list[dict[str, Any]]:
        return [
            {"answer_id": seen.id, "number": number, "at": time.time()}
            | features(url, self.pixels, keep=self.settings.keep_pictures)
            for number, url in enumerate(seen.pictures)
        ]

    def _count(self, seen: Seen, outcome: str) -> None:
        self.metrics.shadows.labels(seen.arm, outcome).inc()


def pair(seen: Seen, teacher: Reply, seconds: float, purpose: str) -> dict[str, Any]:
    """Return the record of a request that both answered."""
    text = teacher.text or ""
    return {
        "answer_id": seen.id,
        "at": time.time(),
        "purpose": purpose,
        "arm": seen.arm,
        "task": seen.task,
        "student": seen.text,
        "teacher": text,
        "agree": agree(seen.text, text),
        "student_seconds": seen.seconds,
        "teacher_seconds": seconds,
        "student_tokens": seen.tokens,
        "teacher_tokens": teacher.tokens("completion"),
    }


def features(url: str, pixels: int, *, keep: bool) -> dict[str, Any]:
    """Return what drift of pictures is told by, and the file itself where it is kept.

    Size of file and picture; of at most 128 x 128 pixels: brightness, contrast and entropy of the grey picture, saturation.
    """
    data = file_of(url, "picture")
    picture = opened(url, pixels, "picture")
    width, height = picture.size
    picture.draft("RGB", (LOOKED_AT, LOOKED_AT))  # a JPEG is decoded at a fraction of its size
    small = decoded(picture, "picture").resize((min(width, LOOKED_AT), min(height, LOOKED_AT)), Image.Resampling.BOX)
    grey = ImageStat.Stat(small.convert("L"))
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": width,
        "height": height,
        "bytes": len(data),
        "brightness": grey.mean[0],
        "contrast": grey.stddev[0],
        "entropy": small.convert("L").entropy(),
        "saturation": ImageStat.Stat(small.convert("HSV")).mean[1],
        "file": data if keep else None,
    }
