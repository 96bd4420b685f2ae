"""The way of one request: read, given to an arm, to the teacher where the arm is unsure, recorded, answered."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from slimlmm.serving.arms import Arm, Reply
from slimlmm.serving.canary import Canary
from slimlmm.serving.chat import Chat, RefusedError, chunks, parsed
from slimlmm.serving.escalation import Escalation
from slimlmm.serving.limits import Gate, Limits, body_of, check
from slimlmm.serving.metering import Meter
from slimlmm.serving.metrics import Metrics
from slimlmm.serving.pictures import Fetcher
from slimlmm.serving.shadow import Seen, Shadow, pair
from slimlmm.serving.store import ANSWERS, EVENTS, PAIRS, Store
from slimlmm.serving.streams import Heard

#: bytes of a body whose pictures are looked at in a thread: less takes less time than the way there
INLINE = 200_000
#: the caller's name for what is asked, and ours for the request
TASK_HEADER, ID_HEADER = "x-slimlmm-task", "x-slimlmm-id"


@dataclass(slots=True, kw_only=True)
class Turn:
    """One request on its way, and what is to be recorded of it."""

    id: str
    at: float
    began: float
    task: str
    raw: dict[str, Any]
    chat: Chat
    arm: Arm
    route: str
    text: str | None = None
    confidence: float | None = None
    arm_seconds: float | None = None
    tokens: tuple[int | None, int | None] = (None, None)

    @property
    def seconds(self) -> float:
        """Seconds since the body had come."""
        return time.perf_counter() - self.began

    def record(self, status: int) -> dict[str, Any]:
        """Return the row of what was answered."""
        return {
            "id": self.id,
            "at": self.at,
            "task": self.task,
            "arm": self.arm.name,
            "model": self.arm.model,
            "route": self.route,
            "status": status,
            "question": self.chat.question,
            "answer": self.text,
            "confidence": self.confidence,
            "seconds": self.seconds,
            "arm_seconds": self.arm_seconds,
            "prompt_tokens": self.tokens[0],
            "completion_tokens": self.tokens[1],
        }

    def seen(self) -> Seen:
        """Return what the teacher gets of it, after the arm's own answer."""
        return Seen(
            id=self.id,
            task=self.task,
            arm=self.arm.name,
            raw=self.raw,
            pictures=tuple(self.chat.pictures),
            text=self.text or "",
            seconds=self.arm_seconds or 0.0,
            tokens=self.tokens[1],
        )


