"""Who can answer: an arm is an engine with the name that records know it by; a reply is what came back from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slimlmm.serving.upstream import Engine

#: keys that ask for a stream
STREAMING = ("stream", "stream_options")


class Reply:
    """A whole answer of an engine."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body

    @cached_property
    def content(self) -> dict[str, Any]:
        """The body as JSON; {} where it is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def text(self) -> str | None:
        """The first choice's text, or None where there is none."""
        text = self._choice.get("message", {}).get("content")
        return text if self.status == 200 and isinstance(text, str) else None

    @property
    def logprobs(self) -> Sequence[float] | None:
        """The log-probability of each token of the first choice, or None where the engine gave none."""
        held = self._choice.get("logprobs")
        if not isinstance(held, dict) or not isinstance(held.get("content"), list):
            return None
        return [float(one["logprob"]) for one in held["content"]]

    def tokens(self, kind: str) -> int | None:
        """Return how many tokens the ``prompt`` or the ``completion`` has, where the engine told."""
        usage = self.content.get("usage")
        count = usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) else None

    def without_logprobs(self) -> Reply:
        """Return the answer as it would be had they not been asked for."""
        choices = [{**one, "logprobs": None} for one in self.content.get("choices", ())]
        return Reply(self.status, json.dumps(self.content | {"choices": choices}).encode())

    @property
    def _choice(self) -> Mapping[str, Any]:
        choices = self.content.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        return first if isinstance(first, dict) else {}


@dataclass(frozen=True, slots=True)
class Arm:
    """One model before users or beside them: student, candidate or teacher.

    `streams` tells whether its engine can write an answer piece by piece; one that cannot is the embedded engine, which also
    tells an error's status inside its body.
    """

    name: str
    model: str
    engine: Engine
    streams: bool

    async def answer(self, raw: Mapping[str, Any]) -> Reply:
        """Return a whole answer to a request, without a stream even where it asks for one; raises as `Engine.complete`."""
        status, body = await self.engine.complete({key: raw[key] for key in raw if key not in STREAMING})
        if not self.streams and body.startswith(b'{"error"'):
            status = int(json.loads(body).get("status", status))
        return Reply(status, body)


def agree(one: str, other: str) -> bool:
    """Tell whether two answers are equal but for white space, as the evaluation compares them."""
    return one.split() == other.split()
