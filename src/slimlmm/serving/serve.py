"""What `slimlmm serve` does: start embedded engines for folders, and the gateway before all engines."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass

import httpx
import uvicorn
from PIL import Image

from slimlmm.errors import UserError
from slimlmm.progress import Reporter
from slimlmm.serving import escalation
from slimlmm.serving.arms import Arm
from slimlmm.serving.canary import Canary
from slimlmm.serving.chat import RefusedError
from slimlmm.serving.gateway import Gateway
from slimlmm.serving.metering import Meter, counter_of
from slimlmm.serving.pictures import Fetcher
from slimlmm.serving.settings import Serving, Source
from slimlmm.serving.shadow import Shadow
from slimlmm.serving.store import Store
from slimlmm.serving.upstream import Engine, session
from slimlmm.serving.web import app_of

#: seconds in which the embedded engine must have loaded its model
LOADING_S = 600.0
#: the models of a gateway, in the order in which they are started
ARMS = ("student", "teacher", "candidate")


def serve(settings: Serving, tell: Reporter, *, token: str | None = None, admin_token: str | None = None) -> None:
    """Serve until the process is told to stop; answers that were begun are finished then.

    Raises:
        UserError: an embedded engine does not start, the store cannot be opened, or escalation cannot work.
    """
    with ExitStack() as stack:
        sources = {name: source for name in ARMS if (source := getattr(settings, name)) is not None}
        started = {
            source.folder: stack.enter_context(embedded(source.folder, settings))
            for source in sources.values()
            if source.folder is not None
        }
        for folder, engine in started.items():  # all load at the same time
            tell.say(f"the engine loads {folder}")
            engine.wait()
        urls = {name: source.urls or (started[source.folder].url,) for name, source in sources.items()}
        # uvicorn lets begun answers end and then raises the signal again, which must not end us before engines are stopped
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        stack.callback(signal.signal, signal.SIGTERM, before)
        config = uvicorn.Config("", host=settings.host, port=settings.port)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_run(settings, sources, urls, tell, token, admin_token))


@dataclass(frozen=True, slots=True)
class Embedded:
    """The process of an embedded engine, and its URL once the model is loaded."""

    process: subprocess.Popen[bytes]
    url: str

    def wait(self) -> None:
        """Return once the model is loaded.

        Raises:
            UserError: the process ended before, or takes longer than `LOADING_S`.
        """
        until = time.monotonic() + LOADING_S
        while time.monotonic() < until:
            if (code := self.process.poll()) is not None:
                raise UserError(f"the embedded engine ended with status {code} before it was ready; see above.")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise UserError(f"the embedded engine was not ready after {LOADING_S:.0f} seconds.")


@contextmanager
def embedded(folder: str, settings: Serving) -> Iterator[Embedded]:
    """Run the embedded engine of a folder within the block."""
    port, batching, limits = free_port(), settings.batching, settings.limits
    command = [sys.executable, "-m", "slimlmm.serving.embedded", folder, "--port", str(port)]
    command += ["--batch", str(batching.size), "--wait-ms", str(batching.wait_ms)]
    command += ["--max-tokens", str(limits.tokens), "--max-pixels", str(limits.pixels)]
    command += ["--threads", str(batching.threads)] if batching.threads else []
    # a group of its own: Ctrl-C reaches the gateway alone, which lets begun answers end before it stops the whole group
    # (LitServe's workers outlive its first process); the pipe ends with the gateway, and the engine with the pipe
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield Embedded(process, f"http://127.0.0.1:{port}")
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


async def _run(
    settings: Serving,
    sources: Mapping[str, Source],
    urls: Mapping[str, Sequence[str]],
    tell: Reporter,
    token: str | None,
    admin_token: str | None,
) -> None:
    """Run the gateway in this event loop until the process is told to stop."""
    limits = settings.limits
    async with AsyncExitStack() as stack:
        arms = {}
        for name, source in sources.items():
            client = await stack.enter_async_context(session(limits.at_once, limits.deadline_s))
            engine = Engine(urls[name], client, model=source.model)
            arms[name] = Arm(name, source.label, engine, streams=source.folder is None)
        gateway = _gateway(settings, arms, token)
        if gateway.store is not None:
            stack.callback(gateway.store.close)
            tell.say(f"answers are recorded in {gateway.store.where}")
            _resume(gateway, tell)
        if settings.energy is not None:
            counter = counter_of(settings.energy)
            gateway.meter = Meter(
                counter=counter, seconds=settings.energy.seconds, metrics=gateway.metrics, store=gateway.store
            )
            tell.say(f"energy is read every {settings.energy.seconds:g} s: {counter.name}")
        if limits.picture_hosts:
            gateway.fetcher = Fetcher(limits)
            stack.push_async_callback(gateway.fetcher.close)
        if gateway.escalation is not None:
            await _proves_logprobs(arms["student"])
        tell.say(f"serving on http://{settings.host}:{settings.port}/v1")
        config = uvicorn.Config(
            app_of(gateway, admin_token),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=limits.drain_s,
            server_header=False,
        )
        await uvicorn.Server(config).serve()


def _gateway(settings: Serving, arms: Mapping[str, Arm], token: str | None) -> Gateway:
    """Return the gateway of these arms with what the settings put beside them."""
    stored, candidate = settings.stored, arms.get("candidate")
    gateway = Gateway(
        name=settings.shown,
        student=arms["student"],
        limits=settings.limits,
        token=token,
        candidate=candidate,
        canary=Canary(settings.canary) if candidate else None,
        teacher=arms.get("teacher"),
        escalation=escalation.read(settings.escalate) if settings.escalate else None,
        store=Store(stored.where, retention_days=stored.retention_days) if stored else None,
    )
    if settings.shadow is not None and gateway.store is not None:
        gateway.shadow = Shadow(
            settings=settings.shadow,
            teacher=arms["teacher"],
            store=gateway.store,
            metrics=gateway.metrics,
            deadline_s=settings.limits.deadline_s,
            pixels=settings.limits.pixels,
            compared=gateway.compared,
        )
    return gateway


def _resume(gateway: Gateway, tell: Reporter) -> None:
    """Go on with the share that a candidate had last, so that a restart brings none back that a rule took away."""
    if gateway.canary is None or gateway.candidate is None or gateway.store is None:
        return
    weight = gateway.store.last_weight(gateway.candidate.model)
    if weight is not None and weight != gateway.canary.weight:
        tell.say(f"the candidate goes on with weight {weight:g}, as it had last; PUT /admin/canary changes it")
        gateway.canary.put(weight)


async def _proves_logprobs(student: Arm) -> None:
    """Ask one question and look for log-probabilities.

    Raises:
        UserError: there are none, so no answer's confidence could be told.
    """
    held = io.BytesIO()
    Image.new("RGB", (64, 64)).save(held, "PNG")
    picture = {"url": f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"}
    parts = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What is it?"}]
    asked = {
        "model": student.model,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 2,
        "logprobs": True,
    }
    try:
        reply = await student.answer(asked)
    except RefusedError as error:
        raise UserError(f"--escalate: the student's engine does not answer ({error}); start it first.") from error
    if reply.logprobs is None:
        said = reply.body[:200].decode(errors="replace")
        raise UserError(
            f"--escalate: it cannot work, as the student's engine gives no log-probabilities (status {reply.status}: {said}). "
            "The embedded engine and vLLM give them."
        )
