"""Second step of the bundled teacher: teach the language model where to look.

A small language model finds the right patch among 144 by chance only, and learns nothing from the others: for thousands of
pictures it answers from the question alone (docs/lab-notes.md). The generator knows where every answer stands, so three heads
of two layers are told: the loss is cross-entropy of the answers plus -log of the attention that those heads give to the patches
that show the wanted word. That second term fades to zero, and the tower's own heads (ground_tower.py) go on beside it.

Shape legend: B pictures, T tokens of a packed sequence, P patches (the first P tokens), A answer tokens, H hidden size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from ground_tower import PATCH_FIELDS, SLOTS, TEXTS, Drawn, Heads, Labels, stack
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from slimlmm.adreview.answers import rows
from slimlmm.adreview.catalogue import TASKS
from slimlmm.adreview.facts import draw

IGNORE = -100
LENGTH = 264
"""Tokens of a packed sequence: 144 patches, ten questions with their answers, padding."""
POINTING_LAYERS = (1, 2)
PICTURES_A_STEP = 8
HEADS_RATE = 1e-3
WEIGHT = {"match": 3.0, "verdict": 3.0}
"""Of the answer tokens of tasks that must compare two things seen; 1 for those that name or read one."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One picture with its ten questions behind it."""

    drawn: Drawn
    tokens: NDArray[np.int64]
    """[4, T]: ids; positions; question number (0 picture, -1 padding); label (the next answer token or IGNORE)"""
    task: NDArray[np.int64]
    """[T] index of the task at answer positions"""
    points: NDArray[np.bool_]
    """[T, P] patches that show what the next answer token says; empty where nothing is to be looked at"""


class Questions(Dataset[Packed]):
    """Pictures with all their questions, as the packed collation of slimlmm lays them out."""

    def __init__(self, labels: Labels, tokenizer: Any, image_token: int) -> None:
        self.labels, self.tokenizer, self.image = labels, tokenizer, image_token

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Packed:
        labels, drawn = self.labels, self.labels[index]
        facts = draw(index, labels.split, labels.seed)
        patches = drawn.patches.shape[1]
        tokens = np.zeros((4, LENGTH), np.int64)
        tokens[0], tokens[2], tokens[3] = self.tokenizer.pad_token_id, -1, IGNORE
        tokens[0, :patches], tokens[1, :patches], tokens[2, :patches] = self.image, np.arange(patches), 0
        task, points = np.zeros(LENGTH, np.int64), np.zeros((LENGTH, patches), np.bool_)
        at = patches
        for number, row in enumerate(rows(facts, "", Random(index)), 1):
            question = self.tokenizer(row["question"] + "<|im_start|>")["input_ids"]
            answer = self.tokenizer(f" {row['answer']}<|im_end|>")["input_ids"]
            end, first = at + len(question) + len(answer), at + len(question) - 1
            tokens[:3, at:end] = (question + answer, np.arange(patches, patches + end - at), [number] * (end - at))
            tokens[3, first : first + len(answer)] = answer
            task[first : first + len(answer)] = TASKS.index(row["task"])
            for order, where in enumerate(self._looks(row["task"], facts, len(answer) - 1, drawn)):
                points[first + order] = where
            at = end
        return Packed(drawn, tokens, task, points)

    def _looks(self, task: str, facts: Any, count: int, drawn: Drawn) -> Iterator[NDArray[np.bool_] | bool]:
        """Yield for each of the answer's tokens (without the end) the patches to look at."""
        place, shown = (drawn.patches[PATCH_FIELDS.index(field)] for field in ("place", "object"))
        people = len(self.labels.names["object"]) - 2
        if task in ("product", "category", "restricted"):
            yield from [(shown > 0) & (shown < people)] * count
        elif task == "person":
            yield from [shown >= people] * count
        elif task in ("slogan", "brand", "price"):
            yield from (text_at(place, task, order) for order in range(count))
        elif task == "claim" and facts.claim_text:
            yield from (text_at(place, task, None), False)
            yield from (text_at(place, task, order) for order in range(count - 2))
        elif task == "match":
            yield from [False] * (count - 1)
            yield text_at(place, "slogan", None) if count > 1 else False


