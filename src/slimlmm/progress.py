"""Progress that one can live with: live lines on a terminal, JSON lines anywhere else, nothing when quiet."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Reporter(Protocol):
    """What the pipeline tells while it works."""

    def say(self, text: str, **facts: Any) -> None:
        """Tell something that happened, once."""

    def step(self, what: str, done: float, total: float, **facts: Any) -> None:
        """Tell how far a longer piece of work is; `facts` are figures worth showing (loss, accuracy)."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Quiet:
    """Tell nothing."""

    def say(self, text: str, **facts: Any) -> None:
        """Ignore."""

    def step(self, what: str, done: float, total: float, **facts: Any) -> None:
        """Ignore."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None: ...


class Lines(Quiet):
    """One JSON object a line on standard error, at most one a `interval` seconds for the same piece of work."""

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.began = time.monotonic()
        self.last: dict[str, float] = {}

    def say(self, text: str, **facts: Any) -> None:
        """Write the event."""
        self._write({"event": text, **facts})

    def step(self, what: str, done: float, total: float, **facts: Any) -> None:
        """Write the state of the work, thinned out."""
        now = time.monotonic()
        if done < total and now - self.last.get(what, -self.interval) < self.interval:
            return
        self.last[what] = now
        self._write({"work": what, "done": done, "total": total, **facts})

    def _write(self, record: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.began, 1)
        rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in record.items()}
        print(json.dumps({"seconds": seconds, **rounded}), file=sys.stderr, flush=True)


class Live:
    """A bar for the work at hand, with its figures and the time left; events stay above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def say(self, text: str, **facts: Any) -> None:
        """Print the event above the bar."""
        self.console.print(f"{escape(text)}{'  ' if facts else ''}[dim]{_figures(facts)}[/dim]", highlight=False)

    def step(self, what: str, done: float, total: float, **facts: Any) -> None:
        """Move the bar of this work; a new piece of work replaces the last one."""
        if what not in self.tasks:
            for task in self.tasks.values():
                self.bar.remove_task(task)
            self.tasks = {what: self.bar.add_task(what, total=total, figures="")}
        self.bar.update(self.tasks[what], completed=done, total=total, figures=_figures(facts))

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _figures(facts: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )


def reporter(quiet: bool) -> Reporter:
    """Return the reporter for this terminal: none when quiet, live on a terminal, JSON lines otherwise."""
    if quiet:
        return Quiet()
    return Live() if sys.stderr.isatty() else Lines()
