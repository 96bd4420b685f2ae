"""What strangers send to a real server: broken HTTP, slow bodies, bombs; nothing of it may be a 500, a hang or a leak."""

import asyncio
import base64
import io
import json
import struct
import zlib

import httpx
import pytest
from PIL import Image

from slimlmm.serving.gateway import Gateway
from slimlmm.serving.limits import Limits
from slimlmm.serving.web import app_of
from test_gateway import Fake, arm_of, as_url, asked, data_url, listening, run

PATH = "/v1/chat/completions"


def png(width, height, data=b""):
    """Return a PNG that says it has this size, whatever it holds."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_bomb():
    """Return a PNG whose compressed text is 100 MB."""
    content = b"a\x00\x00" + zlib.compress(b"x" * 100_000_000)
    whole = png(8, 8)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    return whole[:33] + chunk + whole[33:]


def gif_bomb():
    held = io.BytesIO()
    frames = [Image.new("P", (200, 200), colour) for colour in range(100)]
    frames[0].save(held, "GIF", save_all=True, append_images=frames[1:])
    return held.getvalue()


def head(length, extra=""):
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{extra}\r\n"
    )


BODY = json.dumps(asked())
#: raw requests, and the statuses that may come back; 0 is a connection that was closed without a word
RAW = {
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, {0, 400}),
    "endless header": (f"GET /health HTTP/1.1\r\nx: {'a' * 300_000}\r\n\r\n".encode(), {0, 200, 400, 431}),
    "many headers": (("GET /health HTTP/1.1\r\n" + "x-a: b\r\n" * 5000 + "\r\n").encode(), {0, 200, 400, 431}),
    "two lengths": (head(len(BODY), "content-length: 3\r\n").encode() + BODY.encode(), {0, 400}),
    "length and chunks": (head(len(BODY), "transfer-encoding: chunked\r\n").encode() + BODY.encode(), {0, 400, 408}),
    "negative length": (head(-1).encode(), {0, 400}),
    "no number": (head("1e3").encode(), {0, 400}),
    "length beyond 64 bits": (head(10**30).encode(), {0, 400, 413}),
    "too long by its head": (head(10**9).encode(), {413}),
    "broken chunk": (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n".encode(),
        {0, 400},
    ),
    "null in a header": (b"GET /health HTTP/1.1\r\nx: a\x00b\r\n\r\n", {0, 200, 400}),
    "smuggled line": (b"GET /health HTTP/1.1\r\nx: a\nb: c\r\n\r\n", {0, 200, 400}),
    "body never comes": (head(len(BODY)).encode() + BODY[:20].encode(), {408}),
    "unknown method": (b"BREW /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n", {0, 400, 405}),
    "up the tree": (b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", {404}),
    "binary token": (head(len(BODY), "authorization: Bearer \xff\xfe\r\n").encode("latin1") + BODY.encode(), {200}),
}


async def sent(address, raw):
    """Send bytes, and return the status of what comes back within 5 seconds."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        line = await asyncio.wait_for(reader.readline(), 5)
    except ConnectionError:
        line = b""
    finally:
        writer.close()
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0


def with_server(work, **limits):
    async def whole():
        bounds = Limits(read_s=0.5, deadline_s=2, **limits)
        async with arm_of(Fake()) as arm:
            gateway = Gateway(name="s", student=arm, limits=bounds)
            async with listening(app_of(gateway)) as address:
                await work(address)
                async with httpx.AsyncClient(base_url=address) as client:
                    assert (await client.post(PATH, json=asked())).status_code == 200, "it serves on"
                    metrics = (await client.get("/metrics")).text
                assert 'status="500"' not in metrics
                assert (gateway.gate.inside, gateway.gate.waiting) == (0, 0)

    run(whole())


@pytest.mark.parametrize("name", RAW)
def test_broken_http_gets_an_answer_or_a_closed_door_and_nothing_stays(name):
    raw, statuses = RAW[name]

    async def work(address):
        assert await sent(address, raw) in statuses

    with_server(work)


def test_those_who_leave_in_the_middle_are_no_errors(caplog):
    async def work(address):
        host, _, port = address.removeprefix("http://").rpartition(":")
        for part in (head(len(BODY)).encode(), head(len(BODY)).encode() + BODY[:30].encode()):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(part)
            await writer.drain()
            writer.close()
        await asyncio.sleep(0.2)

    with_server(work)
    assert "Traceback" not in caplog.text


def test_slow_senders_hold_nobody_up():
    async def work(address):
        host, _, port = address.removeprefix("http://").rpartition(":")
        writers = []
        for _ in range(100):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head(len(BODY)).encode() + b"{")
            writers.append(writer)
        async with httpx.AsyncClient(base_url=address) as client:
            assert (await client.post(PATH, json=asked(), timeout=5)).status_code == 200
        for writer in writers:
            writer.close()

    with_server(work, at_once=4, waiting=4)


@pytest.mark.parametrize(
    ("url", "status"),
    [
        (as_url(png(30_000, 30_000)), 400),
        (as_url(png(2**31 - 1, 2**31 - 1)), 400),
        (as_url(text_bomb()), 400),
        (as_url(png(0, 0)), 400),
        (as_url(gif_bomb(), "GIF"), 200),
        (as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG+XML"), 400),
        (as_url(b"\xff\xd8\xff\xe0" + b"\x00" * 100, "JPEG"), 400),
        (as_url(b"%!PS-Adobe-3.0 EPSF-3.0\n", "PNG"), 400),
        ("data:image/png;base64," + "A" * 400_000, 400),
        (data_url() + "\x00", 400),
        ("data:,", 400),
        ("\ud800", 400),
    ],
    ids=range(12),
)
def test_bombs_and_what_is_no_picture_are_400(url, status):
    async def work(address):
        async with httpx.AsyncClient(base_url=address) as client:
            answer = await client.post(PATH, content=json.dumps(asked(url=url)).encode(), timeout=10)
            assert answer.status_code == status, answer.text

    with_server(work)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"\xef\xbb\xbf{}",
        b'{"messages": ' + b"[" * 50_000,
        b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "stop": [""]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}',
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 1000}).encode(),
        base64.b64encode(b"x" * 1000),
    ],
    ids=range(17),
)
def test_bodies_that_are_no_conversation_are_400(body):
    async def work(address):
        async with httpx.AsyncClient(base_url=address) as client:
            answer = await client.post(PATH, content=body, timeout=10)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]

    with_server(work)
