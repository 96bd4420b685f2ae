"""The web application of a gateway: its addresses, and how errors are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from slimlmm import __version__
from slimlmm.serving.chat import Chat, RefusedError
from slimlmm.serving.gateway import Gateway, bears
from slimlmm.serving.metrics import Metrics


class Weight(BaseModel):
    """The candidate's share of requests."""

    weight: float = Field(ge=0, le=1)


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


def app_of(gateway: Gateway, admin_token: str | None = None) -> FastAPI:
    """Return the web application of a gateway; the addresses that change it are there only with an `admin_token`."""

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        if gateway.shadow is not None:
            gateway.shadow.start()
        metering = asyncio.create_task(gateway.meter.run()) if gateway.meter is not None else None
        try:
            yield
        finally:
            if metering is not None:
                metering.cancel()
            if gateway.shadow is not None:
                await gateway.shadow.stop()

    app = FastAPI(title="slimlmm", version=__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.add_middleware(Counted, metrics=gateway.metrics)

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> JSONResponse:
        headers = {} if error.retry_after is None else {"retry-after": f"{error.retry_after:.0f}"}
        return JSONResponse(error.body(), error.status, headers)

    @app.post("/v1/chat/completions", openapi_extra=_documented(app))
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
        here = await gateway.student.engine.ready()
        return JSONResponse({"status": "ready" if here else "the engine does not answer"}, 200 if here else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if admin_token is not None and gateway.canary is not None:
        _admin(app, gateway, admin_token)
    return app


def _documented(app: FastAPI) -> dict[str, Any]:
    """Return what the OpenAPI document says of a chat completion's body, which is read by hand, and put its parts there."""
    schema = Chat.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return found

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _admin(app: FastAPI, gateway: Gateway, token: str) -> None:
    """Add the addresses that read and set the candidate's weight."""

    def allowed(request: Request) -> None:
        if not bears(request, token):
            raise RefusedError(401, "the administrator's token is missing or wrong")

    def state() -> dict[str, Any]:
        assert gateway.canary is not None
        return dict(gateway.canary.state())

    @app.get("/admin/canary")
    async def read(request: Request) -> dict[str, Any]:
        allowed(request)
        return state()

    @app.put("/admin/canary")
    async def put(request: Request, wanted: Weight) -> dict[str, Any]:
        allowed(request)
        await gateway.weigh(wanted.weight)
        return state()
