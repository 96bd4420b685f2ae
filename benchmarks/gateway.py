"""What the gateway costs before a made-up engine on loopback: latency beside the bare engine, most requests a second, overload.

    python benchmarks/gateway.py --out benchmarks/results/gateway.json [--overload 60]

Three processes share the machine: this one sends, one is the engine (a fixed answer after a fixed time), one is `slimlmm serve`.
Requests are sent at their times whether or not earlier ones have come back, and latency counts from the time a request was due
(no coordinated omission). Bare engine and gateway take turns within each second of a run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httptools
import httpx
import psutil
import uvloop
from PIL import Image

from slimlmm import __version__
from slimlmm.serving.serve import free_port

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "engine",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "soda pop"},
                "logprobs": {"content": [{"token": "soda", "logprob": -0.1, "bytes": [], "top_logprobs": []}]},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 70, "completion_tokens": 2, "total_tokens": 72},
    }
).encode()


class FakeEngine(asyncio.Protocol):
    """Answers every request with `ANSWER` after `seconds`, at most `at_once` at a time."""

    seconds = 0.0
    places: asyncio.Semaphore

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport: Any = transport
        self.parser = httptools.HttpRequestParser(self)
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Take the end of a message."""
        task = asyncio.create_task(self._answer())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer(self) -> None:
        async with self.places:
            await asyncio.sleep(self.seconds)
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n\r\n"
        self.transport.write(head.encode() + ANSWER)


