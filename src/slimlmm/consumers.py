"""The linear layers that read the units of an axis, and the moments of what enters them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Axis, Group, Slot
from slimlmm.collate import Batch, Samples, samples_of
from slimlmm.forward import forward
from slimlmm.moments import Moments, products_of
from slimlmm.wiring import owner

#: most bytes of moments of consumers of one pass; those of a 7 B model's FFNs would take 58 GiB
PART_BYTES = 8 << 30


def is_stream(group: Group, axis: Axis) -> bool:
    """Tell whether the group is the residual stream of a width axis."""
    return axis.kind == "width" and group.name == axis.name


def linear_consumers(modules: dict[str, nn.Module], group: Group) -> Iterator[Slot]:
    """Yield the slots of the group that are input columns of an nn.Linear, once per parameter."""
    for slot in group.slots:
        if slot.role == "consume" and isinstance(modules.get(owner(slot.parameter)), nn.Linear):
            yield slot


def linear_alone(modules: dict[str, nn.Module], group: Group) -> bool:
    """Tell whether linear layers read the units of the group, and nothing else does."""
    consumers = [slot for slot in group.slots if slot.role == "consume"]
    return bool(consumers) and len(consumers) == len(list(linear_consumers(modules, group)))


def in_parts(model: PreTrainedModel, axis: Axis) -> list[set[str]]:
    """Return the groups of an axis in parts whose moments are held at once, `PART_BYTES` each; a residual stream is in the first.

    Groups that share a consumer, the heads of an attention output, stay together.
    """
    modules = dict(model.named_modules())
    parts: list[set[str]] = [set()]
    at: dict[str, int] = {}
    taken = 0
    for group in axis.groups:
        slots = [] if is_stream(group, axis) else list(linear_consumers(modules, group))
        sizes = {slot.parameter: 16 * model.get_parameter(slot.parameter).shape[1] ** 2 for slot in slots}
        known = [at[name] for name in sizes if name in at]
        need = sum(size for name, size in sizes.items() if name not in at)
        if not known and taken and taken + need > PART_BYTES:
            parts.append(set())
            taken = 0
        part = known[0] if known else len(parts) - 1
        at |= dict.fromkeys(sizes, part)
        taken += need
        parts[part].add(group.name)
    return parts


class Ears:
    """Hooks that feed moments with inputs of modules, until `stack` closes; `samples` are the batch's."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.samples = Samples()

    def attach(
        self, module: nn.Module, moments: Moments, view: Callable[[Tensor], Tensor] = lambda values: values
    ) -> None:
        """Let inputs of `module`, as `view` shows them, count; a later use on pooled vectors does not."""
        ranks: set[int] = set()

        def hear(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].detach()
            ranks.add(values.dim())
            if values.dim() == max(ranks):
                values, weight, first = self.samples.of(values)
                moments.add(view(values), weight, first)

        self.stack.callback(module.register_forward_pre_hook(hear).remove)

    def beside(self, module: nn.Module) -> Moments:
        """Return moments of the size of what a linear layer reads, which its inputs feed."""
        weight = module.get_parameter("weight")
        moments = Moments(weight.shape[1], weight.device, products_of(weight))
        self.attach(module, moments)
        return moments


def columns_of(slot: Slot, units: int) -> Tensor:
    """Return the input columns of a consumer that each unit owns; [U, C]."""
    return torch.stack([slot.rows(torch.tensor([unit]), units) for unit in range(units)])


@torch.no_grad()
def heard(
    model: PreTrainedModel, parameters: Iterable[str], batches: Sequence[Batch], *, text: bool
) -> dict[str, Moments]:
    """Run the batches; return the moments of what enters the layers of these weights, padding of the `text` tower aside."""
    found: dict[str, Moments] = {}
    with ExitStack() as stack:
        ears = Ears(stack)
        for parameter in dict.fromkeys(parameters):
            found[parameter] = ears.beside(model.get_submodule(owner(parameter)))
        for batch in batches:
            ears.samples = samples_of(batch, text=text)
            forward(model, batch)
    return found
