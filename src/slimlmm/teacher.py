"""The teacher's answers, computed once: its last hidden state at every answer token, on disk, keyed by content.

The logits come back exactly up to fp16 rounding as ``head(hidden)`` with the teacher's frozen head; that is 2H bytes a token
instead of 2V. A key is a hash of teacher weights, processor, picture bytes, prompt and answer, so a changed teacher or
picture is a miss, never a stale hit. Where a loss asks for it, what the teacher's language model gets of each picture is kept
beside that: 2H bytes a picture token.

Shape legend: A answer tokens, N picture tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from slimlmm.anatomy import describe
from slimlmm.collate import Batch, Collator
from slimlmm.data import Row, by_picture
from slimlmm.errors import UserError
from slimlmm.families import SEEN_AS_ASKED, logit_cap
from slimlmm.files import flush, flush_folder
from slimlmm.forward import (
    answer_logits,
    first_text_block,
    refuse_encoder_decoder,
    states_into,
    states_until,
    to_device,
)
from slimlmm.half import half

#: part of every key: raised when the same rows give other states than before, so that what an older version kept is a miss
LAYOUT = b"3"
#: largest difference of logits that come back from hidden states, relative to the largest logit
SAME = 1e-2
#: key of a shard's hash in its metadata
HASH = "slimlmm.sha256"
VALUES_A_SHARD = 16_000_000
PICTURES_A_BATCH = 16


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash over every parameter and buffer, by name, in storage precision."""
    digest = hashlib.sha256(_described(model.config))
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(config: PretrainedConfig) -> str:
    """Return a hash over a configuration, wherever it was loaded from."""
    return hashlib.sha256(_described(config)).hexdigest()


def _described(config: PretrainedConfig) -> bytes:
    found = _settings(config.to_dict())
    found.pop("use_cache", None)  # a Trainer leaves it behind, and it changes no answer
    return json.dumps(found, sort_keys=True, default=str).encode()


def _settings(config: Any) -> Any:
    """Return a config without what loading adds to it: the dtype, which the weights tell, and where and by what it was saved."""
    if not isinstance(config, dict):
        return config
    added = ("dtype", "_name_or_path", "transformers_version", "architectures")
    return {key: _settings(value) for key, value in config.items() if key not in added}


def _rules(processor: Any) -> str:
    """Return what a processor does to pictures and texts, without the folder that it was loaded from.

    Padding and truncation are left out: a fast tokenizer keeps those of its last call, so they say what was done before.
    """
    pictures: str = processor.image_processor.to_json_string()
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    del tokenizer["padding"], tokenizer["truncation"]
    own = processor.to_dict() if isinstance(processor, ProcessorMixin) else {}
    own = {key: value for key, value in own.items() if not isinstance(value, dict)}  # its parts are told above
    return pictures + json.dumps([tokenizer, own], sort_keys=True, default=str) + str(processor.chat_template)


def identity(model: PreTrainedModel, processor: Any) -> bytes:
    """Return the content hash of a model's weights and what its processor does; 32 bytes."""
    return hashlib.sha256((weights_fingerprint(model) + _rules(processor)).encode()).digest()


def _half(states: Tensor) -> Tensor:
    """Return a copy in half precision, on the CPU."""
    return states.to("cpu", torch.float16, copy=True)


