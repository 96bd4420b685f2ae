"""An export that answers: greedily or by sampling, one conversation or a batch, with the logits of every token.

Shape legend: B conversations, T tokens of the prompt (padded on the left), V vocabulary, H width, N tokens of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from slimlmm.checkpoint import MARKER
from slimlmm.decoding import listed
from slimlmm.errors import UserError
from slimlmm.exporting.manifest import Manifest, Shape
from slimlmm.exporting.reading import Reader
from slimlmm.exporting.runtimes import RUNTIMES, Array, Graph
from slimlmm.serving.answering import Answerer

_PROCESSORS: Any = AutoProcessor
_OUTPUT: Any = GenerateDecoderOnlyOutput


class Exported:
    """Two graphs that stand where this package asks a stock model to generate (`Answerer`, `evaluate`, `measure.compare`)."""

    training = False
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, eyes: Graph, words: Graph, shape: Shape, generation_config: GenerationConfig) -> None:
        self.eyes, self.words, self.shape = eyes, words, shape
        self.generation_config = generation_config

    def eval(self) -> Exported:
        """Return itself: an export has no other mode."""
        return self

    def train(self, mode: bool = True) -> Exported:
        """Return itself, and refuse to be trained."""
        if mode:
            raise UserError("an export cannot be trained; train the checkpoint that it was made from.")
        return self

    def get_encoder(self, modality: str | None = None) -> Exported:
        """Return itself, as models do whose tower is no module of its own."""
        return self

    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        eos_token_id: int | list[int] | None,
        pad_token_id: int | None,
        pixel_values: Tensor | None = None,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        return_dict_in_generate: bool = False,
        output_logits: bool = False,
        **plain: Any,
    ) -> Any:
        """Return prompts and answers [B, T + new], padded behind the end token, as `GenerationMixin.generate` does.

        With `return_dict_in_generate` they come with the logits of each step, [B, V], where `output_logits` asks for them.
        Randomness is torch's. `plain` may say once more that nothing else is wanted (one beam, no penalty, no top_k).

        Raises:
            UserError: something else is wanted.
        """
        wanted = {key: value for key, value in plain.items() if value not in (None, 1, 1.0)}
        if wanted:
            raise UserError(f"an export decodes greedily or by temperature and top_p; it takes no {', '.join(wanted)}.")
        ends = listed(eos_token_id)
        steps = self._steps(input_ids, attention_mask, pixel_values)
        written, kept = [], []
        done_B = np.zeros(len(input_ids), dtype=bool)
        logits_BV = next(steps)
        while True:
            next_B = _sampled(logits_BV, temperature or 1.0, top_p or 1.0) if do_sample else logits_BV.argmax(-1)
            next_B = np.where(done_B, pad_token_id or 0, next_B)
            written.append(next_B)
            if output_logits:
                kept.append(torch.from_numpy(logits_BV))
            done_B |= np.isin(next_B, ends)
            if done_B.all() or len(written) == max_new_tokens:
                break
            logits_BV = steps.send(next_B)
        sequences = torch.cat((input_ids, torch.from_numpy(np.stack(written, 1))), dim=1)
        if not return_dict_in_generate:
            return sequences
        return _OUTPUT(sequences=sequences, logits=tuple(kept) if output_logits else None)

    def _steps(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None) -> Any:
        """Yield the logits [B, V] behind the prompt, then behind each token [B] that is sent."""
        kind = self.shape
        ids_BT, mask_BK = input_ids.numpy(), attention_mask.numpy()
        is_seen_BT = (ids_BT == kind.image_token) & (pixel_values is not None)
        seen_BTH = np.zeros((*ids_BT.shape, kind.width), dtype=np.float32)
        if pixel_values is not None:
            seen_BTH[is_seen_BT] = self._look(pixel_values, int(is_seen_BT.sum()))
        past: list[Array] = [np.zeros((len(ids_BT), kind.heads, 0, kind.head_dim), dtype=np.float32)] * kind.caches
        at_BT = np.maximum(mask_BK.cumsum(1) - 1, 0)
        while True:
            logits_BV, *past = self.words(ids_BT, seen_BTH, is_seen_BT, mask_BK, at_BT, *past)
            next_B = yield logits_BV
            ids_BT, at_BT = next_B[:, None], at_BT[:, -1:] + 1
            mask_BK = np.concatenate((mask_BK, np.ones_like(ids_BT)), axis=1)
            seen_BTH, is_seen_BT = np.zeros((*ids_BT.shape, kind.width), np.float32), np.zeros(ids_BT.shape, bool)

    def _look(self, pixel_values: Tensor, places: int) -> Array:
        """Return the tokens of all pictures, one behind the other; [pictures N, H]."""
        expected, found = tuple(self.shape.picture), tuple(pixel_values.shape[1:])
        if found != expected:
            raise UserError(
                f"a picture came as {found} values, and this export takes {expected}: it was made with a processor that "
                f"gives all pictures one size."
            )
        tokens = np.concatenate([self.eyes(one[None])[0] for one in pixel_values.numpy()])
        if len(tokens) != places:
            raise UserError(
                f"the prompt has {places} places for tokens of pictures, and the pictures have {len(tokens)}."
            )
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An export in memory: what `checkpoint.Loaded` is of a checkpoint."""

    model: Exported
    processor: Any
    path: Path


def load(folder: str | Path, *, threads: int | None = None) -> Loaded:
    """Load an export of `onnx` or `openvino`; `threads` of a CPU work on one operation (default: as torch).

    Raises:
        UserError: the folder holds no such export, or its runtime is not installed.
    """
    path = Path(folder).expanduser()
    manifest = Manifest.load(path / MARKER)
    if manifest.shape is None:
        raise UserError(f"{path}: was exported to {manifest.target}, which AutoModelForImageTextToText loads.")
    return opened(path, manifest.target, manifest.shape, threads=threads)


def opened(path: Path, target: str, shape: Shape, *, threads: int | None = None) -> Loaded:
    """Load the graphs of a folder, of which this is known."""
    runtime = RUNTIMES[target]
    count = threads or torch.get_num_threads()
    eyes, words = (runtime.graph(path / f"{name}{runtime.suffix}", count) for name in ("eyes", "words"))
    generation = GenerationConfig.from_pretrained(path, local_files_only=True)
    processor = _PROCESSORS.from_pretrained(path, local_files_only=True)
    reader = Reader(processor, shape.tokens) if shape.reads_bytes else processor
    return Loaded(model=Exported(eyes, words, shape, generation), processor=reader, path=path)


def answerer(folder: str | Path, *, threads: int | None = None) -> Answerer:
    """Return an engine for conversations: `answer(asks) -> list[Said]`, as of a stock model."""
    found = load(folder, threads=threads)
    return Answerer(found.model, found.processor)


def _sampled(logits_BV: Array, temperature: float, top_p: float) -> Array:
    """Draw a token [B] from softmax(logits / temperature), of the likeliest ones that together have `top_p`."""
    p_BV = (torch.from_numpy(logits_BV) / temperature).softmax(-1)
    sorted_BV, order_BV = p_BV.sort(-1, descending=True)
    # a token stays while those before it have less than top_p, so the likeliest always stays
    sorted_BV = sorted_BV * (sorted_BV.cumsum(-1) - sorted_BV < top_p)
    drawn_B1 = torch.multinomial(sorted_BV, 1)
    found: Array = order_BV.gather(-1, drawn_B1)[:, 0].numpy()
    return found
