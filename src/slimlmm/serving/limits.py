"""What the gateway lets in: how large, how many at once, how long; what is more is told so at once, instead of a collapse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from pydantic import Field
from starlette.requests import ClientDisconnect

from slimlmm.pictures import MAX_PIXELS, PILLOW_PIXELS
from slimlmm.serving.chat import Chat, RefusedError, opened
from slimlmm.settings import Settings


class Limits(Settings):
    """Limits of one gateway."""

    body_bytes: int = Field(20_000_000, gt=0, description="Bytes of a request's body.")
    pictures: int = Field(8, gt=0, description="Pictures of a request.")
    pixels: int = Field(MAX_PIXELS, gt=0, le=PILLOW_PIXELS, description="Pixels of a picture, told by its header.")
    picture_hosts: tuple[str, ...] = Field(
        (), description="Hosts whose pictures are fetched by address; none otherwise."
    )
    tokens: int = Field(512, gt=0, description="Tokens of an answer.")
    at_once: int = Field(64, gt=0, description="Requests that an engine works on at once.")
    waiting: int = Field(128, ge=0, description="Requests that wait for their turn; beyond that comes 429.")
    read_s: float = Field(10.0, gt=0, description="Seconds in which a request's body must have come.")
    deadline_s: float = Field(60.0, gt=0, description="Seconds from the body to the end of the answer.")
    teacher_s: float = Field(20.0, gt=0, description="Seconds of it that the teacher may take for an unsure answer.")
    drain_s: int = Field(30, gt=0, description="Seconds that answers may still take once the gateway is told to stop.")


class Gate:
    """Lets so many requests in at once and so many wait.

    `inside` and `waiting` count them.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.inside = 0
        self.waiting = 0
        self._places = asyncio.Semaphore(limits.at_once)

    def check(self) -> None:
        """Refuse at once, before anything of a request was read, where there would be no room for it; raises as `place`."""
        if self.inside + self.waiting >= self.limits.at_once + self.limits.waiting:
            raise self._full()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place within the block.

        Raises:
            RefusedError: 429, where as many wait as may, or where the wait takes longer than the deadline.
        """
        self.check()
        self.waiting += 1
        try:
            async with asyncio.timeout(self.limits.deadline_s):  # no task of its own: a free place is taken at once
                await self._places.acquire()
        except TimeoutError:
            raise self._full() from None
        finally:
            self.waiting -= 1
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._places.release()

    def _full(self) -> RefusedError:
        held = f"{self.inside} requests are being answered and {self.waiting} wait"
        return RefusedError(429, f"{held}; try again later", retry_after=1)


async def body_of(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        RefusedError: 413 where it is larger than the limit, 408 where it takes too long to come, 499 where its sender leaves.
    """
    too_large = RefusedError(413, f"the body is larger than {limits.body_bytes:,} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limits.body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.read_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {limits.read_s:g} seconds") from None
    except ClientDisconnect:
        raise RefusedError(499, "the sender left before the body had come") from None
    return b"".join(parts)


def check(chat: Chat, limits: Limits) -> None:
    """Refuse a request that is beyond the limits; pictures are judged by their headers, not decoded.

    Raises:
        RefusedError: too many pictures or tokens, a picture that is no data URL or too large.
    """
    if chat.limit and chat.limit > limits.tokens:
        raise RefusedError(400, f"{chat.limit} tokens are more than {limits.tokens}", "max_tokens")
    pictures = chat.pictures
    if len(pictures) > limits.pictures:
        raise RefusedError(400, f"{len(pictures)} pictures are more than {limits.pictures}", "messages")
    for number, url in enumerate(pictures):
        param = f"image_url {number}"
        if not url.startswith("data:"):
            raise RefusedError(400, "pictures of this address are not fetched; send the picture as a data URL", param)
        opened(url, limits.pixels, param)
