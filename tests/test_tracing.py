"""Traces of OpenTelemetry: the gateway under its own launcher, before a made-up engine and a made-up collector."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import httpx
from fastapi import FastAPI, Request, Response
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from slimlmm.serving.serve import free_port
from test_gateway import Fake, asked, listening, run

ENVIRONMENT = {
    "OTEL_SERVICE_NAME": "student",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_RESPONSE": "x-slimlmm-id",
    "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "ready",
}


class Collector:
    """Keeps the spans that are sent to it."""

    def __init__(self):
        self.app, self.spans = FastAPI(), []

        @self.app.post("/v1/traces")
        async def take(request: Request):
            told = ExportTraceServiceRequest.FromString(await request.body())
            self.spans += [span for part in told.resource_spans for scope in part.scope_spans for span in scope.spans]
            return Response(status_code=200)


class Heading(Fake):
    """An engine that keeps the headers of what it was asked."""

    def __init__(self):
        super().__init__()
        self.headers = []

        @self.app.middleware("http")
        async def keep(request, further):
            if request.method == "POST":
                self.headers.append(dict(request.headers))
            return await further(request)


@contextlib.asynccontextmanager
async def traced(engine, collector):
    """Run `slimlmm serve` under OpenTelemetry's launcher; yields its address, and ends it."""
    port = free_port()
    launcher = Path(sys.executable).with_name("opentelemetry-instrument")
    command = [launcher, sys.executable, "-m", "slimlmm", "serve", engine, "--port", str(port), "--quiet"]
    environment = {**os.environ, **ENVIRONMENT, "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    process = await asyncio.create_subprocess_exec(*command, env=environment)
    try:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    async with httpx.AsyncClient() as client:
                        if (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200:
                            break
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0


def test_a_request_is_one_trace_from_the_user_through_the_gateway_to_the_engine():
    async def work():
        engine, collector = Heading(), Collector()
        async with (
            listening(engine.app) as engine_url,
            listening(collector.app) as collector_url,
            traced(engine_url, collector_url) as address,
            httpx.AsyncClient() as client,
        ):
            answer = await client.post(f"{address}/v1/chat/completions", json=asked())
            assert answer.status_code == 200
        return engine.headers[0], collector.spans, answer.headers["x-slimlmm-id"]

    headers, spans, name = run(work())
    outer = next(span for span in spans if span.name == "POST /v1/chat/completions")
    told = {one.key: one.value for one in outer.attributes}
    assert told["http.response.header.x_slimlmm_id"].array_value.values[0].string_value == name
    asking = next(span for span in spans if span.span_id.hex() == headers["traceparent"].split("-")[2])
    assert asking.trace_id == outer.trace_id
    assert asking.trace_id.hex() == headers["traceparent"].split("-")[1]
    assert not [span for span in spans if "/ready" in span.name]
