"""Made-up questions about made-up pictures, asked of a model: what a certificate compares, here and anywhere else.

Run as a script (``python -P probes.py < order.json``) it is the new process of `certificate.afresh`: it loads a folder with
the stock classes of transformers and nothing of slimlmm, so this file imports nothing of slimlmm.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import transformers
from jinja2 import TemplateError
from PIL import Image

#: asked in turn, each about a picture of its own
QUESTIONS = (
    "What is shown in the picture?",
    "Which colour covers most of the picture?",
    "Is there any text in the picture?",
    "How many objects are there?",
    "Describe the upper left corner.",
    "What is it for?",
    "Is the picture bright or dark?",
    "Read the words that you see.",
)
#: what a system turn says where a template is tried
SYSTEM = "System7Q"
#: a picture is this many plain squares a side
SQUARES = 8
#: most characters that are told of what stopped it
MOST_SAID = 400
#: pixels a side of pictures where the processor names no size, and at most
USUAL, LARGEST = 224, 1024


class Order(TypedDict):
    """What is asked of which folder, and with which arithmetic; `pictures`: files of real rows, question, system turn."""

    folder: str
    auto: str
    plain: Mapping[str, str]
    device: str
    threads: int
    attention: str | None
    side: int
    probes: int
    limit: int
    pictures: Sequence[tuple[str, str, str]]


class Answer(TypedDict):
    """Greedy token ids, how far each was ahead of the next best, the largest logit, and the hash of the picture's pixels."""

    tokens: list[int]
    margins: list[float]
    scale: float
    picture: str


def picture(number: int, side: int) -> Image.Image:
    """Return a made-up picture of `side` x `side` pixels, the same with every version of every library.

    Square (i, j) of 8 x 8 has the colour in bytes 3 (8 i + j) to + 2 of SHAKE-256 of "slimlmm probe NUMBER".
    """
    stream = hashlib.shake_256(f"slimlmm probe {number}".encode()).digest(3 * SQUARES**2)
    colours = np.frombuffer(stream, dtype=np.uint8).reshape(SQUARES, SQUARES, 3)
    where = np.arange(side) * SQUARES // side
    return Image.fromarray(np.ascontiguousarray(colours[where][:, where]))


def question(number: int) -> str:
    """Return the question about picture `number`."""
    return QUESTIONS[number % len(QUESTIONS)]


def pixels_hash(shown: Image.Image) -> str:
    """Return the SHA-256 of size and RGB pixels of a picture."""
    return hashlib.sha256(f"{shown.width}x{shown.height}".encode() + shown.convert("RGB").tobytes()).hexdigest()


def side_of(processor: Any) -> int:
    """Return the pixels a side of the pictures that a processor makes, so that it does not have to resize a probe."""
    reader = processor.image_processor
    fields = ("crop_size", "size") if getattr(reader, "do_center_crop", False) else ("size",)
    for field in fields:
        value = getattr(reader, field, None) or {}
        sides = [dict(value).get(key) for key in ("height", "width", "shortest_edge", "longest_edge")]
        known = [int(one) for one in sides if one]
        if known and known[0] <= LARGEST:
            return known[0]
    return USUAL


def template_of(processor: Any) -> str | None:
    """Return the chat template of a processor, or that of its tokenizer: some classes (InstructBLIP) load none of their own.

    Not one of a tokenizer that is for texts alone: it would write the parts of a message as Python prints them, or fail.
    """
    template: str | None = processor.chat_template
    if template or processor.tokenizer.chat_template is None:
        return template
    template = processor.tokenizer.chat_template
    said = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    try:
        written = processor.apply_chat_template(said, chat_template=template)
    except (TypeError, ValueError, TemplateError):  # it adds the list of parts to a text, or says that it takes none
        return None
    return None if "'type'" in written else template


def begun(processor: Any, text: str) -> dict[str, bool]:
    """Return the setting by which a processor adds no second token of beginning to a prompt whose template wrote one."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if first and text.startswith(first) else {}


def said_first(system: str, form: str) -> str | list[dict[str, str]]:
    """Return the content of a system turn in the form that a template takes (`system_form`)."""
    return system if form == "text" else [{"type": "text", "text": system}]


def turns_before(question: str, system: str = "", form: str = "") -> list[dict[str, Any]]:
    """Return the turns before an answer: what a system turn says, in this form, and a question about a picture."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return [{"role": "system", "content": said_first(system, form)}, user] if system else [user]


