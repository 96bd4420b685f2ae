"""The terminal view of how sizes were chosen: loss curves by axis, shapes that a search tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from slimlmm.tree import human, plain

CURVES = (
    "Loss above the uncut model (nats per answer token) with one axis alone cut to a size and repaired, on train rows; in "
    "brackets what was reckoned with where that is more (convex in ln(size)). Losses of axes are added up; what two cuts do to "
    "each other is not in it."
)
#: median error of the line from which on it is shown as a warning
POOR = 0.1
TRIED = "Each shape was cut at once and briefly recovered; the one of least cross-entropy on validation rows is taken."


def choice_lines(choice: Mapping[str, Any]) -> list[Any]:
    """Return the tables of a choice (`choosing.Choice.record`); none for one by shares."""
    lines: list[Any] = []
    if choice["curves"]:
        table = plain("axis", "size: loss")
        for one in choice["curves"]:
            points = zip(one["sizes"], one["measured"], one["losses"], strict=True)
            table.add_row(one["axis"], Text(", ".join(_point(*point) for point in points), justify="left"))
        lines += ["", table, Text(f"{CURVES} Predicted for the chosen sizes: {choice['predicted']:.3f}.", style="dim")]
    if (error := choice["line_error"]) is not None:
        told = f"Between measured shapes the cost was reckoned by a line that is {100 * error:.0f} % off in the median."
        lines.append(Text(told, style="dim" if error < POOR else "yellow"))
    if choice["candidates"]:
        table = plain("shape", "parameters", "predicted", "loss", "exact")
        for number, one in enumerate(choice["candidates"]):
            about = Text(f"{one['name']}\n{grouped(one['sizes'])}")
            figures = [human(one["parameters"], "B"), f"{one['predicted']:.3f}", f"{one['loss']:.3f}"]
            table.add_row(about, *figures, f"{100 * one['accuracy']:.1f} %", style="" if number else "bold")
        best = choice["candidates"][0]
        lines += [
            "",
            table,
            Text(f"{TRIED} {best['row_visits']:,} row visits, {best['n']} validation rows.", style="dim"),
        ]
    return lines


def _point(size: int, measured: float, loss: float) -> str:
    more = f" ({loss:.3f})" if loss > measured + 5e-4 else ""
    return f"{size}: {measured:.3f}{more}"


def grouped(sizes: Mapping[str, int]) -> str:
    """Say sizes by tower: "text blocks=2 ffn=512; vision width=64"."""
    towers: dict[str, list[str]] = {}
    for name, size in sizes.items():
        tower, _, noun = name.rpartition(".")
        towers.setdefault(tower, []).append(f"{noun}={size}")
    return "; ".join(" ".join([tower, *words]).strip() for tower, words in towers.items())
