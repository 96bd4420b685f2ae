"""The gateway before engines that are made up: what passes, what is refused, what is counted, and what is given back."""

import asyncio
import base64
import io
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from slimlmm.serving.arms import Arm
from slimlmm.serving.asks import Said, Token
from slimlmm.serving.chat import Chat, completion
from slimlmm.serving.gateway import Gateway
from slimlmm.serving.limits import Limits
from slimlmm.serving.serve import free_port
from slimlmm.serving.upstream import Engine, base_of, session
from slimlmm.serving.web import app_of

SAID = Said(
    text="soda pop",
    tokens=(Token(text="soda", logprob=-0.1), Token(text=" pop", logprob=-0.2)),
    finish="stop",
    prompt_tokens=7,
)


def data_url(width=8, height=8, kind="PNG"):
    held = io.BytesIO()
    Image.new("1", (width, height)).save(held, kind)
    return as_url(held.getvalue(), kind)


def as_url(data, kind="PNG"):
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def asked(url=None, **more):
    picture = {"type": "image_url", "image_url": {"url": url or data_url()}}
    return {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}], **more}


class Fake:
    """An engine: answers `SAID`, keeps what it was asked, waits while `held` is not set, or does what `does` says."""

    def __init__(self, does=None):
        self.app, self.seen, self.held = FastAPI(), [], asyncio.Event()
        self.held.set()
        self.does = does

        @self.app.get("/v1/models")
        async def models():
            return {"data": []}

        @self.app.post("/v1/chat/completions")
        async def chat(request: Request):
            raw = await request.json()
            self.seen.append(raw)
            await self.held.wait()
            return await self.does(raw) if self.does else completion(SAID, Chat.model_validate(raw), "engine")


@asynccontextmanager
async def listening(app):
    """Serve an application on a port of this machine within the block; yields its address."""
    config = uvicorn.Config(app, port=free_port(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        await running


GONE = "http://127.0.0.1:9"


@asynccontextmanager
async def arm_of(*fakes, name="student", gone=False, streams=False, model=None, **bounds):
    """Yield an arm before these engines; before them all stands one that is `gone`, where wanted."""
    limits = Limits(**bounds)
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(listening(fake.app)) for fake in fakes]
        client = await stack.enter_async_context(session(limits.at_once, limits.deadline_s))
        engine = Engine([f"{url}/v1" for url in ([GONE] * gone + urls)], client, model=model)
        yield Arm(name, f"{name}-folder", engine, streams)


@asynccontextmanager
async def calling(gateway, **more):
    """Yield a client of a gateway."""
    app = app_of(gateway, **more)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        yield client


@asynccontextmanager
async def served(*fakes, gone=False, streams=False, token=None, model=None, **limits):
    """Yield a gateway with nothing but a student, and a client of it."""
    async with arm_of(*fakes, gone=gone, streams=streams, model=model, **limits) as arm:
        gateway = Gateway(name="student", student=arm, limits=Limits(**limits), token=token)
        async with calling(gateway) as client:
            yield gateway, client


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def official(client, key="none"):
    return openai.AsyncOpenAI(base_url="http://gateway/v1", api_key=key, http_client=client, max_retries=0)


def test_the_official_client_gets_whole_and_streamed_answers():
    async def work():
        async with served(Fake()) as (_, client):
            api = official(client)
            whole = await api.chat.completions.create(model="m", logprobs=True, **asked())
            assert whole.choices[0].message.content == "soda pop"
            assert [one.logprob for one in whole.choices[0].logprobs.content] == [-0.1, -0.2]
            assert whole.usage.total_tokens == 9
            stream = await api.chat.completions.create(
                model="m", stream=True, stream_options={"include_usage": True}, **asked()
            )
            parts = [part async for part in stream]
            assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "soda pop"
            assert parts[-2].choices[0].finish_reason == "stop"
            assert parts[-1].usage.completion_tokens == 2
            assert [one.id for one in (await api.models.list()).data] == ["student"]

    run(work())


def test_a_request_goes_on_as_it_came_with_the_engines_name_and_a_limit():
    fake = Fake()

    async def work():
        async with served(fake, model="its-name", streams=True, tokens=99) as (_, client):
            await client.post("/v1/chat/completions", json=asked(model="ours", seed=3, guided_choice=["a"]))
            await client.post("/v1/chat/completions", json=asked(max_completion_tokens=5))

    run(work())
    first, second = fake.seen
    assert first == asked(model="its-name", seed=3, guided_choice=["a"], max_tokens=99)
    assert second == asked(model="its-name", max_completion_tokens=5)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"3", "valid dictionary"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "Input should be"),
        (asked(url="https://example.org/a.png"), "not fetched"),
        (asked(url="data:image/png;base64,@@"), "not valid base64"),
        (asked(url="data:text/html;base64,PGh0bWw+"), "cannot be read"),
        (asked(url="file:///etc/passwd"), "not fetched"),
        (asked(url=data_url(9000, 9000)), "9000x9000 = 81,000,000 pixels"),
        (asked(url=data_url(kind="TIFF")), "cannot be read"),
        (asked(max_tokens=100_000), "more than 512"),
        (asked(max_tokens=0), "greater than or equal to 1"),
        (asked(temperature=float("nan")), "Input should be"),
        ({"messages": asked()["messages"] * 9}, "9 pictures are more than 8"),
    ],
)
def test_what_is_no_good_request_is_400_with_the_reason_and_never_reaches_the_engine(body, told):
    fake = Fake()

    async def work():
        async with served(fake) as (_, client):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await client.post("/v1/chat/completions", content=content)
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "invalid_request_error"

    run(work())
    assert fake.seen == []


