"""From conversation to inputs of an export, quicker than the stock processor, and only where that was seen to be the same.

The stock processor checks and merges its settings at every call and normalises pictures in NumPy. An export knows how many
tokens a picture has and can normalise in its own graph, so its reader asks tokenizer and picture processor themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from slimlmm.exporting.graphs import Pixels

#: largest difference between pixels normalised here and by the processor
CLOSE = 1e-5


class Reader:
    """Stands where a processor is asked for the inputs of prompts, with pictures as bytes, not normalised.

    `count` is how many tokens a picture has.
    """

    def __init__(self, processor: Any, count: int) -> None:
        self.processor, self.count = processor, count
        self.tokenizer, self.chat_template = processor.tokenizer, processor.chat_template
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any:
        """Return what the processor's own returns."""
        return self.processor.apply_chat_template(conversation, **settings)

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None,
        padding: bool,
        return_tensors: str,
        **words: bool,
    ) -> BatchFeature:
        """Return token ids (`words` say how), mask and, where there are pictures, their bytes, uint8 [pictures, C, h, w]."""
        whole = [one.replace(self.image_token, self.image_token * self.count) for one in text]
        found = dict(self.tokenizer(whole, padding=padding, return_tensors=return_tensors, **words))
        if images is not None:
            pictures = [picture for some in images for picture in some]
            found["pixel_values"] = self.processor.image_processor(
                pictures, do_rescale=False, do_normalize=False, return_tensors=return_tensors
            )["pixel_values"]
        return BatchFeature(found)


def pixels_of(processor: Any) -> Pixels | None:
    """Return the last arithmetic of the picture processor, None where it does otherwise than scale, then normalise."""
    pictures = processor.image_processor
    if not (pictures.do_rescale and pictures.do_normalize):
        return None
    return Pixels(scale=float(pictures.rescale_factor), mean=tuple(pictures.image_mean), std=tuple(pictures.image_std))


def same(reader: Reader, pixels: Pixels, texts: Sequence[str], pictures: Sequence[Image.Image]) -> bool:
    """Return whether the reader gives these prompts, one picture each, the inputs that the processor gives them."""
    images = [[picture] for picture in pictures]
    settings: dict[str, Any] = {"text": list(texts), "images": images, "padding": True, "return_tensors": "pt"}
    wanted, found = reader.processor(**settings), reader(**settings)
    if set(wanted) != set(found) or wanted["pixel_values"].shape != found["pixel_values"].shape:
        return False
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    close = (found["pixel_values"] * pixels.scale - mean) / std - wanted["pixel_values"]
    words = all(torch.equal(wanted[key], found[key]) for key in ("input_ids", "attention_mask"))
    return words and found["pixel_values"].dtype == torch.uint8 and float(close.abs().max()) <= CLOSE
