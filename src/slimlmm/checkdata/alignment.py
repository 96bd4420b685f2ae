"""Whether a model sees rows in training as it does when it is asked: placeholders, label masks, and a loss of 0 against itself.

Shape legend: A answer tokens, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlmm.checkdata.record import Mask
from slimlmm.checkpoint import Loaded
from slimlmm.collate import IGNORE, Batch, Collator, Prompter
from slimlmm.data import Row, by_picture
from slimlmm.errors import UserError
from slimlmm.evaluate import encode, evaluating
from slimlmm.families import ANSWER_INPUTS
from slimlmm.forward import NOT_INPUTS, answer_logits, in_format, to_device
from slimlmm.half import half, has_half
from slimlmm.losses import cross_entropy, forward_kl
from slimlmm.packing import can_pack
from slimlmm.teacher import TeacherCache

#: nats an answer token that rounding of cached states to half precision may make; below 1e-7 with the tests' tiny models
LIMIT = 1e-3
#: the same where matrices are multiplied in bfloat16
LIMIT_HALF = 1e-2
PICTURES = 4
TAIL = 60
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, slots=True)
class Probe:
    """Losses of a model against itself, nats an answer token; all 0 up to rounding where training is aligned."""

    collated: float
    """forward KL from what the cache says to the model on the same collated batch: what the first step of a training sees"""
    plain: float
    """forward KL to the model on each row alone, as the stock processor and the stock forward make it; inf if tokens differ"""
    cross_entropy: float
    """of the given answers, on the collated batch"""
    tokens: int

    @property
    def loss(self) -> float:
        """The larger of the two divergences."""
        return max(self.collated, self.plain)


def limit(device: torch.device) -> float:
    """Return the loss against itself that rounding explains on a device; more is misaligned."""
    return LIMIT_HALF if has_half(device) else LIMIT


def probe(loaded: Loaded, rows: Sequence[Row]) -> float:
    """Return the loss, nats an answer token, at which distilling a model from itself starts; compare it with `limit`.

    Raises:
        UserError: no rows, a model without a processor, or rows that cannot be collated.
    """
    return probed(loaded, rows).loss


@torch.inference_mode()
def probed(loaded: Loaded, rows: Sequence[Row], cache: TeacherCache | None = None) -> Probe:
    """Run a few rows through collator and teacher cache as a training does, and the model plainly beside; a cache may be given.

    The plain side shares nothing with the collator but the texts, so labels that stand a token off, pictures out of order,
    wrong positions of packed questions and another teacher's states all show.
    """
    if not rows:
        raise UserError("nothing to probe: no row has a picture that opens and an answer.")
    if loaded.processor is None:
        raise UserError(f"{loaded.path}: has no processor that can be loaded. {loaded.note}")
    model, device = loaded.model, loaded.model.device
    with tempfile.TemporaryDirectory() as folder, evaluating(model):
        if cache is None:
            packed = can_pack(model, loaded.processor, rows)
            cache = TeacherCache(model, Collator(loaded.processor, packed=packed), Path(folder))
        groups = by_picture(rows, 16)
        collated = plain = entropy = 0.0
        tokens = 0
        for start in range(0, len(groups), PICTURES):
            batch = to_device(cache.collator(groups[start : start + PICTURES]), device)
            cache.of(batch)
            cache.flush()  # so that the states are those that come back from disk
            teacher_AV = cache.logits(cache.of(batch)).float()
            with half(device):
                student_AV, labels_A, _ = answer_logits(model, batch)
                alone_AV = torch.cat([_plain(loaded, row) for row in batch["rows"]])
            collated += _divergence(student_AV, teacher_AV)
            plain += _divergence(alone_AV, teacher_AV)
            entropy += float(cross_entropy(student_AV.float(), labels_A))
            tokens += len(labels_A)
    return Probe(collated / tokens, plain / tokens, entropy / tokens, tokens)


def _divergence(student_AV: Tensor, teacher_AV: Tensor) -> float:
    """Return the forward KL, summed, without the sign that rounding may give it; inf where tokens differ or it is no number."""
    if student_AV.shape != teacher_AV.shape:
        return math.inf
    found = float(forward_kl(student_AV.float(), teacher_AV))
    return max(0.0, found) if math.isfinite(found) else math.inf


def _plain(loaded: Loaded, row: Row) -> Tensor:
    """Return the logits [A, V] of one row's answer, as the processor and the model's own forward give them."""
    inputs = dict(encode(loaded.processor, [row]).to(loaded.model.device, dtype=loaded.model.dtype))
    asked_1T = inputs["input_ids"]
    answer_1A = torch.tensor([Prompter(loaded.processor).answer_ids(row)], device=asked_1T.device)
    known = {"attention_mask": 1} | ANSWER_INPUTS.get(type(loaded.processor).__name__, {})
    for name, value in inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat((value, answer_1A), 1)
        elif value.shape == asked_1T.shape or name in known:
            there = known.get(name, 0)
            shape = (1, answer_1A.shape[1], *value.shape[2:])
            fill = value[:, -1:].expand(shape) if there is None else value.new_full(shape, there)
            inputs[name] = torch.cat((value, fill), 1)
    logits_TV: Tensor = loaded.model(**inputs, use_cache=False).logits[0]
    return logits_TV[asked_1T.shape[1] - 1 : -1]


def masks(processor: Any, batch: Batch) -> list[Mask]:
    """Return what each row of a batch that is not packed is trained on, as text."""
    tokenizer, found = processor.tokenizer, []
    for index, row in enumerate(batch["rows"]):
        labels_T, picture_T = batch["shift_labels"][index], batch["picture_tokens"][index]
        where = (labels_T != IGNORE).nonzero().flatten().tolist()
        asked_T = batch["input_ids"][index][: where[0] + 1 if where else None]
        trained = labels_T[where]
        found.append(
            Mask(
                id=row.id,
                before=tokenizer.decode(asked_T[~picture_T[: len(asked_T)]])[-TAIL:],
                trained=tokenizer.decode(trained),
                tokens=len(where),
                picture_tokens=int(picture_T.sum()),
            )
        )
    return found


def wrong_mask(processor: Any, batch: Batch, index: int) -> str:
    """Return what is wrong with the labels of one row of a batch that is not packed, "" where they are its answer."""
    row, labels_T = batch["rows"][index], batch["shift_labels"][index]
    where = (labels_T != IGNORE).nonzero().flatten()
    trained = processor.tokenizer.decode(labels_T[where], skip_special_tokens=True)
    if shifted(batch, index):
        return f"labels are not the tokens that follow: {trained!r} is trained for {row.answer!r}"
    if " ".join(row.answer.split()) not in " ".join(trained.split()):
        return f"{trained!r} is trained for {row.answer!r}"
    return ""


def shifted(batch: Batch, index: int) -> bool:
    """Tell whether a label of a sequence, packed or not, is another token than the one that follows its position."""
    labels_T, ids_T = batch["shift_labels"][index], batch["input_ids"][index]
    where = (labels_T != IGNORE).nonzero().flatten()
    if not len(where) or int(where[-1]) + 1 >= len(ids_T):
        return True
    return not torch.equal(ids_T[where + 1], labels_T[where])


@torch.inference_mode()
def features(loaded: Loaded, batch: Batch) -> int | None:
    """Return how many tokens the model makes of the picture in a batch of one row, None where its class does not tell."""
    model: Any = loaded.model
    shape = batch["input_ids"].shape
    pictures = {
        name: value
        for name, value in to_device(batch, model.device).items()
        if name not in (*NOT_INPUTS, *TEXT_INPUTS) and value.shape != shape
    }
    try:
        found = model.get_image_features(**in_format(pictures, model.dtype)).pooler_output
    except (AttributeError, TypeError):  # a class without that method, or with other arguments
        return None
    if found is None:  # Llama 4's gives its tokens elsewhere
        return None
    parts = [found] if isinstance(found, Tensor) else list(found)
    return sum(part.shape[:-1].numel() for part in parts)
