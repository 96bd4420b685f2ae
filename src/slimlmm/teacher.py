"""The teacher's answers, computed once: its last hidden state at every answer token, on disk, keyed by content.

The logits come back exactly up to fp16 rounding as ``head(hidden)`` with the teacher's frozen head; that is 2H bytes a token
instead of 2V. A key is a hash of teacher weights, processor, picture bytes, prompt and answer, so a changed teacher or
picture is a miss, never a stale hit.

Shape legend: A answer tokens, H hidden size, V vocabulary.
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

from slimlmm.collate import Collator
from slimlmm.data import Row, by_picture
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, to_device

ROWS_A_SHARD = 4096


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a hash over every parameter and buffer, by name, in storage precision."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TeacherCache:
    """Hidden states of a frozen teacher at the answer tokens of rows, kept in safetensors shards of one folder."""

    def __init__(self, model: PreTrainedModel, collator: Collator, folder: Path) -> None:
        self.model = model.eval()
        self.collator = collator
        self.folder = folder
        self.head = model.get_output_embeddings()
        self._identity = hashlib.sha256(
            (weights_fingerprint(model) + repr(collator.processor)).encode()
        ).digest()
        self._pictures: dict[str, bytes] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for shard in sorted(folder.glob("shard-*.safetensors")):
            self._register(shard)

    def key(self, row: Row) -> str:
        """Return the content hash of (teacher, processor, picture bytes, prompt, answer)."""
        picture = row.picture_key()
        if picture not in self._pictures:
            self._pictures[picture] = hashlib.sha256(row.picture_bytes()).digest()
        texts = "\x1f".join(self.collator.prompter.turns(row.question, row.answer))
        return hashlib.sha256(self._identity + self._pictures[picture] + texts.encode()).hexdigest()[:32]

    def fill(
        self, rows: Sequence[Row], *, pictures_a_batch: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Run the teacher on the rows that are not cached yet; return how many those were."""
        missing = {key: row for row in rows if (key := self.key(row)) not in self._where}
        groups = by_picture(list(missing.values()), 16)
        pending: dict[str, Tensor] = {}
        done = 0
        for start in range(0, len(groups), pictures_a_batch):
            batch = self.collator(groups[start : start + pictures_a_batch])
            for row, hidden_AH in zip(batch["rows"], self.live(batch), strict=True):
                pending[self.key(row)] = hidden_AH.half()
            done += len(batch["rows"])
            if len(pending) >= ROWS_A_SHARD:
                self._write(pending)
            if progress:
                progress(done, len(missing))
        if pending:
            self._write(pending)
        return len(missing)

    @torch.inference_mode()
    def live(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the teacher's hidden states [A, H] of every row of a batch, computed now."""
        _, _, hidden_AH = answer_logits(self.model, to_device(batch, self.model.device))
        return list(hidden_AH.float().cpu().split(self.lengths(batch["rows"])))

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Return the number of answer tokens of every row."""
        prompter = self.collator.prompter
        texts = [prompter.turns(row.question, row.answer)[1] for row in rows]
        return [len(ids) for ids in prompter.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def hidden(self, rows: Sequence[Row]) -> Tensor:
        """Return the cached hidden states of the rows, concatenated in order: [A, H] fp16."""
        return torch.cat([self._read(self.key(row)) for row in rows])

    def logits(self, hidden_AH: Tensor) -> Tensor:
        """Return the teacher's logits [A, V] from cached hidden states through its frozen head."""
        with torch.no_grad():
            weight = self.head.weight
            logits: Tensor = self.head(hidden_AH.to(weight.device, weight.dtype))
        return logits

    def _read(self, key: str) -> Tensor:
        if key not in self._where:
            raise UserError(f"the teacher cache {self.folder} lacks a row that training asks for; fill it first.")
        shard = self._where[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        value: Tensor = self._open[shard].get_tensor(key)
        return value

    def _register(self, shard: Path) -> None:
        with safe_open(shard, framework="pt") as file:
            self._where.update(dict.fromkeys(file.keys(), shard))

    def _write(self, pending: dict[str, Tensor]) -> None:
        """Write one shard under a temporary name, rename it when whole, and empty `pending`."""
        shard = self.folder / f"shard-{len(list(self.folder.glob('shard-*.safetensors'))):05d}.safetensors"
        temporary = shard.with_suffix(".tmp")
        save_file(pending, temporary)
        temporary.rename(shard)
        self._register(shard)
        pending.clear()
