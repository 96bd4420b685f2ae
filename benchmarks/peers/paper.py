"""arXiv 2312.05795 on our anatomy: masks that go to zero while training, |sum grad x weight|, last blocks first, no repair.

Read from the paper and its official code (alipay/PainlessInferenceAcceleration at 78c9b00, ``ipad/``, which knows LLaMA, GLM and
OPT alone). Three stages: blocks, inner dimensions, width; each ramps its masks over half of its steps, cuts, and trains on for
the other half. What differs from that code, because it cannot be otherwise here or is a defect there, stands in README.md.

Shape legend: U units of a group, C input columns of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from shared import PICTURES, Outcome, Task, cache_of, outcome, recipe_of, save, steps_of, train_rows, trained
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Group, Keep, Slot
from slimlmm.importance import per_unit, row_sums
from slimlmm.surgery import cut
from slimlmm.trainings import Training

STAGES = ("blocks", "inner", "width")
#: share of the row visits and peak rate of each stage: as ours, most on the last shape and a higher rate for smaller ones
SHARES, RATES = (0.25, 0.25, 0.5), (2e-4, 4e-4, 8e-4)
LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 0.1}
#: units that are few and dear fade by this factor a step once they are chosen; others are zero at once (as in the code)
FADE, FEW = 0.9, 16
#: norms of a stream (`Slot.norm`): LayerNorm, RMSNorm, the RMSNorm before a tied head
NORMS = ("layer", "rms", "last")


def reach(task: Task) -> Outcome:
    """Reach our shape by the paper's three stages at our row visits."""
    rows, loaded = train_rows(task), checkpoint.load(task.teacher)
    cache, student = cache_of(task, loaded, rows), checkpoint.load(task.teacher).model
    final: dict[str, int] = {}
    for stage in recipe_of(task, rows).stages:
        for turn in stage.rounds:
            final |= turn.sizes
    done = []
    for number, (kind, share, rate) in enumerate(zip(STAGES, SHARES, RATES, strict=True)):
        training = Training(
            steps=steps_of(task.row_visits * share / 2, rows),
            pictures_per_step=PICTURES,
            learning_rate=rate,
            losses=LOSSES,
            warmup=0.1,
        )
        anatomy = describe(student.config)
        sizes = {name: size for name, size in final.items() if anatomy.axis(name).kind == kind}
        with ExitStack() as stack:
            ramps = [stack.enter_context(Ramp(student, anatomy.axis(n), s, training.steps)) for n, s in sizes.items()]
            done.append(trained(task, student, loaded.processor, rows, training, teacher=cache, number=2 * number))
        for ramp in ramps:
            bare = plain(describe(student.config))
            student = cut(student, bare, ramp.axis.name, ramp.keep())
        done.append(trained(task, student, loaded.processor, rows, training, teacher=cache, number=2 * number + 1))
    save(task, student, loaded.processor, loaded.stored)
    return outcome(done)


def plain(anatomy: Anatomy) -> Anatomy:
    """Return the anatomy without what `cut` would make up for: rows are taken, and that is all."""
    axes = {}
    for name, axis in anatomy.axes.items():
        groups = tuple(replace(g, slots=tuple(replace(slot, norm="") for slot in g.slots)) for g in axis.groups)
        axes[name] = replace(axis, groups=groups, scalars=(), heavier_eps="")
    return replace(anatomy, axes=axes)


