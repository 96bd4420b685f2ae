"""Passes that begin where something has changed: what the blocks before it gave for a batch is remembered.

Ranking the heads of the last block, fitting block after block, judging cuts of the language model: each runs the same first
blocks over the same calibration batches again and again. A block whose output is remembered hands it out instead of running; all
that stands between blocks still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.collate import Batch
from slimlmm.forward import forward, output_of

#: most bytes that are remembered; blocks beyond it run
MOST_BYTES = 4 << 30
#: largest relative deviation of what the last block gives between a whole pass and one that begins later
SAME = 1e-5


@dataclass(frozen=True, slots=True)
class _Given:
    """What a block gave for a batch, which is held so that its id stays its own."""

    batch: Tensor
    output: Any
    versions: tuple[tuple[Tensor, int], ...]
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Tell whether nobody has written into it since."""
        return all(one._version == version for one, version in self.versions)


@dataclass(slots=True)
class Memory:
    """What the blocks of a model gave for some batches, by name of the block; none where a pass cannot begin later.

    It holds for a model and for copies of it that differ behind the blocks that are handed out, which is for the caller to say.
    """

    order: tuple[str, ...]
    """Blocks by name, in the order in which they run; empty where nothing can be remembered."""
    most_bytes: int = MOST_BYTES
    _given: dict[tuple[Any, ...], _Given] = field(default_factory=dict)
    _bytes: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, anatomy: Anatomy, batch: Batch) -> Memory:
        """Return an empty memory of a model in evaluation mode, tried out.

        On `batch`, passes that begin at any block have to end as whole ones do, else all passes will be whole. They do not where
        blocks leave more behind than they return, such as keys that others read.
        """
        memory = cls(_order(model, anatomy, batch))
        if not memory.order:
            return memory
        wanted = memory._end(model, "", batch)
        try:
            ends = [
                memory._end(model, first, batch) for first in (memory.last, *memory.order[1:])
            ]  # remembered, handed out
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
            return cls(())
        most = SAME * wanted.abs().max()
        return cls(memory.order if all(bool((end - wanted).abs().max() <= most) for end in ends) else ())

    @torch.no_grad()
    def _end(self, model: PreTrainedModel, first: str, batch: Batch) -> Tensor:
        """Return what the last block gives in a pass that begins at `first`."""
        with self.resumed(model, first):
            return _tensors(output_of(model, model.get_submodule(self.order[-1]), batch))[0]

    @contextmanager
    def resumed(self, model: PreTrainedModel, first: str) -> Iterator[None]:
        """Within the block passes of `model` begin at the block `first`: those before it hand out what they gave for the batch.

        Whatever they give for a batch that was not seen yet is remembered. A name that is not in `order`: all blocks run.
        """
        ahead = self.order[: self.order.index(first)] if first in self.order else ()
        now: list[Tensor] = []
        with ExitStack() as stack:
            if ahead:
                stack.callback(_watch(model, now).remove)
            for name in ahead:
                stack.enter_context(self._handing_out(model.get_submodule(name), name, now))
            yield

    @contextmanager
    def _handing_out(self, block: nn.Module, name: str, now: list[Tensor]) -> Iterator[None]:
        own, runs = block.__dict__.get("forward"), block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, id(now[0]), torch.is_autocast_enabled(now[0].device.type))
            found = self._given.get(key)
            if found is not None and found.is_whole:
                return found.output
            output = runs(*args, **kwargs)
            self._remember(key, now[0], output)
            return output

        block.__dict__["forward"] = forward
        try:
            yield
        finally:
            del block.__dict__["forward"]
            if own is not None:
                block.__dict__["forward"] = own

    def _remember(self, key: tuple[Any, ...], batch: Tensor, output: Any) -> None:
        tensors = _tensors(output)
        size = sum(one.nbytes for one in tensors)
        if any(one.requires_grad for one in tensors) or self._bytes + size > self.most_bytes:
            return
        before = self._given.pop(key, None)
        self._bytes += size - (before.nbytes if before else 0)
        self._given[key] = _Given(batch, output, tuple((one, one._version) for one in tensors), size)

    @property
    def last(self) -> str:
        """Name of the last block, nothing where passes are whole."""
        return self.order[-1] if self.order else ""

    def before(self, parameters: Iterable[str]) -> str:
        """Return the first block that holds one of these parameters; nothing where one stands outside of all blocks."""
        owners = [
            next((n for n, name in enumerate(self.order) if one.startswith(f"{name}.")), -1) for one in parameters
        ]
        return self.order[min(owners)] if owners and min(owners) >= 0 else ""

    def forget(self, first: str) -> None:
        """Forget what the block `first` and all behind it gave: they have changed."""
        behind = set(self.order[self.order.index(first) :]) if first in self.order else set(self.order)
        for key in [key for key in self._given if key[0] in behind]:
            self._bytes -= self._given.pop(key).nbytes


def _order(model: PreTrainedModel, anatomy: Anatomy, batch: Batch) -> tuple[str, ...]:
    """Return the names of all blocks in the order in which they run; nothing where one runs more than once."""
    lists = dict.fromkeys(axis.layers for axis in anatomy.axes.values() if axis.layers)
    ran: list[str] = []
    with ExitStack() as stack:
        for name in lists:
            for number, block in enumerate(model.get_submodule(name).children()):
                hear = partial(_heard, ran, f"{name}.{number}")
                stack.callback(block.register_forward_pre_hook(hear).remove)
        with torch.no_grad():
            forward(model, batch)
    return tuple(ran) if len(ran) == len(set(ran)) else ()


def _tensors(output: Any) -> list[Tensor]:
    return [one for one in (output if isinstance(output, tuple) else (output,)) if isinstance(one, Tensor)]


def _heard(ran: list[str], name: str, *_: Any) -> None:
    ran.append(name)


def _watch(model: PreTrainedModel, now: list[Tensor]) -> RemovableHandle:
    """Keep in `now` the token ids that the model is called with: they tell one batch from another."""

    def look(_module: nn.Module, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
        now[:] = [named["input_ids"]]

    return model.register_forward_pre_hook(look, with_kwargs=True)
