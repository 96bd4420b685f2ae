"""First step of the bundled teacher: teach the vision tower to read and to name, with temporary heads.

A language model that cannot yet find anything in the picture gives the tower no useful gradient (docs/lab-notes.md: 840 steps
of end-to-end training left every reading task at chance). So the tower first learns from what the generator knows. A patch of a
text tells the character and the unit (word, syllable, digit) at its centre, which text it belongs to and where in it, and all
units of that text in order; every patch tells the object that it shows; their mean tells the facts of the whole picture. The
heads are thrown away.

Shape legend: B pictures, P patches, C channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from slimlmm.adreview.answers import verdict
from slimlmm.adreview.build import canvas, jpeg
from slimlmm.adreview.catalogue import CLAIMS, FILLERS, LIMITS, PRODUCTS, PROHIBITED, SLOGAN_WORDS, SYLLABLES

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789$%"
TEXTS = ("slogan", "claim", "brand", "price")
SLOTS = 4
"""Most units of one text."""
PATCH_FIELDS = ("character", "unit", "place", "object", *(f"slot{n}" for n in range(SLOTS)))
PICTURE_FIELDS = ("product", "person", "subject", "claim", "verdict")

Box = tuple[int, int, int, int]


def units() -> list[str]:
    """Return every word, syllable (``+lex``) and character of a price that a patch may show; 0 is nothing."""
    words = {word for line in FILLERS for word in line.split()}
    words |= {word for group in SLOGAN_WORDS.values() for word in group}
    words |= {word for first, second in CLAIMS.values() for part in (*first, *second) for word in part.split()}
    return ["", *sorted(words), *sorted(f"+{syllable}" for syllable in SYLLABLES), *"$0123456789"]


def split_text(name: str, text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, unit) of the words of a slogan or claim, the syllables of a brand, the characters of a price."""
    if name == "price":
        return [(at, at + 1, character) for at, character in enumerate(text)]
    if name == "brand":
        return [(at, at + 3, "+" + text[at : at + 3].lower()) for at in range(0, len(text), 3)]
    found, at = [], 0
    for word in text.lower().split(" "):
        found.append((at, at + len(word), word))
        at += len(word) + 1
    return found


def verdicts() -> list[str]:
    """Return every verdict."""
    return [
        *(f"reject: minor with {category}" for category, limit in LIMITS.items() if limit == "adults only"),
        *(f"reject: {claim} claim" for claim in PROHIBITED),
        *(f"reject: slogan says {category}" for category in PRODUCTS),
        *("revise: no brand", "revise: no price", "approve: adults only", "approve"),
    ]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture with its labels."""

    pixels: NDArray[np.uint8]
    """[S, S, 3]"""
    patches: NDArray[np.int64]
    """[PATCH_FIELDS, P]; for fields of texts 0 is no text"""
    picture: NDArray[np.int64]
    """[PICTURE_FIELDS]"""


class Labels(Dataset[Drawn]):
    """Pictures with their labels, drawn on the fly; item n is creative n of a split."""

    def __init__(self, side: int, patch: int, *, split: str = "train", seed: int = 1, count: int = 1 << 30) -> None:
        self.grid, self.patch, self.split, self.seed, self.count = side // patch, patch, split, seed, count
        self.names = {
            "unit": units(),
            "object": ["", *sorted(name for table in PRODUCTS.values() for name in table), "adult", "child"],
            "subject": list(PRODUCTS),
            "claim": ["none", *CLAIMS],
            "person": ["none", "adult", "child"],
            "verdict": verdicts(),
        }
        self.names["product"] = self.names["object"][1:-2]
        self.ids = {field: {name: at for at, name in enumerate(names)} for field, names in self.names.items()}

    def sizes(self) -> dict[str, int]:
        """Return the number of classes of every field."""
        fixed = {"character": len(CHARACTERS) + 1, "place": len(TEXTS) * SLOTS + 1}
        slots = {f"slot{n}": len(self.names["unit"]) for n in range(SLOTS)}
        return fixed | slots | {field: len(names) for field, names in self.names.items()}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Drawn:
        facts, painted = canvas(index, self.split, self.seed)
        maps = np.zeros((len(PATCH_FIELDS), self.grid, self.grid), np.int64)
        for name, box in painted.shown.items():
            self._object(box, self.ids["object"][facts.product if name == "product" else facts.person], maps)
        for name in painted.texts:
            self._text(name, [letter for letter in painted.letters if letter[0] == name], maps)
        told = (facts.product, facts.person, facts.slogan_category, facts.claim, verdict(facts))
        picture = [self.ids[field][value] for field, value in zip(PICTURE_FIELDS, told, strict=True)]
        pixels = np.asarray(Image.open(BytesIO(jpeg(painted.image))))
        return Drawn(pixels, maps.reshape(len(maps), -1), np.array(picture))

    def _object(self, box: Box, value: int, maps: NDArray[np.int64]) -> None:
        """Label the patches whose centre lies in the box."""
        left, top, right, bottom = (round(edge / self.patch) for edge in box)
        maps[PATCH_FIELDS.index("object"), top:bottom, left:right] = value

    def _text(self, name: str, letters: list[tuple[str, str, Box]], maps: NDArray[np.int64]) -> None:
        """Label the patches whose centre column lies in a character and whose row holds the middle of its line."""
        whole, places = "", []
        for at, (_, character, box) in enumerate(letters):
            whole += " " if at and box[1] != letters[at - 1][2][1] else ""
            places.append(len(whole))
            whole += character
        found = split_text(name, whole)
        slots = [self.ids["unit"][unit] for _, _, unit in found] + [0] * (SLOTS - len(found))
        for (_, character, (left, top, right, bottom)), place in zip(letters, places, strict=True):
            order = next((n for n, (start, end, _) in enumerate(found) if start <= place < end), None)
            if order is None:
                continue
            values = np.array(
                (CHARACTERS.index(character.lower()) + 1, slots[order], TEXTS.index(name) * SLOTS + order + 1)
            )
            middle = (top + bottom) / 2
            for row in {int((middle + shift) // self.patch) for shift in (-4, 0, 4)} & set(range(self.grid)):
                for column in range(self.grid):
                    if left <= column * self.patch + self.patch / 2 < right:
                        maps[:3, row, column] = values
                        maps[4:, row, column] = slots


def stack(items: list[Drawn]) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels [B, 3, S, S] in 0..1, patch labels [PATCH_FIELDS, B, P], picture labels [PICTURE_FIELDS, B]."""
    pixels = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2).float() / 255
    return (
        pixels.contiguous(),
        torch.from_numpy(np.stack([item.patches for item in items], 1)),
        torch.from_numpy(np.stack([item.picture for item in items], 1)),
    )