class Ramp:
    """Masks of every group of one axis, 1 at first, that choose and fade the units that go over `steps` training steps.

    Before training step i of T, i from 0, importance is |sum over earlier steps of sum over the unit's columns of grad x weight|,
    taken where the unit is read, and the least important units are chosen until there are round(gone * i / (T - 1)) of them,
    gone = units - kept; a unit once chosen stays so. A chosen unit's mask is 0, or where units are few `FADE` times what it was.
    Blocks are chosen from the last on, and fade by a straight line, one after the other. Within the with-block the model computes
    with the masks, and norms average over the channels that are not chosen, so that a plain cut of the chosen units after the
    ramp leaves what the masked model computed.
    """

    def __init__(self, model: PreTrainedModel, axis: Axis, size: int, steps: int) -> None:
        self.model, self.axis, self.last, self.step = model, axis, max(1, steps - 1), 0
        self.kept = {group.name: group.kept(size) for group in axis.groups}
        self.masks = {group.name: torch.ones(group.units) for group in axis.groups}
        self.chosen = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in axis.groups}
        self.sums = {group.name: torch.zeros(group.units) for group in axis.groups}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        hook = self.model.register_forward_pre_hook(lambda *_: self._advance())
        self._stack.callback(hook.remove)
        for group in self.axis.groups:
            if self.axis.layers:
                for unit, block in enumerate(self.model.get_submodule(self.axis.layers).children()):
                    self._stack.callback(block.register_forward_hook(self._faded(group, unit), with_kwargs=True).remove)
            for slot in group.slots:
                self._watch(group, slot)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self) -> Keep:
        """Return the units that stay when all that has to go is chosen."""
        for group in self.axis.groups:
            self._choose(group, group.units - self.kept[group.name])
        return {name: (~gone).nonzero().flatten() for name, gone in self.chosen.items()}

    def _advance(self) -> None:
        """Move the masks one step on; looks in evaluation mode do not count."""
        if not self.model.training:
            return
        for group in self.axis.groups:
            gone = group.units - self.kept[group.name]
            if self.axis.layers:
                self._fade_blocks(group, gone)
                continue
            self._choose(group, round(gone * self.step / self.last))
            mask, chosen = self.masks[group.name], self.chosen[group.name]
            mask[chosen] = mask[chosen] * FADE if group.units <= FEW else 0.0
        self.step += 1

    def _choose(self, group: Group, count: int) -> None:
        """Choose the least important units until `count` are, never one that was chosen before."""
        chosen = self.chosen[group.name]
        last_first = torch.arange(group.units, dtype=torch.float32).neg()
        scores = last_first if self.axis.layers else self.sums[group.name].abs()
        more = count - int(chosen.sum())
        if more > 0:
            chosen[scores.masked_fill(chosen, math.inf).argsort(stable=True)[:more]] = True

    def _fade_blocks(self, group: Group, gone: int) -> None:
        """Fade the last blocks one after the other: each has its share of the steps, and falls by a straight line in it."""
        at = gone * self.step / self.last
        for place in range(gone):
            self.masks[group.name][group.units - 1 - place] = 1 - min(1.0, max(0.0, at - place))

    def _faded(self, group: Group, unit: int) -> Callable[..., Any]:
        """Return the hook by which a block adds to the stream what its mask lets through."""

        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else named["hidden_states"]
            share = float(self.masks[group.name][unit])
            if isinstance(output, tuple):
                return (before + share * (output[0] - before), *output[1:])
            return before + share * (output - before)

        return hook

    def _watch(self, group: Group, slot: Slot) -> None:
        """Mask what is read in one place and add up grad x weight there; narrow the norms of the stream."""
        module = self.model.get_submodule(slot.parameter.rpartition(".")[0])
        if slot.role == "consume":
            self._stack.callback(module.register_forward_pre_hook(self._masked(group, slot)).remove)
            parameter = self.model.get_parameter(slot.parameter)
            self._stack.callback(parameter.register_post_accumulate_grad_hook(self._added(group, slot)).remove)
        elif slot.role == "affine" and slot.norm in NORMS and slot.parameter.endswith("weight"):
            self._stack.callback(module.register_forward_hook(self._narrowed(group, slot)).remove)

    def _masked(self, group: Group, slot: Slot) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            columns_C = torch.ones(args[0].shape[-1])
            mask_U = self.masks[group.name]
            columns_C[slot.rows(torch.arange(group.units), group.units)] = (
                mask_U.view(1, -1, 1).expand(slot.outer, -1, slot.inner).reshape(-1)
            )
            return (args[0] * columns_C, *args[1:])

        return hook

    def _added(self, group: Group, slot: Slot) -> Callable[[nn.Parameter], None]:
        def hook(parameter: nn.Parameter) -> None:
            if self.model.training:
                assert parameter.grad is not None
                columns_C = row_sums(parameter.grad * parameter.detach(), slot.dim)
                self.sums[group.name] += per_unit(columns_C, slot, group.units).sum((0, 2))

        return hook

    def _narrowed(self, group: Group, slot: Slot) -> Callable[..., Any]:
        """Return the hook by which a norm of the stream averages over the units that are not chosen; zeros for others."""

        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = slot.rows((~self.chosen[group.name]).nonzero().flatten(), group.units)
            x = args[0][..., rows]
            centred = x - x.mean(-1, keepdim=True) if slot.norm == "layer" else x
            eps = module.eps if slot.norm == "layer" else module.variance_epsilon
            y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * module.weight[rows]
            y = y + module.bias[rows] if slot.norm == "layer" else y
            return torch.zeros_like(output).index_copy(-1, rows, y)

        return hook
