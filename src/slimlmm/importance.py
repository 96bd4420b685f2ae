"""How much each unit matters: criteria behind one interface.

A criterion declares what it needs (nothing, weights, activations or a loss) and returns one score per unit
of every group; higher means keep. A *loss* is any callable ``(model, batch) -> scalar``: cross-entropy,
distillation or their sum.

Shape legend: B sequences, T tokens, U units of a group.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm import elimination
from slimlmm.axes import Anatomy, Group, Slot
from slimlmm.blocks import hidden_of, layers_of
from slimlmm.collate import Batch, Samples, fitting, real_tokens
from slimlmm.consumers import columns_of, heard, in_parts, linear_alone, linear_consumers
from slimlmm.errors import NO_NUMBERS, UserError, nearest
from slimlmm.forward import evaluating, forward
from slimlmm.moments import Moments
from slimlmm.norms import kind_of
from slimlmm.resuming import Memory
from slimlmm.wiring import owner

#: (model, batch) -> scalar to be minimised; it runs the model itself, so that any distillation loss plugs in
Loss = Callable[[PreTrainedModel, Batch], Tensor]
Scores = dict[str, Tensor]
#: elements of a tensor that are squared at once
SQUARED_AT_ONCE = 1 << 24
#: units that the criterion `ablation` measures on all of its batches, and the most that it measures at all
ABLATED_ON_ALL = 256
MOST_ABLATED = 4096
Needs = Literal["nothing", "weights", "activations", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a criterion gets: the model, the groups to score, and the means that its `needs` call for.

    Criteria that need no more than weights look at `weights`, by parameter name; the model may then be on the meta device.
    """

    model: PreTrainedModel
    weights: Mapping[str, Tensor]
    anatomy: Anatomy
    groups: tuple[Group, ...]
    batches: Iterable[Batch]
    loss: Loss | None
    seed: int
    moments: Mapping[str, Moments]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A way to score units: what it needs, and the function that measures."""

    needs: Needs
    measure: Callable[[Task], Scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one parameter holds of one group: the rows of a slot, or all of it for unit `block`."""

    group: Group
    slot: Slot | None = None
    block: int = 0

    @property
    def dim(self) -> int | None:
        """Dimension of the parameter whose rows count, None where all of it does."""
        return self.slot.dim if self.slot else None

    def owned(self, sums: Tensor) -> Tensor:
        """Return what each unit owns of the sums along `dim` (`row_sums`); [U]."""
        if self.slot is None:
            totals = sums.new_zeros(self.group.units)
            totals[self.block] = sums
            return totals
        return per_unit(sums, self.slot, self.group.units).sum((0, 2))


def row_sums(values: Tensor, dim: int | None) -> Tensor:
    """Sum `values` over all dimensions but `dim` (over all, if None), in at least fp32."""
    others = [d for d in range(values.dim()) if dim is None or d != dim % values.dim()]
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.sum(others, dtype=dtype) if others else values.to(dtype)


