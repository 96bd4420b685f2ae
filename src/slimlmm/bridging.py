"""Closed-form patch for dropped blocks: the block before them takes over what they added, as far as its own FFN can say it.

What a run of blocks adds to the residual stream is predicted from the FFN activations of the last block that stays before it,
and folded into that block's output matrix; a plain checkpoint comes out. LinearPatch (NeurIPS 2025) mends the same gap by a
channel scale between blocks, which a stock configuration cannot say.

Shape legend: B sequences, T tokens, H residual channels, I FFN neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm import surgery
from slimlmm.axes import Anatomy, Keep
from slimlmm.collate import Batch
from slimlmm.importance import Loss, at_least_one, evaluating, forward, mean_loss
from slimlmm.moments import Moments, predict
from slimlmm.repair import Choice, linear_consumers
from slimlmm.wiring import owner

#: ridges relative to the mean power of a neuron; few neurons hold most of it, so that small ones are safe
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: largest relative deviation of a block from adding what its FFN puts out, scaled channel by channel
LINEAR = 1e-3


class NoBridgeError(Exception):
    """Nothing can take over what these blocks added; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A run of dropped blocks `first` to `last` behind the kept block `first` - 1, whose FFN ends in the linear `writer`."""

    first: int
    last: int
    writer: str


def bridge_best(
    model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep, batches: Sequence[Batch], loss: Loss
) -> tuple[PreTrainedModel, list[Choice]]:
    """Drop blocks with and without a bridge over each gap; return the model of less calibration loss, and both losses.

    `model` stays untouched. Where no gap can be bridged there is one choice alone.
    """
    tries: list[Choice] = []
    best: PreTrainedModel | None = None
    for name, way in (("slice", None), ("bridge", bridged)):
        trial = model
        if way is not None:
            trial = copy.deepcopy(model)
            if not way(trial, anatomy, axis, keep, batches):
                continue
        cut = surgery.cut(trial, anatomy, axis, keep)
        del trial
        with evaluating(cut):
            tries.append(Choice(name=name, loss=mean_loss(cut, batches, loss)))
        if best is None or tries[-1].loss < tries[0].loss:
            best = cut
    assert best is not None
    return best, tries


def bridged(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep, batches: Sequence[Batch]) -> list[Gap]:
    """Patch the uncut model in place for the coming cut of its blocks; return the gaps that are bridged.

    With h [I] what enters the writer W, and d [H] what the dropped blocks add behind it, W' = W + diag(1/g) A and b' = b +
    diag(1/g) c for the ridge regression d ~ A h + c (`moments.predict`; the ridge of least held-out error), g [H] being what
    the block makes of its writer's output on the way to the stream (layer scale, else 1).
    """
    done = []
    layers = anatomy.axis(axis).layers
    for gap in gaps(model, anatomy, axis, keep):
        before, after = (model.get_submodule(f"{layers}.{number}") for number in (gap.first - 1, gap.last))
        writer = model.get_submodule(gap.writer)
        assert isinstance(writer, nn.Linear)
        with evaluating(model), torch.no_grad():
            try:
                gain_H = _gain(model, before, writer, next(at_least_one(batches, f"bridging {axis}")))
            except NoBridgeError:
                continue
            moments = _moments(model, writer, before, after, batches)
        _fold(writer, gain_H, moments)
        done.append(gap)
    return done


def gaps(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep) -> Iterator[Gap]:
    """Yield the runs of dropped blocks behind a kept one whose FFN ends in a linear."""
    found, ffn = anatomy.axis(axis), anatomy.axes.get(f"{axis.partition('.')[0]}.ffn")
    (group,) = found.groups
    kept = {int(unit) * group.stride + i for unit in keep[group.name] for i in range(group.stride)}
    modules = dict(model.named_modules())
    for first in range(1, found.size):
        if first in kept or first - 1 not in kept:
            continue
        last = next((number - 1 for number in range(first, found.size) if number in kept), found.size - 1)
        inside = f"{found.layers}.{first - 1}."
        writers = {
            owner(slot.parameter)
            for one in (ffn.groups if ffn else ())
            for slot in linear_consumers(modules, one)
            if slot.parameter.startswith(inside)
        }
        if len(writers) == 1:
            yield Gap(first=first, last=last, writer=writers.pop())


def _stream(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _gain(model: PreTrainedModel, block: nn.Module, writer: nn.Linear, batch: Batch) -> Tensor:
    """Return g [H]: how much of each channel of the writer's output reaches the block's; refuse where that is no plain factor."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    forward(model, batch)
    handle.remove()
    args, kwargs = calls[0]
    plain_BTH = _stream(block(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(2):
        size = float(plain_BTH.std())
        pushed_H = size * (1 + torch.rand(writer.out_features, generator=generator)).to(plain_BTH)
        push: Callable[..., Tensor] = lambda _module, _inputs, output, pushed_H=pushed_H: output + pushed_H  # noqa: E731
        handle = writer.register_forward_hook(push)
        moved_BTH = _stream(block(*args, **kwargs)) - plain_BTH
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
    model: PreTrainedModel, writer: nn.Linear, before: nn.Module, after: nn.Module, batches: Sequence[Batch]
) -> Moments:
    """Return the moments of (h, d) [I + H] over the calibration tokens: the writer's inputs and what the blocks behind add."""
    moments = Moments(writer.in_features + writer.out_features, model.device)
    seen: dict[str, Tensor] = {}

    def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
        added_BTH = _stream(output) - seen["stream"]
        moments.add(torch.cat((seen["neurons"].reshape(*added_BTH.shape[:-1], -1), added_BTH), -1))

    with ExitStack() as stack:
        stack.callback(writer.register_forward_pre_hook(lambda _, inputs: seen.update(neurons=inputs[0])).remove)
        stack.callback(before.register_forward_hook(lambda *call: seen.update(stream=_stream(call[-1]))).remove)
        stack.callback(after.register_forward_hook(measure).remove)
        for batch in batches:
            forward(model, batch)
    return moments


@torch.no_grad()
def _fold(writer: nn.Linear, gain_H: Tensor, moments: Moments) -> None:
    """Add the prediction to the writer; channels that it does not reach are left alone."""
    neurons, channels = writer.in_features, writer.out_features
    kept = torch.arange(neurons, device=writer.weight.device)
    dropped = torch.arange(neurons, neurons + channels, device=writer.weight.device)
    read = torch.zeros(channels, neurons + channels, dtype=torch.float64, device=writer.weight.device)
    read[:, neurons:] = torch.eye(channels, dtype=torch.float64)
    bias = writer.bias if isinstance(writer.bias, Tensor) else None
    found = predict(moments, kept, dropped, read, bias=bias is not None, ridges=RIDGES)
    reached = gain_H.abs() > LINEAR * gain_H.abs().max()
    share = torch.where(reached, 1 / gain_H.double(), torch.zeros_like(gain_H, dtype=torch.float64))
    writer.weight += (share[:, None] * found.matrix).to(writer.weight)
    if bias is not None:
        bias.add_((share * found.offset).to(bias))
