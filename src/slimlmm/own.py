"""On-policy distillation: pictures that are learnt from the student's own answers, the teacher judging every token of them.

A student that only ever sees given answers is not taught what to do after its own mistakes. Source: GKD, arXiv 2306.13649; the
share is `lmbda` there, and its `beta` is that of the loss jensen_shannon.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from slimlmm.collate import Batch, picture_token
from slimlmm.data import Row
from slimlmm.decoding import generation_settings, listed
from slimlmm.evaluate import answer_limit, evaluating, generated, one_look
from slimlmm.forward import to_device
from slimlmm.lessons import Collate, Taught
from slimlmm.trainings import Training

#: rows that answer at once
ROWS_A_CALL = 64
#: how tokens are drawn: from all of softmax(logits / temperature); by itself `generate` draws from the 50 likeliest
DRAWN: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0}


def groups_as_they_are(groups: list[list[Row]]) -> list[list[Row]]:
    """Return pictures with their rows uncollated: their answers are not written yet."""
    return groups


@dataclass(slots=True)
class OwnAnswers:
    """Puts the student's own answers in place of the given ones, for a share of the pictures of each batch."""

    collate: Collate
    processor: Any
    settings: Mapping[str, Any]
    """of generation, see `sampling`"""
    share: float
    taught: Taught
    seed: int

    def batches(
        self, model: PreTrainedModel, groups: Iterable[list[list[Row]]], device: torch.device, step: int
    ) -> Iterator[Batch]:
        """Yield a batch for each list of pictures; the student answers when its batch is asked for, not before.

        What is drawn follows from seed and step alone, so that a training taken up again draws what it would have drawn.
        """
        draw = random.Random(f"{self.seed}-{step}")
        for some in groups:
            with _drawing(draw.getrandbits(63), device):
                answered = self.answered(model, some, draw)
            yield to_device(self.collate(answered), device)

    def answered(self, model: PreTrainedModel, groups: Sequence[list[Row]], draw: random.Random) -> list[list[Row]]:
        """Return the groups, some of them with rows that hold what the student wrote."""
        chosen = self.chosen(groups, draw)
        rows = [row for at in chosen for row in groups[at]]
        written = iter(sampled(model, self.processor, rows, self.settings))
        new = {at: [replace(row, tokens=next(written)) for row in groups[at]] for at in chosen}
        return [new.get(at, group) for at, group in enumerate(groups)]

    def chosen(self, groups: Sequence[list[Row]], draw: random.Random) -> list[int]:
        """Return which are answered: of n pictures that the teacher is asked about, share * n in the mean, rounded by chance."""
        asked = [at for at, group in enumerate(groups) if self.taught is None or group[0].picture_key() in self.taught]
        count = min(len(asked), int(self.share * len(asked) + draw.random()))
        return sorted(draw.sample(asked, count))


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws by this seed; afterwards it goes on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def own_answers(
    model: PreTrainedModel,
    processor: Any,
    rows: Sequence[Row],
    settings: Training,
    collate: Collate,
    taught: Taught,
    seed: int,
) -> OwnAnswers | None:
    """Return how a training on these rows lets the student answer, None where it does not."""
    if not settings.own_answers:
        return None
    drawing = sampling(model, processor, rows, settings.own_temperature)
    return OwnAnswers(collate, processor, drawing, settings.own_answers, taught, seed)


def sampling(model: PreTrainedModel, processor: Any, rows: Sequence[Row], temperature: float) -> dict[str, Any]:
    """Return the settings of generation that draw tokens from softmax(logits / temperature); the likeliest tokens at 0.

    An answer ends with an end token, or where `evaluate` would cut it. Special tokens that no row's answer holds (a picture's
    placeholder, padding) have no meaning in an answer, and a model may break on them, so they are not drawn.
    """
    tokenizer = processor.tokenizer
    settings = generation_settings(model, processor, answer_limit(processor, rows))
    ends = set(listed(settings["eos_token_id"]))
    texts = sorted({row.answer for row in rows})
    spoken = {token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids}
    special = {*tokenizer.all_special_ids, picture_token(processor)}
    settings |= {"eos_token_id": sorted(ends), "suppress_tokens": sorted(special - ends - spoken)}
    return settings | (DRAWN | {"temperature": temperature} if temperature else {})


def sampled(
    model: PreTrainedModel, processor: Any, rows: Sequence[Row], settings: Mapping[str, Any]
) -> list[tuple[int, ...]]:
    """Return an answer to each row as token ids, end token included where one was drawn.

    In evaluation mode, without gradient, by torch's own random numbers; the mode is restored.
    """
    found: list[tuple[int, ...]] = []
    # every token that is written makes another shape: a model that trains compiled writes as it is
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for first in range(0, len(rows), ROWS_A_CALL):
            part = rows[first : first + ROWS_A_CALL]
            keys = [row.picture_key() for row in part]
            pictures = {key: row.open() for key, row in dict(zip(keys, part, strict=True)).items()}
            with one_look(model, keys):
                tokens_BT = generated(model, processor, part, settings, [pictures[key] for key in keys])
            found += [_to_end(ids, settings["eos_token_id"]) for ids in tokens_BT.tolist()]
    return found


def _to_end(ids: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens up to and including the first end token, all where there is none."""
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
    return tuple(ids[: stop + 1])