def square_sums(values: Tensor, dim: int | None) -> Tensor:
    """Return `row_sums` of the squares in fp32, some rows at a time: the largest tensors are gigabytes."""
    values = values.reshape(-1) if dim is None else values
    along = 0 if dim is None else dim
    step = max(1, SQUARED_AT_ONCE * values.shape[along] // max(1, values.numel()))
    parts = [row_sums(rows.to(torch.float32, copy=True).square_(), dim) for rows in values.split(step, along)]
    return torch.stack(parts).sum(0) if dim is None else torch.cat(parts)


def per_unit(values: Tensor, slot: Slot, units: int) -> Tensor:
    """View the last dimension of `values` as [..., outer, U, inner]: the rows that units own in `slot`."""
    owned = values.narrow(-1, slot.offset, slot.outer * units * slot.inner)
    return owned.reshape(*values.shape[:-1], slot.outer, units, slot.inner)


def score(
    model: PreTrainedModel,
    anatomy: Anatomy,
    axes: Sequence[str],
    criterion: str,
    batches: Iterable[Batch] = (),
    loss: Loss | None = None,
    *,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Scores:
    """Return one score per unit, group name -> [U] fp64 on the CPU, for each group of `axes`; higher: keep.

    `batches` are passed once; `loss` must be given where the criterion needs one. `weights`: parameters by name, where
    they are not the model's own (read one at a time from files); a criterion that needs more refuses them. `moments`: of what
    enters the layers of some weights, where they are known, for `obs`. The model runs in
    eval mode and comes back as it was (weights, flags, mode); gradients that it holds are dropped by
    `taylor`.
    """
    needs = needs_of(criterion)
    if needs == "loss" and loss is None:
        raise UserError(f"the criterion {criterion!r} needs a loss; activation, magnitude and random do not.")
    if weights is not None and needs not in ("nothing", "weights"):
        raise UserError(f"the criterion {criterion!r} runs the model, so it must be in memory.")
    groups = tuple(group for name in axes for group in anatomy.axis(name).groups)
    weights = weights if weights is not None else dict(model.named_parameters(remove_duplicate=False))
    task = Task(
        model=model,
        weights=weights,
        anatomy=anatomy,
        groups=groups,
        batches=batches,
        loss=loss,
        seed=seed,
        moments=moments or {},
    )
    with evaluating(model):
        found = CRITERIA[criterion].measure(task)
    scores = {name: values.detach().to("cpu", torch.float64) for name, values in found.items()}
    if wrong := [name for name, values in scores.items() if not bool(values.isfinite().all())]:
        raise UserError(
            f"{criterion}: {len(wrong)} of {len(scores)} groups have scores that are no numbers, {wrong[0]} first: {NO_NUMBERS}"
        )
    return scores


def needs_of(criterion: str) -> Needs:
    """Return what a criterion needs, or a UserError that names the nearest one."""
    if criterion not in CRITERIA:
        raise UserError(f"unknown criterion {criterion!r}. {nearest(criterion, list(CRITERIA))}")
    return CRITERIA[criterion].needs


def normalise(scores: Scores, anatomy: Anatomy, per: Literal["block", "modality"] = "block") -> Scores:
    """Scale scores so that they can be compared across groups: a mean size of 1 in every group, or in every tower.

    ``block`` divides each group by its own mean size (all groups weigh the same, as uniform sizes want it);
    ``modality`` divides by that over the whole tower (the part of the axis name before the dot) and keeps
    differences between its layers. Scores of two towers or two axes are on different scales and compare only
    after this. Source: UKMP (AAAI 2025).
    """

    def family(name: str) -> str:
        return name if per == "block" else anatomy.group(name).axis.partition(".")[0]

    pools: dict[str, list[Tensor]] = {}
    for name, values in scores.items():
        pools.setdefault(family(name), []).append(values)
    tiny = torch.finfo(torch.float64).tiny
    means = {key: torch.cat(pool).abs().mean().clamp(min=tiny) for key, pool in pools.items()}
    return {name: values / means[family(name)] for name, values in scores.items()}


def taylor(task: Task) -> Scores:
    """Score by first-order Taylor: |sum over batches and over all that the unit owns of gradient x weight|.

    The signed sum is the derivative of the summed loss with respect to a gate at 1 on everything the unit
    owns, so its magnitude is the first-order change in loss if the unit goes. Signs are kept until the end,
    over batches and over slots (for the residual width: over every layer), as in the paper's code. Each
    gradient is reduced when it arrives and freed at once: never more than one is alive, and no optimizer
    state is needed. Source: arXiv 2312.05795, section 3 (AntGMM); Molchanov et al. 2019 (arXiv 1906.10771),
    eq. 8 without the square.
    """
    totals, named = _zeros(task), dict(task.model.named_parameters(remove_duplicate=False))
    by_name = _shares(task)
    shares = {named[name]: found for name, found in by_name.items()}
    less_one = {named[name] for name in _less_one(task, by_name)}

    def reduce(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        product = gradient.mul_(parameter.detach() + 1 if parameter in less_one else parameter.detach())
        sums = {dim: row_sums(product, dim) for dim in {share.dim for share in shares[parameter]}}
        for share in shares[parameter]:
            totals[share.group.name] += share.owned(sums[share.dim]).to("cpu", torch.float64)

    loss = task.loss
    assert loss is not None
    with only_gradients_of(task.model, list(shares)), ExitStack() as stack, torch.enable_grad():
        for parameter in shares:
            handle = parameter.register_post_accumulate_grad_hook(reduce)
            stack.callback(handle.remove)
        for batch in at_least_one(task.batches, "taylor"):
            loss(task.model, batch).backward()
    return {name: total.abs() for name, total in totals.items()}


def magnitude(task: Task) -> Scores:
    """Score by weight: the L2 norm of everything the unit owns, sqrt(sum w^2). Needs no data."""
    totals, by_name = _zeros(task), _shares(task)
    less_one = _less_one(task, by_name)
    for name, shares in by_name.items():
        weights = task.weights[name].detach()
        weights = weights + 1 if name in less_one else weights
        sums = {dim: square_sums(weights, dim) for dim in {share.dim for share in shares}}
        for share in shares:
            totals[share.group.name] += share.owned(sums[share.dim]).to("cpu", torch.float64)
    return {name: total.sqrt() for name, total in totals.items()}


def random(task: Task) -> Scores:
    """Score at random, uniform in [0, 1), the control arm; same seed and group name, same scores."""
    found: Scores = {}
    for group in task.groups:
        rng = torch.Generator().manual_seed(zlib.crc32(f"{task.seed}:{group.name}".encode()))
        found[group.name] = torch.rand(group.units, generator=rng, dtype=torch.float64)
    return found


def activation(task: Task) -> Scores:
    """Score by activation: over consumers, sum of L2-over-sequences(mean-over-tokens |its input|).

    A unit of several elements (a head) counts with their L2 norm. Tokens masked out by ``attention_mask`` do
    not count in the text tower. Whole blocks: 1 - cos(input, output), averaged over tokens. Source: Minitron
    (arXiv 2407.14679), section 2.2; ShortGPT (arXiv 2403.03853) for blocks.
    """
    squares = _zeros(task)
    modules = dict(task.model.named_modules())
    mask: list[Tensor | None] = [None]
    partial: dict[tuple[str, Slot], Tensor] = {}
    tokens = _zeros(task)

    def consumer(group: Group, slot: Slot) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            size_U = per_unit(inputs[0].detach().float(), slot, group.units).square().sum((-3, -1)).sqrt()
            text = group.axis.startswith("text.")
            found = _sequence_means(size_U, mask[0] if text else None).square().sum(0).to("cpu", torch.float64)
            partial[group.name, slot] = partial.get((group.name, slot), torch.zeros(())) + found

        return hook

    def block(group: Group, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = hidden_of(args, kwargs), output[0] if isinstance(output, tuple) else output
            change = 1 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            weight = fitting(mask[0], before) if group.axis.startswith("text.") else None
            weight = torch.ones_like(change) if weight is None else weight.to(change)
            squares[group.name][index] += float((change * weight).sum())
            tokens[group.name][index] += float(weight.sum())

        return hook

    with ExitStack() as stack, torch.no_grad():
        for group in task.groups:
            blocks = layers_of(task.model, task.anatomy.axis(group.axis))
            for index, layers in enumerate(blocks):
                for layer in layers:
                    handle = layer.register_forward_hook(block(group, index), with_kwargs=True)
                    stack.callback(handle.remove)
            for slot in () if blocks else _linear_consumers(modules, group, "activation"):
                module = modules[slot.parameter.removesuffix(".weight")]
                stack.callback(module.register_forward_pre_hook(consumer(group, slot)).remove)
        for batch in at_least_one(task.batches, "activation"):
            mask[0] = real_tokens(batch)
            forward(task.model, batch)
    for (name, _slot), found in partial.items():
        squares[name] += found.sqrt()
    return {name: found / tokens[name].clamp(min=1) for name, found in squares.items()}


def ablation(task: Task) -> Scores:
    """Score by ablation: how much the mean loss grows when nothing reads this unit alone; one pass over the batches per unit.

    Of more than `ABLATED_ON_ALL` units the passes are shorter in proportion, over the first batches, one at least. The right
    measure where units are few and dear (key/value groups): taking one away is no small change, so that the first order
    misleads (docs/lab-notes.md).
    """
    other = [g.name for g in task.groups if task.anatomy.axis(g.axis).kind != "inner" or g.masked_role != "consume"]
    if other:
        raise UserError(f"the criterion 'ablation' measures what some matrix reads, not {other[0]}. Use taylor.")
    units = sum(group.units for group in task.groups)
    if units > MOST_ABLATED:
        raise UserError(
            f"the criterion 'ablation' runs the model once per unit, and there are {units}; up to {MOST_ABLATED} it may. "
            "Use taylor."
        )
    assert task.loss is not None
    batches = list(at_least_one(task.batches, "ablation"))
    batches = batches[: max(1, len(batches) * ABLATED_ON_ALL // max(units, ABLATED_ON_ALL))]
    named, totals = dict(task.model.named_parameters(remove_duplicate=False)), _zeros(task)
    memory = Memory.of(task.model, task.anatomy, batches)
    with memory.resumed(task.model, memory.last):
        uncut = mean_loss(task.model, batches, task.loss)
    for group in task.groups:
        first = memory.before(slot.parameter for slot in group.slots if slot.role == "consume")
        for unit in range(group.units):
            with _unread(named, group, unit), memory.resumed(task.model, first):
                totals[group.name][unit] = mean_loss(task.model, batches, task.loss) - uncut
    return totals


@contextmanager
def _unread(named: dict[str, nn.Parameter], group: Group, unit: int) -> Iterator[None]:
    """Within the block the consumers of a group read nothing of one unit."""
    before = []
    with torch.no_grad():
        for slot in (slot for slot in group.slots if slot.role == "consume"):
            parameter = named[slot.parameter]
            rows = slot.rows(torch.tensor([unit]), group.units).to(parameter.device)
            before.append((parameter, slot.dim, rows, parameter.index_select(slot.dim, rows)))
            parameter.index_fill_(slot.dim, rows, 0)
        try:
            yield
        finally:
            for parameter, dim, rows, values in before:
                parameter.index_copy_(dim, rows, values)


def obs(task: Task) -> Scores:
    """Score by structured Optimal Brain Surgeon: how long a unit stays when those that a refit can best do without go first.

    See `elimination.order`. Needs no gradients, but the second moments of what enters the layers that read the units, some groups
    at a time (`consumers.PART_BYTES`): one pass over the batches each, but where they are known.
    """
    modules, found = dict(task.model.named_modules()), _zeros(task)
    batches = list(at_least_one(task.batches, "obs"))
    groups = {group.name: group for group in task.groups}
    for axis in dict.fromkeys(group.axis for group in task.groups):
        for part in in_parts(task.model, task.anatomy.axis(axis)):
            slots = {name: _neurons(modules, groups[name], task.anatomy) for name in part if name in groups}
            read = {slot.parameter for some in slots.values() for slot in some}
            moments = {name: task.moments[name] for name in read & set(task.moments)}
            if read - set(moments):
                moments |= heard(task.model, sorted(read - set(moments)), batches, text=axis.startswith("text."))
            for name, some in slots.items():
                readers = [_reader(modules, slot, groups[name].units, moments[slot.parameter]) for slot in some]
                found[name] = elimination.order(readers)
    return found


def _neurons(modules: dict[str, nn.Module], group: Group, anatomy: Anatomy) -> list[Slot]:
    """Return where linear layers read the units of an inner group; refuse what is read otherwise, and a width."""
    if anatomy.axis(group.axis).kind != "inner" or not linear_alone(modules, group):
        raise UserError(f"the criterion 'obs' measures what linear layers alone read, not {group.name}. Use taylor.")
    return list(linear_consumers(modules, group))


def _reader(modules: dict[str, nn.Module], slot: Slot, units: int, moments: Moments) -> elimination.Reader:
    """Return a layer that reads units, with what enters it: less the mean where a bias takes that."""
    linear = modules[owner(slot.parameter)]
    weight = linear.get_parameter("weight")
    gram = moments.gram(centred=linear.bias is not None)
    return elimination.Reader(weight=weight, gram=gram, columns=columns_of(slot, units))


#: name -> criterion; the recipe's `criterion` is one of these
CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(needs="activations", measure=obs),
    "taylor": Criterion(needs="loss", measure=taylor),
    "ablation": Criterion(needs="loss", measure=ablation),
    "activation": Criterion(needs="activations", measure=activation),
    "magnitude": Criterion(needs="weights", measure=magnitude),
    "random": Criterion(needs="nothing", measure=random),
}


def mean_loss(model: PreTrainedModel, batches: Iterable[Batch], loss: Loss) -> float:
    """Return the mean of `loss` over batches, without gradients; infinity where it is no number: that is never the least."""
    with torch.no_grad():
        values = [float(loss(model, batch)) for batch in at_least_one(batches, "measuring the loss")]
    mean = sum(values) / len(values)
    return float("inf") if math.isnan(mean) else mean


@contextmanager
def only_gradients_of(model: PreTrainedModel, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within the block only `parameters` require gradients; afterwards flags are restored, gradients gone."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in parameters}
    for parameter, _ in before:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)


def _linear_consumers(modules: dict[str, nn.Module], group: Group, criterion: str) -> Iterator[Slot]:
    """Yield the consume slots of the group that are the input columns of an nn.Linear; refuse where there are none."""
    found = list(linear_consumers(modules, group))
    if group.slots and not found:
        raise UserError(
            f"{group.name}: no linear layer reads it, so the criterion {criterion!r} has nothing to look at. Use taylor."
        )
    yield from found


def _zeros(task: Task) -> Scores:
    return {group.name: torch.zeros(group.units, dtype=torch.float64) for group in task.groups}


def _shares(task: Task) -> dict[str, list[Share]]:
    """Return the shares of every parameter that holds some of the groups; a tied parameter counts once, by its first name."""
    named = dict(task.model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    shares: dict[str, list[Share]] = {}
    for group in task.groups:
        prefix = task.anatomy.axis(group.axis).layers
        wanted: list[tuple[str, Share]] = [
            (slot.parameter, Share(group=group, slot=slot)) for slot in group.slots if slot.parameter in named
        ]
        for name in named if prefix else ():
            if name.startswith(f"{prefix}."):
                index = int(name.removeprefix(f"{prefix}.").partition(".")[0])
                wanted.append((name, Share(group=group, block=index // group.stride)))
        seen = set()
        for name, share in wanted:
            slot = share.slot
            place = (slot.dim, slot.offset, slot.outer, slot.inner) if slot else share.block
            if name in named and (id(named[name]), place) not in seen:  # a buffer holds no weight to score
                seen.add((id(named[name]), place))
                shares.setdefault(first[id(named[name])], []).append(share)
    return shares


def _less_one(task: Task, shares: Mapping[str, list[Share]]) -> frozenset[str]:
    """Return the parameters that hold the factor of a norm less one (Gemma's): a unit that goes takes the whole factor along."""
    affine = {name for name, found in shares.items() if any(one.slot and one.slot.role == "affine" for one in found)}
    owners = {name: task.model.get_submodule(name.rpartition(".")[0]) for name in affine if name.endswith(".weight")}
    return frozenset(name for name, module in owners.items() if kind_of(module) == "rms1")


def _sequence_means(size_BTU: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the mean over the tokens of each sequence, [B, U]; [T, U] (packed pictures) is one, unless the mask has as many."""
    size_BTU, *_ = Samples(mask_BT).of(size_BTU)
    if size_BTU.dim() == 2:
        size_BTU = size_BTU[None]
    size_BTU = size_BTU.flatten(1, -2)
    if mask_BT is None or mask_BT.shape != size_BTU.shape[:2]:
        return size_BTU.mean(1)
    weight = mask_BT.to(size_BTU)[..., None]
    return (size_BTU * weight).sum(1) / weight.sum(1).clamp(min=1)


def at_least_one(batches: Iterable[Batch], purpose: str) -> Iterator[Batch]:
    """Yield the batches; refuse an empty calibration set."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise UserError(f"{purpose} needs calibration rows; the data gave none.")
