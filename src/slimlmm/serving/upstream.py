"""Engines behind the gateway: OpenAI-compatible servers by URL, one or more replicas of the same model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from slimlmm.serving.chat import RefusedError

#: seconds for which a replica that did not take a connection is asked last
ASIDE_S = 5.0


@dataclass(slots=True)
class Replica:
    """One server: its address up to ``/v1``, requests that it works on, until when it is asked last."""

    url: str
    busy: int = 0
    aside: float = 0.0


class Engine:
    """Replicas of one model; each request goes to the one that works on the fewest."""

    def __init__(self, urls: Sequence[str], client: httpx.AsyncClient, *, model: str | None = None) -> None:
        self.replicas = [Replica(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self.client = client
        self.model = model

    async def ready(self) -> bool:
        """Tell whether any replica answers that it has models."""
        found = await asyncio.gather(*(self._models(replica) for replica in self.replicas))
        return any(found)

    async def _models(self, replica: Replica) -> bool:
        try:
            return (await self.client.get(f"{replica.url}/v1/models", timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False

    async def complete(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """Return status and body of a whole answer.

        Raises:
            RefusedError: 503 where no replica takes connections, 502 where one broke off.
        """
        async with self.stream(body) as answer:
            return answer.status_code, await answer.aread()

    @asynccontextmanager
    async def stream(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        """Hold an answer within the block, of which the head has come; raises as `complete`."""
        content = json.dumps(body | ({"model": self.model} if self.model else {})).encode()
        for replica in self._order():
            replica.busy += 1
            try:
                request = self.client.build_request(
                    "POST",
                    f"{replica.url}/v1/chat/completions",
                    content=content,
                    headers={"content-type": "application/json"},
                )
                try:
                    answer = await self.client.send(request, stream=True)
                except (httpx.ConnectError, httpx.ConnectTimeout):  # it never had the request, so another may have it
                    replica.aside = time.monotonic() + ASIDE_S
                    continue
                try:
                    yield answer
                finally:
                    await answer.aclose()
                return
            except httpx.HTTPError as error:
                raise RefusedError(502, f"the engine broke off: {type(error).__name__}") from None
            finally:
                replica.busy -= 1
        raise RefusedError(503, "no engine takes connections", retry_after=ASIDE_S)

    def _order(self) -> list[Replica]:
        now = time.monotonic()
        return sorted(self.replicas, key=lambda one: (one.aside > now, one.busy))
