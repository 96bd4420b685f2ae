"""The terminal view of `slimlmm inspect`: 80 columns, parts as a tree, axes with what a step of each takes away."""

from __future__ import annotations

from typing import Any

from rich.console import Group as Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(value: float | None, billion: str = "G") -> str:
    """Return a number with three digits and a unit: 73.4 G (of parameters one says 73.4 B); "-" for None."""
    if value is None:
        return "-"
    for size, unit in ((size, billion if unit == "G" else unit) for size, unit in _UNITS):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:.0f}"


def view(found: dict[str, Any]) -> Lines:
    """Return what `inspect` found, to be read in 80 columns."""
    parts: list[Any] = [_title(found), "", _tree(found), "", _axes(found), *_notes(found)]
    if found["after"]:
        parts += ["", *_after(found)]
    lines = list(found["warnings"])
    if found["after"]:
        lines += [f"after the cut, {text}" for text in found["after"]["warnings"] if text not in lines]
    where = "served" if found["tensor_parallel"] == 1 else f"served on {found['tensor_parallel']} devices"
    if lines:
        parts += ["", Text(f"What may stand in the way when it is {where} (docs/deploy.md):", style="bold")]
        parts += [Padding(Text(f"- {line}"), (0, 0, 0, 2)) for line in lines]
    return Lines(*parts)


def _title(found: dict[str, Any]) -> Text:
    text = Text(f"{found['model']}\n", style="bold")
    text.append(
        f"{found['model_type']}, {found['dtype']}: {human(found['parameters'], 'B')} parameters, {human(found['bytes'])}B"
        + (f", {human(found['flops'])}FLOPs an answer" if found["flops"] is not None else ""),
        style="not bold",
    )
    answer = found["answer"]
    if answer["reason"]:
        text.append(f"\n{answer['reason']}", style="yellow not bold")
    else:
        told = (
            f"\nan answer: one prompt of {answer['prompt']} tokens ({answer['picture']}), {answer['tokens']} tokens out"
        )
        text.append(told, style="dim not bold")
    return text


def plain(*heads: str) -> Table:
    """Return an empty table without lines: names to the left, figures to the right, sizes on as many lines as they need."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        left = head in ("part", "axis", "sizes", "cut", "cost", "round")
        table.add_column(head, justify="left" if left else "right", no_wrap=head != "sizes", overflow="fold")
    return table


def _tree(found: dict[str, Any]) -> Table:
    table = plain("part", "parameters", "share", "bytes", "FLOPs", "share")
    whole = found["parameters"], found["flops"]

    def row(label: str, amount: dict[str, Any], style: str = "") -> None:
        shares = [_share(amount["parameters"], whole[0]), _share(amount["flops"], whole[1])]
        table.add_row(
            label,
            human(amount["parameters"], "B"),
            shares[0],
            human(amount["bytes"]),
            human(amount["flops"]),
            shares[1],
            style=style,
        )

    for tower in found["tree"]:
        row(tower["part"], tower, "bold")
        for index, part in enumerate(tower["parts"]):
            row(("└─ " if index == len(tower["parts"]) - 1 else "├─ ") + part["part"], part)
    row("total", found, "bold")
    return table


def _share(value: float | None, whole: float | None) -> str:
    return "-" if value is None or not whole else f"{100 * value / whole:.1f} %"


def _axes(found: dict[str, Any]) -> Table:
    table = plain("axis", "size", "sizes", "step", "parameters", "FLOPs", "at most", "cut")
    marks = _marks(found)
    for axis in found["axes"]:
        unit = axis["unit"] or {"size": None, "parameters": None, "flops": None}
        kind = "no" if axis["refusal"] else "exact" if axis["exact"] else "close"
        mark = marks.get(axis["refusal"] or axis["note"])
        table.add_row(
            axis["axis"],
            str(axis["size"]),
            _short(axis["allowed"]),
            "-" if unit["size"] is None else str(unit["size"]),
            human(unit["parameters"], "B"),
            human(unit["flops"]),
            "-" if axis["share"] is None else f"{100 * axis['share']:.1f} %",
            kind + (f" {mark}" if mark else ""),
            style="dim" if axis["refusal"] else "",
        )
    return table


def _short(allowed: str) -> str:
    return allowed.replace(" .. ", "..").replace(" by ", " /").replace(", ", " ")


def _marks(found: dict[str, Any]) -> dict[str, int]:
    reasons = dict.fromkeys(
        axis["refusal"] or axis["note"] for axis in found["axes"] if axis["refusal"] or axis["note"]
    )
    return {reason: number for number, reason in enumerate(reasons, 1)}


def _notes(found: dict[str, Any]) -> list[Any]:
    legend = "step: smallest cut, and what goes with it; at most: share of the parameters that go at the smallest size"
    notes = [Text(legend, style="dim")]
    return notes + [
        Padding(Text(f"{number} {reason}", style="dim"), (0, 0, 0, 2)) for reason, number in _marks(found).items()
    ]


def _after(found: dict[str, Any]) -> list[Any]:
    after = found["after"]
    sizes = ", ".join(f"{name}={size}" for name, size in after["sizes"].items())
    table = plain("part", "parameters", "fewer", "bytes", "FLOPs", "less")
    rows = {tower["part"]: tower for tower in after["tree"]}
    for tower in [*found["tree"], {"part": "total", **{key: found[key] for key in ("parameters", "bytes", "flops")}}]:
        left = after if tower["part"] == "total" else rows.get(tower["part"], {"parameters": 0, "bytes": 0, "flops": 0})
        table.add_row(
            tower["part"],
            human(left["parameters"], "B"),
            ratio(tower["parameters"], left["parameters"]),
            human(left["bytes"]),
            human(left["flops"]),
            ratio(tower["flops"], left["flops"]),
            style="bold" if tower["part"] == "total" else "",
        )
    return [Text(f"after {sizes}", style="bold"), table]


def ratio(before: float | None, after: float | None) -> str:
    """Return how many times less is left, "-" where it is not known."""
    return f"{before / after:.2f}x" if before and after else "-"
