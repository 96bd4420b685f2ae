"""An image-text model as two graphs without Python: eyes (one picture to its tokens) and words (tokens to the next logits).

Shape legend: B conversations, T new tokens, P tokens before them, K = P + T, N tokens of a picture, H width of the language
model, V vocabulary, G key/value heads, D dimensions of a head.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from slimlmm.errors import UserError

#: model types whose answers these two graphs can give: every picture a fixed number of tokens put in the place of its
#: placeholders, then a decoder with one cache of keys and values a layer
TAKEN = ("llava",)
#: the format of ONNX operators that is written
OPSET = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What a picture processor does last, as arithmetic: (x * scale - mean) / std for bytes x, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalise(nn.Module):
    """Bytes of a picture [1, C, h, w] to what the tower takes."""

    mean: Tensor
    std: Tensor

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.scale = pixels.scale
        self.register_buffer("mean", torch.tensor(pixels.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std)[:, None, None], persistent=False)

    def forward(self, bytes_1Chw: Tensor) -> Tensor:
        """Return float pixels of the same shape."""
        found: Tensor = (bytes_1Chw.float() * self.scale - self.mean) / self.std
        return found


class Eyes(nn.Module):
    """Vision tower and projector: one picture [1, C, h, w] to its tokens [N, H]."""

    def __init__(self, model: Any, pixels: Pixels | None) -> None:
        super().__init__()
        self.entry = nn.Identity() if pixels is None else Normalise(pixels)
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the picture's tokens as the language model takes them."""
        found: Any = self.model.get_image_features(self.entry(pixel_values))
        return torch.cat(list(found.pooler_output))


class Words(nn.Module):
    """Language model: tokens and what came before them to the logits of the last one, and all keys and values.

    In: token ids [B, T]; `seen` [B, T, H], what stands in the place of tokens where `is_seen` [B, T]; the mask [B, K] of all
    tokens, 0 for padding; positions [B, T]; keys and values of P tokens, [B, G, P, D] each, two a layer. Out: logits [B, V],
    then keys and values of K tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed = model.get_input_embeddings()
        self.decoder = model.model.language_model
        self.head = model.get_output_embeddings()

    def forward(
        self, ids_BT: Tensor, seen_BTH: Tensor, is_seen_BT: Tensor, mask_BK: Tensor, at_BT: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits and cache."""
        states_BTH = torch.where(is_seen_BT[..., None], seen_BTH, self.embed(ids_BT))
        T, K = ids_BT.shape[1], mask_BK.shape[1]
        causal_TK = torch.arange(K)[None, :] <= (torch.arange(T) + (K - T))[:, None]
        allowed_B1TK = causal_TK[None, None] & mask_BK.bool()[:, None, None, :]
        # not -inf: a row of padding sees nothing, and nothing divided by nothing is no number
        additive_B1TK = torch.where(allowed_B1TK, 0.0, torch.finfo(torch.float32).min)
        found = self.decoder(
            inputs_embeds=states_BTH,
            attention_mask=additive_B1TK,
            position_ids=at_BT,
            past_key_values=_cache(past),
            use_cache=True,
        )
        logits_BV = self.head(found.last_hidden_state[:, -1])
        return (logits_BV, *(one for layer in found.past_key_values.layers for one in (layer.keys, layer.values)))


def _cache(past: Sequence[Tensor]) -> DynamicCache:
    """Return a cache that holds these keys and values from the start: a concatenation with nothing has no shape to trace."""
    cache = DynamicCache()
    for keys, values in zip(past[0::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def refuse(model: Any, where: str, target: str) -> None:
    """Raise a UserError that names what the graphs cannot hold of this model."""
    config = model.config
    if config.model_type not in TAKEN:
        raise UserError(
            f"{where}: model type {config.model_type!r} is not exported to {target}; known to give the same answers there: "
            f"{', '.join(TAKEN)}. Plain loading takes all: --to torchao."
        )
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if others := sorted(kinds - {"full_attention"}):
        raise UserError(
            f"{where}: its {text.model_type} attends by {', '.join(others)}; exports to {target} hold full attention alone, "
            f"with one growing cache a layer."
        )


def write(model: Any, pixel_values: Tensor, pixels: Pixels | None, folder: Path) -> tuple[tuple[int, ...], ...]:
    """Write ``eyes.onnx`` and ``words.onnx``; return the shapes (N, H) of a picture's tokens and (2 L, G, D) of the cache.

    `pixel_values` [1, C, h, w] is one picture as the eyes will get it: bytes where they normalise them by `pixels`. Weights stand
    beside the graphs in ``.data`` files, so no graph is too large for its format.

    Raises:
        UserError: torch cannot trace the model; the message says at what.
    """
    eyes, words = Eyes(model, pixels).eval(), Words(model).eval()
    with _eager(model), _hushed(), torch.no_grad():
        seen_NH = eyes(pixel_values)
        caches = _cache_shapes(words, seen_NH.shape[1])
        past = [torch.zeros(2, heads, 3, size) for heads, size in caches]
        inputs = (
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 5, seen_NH.shape[1]),
            torch.zeros(2, 5, dtype=torch.bool),
            torch.ones(2, 8, dtype=torch.long),
            torch.arange(3, 8)[None].repeat(2, 1),
            past,
        )
        free = torch.export.Dim.AUTO
        both = {0: free, 1: free}
        _write(eyes, (pixel_values,), ({},), folder / "eyes.onnx")
        _write(words, inputs, (both, both, both, both, both, [{0: free, 2: free} for _ in past]), folder / "words.onnx")
    return tuple(seen_NH.shape), (len(past), *caches[0])


def _cache_shapes(words: Words, width: int) -> list[tuple[int, int]]:
    """Return (heads, dimensions) of the keys and of the values of every layer; they must be alike."""
    one = torch.zeros(1, 1, dtype=torch.long)
    found = words.decoder(inputs_embeds=torch.zeros(1, 1, width), position_ids=one, use_cache=True)
    layers = found.past_key_values.layers
    shapes = [(item.shape[1], item.shape[3]) for layer in layers for item in (layer.keys, layer.values)]
    if len(set(shapes)) != 1:
        raise UserError(
            f"keys and values are of {len(set(shapes))} different shapes, and exports take one: {set(shapes)}."
        )
    return shapes


def _write(graph: nn.Module, inputs: tuple[Any, ...], free: tuple[Any, ...], path: Path) -> None:
    try:
        traced = torch.export.export(graph, inputs, dynamic_shapes=free, strict=False)
        program: Any = torch.onnx.export(traced, (), dynamo=True, opset_version=OPSET, verbose=False)
    except (RuntimeError, ValueError, TypeError, AssertionError, torch.onnx.errors.OnnxExporterError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), "no message").strip()
        raise UserError(
            f"{path.stem} of this model cannot be traced by torch {torch.__version__}: {type(error).__name__}: {line}"
        ) from error
    program.save(str(path), external_data=True)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Let the model attend eagerly: its fused attention comes out of the tracer with tests for NaN around every softmax."""
    parts = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = parts[0]._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence what the tracer says of libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