@dataclass(slots=True, kw_only=True)
class Gateway:
    """A student before its users, and what stands beside it: teacher, candidate, store; None for what was not asked for."""

    name: str
    student: Arm
    limits: Limits
    metrics: Metrics = field(default_factory=Metrics)
    token: str | None = None
    candidate: Arm | None = None
    canary: Canary | None = None
    teacher: Arm | None = None
    escalation: Escalation | None = None
    shadow: Shadow | None = None
    store: Store | None = None
    fetcher: Fetcher | None = None
    meter: Meter | None = None
    gate: Gate = field(init=False)
    teacher_gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        """Make the gates, and gauges of what is held."""
        self.gate, self.teacher_gate = Gate(self.limits), Gate(self.limits)
        watch = self.metrics.watch
        watch("slimlmm_inside", "Requests that are being answered.", lambda: self.gate.inside)
        watch("slimlmm_waiting", "Requests that wait for their turn.", lambda: self.gate.waiting)
        if (canary := self.canary) is not None:
            watch("slimlmm_canary_weight", "Share of requests that go to the candidate.", lambda: canary.weight)
        if self.teacher is not None:
            watch(
                "slimlmm_shadow_waiting",
                "Shadow requests that wait.",
                lambda: self.shadow.waiting if self.shadow else 0,
            )
        if (store := self.store) is not None:
            watch("slimlmm_store_failed", "Records that the store did not take.", lambda: store.failed)

    def allowed(self, request: Request) -> None:
        """Refuse a request without the token, where there is one."""
        if self.token is not None and not bears(request, self.token):
            raise RefusedError(401, "the bearer token is missing or wrong")

    async def chat(self, request: Request) -> Response:
        """Answer one chat completion."""
        self.allowed(request)
        self.gate.check()
        turn = await self._read(request)
        if turn.chat.streamed and turn.arm.streams and self.escalation is None:
            return await self._stream(turn)
        try:
            reply = await self._whole(turn)
        except RefusedError as error:
            await self._ended(turn, error.status)
            raise
        await self._ended(turn, reply.status)
        headers = {ID_HEADER: turn.id}
        if not turn.chat.streamed or reply.status != 200:
            return Response(reply.body, reply.status, headers, "application/json")
        usage = bool(turn.chat.stream_options and turn.chat.stream_options.include_usage)
        events = [_event(chunk) for chunk in chunks(reply.content, usage=usage)]
        return Response(b"".join((*events, b"data: [DONE]\n\n")), 200, headers, "text/event-stream")

    async def _read(self, request: Request) -> Turn:
        """Return a request that was understood and is within the limits, and whose it is."""
        body = await body_of(request, self.limits)
        try:
            raw = json.loads(body)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
            raise RefusedError(400, f"the body is not JSON: {error}") from None
        chat = parsed(raw)
        if self.fetcher is not None and any(not url.startswith("data:") for url in chat.pictures):
            await self.fetcher.inline(raw)
            chat = parsed(raw)
        if len(body) > INLINE:
            await asyncio.to_thread(check, chat, self.limits)
        else:
            check(chat, self.limits)
        if chat.limit is None:
            raw["max_tokens"] = self.limits.tokens
        drawn = self.candidate if self.canary and self.canary.draws_candidate() else None
        arm = drawn or self.student
        task = request.headers.get(TASK_HEADER, "")[:200]
        return Turn(
            id=uuid.uuid4().hex,
            at=time.time(),
            began=time.perf_counter(),
            task=task,
            raw=raw,
            chat=chat,
            arm=arm,
            route=arm.name,
        )

    async def _whole(self, turn: Turn) -> Reply:
        """Return an answer that came whole, of the arm or of the teacher."""
        wanted = turn.raw if self.escalation is None else turn.raw | {"logprobs": True}
        try:
            async with asyncio.timeout(self._left(turn)), self.gate.place():
                reply = await turn.arm.answer(wanted)
        except TimeoutError:
            raise self._late() from None
        turn.text, turn.arm_seconds = reply.text, turn.seconds
        turn.tokens = (reply.tokens("prompt"), reply.tokens("completion"))
        if reply.text is not None and self.escalation is not None:
            turn.confidence = self.escalation.confidence(reply.logprobs)
            if self.escalation.unsure(turn.confidence):
                reply = await self._escalated(turn, reply)
            if not turn.chat.logprobs:
                reply = reply.without_logprobs()
        return reply

    async def _escalated(self, turn: Turn, reply: Reply) -> Reply:
        """Return the teacher's answer, or the arm's where the teacher is full, fails or takes too long."""
        assert self.teacher is not None
        told = self.metrics.escalations.labels
        began = time.perf_counter()
        try:
            async with asyncio.timeout(min(self._left(turn), self.limits.teacher_s)), self.teacher_gate.place():
                better = await self.teacher.answer(turn.raw)
        except TimeoutError:
            told("late").inc()
            return reply
        except RefusedError as error:
            told("full" if error.status == 429 else "failed").inc()
            return reply
        if better.text is None:
            told("failed").inc()
            return reply
        told("taken").inc()
        if self.store is not None:
            await self.store.add(PAIRS, pair(turn.seen(), better, time.perf_counter() - began, "escalation"))
        turn.text, turn.route = better.text, self.teacher.name
        turn.tokens = (better.tokens("prompt"), better.tokens("completion"))
        return better

    async def _stream(self, turn: Turn) -> Response:
        """Return an answer that comes as the engine writes it; nothing is promised before the engine has taken it on."""
        stack = AsyncExitStack()
        try:
            async with asyncio.timeout(self._left(turn)):
                await stack.enter_async_context(self.gate.place())
                answer = await stack.enter_async_context(turn.arm.engine.stream(turn.raw))
                told = await answer.read() if answer.status != 200 else b""
        except BaseException as error:
            await stack.aclose()
            refused = self._late() if isinstance(error, TimeoutError) else error
            await self._ended(turn, getattr(refused, "status", 500))
            raise refused from None
        if answer.status != 200:
            await stack.aclose()
            await self._ended(turn, answer.status)
            return Response(told, answer.status, media_type="application/json")
        return StreamingResponse(
            self._passed(turn, stack, answer), headers={ID_HEADER: turn.id}, media_type="text/event-stream"
        )

    async def _passed(self, turn: Turn, stack: AsyncExitStack, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield a streamed answer as it comes; what goes wrong on the way is its last event."""
        heard, status = Heard(), 499
        try:
            async with stack:
                try:
                    async with asyncio.timeout(self._left(turn)):
                        async for part in answer.content.iter_any():
                            heard.feed(part)
                            yield part
                    status = 200
                except TimeoutError:
                    status = 504
                    yield _event(self._late().body())
                except aiohttp.ClientError as error:
                    status = 502
                    yield _event(RefusedError(502, f"the engine broke off: {type(error).__name__}").body())
        finally:
            turn.arm_seconds = turn.seconds
            turn.text, turn.tokens = heard.text, (heard.prompt_tokens, heard.completion_tokens)
            await self._ended(turn, status)

    async def _ended(self, turn: Turn, status: int) -> None:
        """Count, record and judge what was answered; where it may be compared, the shadow gets it."""
        if status == 200:
            self.metrics.answered += 1
            self.metrics.seconds.observe(turn.seconds)
            self.metrics.routes.labels(turn.arm.name, turn.route).inc()
        if turn.arm_seconds is not None:
            self.metrics.arm_seconds.labels(turn.arm.name).observe(turn.arm_seconds)
        if self.store is not None:
            await self.store.add(ANSWERS, turn.record(status))
        if self.canary is not None and status not in (400, 429, 499):
            seconds = turn.arm_seconds if turn.arm_seconds is not None else turn.seconds
            await self._returned(self.canary.answered(turn.arm.name, seconds, failed=status >= 500))
        if self.shadow is not None and status == 200 and turn.text is not None and turn.route == turn.arm.name:
            self.shadow.offer(turn.seen())

    async def compared(self, arm: str, agreed: bool) -> None:
        """Take note of a shadow pair."""
        if self.canary is not None:
            await self._returned(self.canary.compared(arm, agreed=agreed))

    async def weigh(self, weight: float) -> None:
        """Give the candidate another share of requests; those that are under way end where they began."""
        assert self.canary is not None
        self.canary.put(weight)
        await self._tell("canary", {"weight": weight})

    async def _returned(self, rule: str | None) -> None:
        if rule is None or self.canary is None:
            return
        self.metrics.returns.labels(rule).inc()
        await self._tell("returned", {"rule": rule, **self.canary.state()})

    async def _tell(self, kind: str, detail: Mapping[str, Any]) -> None:
        if self.store is not None:
            about = {"student": self.student.model, "candidate": self.candidate and self.candidate.model}
            await self.store.add(EVENTS, {"at": time.time(), "kind": kind, "detail": {**about, **detail}})

    def _left(self, turn: Turn) -> float:
        return max(0.0, self.limits.deadline_s - turn.seconds)

    def _late(self) -> RefusedError:
        return RefusedError(504, f"no answer within {self.limits.deadline_s:g} seconds")


def bears(request: Request, token: str) -> bool:
    """Tell whether a request carries a bearer token; the comparison takes as long whatever it finds."""
    told = request.headers.get("authorization", "").encode()
    return hmac.compare_digest(told, f"Bearer {token}".encode())


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
