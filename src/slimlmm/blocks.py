"""What goes when blocks go: names that change, rows that stand outside of the blocks but belong to them; and blocks left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Axis, Slot
from slimlmm.probing import edited, skeleton
from slimlmm.slots import RefusedError
from slimlmm.views import View, block_changes


def renamed(layers: str, kept: Sequence[int], names: Iterable[str]) -> dict[str, str]:
    """Map names to their new ones when only the blocks `kept` of the list `layers` stay; names of the others are left out."""
    place = {str(old): str(new) for new, old in enumerate(kept)}
    prefix, found = f"{layers}.", {}
    for name in names:
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = name
        elif layer in place:
            found[name] = f"{prefix}{place[layer]}.{rest}"
    return found


def rows_of_blocks(view: View, layers: str, kept: Sequence[int], units: int) -> tuple[Slot, ...]:
    """Return what has rows for each block outside of the blocks, by building the configuration of `kept` alone.

    Raises RefusedError where that model is not the old one without the other blocks.
    """
    whole, fewer = view.whole.shapes, skeleton(edited(view.config, block_changes(view, list(kept)))).shapes
    names = renamed(layers, kept, whole)
    if set(names.values()) != set(fewer):
        raise RefusedError(f"fewer blocks do not remove exactly those of {layers}")
    slots = []
    for old, new in names.items():
        for dim, (a, b) in enumerate(zip(whole[old], fewer[new], strict=True)):
            if a == b:
                continue
            if old.startswith(f"{layers}.") or a % view.blocks or b != a // view.blocks * len(kept):
                raise RefusedError(f"{old} dim {dim} goes from {a} to {b} with {len(kept)} of {view.blocks} blocks")
            slots.append(Slot(parameter=old, dim=dim, role="produce", inner=a // units))
    return tuple(slots)


def layers_of(model: PreTrainedModel, axis: Axis) -> list[list[nn.Module]]:
    """Return the layers that make up each unit of a block axis, and none for any other axis."""
    if not axis.layers:
        return []
    stride = axis.groups[0].stride
    layers = list(model.get_submodule(axis.layers).children())
    return [layers[start : start + stride] for start in range(0, len(layers), stride)]


@contextmanager
def skipped(layers: Iterable[nn.Module], *, alone: bool = False) -> Iterator[None]:
    """Within the block these layers hand their input on unchanged (as tensor or tuple, as they would).

    They run nevertheless, as others may read what they leave behind (keys of a later block), unless they stand `alone`: then
    one that gives a tensor runs once, to show it.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in layers:
            if alone:
                stack.enter_context(forward_of(layer, _HandingOn(layer.forward)))
            handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


@dataclass(slots=True)
class _HandingOn:
    """The forward of a layer that is left out: it runs until it has shown that it gives a tensor, then its input is enough."""

    runs: Callable[..., Any]
    plain: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plain:
            return hidden_of(args, kwargs)
        output = self.runs(*args, **kwargs)
        self.plain = isinstance(output, Tensor)
        return output


@contextmanager
def forward_of(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block `forward` is that of the layer."""
    own = layer.__dict__.get("forward")
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if own is not None:
            layer.__dict__["forward"] = own


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a layer was called with, first or by name."""
    hidden: Tensor = (
        args[0] if args else next(kwargs[key] for key in ("hidden_states", "hidden_state") if key in kwargs)
    )
    return hidden
