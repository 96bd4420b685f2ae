"""Engines behind the gateway: OpenAI-compatible servers by URL, one or more replicas of the same model."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from slimlmm.serving.chat import RefusedError

#: seconds for which a replica that did not take a connection is asked last
ASIDE_S = 5.0
#: seconds that a connection is kept unused: less than the 5 after which uvicorn, under most engines, closes it
KEPT_S = 4.0


@dataclass(slots=True)
class Replica:
    """One server: its address up to ``/v1`` or the like, requests that it works on, until when it is asked last."""

    url: str
    busy: int = 0
    aside: float = 0.0


def base_of(url: str) -> str:
    """Return an address with the version of its interface: ``/v1`` unless it says another, as OpenVINO Model Server's ``/v3``."""
    url = url.rstrip("/")
    return url if re.search(r"/v\d+$", url) else f"{url}/v1"


def session(at_once: int, deadline_s: float) -> aiohttp.ClientSession:
    """Return what engines are asked through; no proxies and no settings of the environment."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=at_once + 8, keepalive_timeout=KEPT_S),
        timeout=aiohttp.ClientTimeout(total=deadline_s, sock_connect=2.0),
        trust_env=False,
        auto_decompress=False,
    )


class Engine:
    """Replicas of one model; each request goes to the one that works on the fewest."""

    def __init__(self, urls: Sequence[str], client: aiohttp.ClientSession, *, model: str | None = None) -> None:
        self.replicas = [Replica(base_of(url)) for url in urls]
        self.client = client
        self.model = model

    async def ready(self) -> bool:
        """Tell whether any replica answers that it has models."""
        found = await asyncio.gather(*(self._models(replica) for replica in self.replicas))
        return any(found)

    async def _models(self, replica: Replica) -> bool:
        try:
            async with self.client.get(f"{replica.url}/models", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def complete(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return status and body of a whole answer.

        Raises:
            RefusedError: 503 where no replica takes connections, 502 where one broke off.
        """
        async with self.stream(body) as answer:
            return answer.status, await answer.read()

    @asynccontextmanager
    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Hold an answer within the block, of which the head has come; raises as `complete`."""
        content = json.dumps({**body, "model": self.model} if self.model else body).encode()
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        for replica in self._order():
            replica.busy += 1
            try:
                url = f"{replica.url}/chat/completions"
                try:
                    answer = await self.client.post(url, data=content, headers=headers, allow_redirects=False)
                except aiohttp.ClientConnectorError:  # it never had the request, so another may have it
                    replica.aside = time.monotonic() + ASIDE_S
                    continue
                async with answer:
                    yield answer
                return
            except aiohttp.ClientError as error:
                raise RefusedError(502, f"the engine broke off: {type(error).__name__}") from None
            finally:
                replica.busy -= 1
        raise RefusedError(503, "no engine takes connections", retry_after=ASIDE_S)

    def _order(self) -> list[Replica]:
        now = time.monotonic()
        return sorted(self.replicas, key=lambda one: (one.aside > now, one.busy))
