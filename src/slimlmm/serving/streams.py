"""What a streamed answer said, read along while it passes."""

from __future__ import annotations

import json
from typing import Any


class Heard:
    """Reads server-sent events of chat completion chunks: text of the first choice, and usage where it is told."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self._rest = b""

    def feed(self, part: bytes) -> None:
        """Take the next bytes, wherever they are cut."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            try:
                chunk = json.loads(line[5:])
            except ValueError:  # the end is said by [DONE], which is no JSON
                continue
            if isinstance(chunk, dict):
                self._take(chunk)

    def _take(self, chunk: dict[str, Any]) -> None:
        if isinstance(usage := chunk.get("usage"), dict):
            self.prompt_tokens, self.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content")
            if choice.get("index", 0) == 0 and isinstance(text, str):
                self.text = (self.text or "") + text