def system_form(processor: Any, template: str | None) -> str:
    """Return how a template takes what a system turn says: in "parts", as "text", or not at all, "".

    Templates without a place for it fail or leave it out; some that take parts of users take texts here (Llama 3.2 Vision).
    """
    for form in ("parts", "text") if template else ():
        turns = turns_before("x", SYSTEM, form)
        try:
            written = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
        except (TypeError, ValueError, TemplateError):
            continue
        if SYSTEM in written and "'type'" not in written:
            return form
    return ""


def prompt(processor: Any, asked: str, plain: Mapping[str, str], system: str = "") -> str:
    """Return the text that the model sees before its answer: by the chat template, else by the class's plain form."""
    template = template_of(processor)
    if template is None:
        return plain[type(processor).__name__].format(question=asked)
    turns = turns_before(asked, system, system_form(processor, template) if system else "")
    text: str = processor.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
    return text


@torch.inference_mode()
def answer(model: Any, processor: Any, shown: Image.Image, text: str, limit: int) -> Answer:
    """Let the model, in evaluation mode, answer greedily in at most `limit` tokens."""
    batch = processor(text=[text], images=[[shown]], return_tensors="pt", **begun(processor, text))
    batch = batch.to(model.device, dtype=model.dtype)
    end = model.generation_config.eos_token_id
    end = processor.tokenizer.eos_token_id if end is None else end
    pad = processor.tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    greedy |= {"temperature": None, "top_p": None, "top_k": None}
    ends = {"max_new_tokens": limit, "eos_token_id": end, "pad_token_id": pad}
    found = model.generate(**batch, **greedy, **ends, return_dict_in_generate=True, output_logits=True)
    logits_TV = torch.cat(found.logits).float()
    best = logits_TV.topk(2).values
    return {
        "tokens": found.sequences[0, -len(logits_TV) :].tolist(),
        "margins": (best[:, 0] - best[:, 1]).tolist(),
        "scale": float(logits_TV.abs().max()),
        "picture": pixels_hash(shown),
    }


def answers(model: Any, processor: Any, order: Order) -> list[Answer]:
    """Ask all probes of an order, then its real rows, one at a time."""
    shown = [(picture(number, order["side"]), question(number), "") for number in range(order["probes"])]
    for path, asked, system in order["pictures"]:
        with Image.open(path) as one:
            shown.append((one.convert("RGB"), asked, system))
    texts = [prompt(processor, asked, order["plain"], system) for _, asked, system in shown]
    return [answer(model, processor, one, text, order["limit"]) for (one, *_), text in zip(shown, texts, strict=True)]


def run(order: Order) -> dict[str, Any]:
    """Load the folder of an order with stock classes, safetensors only, offline, no code of its own; ask it."""
    torch.set_num_threads(order["threads"])
    stock: Any = getattr(transformers, order["auto"])
    safe = {"local_files_only": True, "trust_remote_code": False}
    attention = {"attn_implementation": order["attention"]} if order["attention"] else {}
    model, info = stock.from_pretrained(
        order["folder"],
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        device_map=order["device"],
        **safe,
        **attention,
    )
    processor: Any = transformers.AutoProcessor.from_pretrained(order["folder"], **safe)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "parameters": model.num_parameters(),
        "keys": {kind.split("_")[0]: sorted(map(str, info[kind])) for kind in kinds},
        "answers": answers(model.eval(), processor, order),
        "own": sorted(name for name in sys.modules if name.split(".")[0] == "slimlmm"),
    }


def told(order: Order) -> dict[str, Any]:
    """Return what `run` found, or under "error" what stopped it: whatever that is, the asking process names it."""
    try:
        return run(order)
    except Exception as error:  # in a process of its own: the other one tells it
        said = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {said[:MOST_SAID] or 'no message'}"}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(told(json.load(sys.stdin))), encoding="utf-8")
