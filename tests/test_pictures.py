"""Pictures by address: what the list allows and nothing else, wherever names, redirects and addresses point."""

import asyncio
import base64
import socket

import pytest
from aiohttp.abc import AbstractResolver
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from slimlmm.serving.chat import RefusedError
from slimlmm.serving.gateway import Gateway
from slimlmm.serving.limits import Limits
from slimlmm.serving.pictures import Fetcher, Resolver, is_public
from test_gateway import Fake, arm_of, asked, calling, data_url, listening, run

PICTURE = base64.b64decode(data_url().partition(",")[2])


class Names(AbstractResolver):
    """Gives each name its addresses, one after the other, as one does that rebinds."""

    def __init__(self, *addresses):
        self.addresses, self.asked = addresses, 0

    async def resolve(self, host, port=0, family=socket.AF_INET):
        address = self.addresses[min(self.asked, len(self.addresses) - 1)]
        self.asked += 1
        return [{"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self):
        pass


def pages():
    app = FastAPI()

    @app.get("/good.png")
    async def good():
        return Response(PICTURE, media_type="image/png")

    @app.get("/away")
    async def away():
        return RedirectResponse("/good.png")

    @app.get("/endless")
    async def endless():
        async def parts():
            while True:
                yield b"x" * 4096
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    @app.get("/slow")
    async def slow():
        await asyncio.sleep(5)
        return Response(PICTURE)

    @app.get("/text")
    async def text():
        return Response("secret")

    return app


async def fetched(url, hosts=("pictures.example",), names=None, public=lambda _: True, ports=None, **limits):
    """Return status and message of a request with this address through a whole gateway, and what the engine saw."""
    fake = Fake()
    async with listening(pages()) as address, arm_of(fake) as arm:
        port = int(address.rpartition(":")[2])
        bounds = Limits(picture_hosts=hosts, read_s=0.5, body_bytes=100_000, **limits)
        gateway = Gateway(name="s", student=arm, limits=bounds)
        gateway.fetcher = Fetcher(
            bounds, public=public, resolver=names or Names("127.0.0.1"), ports=(port,) if ports is None else ports
        )
        async with calling(gateway) as client:
            answer = await client.post("/v1/chat/completions", json=asked(url=url.replace("PORT", str(port))))
        await gateway.fetcher.close()
        return answer.status_code, answer.json().get("error", {}).get("message"), fake.seen


def test_a_picture_of_a_listed_host_reaches_the_engine_as_itself():
    status, _, seen = run(fetched("http://pictures.example:PORT/good.png"))
    assert status == 200
    url = seen[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == PICTURE


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://other.example:PORT/good.png", "of this address are not fetched"),
        ("http://pictures.example.evil.example:PORT/good.png", "of this address are not fetched"),
        ("http://pictures.example@127.0.0.1:PORT/good.png", "of this address are not fetched"),
        ("http://user:pw@pictures.example:PORT/good.png", "of this address are not fetched"),
        ("ftp://pictures.example:PORT/good.png", "of this address are not fetched"),
        ("file:///etc/passwd", "of this address are not fetched"),
        ("http://pictures.example:22/good.png", "of this address are not fetched"),
        ("http://[::1/good.png", "address is none"),
        ("http://pictures.example:99999/good.png", "address is none"),
        ("http://pictures.example:PORT/away", "status 307"),
        ("http://pictures.example:PORT/none", "status 404"),
        ("http://pictures.example:PORT/endless", "more than 100,000 bytes"),
        ("http://pictures.example:PORT/slow", "cannot be fetched: "),
        ("http://pictures.example:PORT/text", "cannot be read"),
    ],
)
def test_anything_else_is_400_and_reaches_no_engine(url, told):
    status, message, seen = run(fetched(url))
    assert status == 400
    assert told in message
    assert seen == []


def test_a_listed_name_that_leads_inside_is_not_followed_nor_one_that_changes_its_mind():
    status, message, seen = run(fetched("http://pictures.example:PORT/good.png", public=is_public))
    assert (status, seen) == (400, [])
    assert "cannot be fetched" in message
    rebinding = Names("93.184.215.14", "127.0.0.1")

    async def work():
        found = await Resolver(rebinding, is_public).resolve("pictures.example", 80)
        assert [one["host"] for one in found] == ["93.184.215.14"], "what was judged is what is connected to"
        with pytest.raises(OSError, match="no public address"):
            await Resolver(rebinding, is_public).resolve("pictures.example", 80)

    run(work())


def test_a_listed_address_that_is_not_public_is_refused():
    status, message, _ = run(fetched("http://127.0.0.1:PORT/good.png", hosts=("127.0.0.1",), public=is_public))
    assert status == 400
    assert "not public" in message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_too_many_pictures_are_refused_before_any_is_fetched():
    names = Names("127.0.0.1")

    async def work():
        limits = Limits(picture_hosts=("pictures.example",), pictures=1)
        fetcher = Fetcher(limits, resolver=names)
        one = asked(url="http://pictures.example/a.png")["messages"]
        with pytest.raises(RefusedError, match="2 pictures are more than 1"):
            await fetcher.inline({"messages": one * 2})
        await fetcher.close()

    run(work())
    assert names.asked == 0
