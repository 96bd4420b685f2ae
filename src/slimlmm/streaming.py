"""Cut a checkpoint folder shard by shard: never more in memory than one file of the student and what one parameter needs.

A cut is a view: a mapping from parameter names to tensors that reads from what it cuts, slices and makes up for the cut
when a tensor is asked for. Cuts stack; scoring the next axis looks through all before it, as `surgery.cut` would have
left them. The arithmetic is `surgery.sliced`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm import checkpoint, importance, plan, processors
from slimlmm.anatomy import describe
from slimlmm.axes import Axis, Keep
from slimlmm.errors import UserError
from slimlmm.families import stock_class
from slimlmm.probing import skeleton
from slimlmm.surgery import by_parameter, check, new_config, new_names, sliced
from slimlmm.weights import Layout, Weights


class Cut(Mapping[str, Tensor]):
    """The weights of `source` without the units outside `keep` along `axis`, each made when asked for."""

    def __init__(self, source: Weights | Cut, axis: Axis, keep: Keep) -> None:
        self.source, self.keep = source, keep
        self.size = check(axis, keep)
        self.config: Any = new_config(source.config, axis, self.size, keep)
        self._parts = by_parameter(axis)
        self._old = {new: old for old, new in new_names(axis, keep, source).items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return one parameter, in at least fp32 where the cut touched it."""
        old = self._old[name]
        if old not in self._parts:
            return self.source[old]
        return sliced(self._parts[old], self.size, self.keep, old, self.source[old])

    def __iter__(self) -> Iterator[str]:
        return iter(self._old)

    def __len__(self) -> int:
        return len(self._old)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format in which the uncut parameter is stored."""
        return self.source.dtype(self._old[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a cut of a folder left: parameters before and after, bytes of weights, keys that the model had no place for."""

    parameters_before: int
    parameters: int
    bytes: int
    left: tuple[str, ...]


def cut_folder(
    weights: Weights,
    sizes: Mapping[str, int],
    out: Path,
    *,
    criterion: str = "magnitude",
    seed: int = 0,
    max_shard_size: int | str = checkpoint.SHARD,
) -> Written:
    """Cut every axis of `sizes` in turn, as scored by the weights that are left then, and write the student to `out`.

    Each weight keeps the number format of its file. Processor, tokenizer, chat template and generation settings are
    copied. The units are those that cutting the loaded model would choose.
    """
    size_of_files, folder = checkpoint.shard_size(max_shard_size), weights.shards.folder
    processors.refuse_unsaid(folder, weights.config, sizes)
    student: Weights | Cut = weights
    for name, size in sizes.items():
        anatomy = describe(student.config)
        whole: Any = skeleton(student.config).model
        scores = importance.score(whole, anatomy, [name], criterion, seed=seed, weights=student)
        student = Cut(student, anatomy.axis(name), plan.choose(scores, anatomy, name, size))
    final, model = student, _empty(student.config)
    layout = Layout(model, {name: _shape(model, name, final.dtype(name)) for name in final}, size_of_files)

    def write(partial: Path) -> None:
        _write_settings(model, weights, partial)
        layout.write(partial, lambda name: rounded(final, name))
        checkpoint.copy_processor(folder, partial)
        processors.follow(partial, weights.config, sizes)

    checkpoint.written(out, write)
    return Written(
        parameters_before=skeleton(weights.config).parameters,
        parameters=model.num_parameters(),
        bytes=int(layout.split.metadata["total_size"]),
        left=tuple(weights.left),
    )


def rounded(weights: Weights | Cut, name: str) -> Tensor:
    """Return one parameter in the number format that it is stored in, or refuse what overflows there."""
    tensor, stored = weights[name], weights.dtype(name)
    if tensor.dtype == stored:
        return tensor
    found = tensor.to(stored)
    if bool(tensor.isfinite().all()) and not bool(found.isfinite().all()):
        raise UserError(f"{name} does not fit into {stored} after the cut; give the model in bfloat16 or float32.")
    return found


def _empty(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = stock_class(config).from_config(config)
    return model


def _shape(model: PreTrainedModel, name: str, dtype: torch.dtype) -> Tensor:
    found = model.get_parameter_or_buffer(name)
    return torch.empty(found.shape, dtype=dtype, device="meta")


def _write_settings(model: PreTrainedModel, weights: Weights, folder: Path) -> None:
    """Write config.json as ``save_pretrained`` does, and the generation settings as they were."""
    dtype = weights.config.dtype or weights.shards.common
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    settings = weights.shards.folder / checkpoint.GENERATION
    if settings.is_file():
        (folder / checkpoint.GENERATION).write_bytes(settings.read_bytes())
    elif model.can_generate():
        model.generation_config.save_pretrained(folder)
