"""Pictures by address, for hosts that the operator listed: nothing of them can lead inside the network.

Source: OWASP, Server-Side Request Forgery Prevention Cheat Sheet, "allow-list" case.
"""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from slimlmm.serving.chat import RefusedError
from slimlmm.serving.limits import Limits


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet; one that maps or embeds another is judged by that, too."""
    found = ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))


class Resolver(AbstractResolver):
    """Resolves names, and keeps of their addresses the public ones.

    What was judged is what is connected to, so a name that changes its address meanwhile (DNS rebinding) gains nothing.
    """

    def __init__(self, inner: AbstractResolver, public: Callable[[str], bool]) -> None:
        """Judge what another resolver finds."""
        self.inner, self.public = inner, public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the public addresses of a name.

        Raises:
            OSError: it has none.
        """
        found = [one for one in await self.inner.resolve(host, port, family) if self.public(one["host"])]
        if not found:
            raise OSError(f"{host} has no public address")
        return found

    async def close(self) -> None:
        """Close what it asks."""
        await self.inner.close()


class Fetcher:
    """Fetches pictures of listed hosts: by http or https on the usual ports, without redirects, up to a size, in a time."""

    def __init__(
        self,
        limits: Limits,
        *,
        public: Callable[[str], bool] = is_public,
        resolver: AbstractResolver | None = None,
        ports: Sequence[int | None] = (None, 80, 443),
    ) -> None:
        self.limits, self.public, self.ports = limits, public, ports
        inner = resolver or ThreadedResolver()
        self.client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=Resolver(inner, public), use_dns_cache=False, limit=limits.at_once),
            timeout=aiohttp.ClientTimeout(total=limits.read_s),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self.client.close()

    async def inline(self, raw: dict[str, Any]) -> None:
        """Put pictures in the place of their addresses, as data URLs.

        Raises:
            RefusedError: an address is not allowed, or there is no picture within the limits.
        """
        places = [part["image_url"] for message in raw["messages"] for part in _pictures(message)]
        remote = [(number, place) for number, place in enumerate(places) if not place["url"].startswith("data:")]
        if len(places) > self.limits.pictures:
            raise RefusedError(400, f"{len(places)} pictures are more than {self.limits.pictures}", "messages")
        found = await asyncio.gather(*(self._fetched(place["url"], f"image_url {number}") for number, place in remote))
        for (_, place), url in zip(remote, found, strict=True):
            place["url"] = url

    async def _fetched(self, url: str, param: str) -> str:
        self._allowed(url, param)
        try:
            async with self.client.get(url, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise RefusedError(400, f"a picture's address answers with status {answer.status}", param)
                data = await answer.content.read(self.limits.body_bytes + 1)
                while len(data) <= self.limits.body_bytes and (more := await answer.content.readany()):
                    data += more
        except (aiohttp.ClientError, OSError, ValueError) as error:  # time is up: a TimeoutError is an OSError
            raise RefusedError(400, f"a picture cannot be fetched: {type(error).__name__}", param) from None
        if len(data) > self.limits.body_bytes:
            raise RefusedError(400, f"a picture has more than {self.limits.body_bytes:,} bytes", param)
        return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"

    def _allowed(self, url: str, param: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise RefusedError(400, "a picture's address is none", param) from None
        plain = parts.scheme in ("http", "https") and not (parts.username or parts.password) and port in self.ports
        if not plain or host not in self.limits.picture_hosts:
            raise RefusedError(400, "pictures of this address are not fetched; send the picture as a data URL", param)
        try:
            literal = ip_address(host)
        except ValueError:
            return
        if not self.public(str(literal)):  # no name, so no resolver will see it
            raise RefusedError(400, "pictures of this address are not fetched; it is not public", param)


def _pictures(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if part.get("type") == "image_url"] if isinstance(content, list) else []
