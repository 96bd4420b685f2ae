"""The part of OpenAI's chat completions that slimlmm reads: what a request must be, its pictures, and what an answer looks like.

Source: https://platform.openai.com/docs/api-reference/chat. Keys that are not here are passed on to an engine as they came.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from slimlmm import pictures
from slimlmm.pictures import Format, PictureError, PictureSettings
from slimlmm.serving.asks import Ask, Said, Token

#: what a picture may be; everything else that Pillow can open is more than a web page would show
FORMATS: tuple[Format, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

#: temperatures below are greedy: what they would divide by overflows
COLDEST = 1e-4


class RefusedError(Exception):
    """A request that is answered with an error: HTTP status, what was wrong, and which key."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ImageUrl(_Part):
    """Where a picture is: a data URL, or an address that the gateway may fetch."""

    url: str


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def parts(self) -> Sequence[TextPart | ImagePart]:
        """Return the content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Part):
    """What a streamed answer ends with."""

    include_usage: bool = False


class Chat(_Part):
    """A request for a chat completion."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def pictures(self) -> list[str]:
        """URLs of all pictures in their order."""
        parts = [part for message in self.messages for part in message.parts()]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    @property
    def question(self) -> str:
        """All texts of the user's turns."""
        parts = [part for message in self.messages if message.role == "user" for part in message.parts()]
        return "\n".join(part.text for part in parts if isinstance(part, TextPart))

    @property
    def streamed(self) -> bool:
        """Whether the answer comes token by token."""
        return bool(self.stream)


def parsed(raw: Any) -> Chat:
    """Return a request as it is understood.

    Raises:
        RefusedError: 400 with the first thing that is wrong and its key.
    """
    try:
        return Chat.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise RefusedError(400, first["msg"], ".".join(map(str, first["loc"]))) from None


def file_of(url: str, param: str) -> bytes:
    """Return the bytes of a picture that a data URL holds.

    Raises:
        RefusedError: it is none, or not base64.
    """
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise RefusedError(400, "a picture must be a data URL: data:image/png;base64,...", param)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, "a picture is not valid base64", param) from None


def opened(url: str, most_pixels: int, param: str) -> Image.Image:
    """Return the picture of a data URL, its header read: the format is one of `FORMATS` and it has at most `most_pixels`.

    Raises:
        RefusedError: it is no data URL, no such picture, or larger.
    """
    data = file_of(url, param)
    # what a picture may be beside one is the engine's affair: it is shown nothing but pixels
    allowed = PictureSettings(formats=FORMATS, max_pixels=most_pixels, max_bytes=len(data) or 1, polyglots=True)
    try:
        return pictures.opened(data, allowed)
    except PictureError as error:
        if error.kind == "enormous picture":
            raise RefusedError(400, f"a picture has {error.detail}", param) from None
        raise RefusedError(400, f"a picture cannot be read; give one of {', '.join(FORMATS)}", param) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the embedded engine takes at most."""

    tokens: int
    pixels: int


def ask_of(chat: Chat, bounds: Bounds) -> Ask:
    """Return the conversation for the embedded engine, its pictures decoded.

    Raises:
        RefusedError: a picture cannot be decoded, or a key asks for what this engine does not do.
    """
    if (chat.n or 1) > 1:
        raise RefusedError(400, f"n={chat.n}: this engine gives one answer", "n")
    seen: list[Image.Image] = []
    turns: list[dict[str, Any]] = []
    for message in chat.messages:
        content: list[dict[str, str]] = []
        for part in message.parts():
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            param = f"image_url {len(seen)}"
            seen.append(decoded(opened(part.image_url.url, bounds.pixels, param), param))
            content.append({"type": "image"})
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    stop = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
    return Ask(
        messages=turns,
        pictures=seen,
        max_tokens=min(chat.limit or bounds.tokens, bounds.tokens),
        temperature=chat.temperature if chat.temperature and chat.temperature >= COLDEST else 0.0,
        top_p=chat.top_p or 1.0,
        stop=tuple(text for text in stop if text),
        top_logprobs=chat.top_logprobs or 0,
    )


def decoded(picture: Image.Image, param: str) -> Image.Image:
    """Return the pixels of an opened picture as RGB.

    Raises:
        RefusedError: they cannot be decoded.
    """
    try:
        with pictures.decoding():
            return picture.convert("RGB")
    except PictureError as error:
        raise RefusedError(400, f"a picture cannot be decoded: {error.detail}", param) from None


def completion(said: Said, chat: Chat, model: str) -> dict[str, Any]:
    """Return an answer as a ``chat.completion``."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said.text},
        "logprobs": {"content": [_logprob(token) for token in said.tokens]} if chat.logprobs else None,
        "finish_reason": said.finish,
    }
    written = len(said.tokens)
    usage = {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": said.prompt_tokens + written,
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def _logprob(token: Token) -> dict[str, Any]:
    def told(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return told(token.text, token.logprob) | {"top_logprobs": [told(*one) for one in token.top]}


def chunks(whole: Mapping[str, Any], *, usage: bool) -> Iterator[dict[str, Any]]:
    """Yield a whole ``chat.completion`` as the chunks of a stream: role, text, reason of the end, usage where wanted."""
    base = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    (choice,) = whole["choices"]
    message = choice["message"]
    deltas: list[tuple[dict[str, Any], str | None, Any]] = [
        ({"role": message["role"], "content": ""}, None, None),
        ({"content": message["content"]}, None, choice.get("logprobs")),
        ({}, choice["finish_reason"], None),
    ]
    for delta, reason, logprobs in deltas:
        told = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        yield base | {"choices": [told]} | ({"usage": None} if usage else {})
    if usage:
        yield base | {"choices": [], "usage": whole["usage"]}
