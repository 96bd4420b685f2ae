"""What goes when blocks go: names that change, and rows that stand outside of the blocks but belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slimlmm.axes import Slot
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