def text_at(place_P: NDArray[np.int64], text: str, order: int | None) -> NDArray[np.bool_]:
    """Return the patches that show unit `order` of a text; all patches of the text where that unit has none, or for None."""
    first = TEXTS.index(text) * SLOTS + 1
    exact = place_P == first + order if order is not None and order < SLOTS else np.zeros_like(place_P, np.bool_)
    return exact if exact.any() else (place_P >= first) & (place_P < first + SLOTS)


def collate(items: list[Packed]) -> dict[str, Any]:
    """Stack pictures; the additive mask lets a token see the picture and its own question, causally."""
    tokens = torch.from_numpy(np.stack([item.tokens for item in items], 1))
    ids, positions, number, labels = tokens
    same = (number[:, None, :] == 0) | (number[:, None, :] == number[:, :, None])
    see = same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]
    where = labels != IGNORE
    points = torch.from_numpy(np.stack([item.points for item in items]))
    task = torch.from_numpy(np.stack([item.task for item in items]))
    return {
        "drawn": stack([item.drawn for item in items]),
        "ids": ids,
        "positions": positions,
        "mask": mask,
        "where": where,
        "labels": labels[where],
        "task": task[where],
        "question": (number + torch.arange(len(items))[:, None] * 1000)[where],
        "points": points[where],
    }


