"""Closed-form patch for dropped blocks: the block before them takes over what they added, as far as its own FFN can say it.

What a run of blocks adds to the residual stream is predicted from the FFN activations of the last block that stays before it,
and folded into that block's output matrix; a plain checkpoint comes out. LinearPatch (NeurIPS 2025) mends the same gap by a
channel scale between blocks, which a stock configuration cannot say.

Shape legend: B sequences, T tokens, H residual channels, I FFN neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm import surgery
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.blocks import skipped
from slimlmm.calibration import Calibration
from slimlmm.collate import Batch, samples_of
from slimlmm.consumers import linear_consumers
from slimlmm.forward import evaluating, output_of
from slimlmm.importance import Loss, at_least_one, mean_loss
from slimlmm.moments import Moments, predict, products_of
from slimlmm.ranking import greedily
from slimlmm.repair import Choice, judged
from slimlmm.resizing import dead_blocks
from slimlmm.resuming import Memory
from slimlmm.wiring import owner

#: ridges relative to the mean power of a neuron; few neurons hold most of it, so that small ones are safe
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: largest relative deviation of a block from adding what its FFN puts out, scaled channel by channel
LINEAR = 1e-3


#: parameters of a linear by name
Patch = dict[str, Tensor]


class NoBridgeError(Exception):
    """Nothing can take over what these blocks added; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A run of dropped blocks `first` to `last` behind the kept block `first` - 1, whose FFN ends in the linear `writer`."""

    first: int
    last: int
    writer: nn.Linear


def bridge_best(
    model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep, calibration: Calibration, loss: Loss
) -> tuple[PreTrainedModel, list[Choice]]:
    """Drop blocks with and without a bridge over each gap; return the model of less loss on unseen rows, and both losses.

    `model` stays untouched. Where no gap can be bridged there is one choice alone.
    """
    plain = surgery.cut(model, anatomy, axis, keep)
    tries = [judged("slice", plain, calibration.judge, loss)]
    trial = copy.deepcopy(model)
    if not bridged(trial, anatomy, axis, keep, calibration.fit):
        return plain, tries
    mended = surgery.cut(trial, anatomy, axis, keep)
    del trial
    tries.append(judged("bridge", mended, calibration.judge, loss))
    return (mended if tries[1].loss < tries[0].loss else plain), tries


def greedy_bridged(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axis: str,
    calibration: Calibration,
    loss: Loss,
    keep: int,
    stays: Sequence[int] = (),
) -> list[int]:
    """Return the `keep` units of blocks that stay when, one by one, the one that costs least once bridged is dropped; ascending.

    As `ranking.greedy_blocks` (`stays` too), but gaps are bridged before they are judged, on rows that no bridge was fitted
    on: the block whose absence hurts most may be the one that its neighbour can stand in for. One pass for each choice that is
    tried and two for each gap; weights are changed in place while a choice is judged, and put back.
    """
    group, layers = anatomy.axis(axis).groups[0], anatomy.axis(axis).layers
    patches: dict[tuple[int, int], Patch | None] = {}
    with evaluating(model):
        memory = Memory.of(model, anatomy, list(at_least_one(calibration.fit, "ranking blocks")))

    def cost(left: list[int]) -> float:
        gone = group.layers(unit for unit in range(group.units) if unit not in left)
        found = list(gaps(model, anatomy, axis, {group.name: torch.tensor(left)}))
        for gap in found:
            if (gap.first, gap.last) not in patches:
                patches[gap.first, gap.last] = _patch(model, anatomy.axis(axis), gap, calibration.fit, memory)
        with ExitStack() as stack:
            for gap in found:
                stack.enter_context(_put_back(gap.writer))
                _put(gap.writer, patches[gap.first, gap.last])
            left_out = [model.get_submodule(f"{layers}.{number}") for number in gone]
            stack.enter_context(skipped(left_out, alone=bool(memory.order)))
            stack.enter_context(evaluating(model))
            first = max(0, gone[0] - 1)  # the bridge stands before the gap
            stack.enter_context(memory.resumed(model, f"{layers}.{first}"))
            return mean_loss(model, calibration.judge, loss)

    return greedily(group, keep, cost, stays)


def _patch(model: PreTrainedModel, axis: Axis, gap: Gap, batches: Sequence[Batch], memory: Memory) -> Patch | None:
    """Return the parameters of the gap's writer once it is bridged, None where it cannot be; the model stays as it is."""
    before, after = (f"{axis.layers}.{number}" for number in (gap.first - 1, gap.last))
    text = axis.name.startswith("text.")
    moments = partial(_moments, model, gap.writer, (before, after), batches, memory, text=text)
    with _put_back(gap.writer):
        done = mend(model, model.get_submodule(before), gap.writer, batches, moments)
        return _weights(gap.writer) if done else None


