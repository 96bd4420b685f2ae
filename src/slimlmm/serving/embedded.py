"""The embedded engine: a stock model behind LitServe, which gathers waiting requests into batches, in a process of its own.

``python -m slimlmm.serving.embedded MODEL --port 9000`` is an OpenAI-compatible server without streaming and without limits; it
listens on this machine alone, behind the gateway, and ends when its standard input does.
"""

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
import torch
from fastapi import Request

from slimlmm import checkpoint
from slimlmm.errors import UserError
from slimlmm.serving.answering import Answerer
from slimlmm.serving.asks import Ask
from slimlmm.serving.chat import Bounds, Chat, RefusedError, ask_of, completion, parsed
from slimlmm.serving.settings import is_export

COMPLETIONS = "/v1/chat/completions"
#: what is read of a request, or why it is refused: a bad request must not fail the batch that it came in
Decoded = tuple[Chat, Ask] | RefusedError


class Engine(litserve.LitAPI):
    """The model's side of the server: JSON to conversation, a batch through the model, answer to JSON."""

    def __init__(self, folder: Path, bounds: Bounds, threads: int | None, **batching: Any) -> None:
        super().__init__(api_path=COMPLETIONS, **batching)
        self.folder, self.bounds, self.threads = folder, bounds, threads

    def setup(self, device: str) -> None:
        """Load the model onto its device; called once in the process that answers."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if is_export(self.folder):
            from slimlmm.exporting import runner  # its runtimes are an extra

            self.answerer = runner.answerer(self.folder, threads=self.threads)
            return
        loaded = checkpoint.load(self.folder, device=torch.device(device))
        self.answerer = Answerer(loaded.model, loaded.processor)

    def decode_request(self, request: Request) -> Decoded:
        """Read one request, whose JSON comes here; LitServe reads from the annotation that it is to be parsed, and no more."""
        try:
            chat = parsed(request)
            return chat, ask_of(chat, self.bounds)
        except RefusedError as error:
            return error

    def batch(self, inputs: Sequence[Decoded]) -> list[Decoded]:
        """Leave a batch a list: tensors are made where the processor is."""
        return list(inputs)

    def unbatch(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave it a list."""
        return list(output)

    def predict(self, decoded: Sequence[Decoded]) -> list[dict[str, Any]]:
        """Answer a batch; what was refused is an error in its place."""
        good = [one for one in decoded if not isinstance(one, RefusedError)]
        answers = iter(self._answers(good))
        return [_error(one) if isinstance(one, RefusedError) else next(answers) for one in decoded]

    def _answers(self, good: Sequence[tuple[Chat, Ask]]) -> list[dict[str, Any]]:
        """Answer conversations together; where one of them has no place in the model's prompt, each alone."""
        if not good:
            return []
        try:
            said = self.answerer.answer([ask for _, ask in good])
        except (UserError, ValueError, IndexError, KeyError) as error:
            if len(good) == 1:
                return [_error(RefusedError(400, f"the model does not take this conversation: {error}", "messages"))]
            return [self._answers([one])[0] for one in good]
        name = self.folder.name
        return [completion(one, chat, chat.model or name) for one, (chat, _) in zip(said, good, strict=True)]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer as it is."""
        return output


def _error(error: RefusedError) -> dict[str, Any]:
    return error.body() | {"status": error.status}


def server(engine: Engine, *, accelerator: str = "auto") -> litserve.LitServer:
    """Return the server of one engine, one worker a device."""
    found = litserve.LitServer(engine, accelerator=accelerator, timeout=False, disable_openapi_url=True)
    name = engine.folder.name
    found.app.add_api_route(
        "/v1/models", lambda: {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "slimlmm"}]}
    )
    return found


def _end_with_parent() -> None:
    """Wait until standard input ends, as it does when the gateway is no more, and end this process with its workers.

    By its number: a reader of `sys.stdin` would hold that one's lock, on which forked processes wait for ever.
    """
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Serve a folder until the process is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--wait-ms", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--max-pixels", type=int, default=50_000_000)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bounds = Bounds(tokens=options.max_tokens, pixels=options.max_pixels)
    batching = {"max_batch_size": options.batch, "batch_timeout": options.wait_ms / 1000}
    engine = Engine(options.model, bounds, options.threads, **batching)
    server(engine).run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
