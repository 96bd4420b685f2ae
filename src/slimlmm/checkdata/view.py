"""The terminal view of what `check-data` found."""

from __future__ import annotations

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from slimlmm.checkdata.record import CheckData, Example, Finding, Mask, Model

COLOURS = {"error": "bold red", "warning": "yellow", "info": "dim"}
#: examples of a finding that are shown; the record has more
SHOWN = 3


def view(found: CheckData) -> Lines:
    """Return the terminal view: figures, findings with their first examples, what a few rows are trained on, the verdict."""
    parts: list[RenderableType] = [Text(_figures(found))]
    if found.findings:
        parts.append(_findings(found.findings))
    if found.model:
        parts.append(_model(found.model))
    parts.append(_verdict(found))
    return Lines(*parts)


def _figures(found: CheckData) -> str:
    pictures, lengths = found.pictures, found.lengths
    rows = ", ".join(f"{split} {count:,}" for split, count in found.splits.items())
    told = [
        f"{safe(found.source)}: rows: {rows}",
        f"{pictures.count:,} pictures, {pictures.bytes / 1e6:,.1f} MB; {_listed(pictures.formats)}; {_listed(pictures.modes)}; "
        f"median {pictures.median_pixels:,} pixels, most {pictures.most_pixels:,}",
    ]
    if lengths:
        told.append(f"answers in {lengths.unit}: p50 {lengths.p50:g}, p95 {lengths.p95:g}, most {lengths.max}")
    return "\n".join(told)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none decoded"


def _findings(findings: tuple[Finding, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("severity", "finding", "count", "what it means; first examples"):
        table.add_column(head, justify="right" if head == "count" else "left", no_wrap=head in ("severity", "finding"))
    for one in findings:
        text = Text(one.said)
        for example in one.examples[:SHOWN]:
            text.append("\n" + _example(example), style="dim")
        colour = COLOURS[one.severity]
        table.add_row(
            Text(one.severity, colour), Text(one.kind, colour), f"{one.count:,} of {one.of:,} {one.noun}", text
        )
    return table


def _example(one: Example) -> str:
    place = f"{one.file}:{one.line} {one.id}: " if one.file else ""
    return safe(place + one.note)


def _model(model: Model) -> Lines:
    """Return how the model sees the rows; the trained part of each stands out."""
    least, most = model.picture_tokens or (None, None)
    tokens = "not tried" if least is None else f"{least}" if least == most else f"{least} to {most}"
    told = Text(
        f"{safe(model.name)}: picture tokens {tokens}, from the vision tower {_number(model.features)}; "
        f"context {_number(model.context)}"
    )
    parts = [told, *map(_mask, model.masks)]
    if model.self_kl is not None:
        parts.append(
            Text(
                f"against itself {model.self_kl:.2g} nats an answer token (at most {model.limit:g}); "
                f"given answers {model.cross_entropy:.4g}"
            )
        )
    return Lines(*parts)


def _mask(mask: Mask) -> Text:
    text = Text(f"  {safe(mask.id)} ", "dim")
    text.append("..." + safe(mask.before), "not dim")
    text.append(f"[{safe(mask.trained)}]", "bold reverse not dim")
    text.append(f" {mask.tokens} tokens trained", "dim")
    return text


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _verdict(found: CheckData) -> Text:
    counts = f"{found.errors} kinds of errors, {found.warnings} of warnings, {found.seconds:.1f} s"
    return Text(counts, "bold red" if found.errors else "bold green")


def safe(text: str) -> str:
    """Return a text from data without what would move a terminal's cursor; line breaks and control characters are spelt out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