def _weights(linear: nn.Linear) -> Patch:
    return {name: value.detach().clone() for name, value in linear.named_parameters()}


@torch.no_grad()
def _put(linear: nn.Linear, patch: Patch | None) -> None:
    for name, values in (patch or {}).items():
        linear.get_parameter(name).copy_(values)


@contextmanager
def _put_back(linear: nn.Linear) -> Iterator[None]:
    """After the block a linear has the parameters that it had before."""
    before = _weights(linear)
    try:
        yield
    finally:
        _put(linear, before)


def bridged(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep, batches: Sequence[Batch]) -> list[Gap]:
    """Patch the uncut model in place for the coming cut of its blocks; return the gaps that are bridged.

    With h [I] what enters the writer W, and d [H] what the dropped blocks add behind it, W' = W + diag(1/g) A and b' = b +
    diag(1/g) c for the ridge regression d ~ A h + c (`moments.predict`; the ridge of least held-out error), g [H] being what
    the block makes of its writer's output on the way to the stream (layer scale, else 1).
    """
    found, memory = anatomy.axis(axis), Memory(())
    # all of the model as it is: patched, it would add twice what the blocks add that still run
    patches = [(gap, _patch(model, found, gap, batches, memory)) for gap in gaps(model, anatomy, axis, keep)]
    for gap, patch in patches:
        _put(gap.writer, patch)
    return [gap for gap, patch in patches if patch]


def mend(
    model: PreTrainedModel,
    block: nn.Module,
    writer: nn.Linear,
    batches: Sequence[Batch],
    moments: Callable[[], Moments],
) -> bool:
    """Fold what the stream lacks behind `block` into its writer (`fold`), by these moments of (h, d); return whether it was."""
    with evaluating(model), torch.no_grad():
        try:
            gain_H = gain(model, block, writer, next(at_least_one(batches, "mending the stream")))
            return fold(writer, gain_H, moments())
        except NoBridgeError:
            return False


def gaps(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep) -> Iterator[Gap]:
    """Yield the runs of dropped blocks behind a kept one whose FFN ends in a linear; blocks that nothing reads are in none."""
    found = anatomy.axis(axis)
    (group,) = found.groups
    kept, size = set(group.layers(keep[group.name].tolist())), read_blocks(model, axis, found.size)
    for first in range(1, size):
        if first in kept or first - 1 not in kept:
            continue
        last = next((number - 1 for number in range(first, size) if number in kept), size - 1)
        writer = writer_of(model, f"{found.layers}.{first - 1}")
        if writer is not None:
            yield Gap(first=first, last=last, writer=writer)


def read_blocks(model: PreTrainedModel, axis: str, size: int) -> int:
    """Return how many of the blocks of an axis come before the last place where something reads the stream."""
    return min(dead_blocks(model.config).get(axis, [size]))


def writer_of(model: PreTrainedModel, block: str) -> nn.Linear | None:
    """Return the linear by which the FFN of a block ends, None where there is not just one."""
    modules = dict(model.named_modules())
    writers = {
        owner(slot.parameter)
        for axis in describe(model.config).axes.values()
        if axis.noun == "ffn"
        for group in axis.groups
        for slot in linear_consumers(modules, group)
        if slot.parameter.startswith(f"{block}.")
    }
    found = modules[writers.pop()] if len(writers) == 1 else None
    assert found is None or isinstance(found, nn.Linear)
    return found


