"""First step of the bundled teacher: teach the vision tower to read, patch by patch, with temporary heads.

A language model that cannot yet find anything in the picture gives the tower no useful gradient (docs/lab-notes.md: 840 steps
of end-to-end training left every reading task at chance). So the tower first learns from what the generator knows: for each
patch the character and the word (or syllable) at its centre, the word that follows it and the text it is part of; for the
picture the product and the person. The heads are thrown away.

Shape legend: B pictures, P patches, C channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimlmm.adreview.build import canvas
from slimlmm.adreview.catalogue import CLAIMS, FILLERS, PRODUCTS, SLOGAN_WORDS, SYLLABLES

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789$%"
PEOPLE = ("none", "adult", "child")
#: texts by name, each once for its first word and once for the rest; 0 is nothing
TEXTS = ("", "slogan", "claim", "brand", "price", "slogan+", "claim+", "brand+", "price+")


def vocabulary() -> list[str]:
    """Return every word or syllable that a patch may show; 0 is nothing."""
    words = {word for line in FILLERS for word in line.split()}
    words |= {word for group in SLOGAN_WORDS.values() for word in group}
    words |= {word for first, second in CLAIMS.values() for part in (*first, *second) for word in part.split()}
    return ["", *sorted(words), *sorted(f"+{syllable}" for syllable in SYLLABLES)]


def products() -> list[str]:
    """Return all product names."""
    return sorted(name for table in PRODUCTS.values() for name in table)


def pieces(name: str, text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, unit) of the words of a text, or of the syllables of a brand."""
    at, lower = 0, text.lower()
    if name != "brand":
        for word in lower.split(" "):
            yield at, at + len(word), word
            at += len(word) + 1
        return
    while at < len(lower):
        found = max((s for s in SYLLABLES if lower.startswith(s, at)), key=len, default="")
        if not found:
            return
        yield at, at + len(found), f"+{found}"
        at += len(found)


class Labels:
    """Pictures with their labels per patch, drawn on the fly."""

    def __init__(self, side: int, patch: int) -> None:
        self.grid, self.patch = side // patch, patch
        self.words = {word: index for index, word in enumerate(vocabulary())}
        self.products = {name: index for index, name in enumerate(products())}

    def draw(self, index: int, seed: int) -> tuple[Any, ...]:
        """Return picture [S, S, 3]; characters, words, next words, texts, each [P]; product; person."""
        facts, painted = canvas(index, "train", seed)
        maps = np.zeros((4, self.grid, self.grid), np.int64)
        for name in {letter[0] for letter in painted.letters}:
            self._text(name, [letter for letter in painted.letters if letter[0] == name], maps)
        product, person = self.products[facts.product], PEOPLE.index(facts.person)
        return np.asarray(painted.image), *maps.reshape(4, -1), product, person

    def _text(self, name: str, letters: list[Any], maps: Any) -> None:
        """Label the patches whose centre column lies in a character and whose row holds the middle of its line."""
        tops = [letter[2][1] for letter in letters]
        whole = "".join(
            (" " if at and tops[at] != tops[at - 1] else "") + letter[1] for at, letter in enumerate(letters)
        )
        units = list(pieces(name, whole))
        at = 0
        for order, (_, character, (left, top, right, bottom)) in enumerate(letters):
            at += 1 if order and tops[order] != tops[order - 1] else 0
            place = next((n for n, (start, end, _) in enumerate(units) if start <= at < end), None)
            at += 1
            if place is None:
                continue
            following = units[place + 1][2] if place + 1 < len(units) else ""
            text = TEXTS.index(name + ("+" if place else ""))
            labels = (
                CHARACTERS.find(character.lower()) + 1,
                self.words.get(units[place][2], 0),
                self.words.get(following, 0),
                text,
            )
            middle = (top + bottom) / 2
            for row in {int((middle + shift) // self.patch) for shift in (-4, 0, 4)} & set(range(self.grid)):
                for column in range(self.grid):
                    if left <= column * self.patch + self.patch / 2 < right:
                        maps[:, row, column] = labels

    def batch(self, start: int, count: int, seed: int) -> list[Any]:
        """Return the stacked fields of `count` pictures."""
        return [np.stack(field) for field in zip(*(self.draw(start + i, seed) for i in range(count)), strict=True)]


def ground(
    tower: Any,
    mean: list[float],
    std: list[float],
    *,
    side: int,
    patch: int,
    steps: int = 700,
    pictures: int = 16,
    rate: float = 4e-4,
    seed: int = 1,
) -> None:
    """Train `tower` (Dinov2Model) in place on patch and picture labels; prints a JSON record every 20 steps."""
    labels = Labels(side, patch)
    width = tower.config.hidden_size
    heads = nn.ModuleDict(
        {
            "character": nn.Linear(width, len(CHARACTERS) + 1),
            "word": nn.Linear(width, len(labels.words)),
            "next": nn.Linear(width, len(labels.words)),
            "text": nn.Linear(width, len(TEXTS)),
            "product": nn.Linear(2 * width, len(labels.products)),
            "person": nn.Linear(2 * width, len(PEOPLE)),
        }
    )
    norms = nn.ModuleDict(
        {"patch": nn.BatchNorm1d(width, affine=False), "picture": nn.BatchNorm1d(2 * width, affine=False)}
    )
    for parameter in tower.embeddings.patch_embeddings.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rate}, {"params": heads.parameters(), "lr": 2e-3}], weight_decay=0.02, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, 2e-3], total_steps=steps, pct_start=0.08)
    shift, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    began = time.perf_counter()
    tower.train()
    for step in range(steps):
        images, *targets = labels.batch(step * pictures, pictures, seed)
        pixels_B3SS = (torch.tensor(images).permute(0, 3, 1, 2).float() / 255 - shift) / scale
        hidden_BPC = tower(pixels_B3SS, output_hidden_states=True).hidden_states[-1]
        losses, right = _losses(hidden_BPC, [torch.tensor(t) for t in targets], heads, norms)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            facts = {f"loss/{name}": round(value.item(), 4) for name, value in losses.items()}
            print(
                json.dumps({"step": step + 1, **facts, **right, "seconds": round(time.perf_counter() - began)}),
                flush=True,
            )
    for parameter in tower.parameters():
        parameter.requires_grad_(True)
    tower.eval()


def _losses(
    hidden_BPC: Tensor, targets: list[Tensor], heads: nn.ModuleDict, norms: nn.ModuleDict
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the losses and the shares of right labels (on patches that show text)."""
    *patch_labels, product_B, person_B = targets
    shown = patch_labels[3].flatten() > 0
    patches = norms["patch"](hidden_BPC[:, 1:].flatten(0, 1))
    picture = norms["picture"](torch.cat((hidden_BPC[:, 0], hidden_BPC[:, 1:].mean(1)), -1))
    losses, right = {}, {}
    for name, labels_BP in zip(("character", "word", "next", "text"), patch_labels, strict=True):
        wanted = labels_BP.flatten()
        logits = heads[name](patches)
        each = functional.cross_entropy(logits, wanted, reduction="none")
        losses[name] = each[shown].mean() + 0.5 * each[~shown].mean()
        right[name] = round((logits.argmax(-1) == wanted)[shown].float().mean().item(), 3)
    for name, wanted in (("product", product_B), ("person", person_B)):
        logits = heads[name](picture)
        losses[name] = 0.5 * functional.cross_entropy(logits, wanted)
        right[name] = round((logits.argmax(-1) == wanted).float().mean().item(), 3)
    return losses, right