class Heads(nn.Module):
    """Temporary linear heads on normalised patch features and on their mean."""

    def __init__(self, width: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.patch_norm, self.picture_norm = (nn.BatchNorm1d(width, affine=False) for _ in range(2))
        self.patch = nn.ModuleDict({field: nn.Linear(width, sizes[field]) for field in PATCH_FIELDS})
        self.picture = nn.ModuleDict({field: nn.Linear(width, sizes[field]) for field in PICTURE_FIELDS})

    def forward(
        self, features_BPC: Tensor, patches: Tensor, picture: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return per field the mean loss, and the share of right labels (of text fields: on patches that show text)."""
        losses, right = {}, {}
        flat = self.patch_norm(features_BPC.flatten(0, 1))
        shown = patches[PATCH_FIELDS.index("place")].flatten() > 0
        text, rest = flat[shown], flat[~shown]
        for field, labels in zip(PATCH_FIELDS, patches.flatten(1), strict=True):
            if field == "object":
                logits, wanted, weight = self.patch[field](rest), labels[~shown], 1.0
            else:
                logits, wanted, weight = (
                    self.patch[field](text),
                    labels[shown],
                    0.5 if field.startswith("slot") else 1.0,
                )
            losses[field] = weight * functional.cross_entropy(logits, wanted)
            right[field] = (logits.argmax(-1) == wanted).float().mean().detach()
        empty = self.patch["place"](rest)
        losses["place"] = losses["place"] + 0.5 * functional.cross_entropy(empty, empty.new_zeros(len(empty)).long())
        pooled = self.picture_norm(features_BPC.mean(1))
        for field, wanted in zip(PICTURE_FIELDS, picture, strict=True):
            logits = self.picture[field](pooled)
            losses[field] = 0.3 * functional.cross_entropy(logits, wanted)
            right[field] = (logits.argmax(-1) == wanted).float().mean().detach()
        return losses, right


def batches(labels: Labels, pictures: int, steps: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `steps` batches of consecutive creatives, painted by one worker ahead of time."""
    order = range(first, first + steps * pictures)
    yield from DataLoader(labels, pictures, sampler=order, num_workers=1, prefetch_factor=8, collate_fn=stack)


@torch.inference_mode()
def check(features: Any, heads: Heads, labels: Labels, pictures: int = 96) -> dict[str, float]:
    """Return the shares of right labels on the first creatives of `labels`."""
    heads.eval()
    pixels, patches, picture = stack([labels[index] for index in range(pictures)])
    _, right = heads(features(pixels), patches, picture)
    heads.train()
    return {f"test/{field}": round(share.item(), 3) for field, share in right.items()}


def ground(
    tower: Any,
    mean: list[float],
    std: list[float],
    *,
    side: int,
    patch: int,
    steps: int = 1600,
    pictures: int = 12,
    rate: float = 4e-4,
    seed: int = 1,
) -> Heads:
    """Train `tower` (Dinov2Model) in place on patch and picture labels; prints JSON records; returns the heads."""
    labels, test = (Labels(side, patch, split=split, seed=seed) for split in ("train", "test"))
    heads = Heads(tower.config.hidden_size, labels.sizes())
    for parameter in tower.embeddings.patch_embeddings.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rate}, {"params": heads.parameters(), "lr": 2e-3}], weight_decay=0.02, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate, 2e-3], total_steps=steps, pct_start=0.08)
    shift, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    compiled: Any = torch.compile(tower, dynamic=False)  # a quarter faster on a CPU

    def features(pixels_B3SS: Tensor) -> Tensor:
        hidden_BPC: Tensor = compiled((pixels_B3SS - shift) / scale, output_hidden_states=True).hidden_states[-1]
        return hidden_BPC[:, 1:]

    began = time.perf_counter()
    tower.train()
    for step, (pixels, patches, picture) in enumerate(batches(labels, pictures, steps), 1):
        losses, right = heads(features(pixels), patches, picture)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            facts = {f"loss/{field}": round(value.item(), 3) for field, value in losses.items()}
            facts |= {field: round(share.item(), 3) for field, share in right.items()}
            facts |= check(features, heads, test) if step % 200 == 0 or step == steps else {}
            print(json.dumps({"step": step, **facts, "seconds": round(time.perf_counter() - began)}), flush=True)
    for parameter in tower.parameters():
        parameter.requires_grad_(True)
    tower.eval()
    return heads
