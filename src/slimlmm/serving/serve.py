"""What `slimlmm serve` does: start the embedded engine unless one is given by URL, and the gateway before it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn

from slimlmm.errors import UserError
from slimlmm.progress import Reporter
from slimlmm.serving.gateway import Gateway, app_of
from slimlmm.serving.limits import Limits
from slimlmm.serving.upstream import Engine

#: seconds in which the embedded engine must have loaded its model
LOADING_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One gateway: the student, engines that serve it (none for the embedded one), where it listens, its limits."""

    student: str
    engines: Sequence[str] = ()
    engine_model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    batch: int = 16
    wait_ms: float = 2.0
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)


def serve(settings: Serving, tell: Reporter) -> None:
    """Serve until the process is told to stop; answers that were begun are finished then.

    Raises:
        UserError: the student is no folder that can be served, or the embedded engine does not start.
    """
    if settings.engines:
        _run(settings, settings.engines, tell, streams=True)
        return
    with embedded(settings, tell) as url:
        _run(settings, [url], tell, streams=False)


@contextmanager
def embedded(settings: Serving, tell: Reporter) -> Iterator[str]:
    """Run the embedded engine within the block; yields its URL once the model is loaded.

    Raises:
        UserError: the folder is no model, or its process ended before it was ready.
    """
    folder = Path(settings.student)
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: has no config.json; give the folder of a model, or an engine that serves it (--engine URL)."
        )
    port = free_port()
    command = [sys.executable, "-m", "slimlmm.serving.embedded", str(folder), "--port", str(port)]
    command += ["--batch", str(settings.batch), "--wait-ms", str(settings.wait_ms)]
    command += ["--max-tokens", str(settings.limits.tokens), "--max-pixels", str(settings.limits.pixels)]
    command += ["--threads", str(settings.threads)] if settings.threads else []
    # a group of its own: Ctrl-C reaches the gateway alone, which lets begun answers end before it stops the whole group
    # (LitServe's workers outlive its first process); the pipe ends with the gateway, and the engine with the pipe
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        _await(process, f"http://127.0.0.1:{port}/health", tell)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _await(process: subprocess.Popen[bytes], url: str, tell: Reporter) -> None:
    tell.say("the engine loads the model")
    until = time.monotonic() + LOADING_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise UserError(
                f"the embedded engine ended with status {process.returncode} before it was ready; see above."
            )
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise UserError(f"the embedded engine was not ready after {LOADING_S:.0f} seconds.")


def _run(settings: Serving, urls: Sequence[str], tell: Reporter, *, streams: bool) -> None:
    limits = settings.limits
    client = httpx.AsyncClient(
        limits=httpx.Limits(max_connections=limits.at_once + 8, max_keepalive_connections=limits.at_once + 8),
        timeout=httpx.Timeout(limits.deadline_s, connect=2.0),
        trust_env=False,
    )
    engine = Engine(urls, client, model=settings.engine_model)
    app = app_of(Gateway(engine, Path(settings.student).name, limits, settings.token, streams=streams))
    tell.say(f"serving on http://{settings.host}:{settings.port}/v1")
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=limits.drain_s,
        server_header=False,
    )
    # uvicorn lets begun answers end and then raises the signal again, which must not end us before the engine is stopped
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    finally:
        signal.signal(signal.SIGTERM, before)