def stream(output: Any) -> Tensor:
    """Return the residual stream of what a block gives out, alone or first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def gain(model: PreTrainedModel, block: nn.Module, writer: nn.Linear, batch: Batch) -> Tensor:
    """Return g [H]: how much of each channel of the writer's output reaches the block's; refuse where that is no plain factor."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    plain_BTH = stream(output_of(model, block, batch))
    handle.remove()
    args, kwargs = calls[0]
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(2):
        size = float(plain_BTH.std())
        pushed_H = size * (1 + torch.rand(writer.out_features, generator=generator)).to(plain_BTH)
        push: Callable[..., Tensor] = lambda _module, _inputs, output, pushed_H=pushed_H: output + pushed_H  # noqa: E731
        handle = writer.register_forward_hook(push)
        moved_BTH = stream(block(*args, **kwargs)) - plain_BTH
        handle.remove()
        if moved_BTH.shape[-1] != len(pushed_H):
            raise NoBridgeError("the FFN does not write the stream itself")
        gains.append(moved_BTH / pushed_H)
    both = torch.stack([gain.reshape(-1, gain.shape[-1]) for gain in gains]).flatten(0, 1)
    gain_H = both.mean(0)
    if float((both - gain_H).abs().max()) > LINEAR * float(gain_H.abs().max()):
        raise NoBridgeError("what the FFN puts out is normed before it reaches the stream")
    return gain_H


def _moments(
    model: PreTrainedModel,
    writer: nn.Linear,
    ends: tuple[str, str],
    batches: Sequence[Batch],
    memory: Memory,
    *,
    text: bool,
) -> Moments:
    """Return the moments of (h, d) [I + H] over the calibration tokens: the writer's inputs and what the blocks behind add.

    Of the `text` tower padding does not count.
    """
    moments = Moments(writer.in_features + writer.out_features, model.device, products_of(writer.weight))
    seen: dict[str, Tensor] = {}
    before, after = (model.get_submodule(name) for name in ends)
    with ExitStack() as stack:
        stack.callback(writer.register_forward_pre_hook(lambda _, inputs: seen.update(neurons=inputs[0])).remove)
        stack.callback(before.register_forward_hook(lambda *call: seen.update(stream=stream(call[-1]))).remove)
        stack.enter_context(memory.resumed(model, ends[0]))
        for batch in batches:
            behind_BTH = stream(output_of(model, after, batch))
            if behind_BTH.shape != seen["stream"].shape:
                raise NoBridgeError("a block of the gap changes the number of tokens")
            count(moments, seen["neurons"], behind_BTH - seen["stream"], batch, text=text)
    return moments


def count(moments: Moments, neurons: Tensor, lacking_BTH: Tensor, batch: Batch, *, text: bool) -> None:
    """Let (h, d) count, what enters a writer and what the stream lacks; of the `text` tower not at padding."""
    both = torch.cat((neurons.reshape(*lacking_BTH.shape[:-1], -1), lacking_BTH), -1)
    moments.add(*samples_of(batch, text=text).of(both))


@torch.no_grad()
def fold(writer: nn.Linear, gain_H: Tensor, moments: Moments) -> bool:
    """Add what the neurons tell of the lacking stream to the writer, where that lowers the held-out error; return whether it did.

    Channels that the writer does not reach are left alone.
    """
    neurons, channels, device = writer.in_features, writer.out_features, writer.weight.device
    kept, dropped = torch.arange(neurons + channels, device=device).split([neurons, channels])
    read = torch.zeros(channels, neurons + channels, dtype=torch.float64, device=device)
    read[:, neurons:].fill_diagonal_(1.0)
    bias = writer.bias if isinstance(writer.bias, Tensor) else None
    found = predict(moments, kept, dropped, read, bias=bias is not None, ridges=RIDGES)
    if found.error >= found.plain_error:
        return False
    reached = gain_H.abs() > LINEAR * gain_H.abs().max()
    share = torch.where(reached, 1 / gain_H.double(), torch.zeros_like(gain_H, dtype=torch.float64))
    writer.weight += (share[:, None] * found.matrix).to(writer.weight)
    if bias is not None:
        bias.add_((share * found.offset).to(bias))
    return True