class Grounding:
    """The teacher's forward pass, written out so that layers can be compiled and attention be told where to look."""

    def __init__(self, model: Any, heads: Heads, normalise: Callable[[Tensor], Tensor]) -> None:
        self.model, self.heads, self.normalise = model, heads, normalise
        self.text = model.model.language_model
        self.tower: Any = torch.compile(model.model.vision_tower, dynamic=False)
        self.layers: list[Any] = [torch.compile(layer, dynamic=False) for layer in self.text.layers]

    def features(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the tower's patch features [B, P, C]."""
        hidden_BPC: Tensor = self.tower(self.normalise(pixels_B3SS), output_hidden_states=True).hidden_states[-1]
        return hidden_BPC[:, 1:]

    def answers(self, features_BPC: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits [A, V] at answer positions, and the mean pointing loss."""
        pictures_BPH = self.model.model.multi_modal_projector(features_BPC)
        words_BTH = self.text.embed_tokens(batch["ids"][:, pictures_BPH.shape[1] :])
        hidden_BTH = torch.cat((pictures_BPH, words_BTH), 1)
        rotary = self.text.rotary_emb(hidden_BTH, batch["positions"])
        pointing = []
        for index, layer in enumerate(self.layers):
            if index in POINTING_LAYERS:
                pointing.append(self._pointing(self.text.layers[index], hidden_BTH, rotary, batch))
            hidden_BTH = layer(hidden_BTH, attention_mask=batch["mask"], position_embeddings=rotary)
        logits_AV = self.model.lm_head(self.text.norm(hidden_BTH[batch["where"]]))
        return logits_AV, torch.stack(pointing).mean()

    def _pointing(self, layer: Any, hidden_BTH: Tensor, rotary: Any, batch: dict[str, Any]) -> Tensor:
        """Return -log of the attention mass on the wanted patches, mean over answer tokens and the first KV group's heads."""
        attention, normed = layer.self_attn, layer.input_layernorm(hidden_BTH)
        size, group = attention.head_dim, attention.num_key_value_groups
        query = functional.linear(normed, attention.q_proj.weight[: size * group])
        key = functional.linear(normed, attention.k_proj.weight[:size])
        query, key = query.unflatten(-1, (group, size)).transpose(1, 2), key[:, None]
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        scores = query @ key.transpose(-1, -2) * size**-0.5 + batch["mask"]
        scores_AGT = scores.transpose(1, 2)[batch["where"]]
        log_AGP = functional.log_softmax(scores_AGT, -1)[..., : batch["points"].shape[-1]]
        told = batch["points"].any(-1)
        mass = log_AGP[told].masked_fill(~batch["points"][told][:, None], -torch.inf).logsumexp(-1)
        return -mass.mean()


def exact_match(logits_AV: Tensor, batch: dict[str, Any]) -> dict[str, list[bool]]:
    """Return for every task which answers are right to the last token (greedy decoding would give just these)."""
    right = logits_AV.argmax(-1) == batch["labels"]
    found: dict[str, list[bool]] = {task: [] for task in TASKS}
    for question in batch["question"].unique():
        here = batch["question"] == question
        found[TASKS[int(batch["task"][here][0])]].append(bool(right[here].all()))
    return found


@torch.inference_mode()
def check(grounding: Grounding, questions: Questions, pictures: int, size: int) -> dict[str, float]:
    """Return exact match per task and over all on the first pictures of a split."""
    found: dict[str, list[bool]] = {task: [] for task in TASKS}
    for start in range(0, pictures, size):
        batch = collate([questions[index] for index in range(start, start + size)])
        logits_AV, _ = grounding.answers(grounding.features(batch["drawn"][0]), batch)
        for task, right in exact_match(logits_AV, batch).items():
            found[task] += right
    everything = [one for right in found.values() for one in right]
    return {f"test/{task}": round(float(np.mean(right)), 3) for task, right in found.items()} | {
        "test": round(float(np.mean(everything)), 4)
    }


def ground_text(
    model: Any,
    heads: Heads,
    normalise: Callable[[Tensor], Tensor],
    questions: Questions,
    test: Questions,
    *,
    steps: int,
    rate: float,
    tower_rate: float,
    pointing: float,
    seeing: float = 0.0,
    first: int,
    check_every: int = 250,
) -> None:
    """Train in place on the creatives from `first` on; `tower_rate` 0 freezes the tower, `pointing` fades to 0."""
    grounding = Grounding(model, heads, normalise)
    groups = parameter_groups(model, heads, rate, tower_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.06)
    order = range(first, first + steps * PICTURES_A_STEP)
    loader = DataLoader(questions, PICTURES_A_STEP, sampler=order, num_workers=1, prefetch_factor=8, collate_fn=collate)
    began, sums = time.perf_counter(), torch.zeros(3)
    for step, batch in enumerate(loader, 1):
        parts_3 = losses(grounding, batch, see=tower_rate > 0)
        weights_3 = torch.tensor((1.0, pointing * max(0.0, 1 - step / steps), seeing))
        optimizer.zero_grad(set_to_none=True)
        (weights_3 @ parts_3).backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        sums += parts_3.detach()
        if step % 25 == 0 or step == steps:
            means = (sums / (step % 25 or 25)).tolist()
            facts = {name: round(mean, 4) for name, mean in zip(("answers", "pointing", "seeing"), means, strict=True)}
            facts |= check(grounding, test, 96, PICTURES_A_STEP) if step % check_every == 0 or step == steps else {}
            print(json.dumps({"step": step, **facts, "seconds": round(time.perf_counter() - began)}), flush=True)
            sums.zero_()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def parameter_groups(model: Any, heads: Heads, rate: float, tower_rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: language model and projector; with `tower_rate` tower (not its patches) and heads."""
    for name, parameter in model.model.vision_tower.named_parameters():
        parameter.requires_grad_(tower_rate > 0 and "patch_embeddings" not in name)
    text = [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]
    groups: list[dict[str, Any]] = [{"params": text, "lr": rate}]
    if tower_rate:
        trained = [p for p in model.model.vision_tower.parameters() if p.requires_grad]
        groups += [{"params": trained, "lr": tower_rate}, {"params": list(heads.parameters()), "lr": HEADS_RATE}]
    return groups


def losses(grounding: Grounding, batch: dict[str, Any], *, see: bool) -> Tensor:
    """Return [3] of one step: weighted mean cross-entropy of the answers, pointing, and the tower's heads (0 unless `see`)."""
    pixels, patches, picture = batch["drawn"]
    with torch.set_grad_enabled(see):
        features_BPC = grounding.features(pixels)
    logits_AV, pointed = grounding.answers(features_BPC, batch)
    weight_A = torch.tensor([WEIGHT.get(task, 1.0) for task in TASKS])[batch["task"]]
    answers_A = functional.cross_entropy(logits_AV, batch["labels"], reduction="none")
    answers = (weight_A * answers_A).sum() / weight_A.sum()
    heads = grounding.heads(features_BPC, patches, picture)[0] if see else {}
    return torch.stack((answers, pointed, sum(heads.values(), start=answers.new_zeros(()))))
