"""Passes that begin where something has changed: what the blocks before it gave for a batch is remembered.

Ranking the heads of the last block, fitting block after block, judging cuts of the language model: each runs the same first
blocks over the same calibration batches again and again. A block whose output is remembered hands it out instead of running; all
that stands between blocks still runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.blocks import forward_of
from slimlmm.collate import Batch
from slimlmm.forward import forward, output_of

#: most bytes that are remembered; blocks beyond it run
MOST_BYTES = 2 << 30
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
class _Pass:
    """The pass that is under way: the token ids that the model was called with, and how often each block ran in it."""

    batch: Tensor | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def watch(self, model: PreTrainedModel) -> RemovableHandle:
        """Follow the passes of a model until the handle is removed."""

        def look(_module: nn.Module, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.batch = named["input_ids"]
            self.calls.clear()

        return model.register_forward_pre_hook(look, with_kwargs=True)


@dataclass(slots=True)
class Memory:
    """What the blocks of a model gave for some batches, by name of the block; none where a pass cannot begin later.

    It holds for a model and for copies of it that differ behind the blocks that are handed out, which is for the caller to say.
    Passes with gradients are whole.
    """

    order: tuple[str, ...]
    """Blocks by name, in the order in which they run; empty where nothing can be remembered."""
    most_bytes: int = MOST_BYTES
    _given: dict[tuple[Any, ...], _Given] = field(default_factory=dict)
    _bytes: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> Memory:
        """Return an empty memory of a model in evaluation mode, tried out on its first and last batch.

        Passes that begin at any block have to end as whole ones do, else all passes will be whole. They do not where blocks leave
        more behind than they return: keys that others read; a second batch shows what stays on a module from the one before.
        """
        few = [batches[0], *batches[1:][-1:]]
        memory = cls(_order(model, anatomy, few[0]))
        if not memory.order:
            return memory
        try:
            wanted = [memory._end(model, "", batch) for batch in few]
            remembered = [memory._end(model, memory.last, batch) for batch in few]
            right = all(map(_same, remembered, wanted)) and all(
                _same(memory._end(model, first, batch), end)
                for first in memory.order[1:]
                for batch, end in zip(few, wanted, strict=True)
            )
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
            right = False
        return cls(memory.order if right else ())

    @torch.no_grad()
    def _end(self, model: PreTrainedModel, first: str, batch: Batch) -> Tensor:
        """Return what the last block gives in a pass that begins at `first`."""
        with self.resumed(model, first):
            return _tensors(output_of(model, model.get_submodule(self.order[-1]), batch))[0]

    @contextmanager
    def resumed(self, model: PreTrainedModel, first: str) -> Iterator[None]:
        """Within the block passes of `model` begin at the block `first`: those before it hand out what they gave for the batch.

        Whatever they give for a batch that was not seen yet is remembered. A name that is not in `order`: all blocks run. The
        model cannot be copied meanwhile.
        """
        ahead = self.order[: self.order.index(first)] if first in self.order else ()
        now = _Pass()
        with ExitStack() as stack:
            if ahead:
                stack.callback(now.watch(model).remove)
            for name in ahead:
                block = model.get_submodule(name)
                stack.enter_context(forward_of(block, _Handing(self, name, now, block.forward)))
            yield

    def given(self, key: tuple[Any, ...]) -> _Given | None:
        """Return what was remembered, None where that is nothing or was written into."""
        found = self._given.get(key)
        return found if found is not None and found.is_whole else None

    def remember(self, key: tuple[Any, ...], batch: Tensor, output: Any) -> None:
        """Remember tensors, as far as there is room."""
        tensors = _tensors(output)
        before = self._given.pop(key, None)
        self._bytes -= before.nbytes if before else 0
        size = sum(one.nbytes for one in tensors)
        if not tensors or any(one.is_inference() for one in tensors) or self._bytes + size > self.most_bytes:
            return
        self._bytes += size
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


@dataclass(slots=True)
class _Handing:
    """The forward of a block that hands out what it gave before, and runs where that is nothing."""

    memory: Memory
    name: str
    now: _Pass
    runs: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch, number = self.now.batch, self.now.calls[self.name]
        if batch is None or torch.is_grad_enabled():
            return self.runs(*args, **kwargs)
        self.now.calls[self.name] += 1
        key = (self.name, number, id(batch), torch.is_autocast_enabled(batch.device.type))
        found = self.memory.given(key)
        if found is not None:
            return found.output
        output = self.runs(*args, **kwargs)
        self.memory.remember(key, batch, output)
        return output

    def __deepcopy__(self, _memo: Any) -> NoReturn:
        raise RuntimeError(f"a model is copied while {self.name} hands out what it gave; its copy would do so for good")


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= SAME * wanted.abs().max())


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