class TeacherCache:
    """Hidden states of a frozen teacher at the answer tokens of rows, kept in safetensors shards of one folder."""

    def __init__(self, model: PreTrainedModel, collator: Collator, folder: Path) -> None:
        refuse_encoder_decoder(model)
        self.model = model.eval()
        self.collator = collator
        self.folder = folder
        self.head = model.get_output_embeddings()
        self._cap = logit_cap(model.config)
        self._head_tried = False
        self._identity = LAYOUT + identity(model, collator.processor)
        self._pictures: dict[str, bytes] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_values = 0
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._take_up(shard)

    def key(self, row: Row) -> str:
        """Return the content hash of (teacher, processor, picture bytes, prompt, answer)."""
        texts = "\x1f".join(
            (*self.collator.prompter.turns(row.question, row.answer, row.system), *map(str, row.tokens))
        )
        return hashlib.sha256(self._identity + self._picture(row) + texts.encode()).hexdigest()[:32]

    def picture_key(self, row: Row) -> str:
        """Return the content hash of (teacher, processor, picture bytes), and of the prompt where that decides what is seen."""
        prompter = self.collator.prompter
        asked = prompter.prompt(*row.asked) if type(prompter.processor).__name__ in SEEN_AS_ASKED else ""
        return "picture-" + hashlib.sha256(self._identity + self._picture(row) + asked.encode()).hexdigest()[:32]

    def _picture(self, row: Row) -> bytes:
        name = row.picture_key()
        if name not in self._pictures:
            self._pictures[name] = hashlib.sha256(row.picture_bytes()).digest()
        return self._pictures[name]

    def of(self, batch: Batch) -> Tensor:
        """Return the hidden states [A, H] fp16 of a collated batch, in row order; the teacher runs only on what is new.

        Answers that a student wrote are new each time, so what is said about them is not kept.
        """
        keys = [self.key(row) for row in batch["rows"]]
        missing = [row for row, key in zip(batch["rows"], keys, strict=True) if not self._has(key)]
        passing: dict[str, Tensor] = {}
        for small in self._batches(missing):
            states = self.live(small)
            passing |= {self.key(row): _half(one) for row, one in zip(small["rows"], states, strict=True) if row.tokens}
            self._add_answers(small["rows"], states)
        return self._read_all(keys, passing)

    def pictures(self, batch: Batch, *, answers: bool = True) -> Tensor:
        """Return the states [N, H] fp16 that enter the teacher's language model at picture tokens, sequence by sequence.

        Where the teacher must run for them, its hidden states at answer tokens are kept too; without `answers` it stops
        where its language model begins.
        """
        missing = [row for row in batch["rows" if answers else "heads"] if not self._has(self.picture_key(row))]
        block = first_text_block(self.model, describe(self.model.config)) if missing else None
        for small in self._batches(missing):
            assert block is not None
            where_BT = small["picture_tokens"]
            if answers:
                with states_into(block, where_BT.to(self.model.device)) as seen:
                    self._add_answers(small["rows"], self.live(small))
            else:
                with torch.inference_mode(), half(self.model.device):
                    seen = [states_until(self.model, block, to_device(small, self.model.device))]
            self._add([self.picture_key(row) for row in small["heads"]], seen[0].split(where_BT.sum(1).tolist()))
        return self._read_all([self.picture_key(row) for row in batch["heads"]])

    def _batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Collate rows as the teacher sees them, a few pictures at a time."""
        groups = by_picture(rows, 16)
        for start in range(0, len(groups), PICTURES_A_BATCH):
            yield self.collator(groups[start : start + PICTURES_A_BATCH])

    def _add_answers(self, rows: Sequence[Row], states: Sequence[Tensor]) -> None:
        """Keep the states of given answers."""
        given = [(self.key(row), one) for row, one in zip(rows, states, strict=True) if not row.tokens]
        self._add([key for key, _ in given], [one for _, one in given])

    def _add(self, keys: Sequence[str], states: Sequence[Tensor]) -> None:
        """Keep in half precision what is not kept yet."""
        for key, value in zip(keys, states, strict=True):
            if not self._has(key):
                self._pending[key] = _half(value)
                self._pending_values += value.numel()

    def _read_all(self, keys: Sequence[str], passing: Mapping[str, Tensor] | None = None) -> Tensor:
        if not keys:
            return torch.empty(0, self.head.weight.shape[1], dtype=torch.float16)
        passing = passing or {}
        found = torch.cat([passing[key] if key in passing else self._read(key) for key in keys])
        if self._pending_values >= VALUES_A_SHARD:
            self.flush()
        return found

    @torch.inference_mode()
    def live(self, batch: Batch) -> list[Tensor]:
        """Return the hidden states [A, H] of every row, computed now."""
        with half(self.model.device):
            logits_AV, _, hidden_AH = answer_logits(self.model, to_device(batch, self.model.device))
            if not self._head_tried:
                self._try_head(hidden_AH, logits_AV)
        return list(hidden_AH.split(self.lengths(batch["rows"])))

    def _try_head(self, hidden_AH: Tensor, logits_AV: Tensor) -> None:
        """Refuse a teacher whose logits do not come back from its hidden states: it would teach something else than it says."""
        apart, largest = (float(value.abs().max()) for value in (self.logits(hidden_AH) - logits_AV, logits_AV))
        if apart > SAME * largest:  # where something is no number the loss against itself says so
            raise UserError(
                f"the teacher's logits do not come back from its last hidden states through its head (largest difference "
                f"{apart:.3g}, largest logit {largest:.3g}), and these states are what is kept of it: this "
                f"{self.model.config.model_type} cannot teach."
            )
        self._head_tried = True

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the number of answer tokens of every row."""
        prompter = self.collator.prompter
        return [len(prompter.answer_ids(row)) for row in rows]

    def logits(self, hidden_AH: Tensor) -> Tensor:
        """Return the teacher's logits [A, V] from cached hidden states through its frozen head, in fp32."""
        with torch.no_grad():
            weight = self.head.weight
            logits: Tensor = self.head(hidden_AH.to(weight.device, weight.dtype)).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def flush(self) -> None:
        """Write what is not on disk yet as one shard, under a temporary name that is replaced when whole."""
        if not self._pending:
            return
        last = max((int(path.stem.rpartition("-")[2]) for path in self.folder.glob("shard-*.safetensors")), default=-1)
        shard = self.folder / f"shard-{last + 1:05d}.safetensors"
        temporary = shard.with_suffix(".tmp")
        save_file(self._pending, temporary, metadata={HASH: _hash(self._pending)})
        flush(temporary)
        temporary.rename(shard)
        flush_folder(self.folder)
        self._register(shard)
        self._pending, self._pending_values = {}, 0

    def _has(self, key: str) -> bool:
        return key in self._pending or key in self._where

    def _read(self, key: str) -> Tensor:
        if key in self._pending:
            return self._pending[key]
        shard = self._where[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        value: Tensor = self._open[shard].get_tensor(key)
        return value

    def _register(self, shard: Path) -> None:
        with safe_open(shard, framework="pt") as file:
            self._where.update(dict.fromkeys(file.keys(), shard))

    def _take_up(self, shard: Path) -> None:
        """Use a shard of an earlier run if it is what was written; else remove it, aloud: what it held is asked again."""
        try:
            with safe_open(shard, framework="pt") as file:
                told = (file.metadata() or {}).get(HASH)
            whole = told == _hash(load_file(shard))
        except (SafetensorError, OSError):
            whole = False
        if whole:
            self._register(shard)
            return
        warnings.warn(f"{shard}: is not what was written; removed, the teacher is asked again", stacklevel=2)
        shard.unlink()


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names and bytes, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Teachers:
    """Whom one training asks: the teacher whose states are matched, and a second one with its share of the divergences."""

    lead: TeacherCache
    second: TeacherCache | None = None
    share: float = 0.0

    @classmethod
    def of(cls, weights: Mapping[Any, float], first: TeacherCache, previous: TeacherCache | None) -> Teachers:
        """Return the teachers that have a weight, weights normalised to 1; one alone where both are the same.

        `previous` leads where `first` has no weight. Between a student and a teacher many times its size, one of in-between
        size helps: LLaVA-CKD, arXiv 2605.10641; at a ratio of about 2.5, the capacity law behind MiniMA.
        """
        if previous is None or previous is first or "previous" not in weights:
            return cls(first)
        if "first" not in weights:
            return cls(previous)
        return cls(first, previous, weights["previous"] / sum(weights.values()))

    def flush(self) -> None:
        """Write what is not on disk yet."""
        self.lead.flush()
        if self.second is not None:
            self.second.flush()
