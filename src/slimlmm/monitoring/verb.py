"""The verb `monitor`: options parsed, one record read and shown, or served as metrics until the process is told to stop."""

from __future__ import annotations

import importlib
import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from slimlmm.errors import UserError

if TYPE_CHECKING:
    import sqlalchemy

    from slimlmm.monitoring.monitor import Shown
    from slimlmm.monitoring.settings import Monitoring

EXAMPLE = "Example: `slimlmm monitor gateway.sqlite --page monitor.html`"
Where = Annotated[str, typer.Argument(metavar="STORE", help="File or URL that serve writes with --store.")]
Page = Annotated[Path | None, typer.Option("--page", help="HTML page to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Prometheus = Annotated[Path | None, typer.Option(help="Text file of metrics to write, for a textfile collector.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Serve metrics on this port until stopped.")]
Host = Annotated[str, typer.Option(help="Address that metrics are served on.")]
Refresh = Annotated[float, typer.Option(min=1, help="Seconds between two readings of the store for --metrics-port.")]
Audits = Annotated[
    Path | None, typer.Option(help="CSV or JSONL of answer_id, correct[, label, auditor] to import first.")
]
Since = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day that is shown (UTC).")]
Until = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day that is shown (UTC).")]
Days = Annotated[int | None, typer.Option(min=1, help="Show the last N days only.")]
Write = Annotated[bool, typer.Option("--write", help="Keep the reference and each new alarm in the store, as events.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML of settings: reference, margins, false alarms.")]


def monitor(
    store: Where,
    page: Page = None,
    json_out: Json = False,
    prometheus: Prometheus = None,
    metrics_port: Port = None,
    metrics_host: Host = "127.0.0.1",
    refresh: Refresh = 60.0,
    import_audits: Audits = None,
    since: Since = None,
    until: Until = None,
    days: Days = None,
    write: Write = False,
    config: Config = None,
) -> None:
    """Tell how served answers fare: agreement by day and task, drift, latency, errors, energy, and alarms that ring early."""
    from slimlmm.monitoring import settings

    judged = settings.read(config)
    module = _installed("monitor")
    database = module.database_of(store)
    if import_audits is not None:
        with module.asked(database) as connection:
            done = _installed("audits").load(import_audits, connection)
        Console(stderr=True).print(
            f"{import_audits}: {done.added} labels imported, {done.changed} changed", markup=False
        )
    shown = module.Shown(since.date() if since else None, until.date() if until else None, days)
    if metrics_port is not None:
        serve(database, judged, shown, host=metrics_host, port=metrics_port, refresh=refresh, write=write)
        return
    found = module.monitor(database, judged, shown, write=write)
    database.dispose()
    if prometheus is not None:
        _installed("metrics").write(found, time.time(), prometheus)
    if page is not None:
        _installed("page").write(found, page)
    if json_out:
        print(json.dumps(found.model_dump(mode="json"), indent=1))
    elif page is None and prometheus is None:
        Console().print(_installed("tables").terminal(found), highlight=False)
    else:
        told = ", ".join(str(path) for path in (page, prometheus) if path)
        Console().print(f"{told}: {_installed('tables').verdict(found)}", highlight=False, markup=False)


def serve(
    database: sqlalchemy.Engine,
    judged: Monitoring,
    shown: Shown,
    *,
    host: str,
    port: int,
    refresh: float,
    write: bool,
) -> None:
    """Serve metrics until interrupted; a store that cannot be read or is empty is told, and tried again.

    Raises:
        UserError: the port is taken.
    """
    from prometheus_client import start_http_server

    module, metrics = _installed("monitor"), _installed("metrics")
    gauges = metrics.Gauges()
    try:
        server, _ = start_http_server(port, host, metrics.registry_of(gauges))
    except OSError as error:
        raise UserError(f"--metrics-port {port}: {error.strerror}.") from error
    console = Console(stderr=True)
    console.print(f"metrics on http://{host}:{port}/metrics", highlight=False)
    try:
        while True:
            try:
                gauges.found = module.monitor(database, judged, shown, write=write)
                gauges.refreshed = time.time()
            except UserError as error:
                console.print(str(error), style="red", markup=False, highlight=False)
            time.sleep(refresh)
    finally:
        server.shutdown()
        server.server_close()


def _installed(name: str) -> Any:
    """Return a module of this package.

    Raises:
        UserError: what it needs is not installed.
    """
    try:
        return importlib.import_module(f"slimlmm.monitoring.{name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the monitor needs {error.name}, which is not installed: pip install 'slimlmm[serve]'."
        ) from error
