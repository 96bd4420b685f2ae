"""The teacher's answers, computed once: its last hidden state at every answer token, on disk, keyed by content.

The logits come back exactly up to fp16 rounding as ``head(hidden)`` with the teacher's frozen head; that is 2H bytes a token
instead of 2V. A key is a hash of teacher weights, processor, picture bytes, prompt and answer, so a changed teacher or
picture is a miss, never a stale hit. Where a loss asks for it, what the teacher's language model gets of each picture is kept
beside that: 2H bytes a picture token.

Shape legend: A answer tokens, N picture tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm.anatomy import describe
from slimlmm.collate import Batch, Collator
from slimlmm.data import Row, by_picture
from slimlmm.forward import answer_logits, first_text_block, states_into, to_device

VALUES_A_SHARD = 16_000_000
PICTURE = "picture-"


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash over every parameter and buffer, by name, in storage precision."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rules(processor: Any) -> str:
    """Return what a processor does to pictures and texts, without the folder that it was loaded from."""
    pictures: str = processor.image_processor.to_json_string()
    tokenizer: str = processor.tokenizer.backend_tokenizer.to_str()
    return pictures + tokenizer + str(processor.chat_template)


class TeacherCache:
    """Hidden states of a frozen teacher at the answer tokens of rows, kept in safetensors shards of one folder."""

    def __init__(self, model: PreTrainedModel, collator: Collator, folder: Path) -> None:
        self.model = model.eval()
        self.collator = collator
        self.folder = folder
        self.head = model.get_output_embeddings()
        self._first_block = first_text_block(model, describe(model.config))
        self._identity = hashlib.sha256((weights_fingerprint(model) + _rules(collator.processor)).encode()).digest()
        self._pictures: dict[str, bytes] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._pending: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._register(shard)

    def key(self, row: Row) -> str:
        """Return the content hash of (teacher, processor, picture bytes, prompt, answer)."""
        texts = "\x1f".join(self.collator.prompter.turns(row.question, row.answer))
        return hashlib.sha256(self._identity + self._picture(row) + texts.encode()).hexdigest()[:32]

    def picture_key(self, row: Row) -> str:
        """Return the content hash of (teacher, processor, picture bytes)."""
        return PICTURE + hashlib.sha256(self._identity + self._picture(row)).hexdigest()[:32]

    def _picture(self, row: Row) -> bytes:
        name = row.picture_key()
        if name not in self._pictures:
            self._pictures[name] = hashlib.sha256(row.picture_bytes()).digest()
        return self._pictures[name]

    def fill(
        self, rows: Sequence[Row], *, pictures_a_batch: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Run the teacher on the rows that are not cached yet; return how many those were."""
        missing = {key: row for row in rows if not self._has(key := self.key(row))}
        groups = by_picture(list(missing.values()), 16)
        done = 0
        for start in range(0, len(groups), pictures_a_batch):
            batch = self.collator(groups[start : start + pictures_a_batch])
            self.of(batch)
            done += len(batch["rows"])
            if progress:
                progress(done, len(missing))
        self.flush()
        return len(missing)

    def of(self, batch: Batch) -> Tensor:
        """Return the hidden states [A, H] fp16 of a collated batch, in row order; the teacher runs only on what is new."""
        return self._found([self.key(row) for row in batch["rows"]], batch)

    def pictures(self, batch: Batch) -> Tensor:
        """Return the states [N, H] fp16 that enter the teacher's language model at picture tokens, sequence by sequence."""
        return self._found([self.picture_key(row) for row in batch["heads"]], batch)

    def _found(self, keys: list[str], batch: Batch) -> Tensor:
        if not all(self._has(key) for key in keys):
            self._pending |= self._entries(batch, with_pictures=keys[0].startswith(PICTURE))
        found = torch.cat([self._read(key) for key in keys])
        if sum(value.numel() for value in self._pending.values()) >= VALUES_A_SHARD:
            self.flush()
        return found

    def _entries(self, batch: Batch, *, with_pictures: bool) -> dict[str, Tensor]:
        """Run the teacher; return what is kept of a batch by key."""
        hidden, pictures = self.live(batch)
        entries = {self.key(row): states.half() for row, states in zip(batch["rows"], hidden, strict=True)}
        if with_pictures:
            kept = zip(batch["heads"], pictures, strict=True)
            entries |= {self.picture_key(row): states.half() for row, states in kept}
        return {key: states for key, states in entries.items() if not self._has(key)}

    @torch.inference_mode()
    def live(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return, computed now, hidden states [A, H] by row and picture states [N, H] by sequence."""
        here = to_device(batch, self.model.device)
        with states_into(self._first_block, here["picture_tokens"]) as seen:
            _, _, hidden_AH = answer_logits(self.model, here)
        counts = batch["picture_tokens"].sum(1).tolist()
        return (
            list(hidden_AH.float().cpu().split(self.lengths(batch["rows"]))),
            list(seen[0].float().cpu().split(counts)),
        )

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the number of answer tokens of every row."""
        prompter = self.collator.prompter
        return [len(prompter.ids(prompter.turns(row.question, row.answer)[1])) for row in rows]

    def logits(self, hidden_AH: Tensor) -> Tensor:
        """Return the teacher's logits [A, V] from cached hidden states through its frozen head."""
        with torch.no_grad():
            weight = self.head.weight
            logits: Tensor = self.head(hidden_AH.to(weight.device, weight.dtype))
        return logits

    def flush(self) -> None:
        """Write what is not on disk yet as one shard, under a temporary name that is replaced when whole."""
        if not self._pending:
            return
        shard = self.folder / f"shard-{len(list(self.folder.glob('shard-*.safetensors'))):05d}.safetensors"
        temporary = shard.with_suffix(".tmp")
        save_file(self._pending, temporary)
        temporary.rename(shard)
        self._register(shard)
        self._pending = {}

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
