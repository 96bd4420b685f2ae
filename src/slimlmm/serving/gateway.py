"""The gateway: OpenAI's chat completions before an engine, with limits, a token, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from slimlmm import __version__
from slimlmm.serving.chat import Chat, RefusedError, chunks, parsed
from slimlmm.serving.limits import Gate, Limits, body_of, check
from slimlmm.serving.upstream import Engine

#: seconds; an answer of a small student takes tens of milliseconds, one of a large teacher seconds
BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)


class Metrics:
    """What one gateway counts, for Prometheus."""

    def __init__(self, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("slimlmm_requests", "Requests by HTTP status.", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "slimlmm_answer_seconds",
            "Seconds from a request's body to its answer.",
            registry=self.registry,
            buckets=BUCKETS,
        )
        inside = Gauge("slimlmm_inside", "Requests that are being answered.", registry=self.registry)
        inside.set_function(lambda: gate.inside)
        waiting = Gauge("slimlmm_waiting", "Requests that wait for their turn.", registry=self.registry)
        waiting.set_function(lambda: gate.waiting)


class Gateway:
    """One student before its users."""

    def __init__(self, engine: Engine, name: str, limits: Limits, token: str | None = None, *, streams: bool) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.streams = streams
        self.gate = Gate(limits)
        self.metrics = Metrics(self.gate)
        self._bearer = f"Bearer {token}".encode() if token else None

    def allowed(self, request: Request) -> None:
        """Refuse a request without the token, where there is one."""
        told = request.headers.get("authorization", "").encode()
        if self._bearer is not None and not hmac.compare_digest(told, self._bearer):
            raise RefusedError(401, "the bearer token is missing or wrong")

    async def chat(self, request: Request) -> Response:
        """Answer one chat completion."""
        self.allowed(request)
        raw, chat = await self._read(request)
        began = time.perf_counter()
        if chat.streamed and self.streams:
            return await self._stream(raw, began)
        status, answer = await self._whole(raw, began)
        if not chat.streamed or status != 200:
            return Response(answer, status, media_type="application/json")
        usage = bool(chat.stream_options and chat.stream_options.include_usage)
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks(json.loads(answer), usage=usage)]
        return Response("".join((*events, "data: [DONE]\n\n")), media_type="text/event-stream")

    async def _read(self, request: Request) -> tuple[dict[str, Any], Chat]:
        """Return a request as it came and as it was understood; it is within the limits."""
        body = await body_of(request, self.limits)
        try:
            raw = json.loads(body)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from None
        chat = parsed(raw)
        await asyncio.to_thread(check, chat, self.limits)
        if chat.limit is None:
            raw["max_tokens"] = self.limits.tokens
        return raw, chat

    async def _whole(self, raw: dict[str, Any], began: float) -> tuple[int, bytes]:
        """Return status and body of an answer that came whole."""
        plain = {key: value for key, value in raw.items() if self.streams or key not in ("stream", "stream_options")}
        try:
            async with asyncio.timeout(self.limits.deadline_s), self.gate.place():
                status, answer = await self.engine.complete(plain)
        except TimeoutError:
            raise self._late() from None
        self.metrics.seconds.observe(time.perf_counter() - began)
        if answer.startswith(b'{"error"'):
            return int(json.loads(answer).get("status", status)), answer
        return status, answer

    async def _stream(self, raw: dict[str, Any], began: float) -> Response:
        """Return an answer that comes as the engine writes it; nothing is promised before the engine has taken it on."""
        stack = AsyncExitStack()
        left = self._left(began)
        try:
            await asyncio.wait_for(stack.enter_async_context(self.gate.place()), left())
            answer = await asyncio.wait_for(stack.enter_async_context(self.engine.stream(raw)), left())
            if answer.status_code != 200:
                told = await asyncio.wait_for(answer.aread(), left())
                await stack.aclose()
                return Response(told, answer.status_code, media_type="application/json")
        except TimeoutError:
            await stack.aclose()
            raise self._late() from None
        except BaseException:
            await stack.aclose()
            raise
        return StreamingResponse(self._passed(stack, answer, began), media_type="text/event-stream")

    async def _passed(self, stack: AsyncExitStack, answer: httpx.Response, began: float) -> AsyncIterator[bytes]:
        """Yield a streamed answer as it comes; what goes wrong on the way is its last event."""
        left, parts = self._left(began), answer.aiter_raw()
        async with stack:
            try:
                while (part := await asyncio.wait_for(anext(parts, None), left())) is not None:
                    yield part
                self.metrics.seconds.observe(time.perf_counter() - began)
            except TimeoutError:
                yield _event(self._late())
            except httpx.HTTPError as error:
                yield _event(RefusedError(502, f"the engine broke off: {type(error).__name__}"))

    def _left(self, began: float) -> Callable[[], float]:
        return lambda: max(0.0, began + self.limits.deadline_s - time.perf_counter())

    def _late(self) -> RefusedError:
        return RefusedError(504, f"no answer within {self.limits.deadline_s:g} seconds")


def _event(error: RefusedError) -> bytes:
    return f"data: {json.dumps(error.body())}\n\n".encode()


class Counted:
    """Counts answers by status around a web application; plain ASGI, so that streams pass as they come."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application on one connection."""

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, told if scope["type"] == "http" else send)


def app_of(gateway: Gateway) -> FastAPI:
    """Return the web application of a gateway."""
    app = FastAPI(title="slimlmm", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Counted, metrics=gateway.metrics)

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> JSONResponse:
        headers = {} if error.retry_after is None else {"retry-after": f"{error.retry_after:.0f}"}
        return JSONResponse(error.body(), error.status, headers)

    body = {"required": True, "content": {"application/json": {"schema": Chat.model_json_schema()}}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body})
    async def chat(request: Request) -> Response:
        return await gateway.chat(request)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        gateway.allowed(request)
        return {"object": "list", "data": [{"id": gateway.name, "object": "model", "owned_by": "slimlmm"}]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        here = await gateway.engine.ready()
        return JSONResponse({"status": "ready" if here else "the engine does not answer"}, 200 if here else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