async def fake_engine(port: int, seconds: float, at_once: int) -> None:
    """Listen until killed."""
    FakeEngine.seconds, FakeEngine.places = seconds, asyncio.Semaphore(at_once)
    server = await asyncio.get_running_loop().create_server(FakeEngine, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


class Connection(asyncio.Protocol):
    """One kept-alive connection; one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        if not self.done.done():
            self.done.set_result("lost")

    def on_message_complete(self) -> None:
        """Take the end of a message."""
        if not self.done.done():
            self.done.set_result(str(self.parser.get_status_code()))

    def ask(self, request: bytes) -> asyncio.Future[str]:
        """Send a request; the future has its HTTP status."""
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)
        return self.done


class Client:
    """Sends one fixed request to one address over as many connections as are needed."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port, self.request = port, request
        self.idle: list[Connection] = []
        self.seconds: list[float] = []
        self.statuses: Counter[str] = Counter()

    async def one(self, due: float) -> None:
        """Ask once and note status and time since it was due."""
        while self.idle and self.idle[-1].transport.is_closing():
            self.idle.pop()
        try:
            if self.idle:
                connection = self.idle.pop()
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
            status = await asyncio.wait_for(connection.ask(self.request), 60)
        except (OSError, TimeoutError) as error:
            status = type(error).__name__
        else:
            self.idle.append(connection)
        self.statuses[status] += 1
        if status == "200":
            self.seconds.append(time.perf_counter() - due)

    def taken(self) -> dict[str, Any]:
        """Return what was noted since the last time, milliseconds of what was answered."""
        ms = sorted(1000 * one for one in self.seconds)
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        found = (
            {name: round(ms[min(len(ms) - 1, int(share * len(ms)))], 3) for name, share in shares.items()} if ms else {}
        )
        told = {"n": len(ms), "ms": found, "statuses": dict(self.statuses)}
        self.seconds, self.statuses = [], Counter()
        return told


async def at_rate(clients: list[Client], rate: float, seconds: float) -> None:
    """Send `rate` requests a second at random times (Poisson), each to a client drawn at random."""
    rng, began, due, tasks = random.Random(0), time.perf_counter(), 0.0, set()
    while due < seconds:
        due += rng.expovariate(rate)
        if (wait := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(rng.choice(clients).one(began + due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(tasks)


async def most(client: Client, at_once: int, seconds: float) -> float:
    """Return requests a second with `at_once` under way all the time."""
    until = time.perf_counter() + seconds

    async def worker() -> None:
        while (now := time.perf_counter()) < until:
            await client.one(now)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return float(client.statuses["200"] / (time.perf_counter() - began))


def request_of(port: int, side: int) -> bytes:
    """Return a chat completion with a noisy JPEG of that side, as bytes on the wire."""
    held = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(held, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = json.dumps({"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": parts}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Started:
    """An engine and a gateway before it, in processes of their own."""

    def __init__(self, engine_ms: float, engine_at_once: int, options: list[str]) -> None:
        self.engine_port, self.port = free_port(), free_port()
        this = [sys.executable, __file__, "--engine-port", str(self.engine_port)]
        self.engine = subprocess.Popen([*this, "--engine-ms", str(engine_ms), "--engine-at-once", str(engine_at_once)])
        serve = [sys.executable, "-m", "slimlmm", "serve", "student", "--port", str(self.port), "--quiet", *options]
        self.gateway = subprocess.Popen([*serve, "--engine", f"http://127.0.0.1:{self.engine_port}"])

    def __enter__(self) -> Started:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.1)
        raise SystemExit("the gateway did not start")

    def __exit__(self, *_: object) -> None:
        self.gateway.send_signal(signal.SIGTERM)
        self.gateway.wait(60)
        self.engine.kill()

    def memory(self) -> float:
        """Return MB that the gateway holds now."""
        return float(psutil.Process(self.gateway.pid).memory_info().rss) / 1e6


async def latency(started: Started, side: int, rate: float, seconds: float) -> dict[str, Any]:
    """Return latencies of the bare engine and of the gateway at one rate, in turns."""
    bare = Client(started.engine_port, request_of(started.engine_port, side))
    gated = Client(started.port, request_of(started.port, side))
    await at_rate([bare, gated], rate, 2)
    bare.taken(), gated.taken()
    await at_rate([bare, gated], 2 * rate, seconds)
    found = {"bare": bare.taken(), "gateway": gated.taken()}
    over = {name: round(found["gateway"]["ms"][name] - found["bare"]["ms"][name], 3) for name in ("p50", "p95", "p99")}
    return {"rate": rate, "request_bytes": len(gated.request), **found, "overhead_ms": over}


async def throughput(started: Started, side: int, at_once: int, seconds: float) -> dict[str, Any]:
    """Return the most requests a second, five times."""
    gated = Client(started.port, request_of(started.port, side))
    rates, used = [], []
    for _ in range(5):
        before = sum(psutil.Process(started.gateway.pid).cpu_times()[:2])
        rates.append(await most(gated, at_once, seconds))
        count = gated.taken()["statuses"].get("200", 0)
        used.append((sum(psutil.Process(started.gateway.pid).cpu_times()[:2]) - before) / max(count, 1))
    return {
        "at_once": at_once,
        "request_bytes": len(gated.request),
        "n": 5,
        "requests_a_second": round(statistics.median(rates), 1),
        "least": round(min(rates), 1),
        "most": round(max(rates), 1),
        "gateway_cpu_ms_a_request": round(1000 * statistics.median(used), 3),
    }


async def overload(started: Started, side: int, capacity: float, seconds: float) -> dict[str, Any]:
    """Offer ten times what the engine can do, then see how soon an ordinary rate is served as before."""
    gated = Client(started.port, request_of(started.port, side))
    await at_rate([gated], capacity / 2, 5)
    before = gated.taken()
    memory = started.memory()
    await at_rate([gated], 10 * capacity, seconds)
    during = gated.taken()
    recovered = None
    ended = time.perf_counter()
    for _ in range(20):
        await at_rate([gated], capacity / 2, 0.5)
        now = gated.taken()
        if set(now["statuses"]) == {"200"} and now["ms"]["p50"] <= 1.5 * before["ms"]["p50"]:
            recovered = round(time.perf_counter() - ended, 2)
            break
    return {
        "engine_requests_a_second": capacity,
        "offered_a_second": 10 * capacity,
        "seconds": seconds,
        "before": before,
        "during": during,
        "recovered_within_s": recovered,
        "memory_mb": [round(memory, 1), round(started.memory(), 1)],
    }


async def soak(started: Started, side: int, count: int) -> dict[str, Any]:
    """Send as many requests as a day has at a steady rate, as fast as they are answered; memory after each twentieth."""
    gated = Client(started.port, request_of(started.port, side))
    statuses: Counter[str] = Counter()
    memory, began = [], time.perf_counter()
    for _ in range(20):
        left = iter(range(count // 20))

        async def worker(left: Iterator[int] = left) -> None:
            for _ in left:
                await gated.one(time.perf_counter())

        await asyncio.gather(*(worker() for _ in range(32)))
        statuses.update(gated.taken()["statuses"])
        memory.append(round(started.memory(), 1))
    seconds = round(time.perf_counter() - began, 1)
    return {"requests": sum(statuses.values()), "seconds": seconds, "statuses": dict(statuses), "memory_mb": memory}


def main() -> None:
    """Run what was asked for and write the JSON."""
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("--out", type=Path)
    told.add_argument("--side", type=int, default=224, help="pixels of the picture's side")
    told.add_argument("--seconds", type=float, default=20)
    told.add_argument("--overload", type=float, default=0, help="seconds of ten times the engine's capacity")
    told.add_argument("--soak", type=int, default=0, help="requests that are sent alone, for growth of memory")
    told.add_argument("--option", action="append", default=[], help="option of slimlmm serve; repeat")
    told.add_argument("--engine-port", type=int)
    told.add_argument("--engine-ms", type=float, default=5.0)
    told.add_argument("--engine-at-once", type=int, default=10_000)
    args = told.parse_args()
    if args.engine_port:
        uvloop.run(fake_engine(args.engine_port, args.engine_ms / 1000, args.engine_at_once))
        return
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    if args.soak:
        with Started(0, args.engine_at_once, args.option) as started:
            found["soak"] = uvloop.run(soak(started, args.side, args.soak))
    with Started(args.engine_ms, args.engine_at_once, args.option) as started:
        found |= {
            "latency": uvloop.run(latency(started, args.side, 50, args.seconds)),
            "throughput": uvloop.run(throughput(started, args.side, 32, args.seconds / 5)),
        }
    if args.overload:
        with Started(40, 2, args.option) as started:
            found["overload"] = uvloop.run(overload(started, args.side, 50, args.overload))
    versions = {"slimlmm": __version__, "python": platform.python_version(), "aiohttp": aiohttp.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load}
    result = {
        "at": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "machine": machine,
        "options": args.option,
        **found,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