def test_a_body_too_large_is_413_and_one_that_does_not_come_408():
    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    async def many():
        for _ in range(30):
            yield b"x" * 1000

    async def work():
        async with served(Fake(), body_bytes=20_000, read_s=0.2) as (_, client):
            path = "/v1/chat/completions"
            assert (await client.post(path, content=b"x" * 30_000)).status_code == 413
            assert (await client.post(path, content=many())).status_code == 413
            assert (await client.post(path, content=slow())).status_code == 408

    run(work())


def test_a_token_is_asked_for_where_there_is_one():
    async def work():
        async with served(Fake(), token="secret") as (_, client):
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                assert (await client.post("/v1/chat/completions", json=asked(), headers=header)).status_code == 401
                assert (await client.get("/v1/models", headers=header)).status_code == 401
            api = official(client, "secret")
            assert (await api.chat.completions.create(model="m", **asked())).choices
            assert (await client.get("/health")).status_code == 200

    run(work())


def test_more_than_may_wait_get_429_at_once_and_the_others_their_answers():
    fake = Fake()
    fake.held.clear()

    async def work():
        async with served(fake, at_once=2, waiting=3) as (gateway, client):
            sent = [asyncio.create_task(client.post("/v1/chat/completions", json=asked())) for _ in range(9)]
            while sum(one.done() for one in sent) < 4:
                await asyncio.sleep(0.01)
            assert (gateway.gate.inside, gateway.gate.waiting) == (2, 3)
            fake.held.set()
            found = await asyncio.gather(*sent)
            assert sorted(one.status_code for one in found) == [200] * 5 + [429] * 4
            assert all(one.headers["retry-after"] == "1" for one in found if one.status_code == 429)
            assert (gateway.gate.inside, gateway.gate.waiting) == (0, 0)
            metrics = (await client.get("/metrics")).text
            assert 'slimlmm_requests_total{status="429"} 4.0' in metrics
            assert 'slimlmm_requests_total{status="200"} 5.0' in metrics
            assert "slimlmm_answer_seconds_count 5.0" in metrics

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_504_and_gives_its_place_back(stream):
    fake = Fake()
    fake.held.clear()

    async def work():
        async with served(fake, streams=True, deadline_s=0.2, at_once=1) as (gateway, client):
            answer = await client.post("/v1/chat/completions", json=asked(stream=stream))
            assert answer.status_code == 504
            assert (gateway.gate.inside, gateway.gate.waiting) == (0, 0)
            assert [one.busy for one in gateway.student.engine.replicas] == [0]
            fake.held.set()
            assert (await client.post("/v1/chat/completions", json=asked())).status_code == 200

    run(work())


def test_another_replica_takes_what_one_does_not_and_the_least_busy_comes_first():
    one, other = Fake(), Fake()

    async def work():
        async with served(one, other, gone=True) as (gateway, client):
            assert (await client.post("/v1/chat/completions", json=asked())).status_code == 200
            assert (len(one.seen), len(other.seen)) == (1, 0)
            one.held.clear()
            held = asyncio.create_task(client.post("/v1/chat/completions", json=asked()))
            while len(one.seen) < 2:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/chat/completions", json=asked())).status_code == 200
            assert len(other.seen) == 1
            one.held.set()
            assert (await held).status_code == 200
            assert [replica.busy for replica in gateway.student.engine.replicas] == [0, 0, 0]

    run(work())


def test_without_any_engine_it_is_alive_not_ready_and_answers_503():
    async def work():
        async with served(gone=True) as (_, client):
            answer = await client.post("/v1/chat/completions", json=asked())
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
        async with served(Fake()) as (_, client):
            assert (await client.get("/ready")).status_code == 200

    run(work())


def test_a_stream_of_the_engine_passes_as_it_is_and_one_that_breaks_off_says_so():
    async def fine(_raw):
        async def parts():
            for text in ('data: {"a": 1}\n\n', "data: [DONE]\n\n"):
                yield text

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def bad(_raw):
        return JSONResponse({"error": {"message": "no such model"}}, 404)

    async def work():
        async with served(Fake(fine), streams=True, at_once=1) as (gateway, client):
            answer = await client.post("/v1/chat/completions", json=asked(stream=True))
            assert answer.text == 'data: {"a": 1}\n\ndata: [DONE]\n\n'
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert gateway.gate.inside == 0
        async with served(Fake(bad), streams=True) as (gateway, client):
            answer = await client.post("/v1/chat/completions", json=asked(stream=True))
            assert (answer.status_code, answer.json()["error"]["message"]) == (404, "no such model")
            assert gateway.gate.inside == 0

    run(work())


def test_an_error_inside_a_batch_of_the_embedded_engine_has_its_own_status():
    async def refused(_raw):
        return {"error": {"message": "no place for two pictures"}, "status": 400}

    async def work():
        async with served(Fake(refused)) as (_, client):
            for stream in (False, True):
                answer = await client.post("/v1/chat/completions", json=asked(stream=stream))
                assert answer.status_code == 400
                assert answer.json()["error"]["message"] == "no place for two pictures"

    run(work())


def test_the_openapi_document_holds_all_parts_of_a_request():
    async def work():
        async with served(Fake()) as (_, client):
            found = (await client.get("/openapi.json")).json()
            text = json.dumps(found)
            for part in set(re.findall(r"#/([^\"]+)", text)):
                place = found
                for key in part.split("/"):
                    place = place[key]
            assert "#/components/schemas/ImageUrl" in text

    run(work())


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://a:1", "http://a:1/v1"),
        ("http://a:1/", "http://a:1/v1"),
        ("http://a/v1/", "http://a/v1"),
        ("https://a/proxy", "https://a/proxy/v1"),
        ("http://a/v3", "http://a/v3"),
    ],
)
def test_an_engine_is_asked_at_the_version_that_its_address_says(url, base):
    assert base_of(url) == base
