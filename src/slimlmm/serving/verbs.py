"""The verbs `serve` and `calibrate`: options, and what they print. A gateway needs no torch, so nothing here loads it early."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from slimlmm import picture_options
from slimlmm.errors import UserError

SERVE = "Example: `slimlmm serve runs/mine/final --teacher TEACHER --shadow 0.05 --store answers.sqlite`"
CALIBRATE = "Example: `slimlmm calibrate STUDENT --teacher TEACHER --data DATA --share 0.1 --out escalation.json`"
Text = str | None
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Student = Annotated[Text, typer.Argument(help="Folder of the model, or URL of a server that has it.")]
Engines = Annotated[
    list[str] | None, typer.Option("--engine", help="URL of an OpenAI-compatible server of it; repeat for replicas.")
]
EngineModel = Annotated[Text, typer.Option("--engine-model", help="Name of the model on that server.")]
Teacher = Annotated[Text, typer.Option(help="Folder or URL of the teacher.")]
Shadow = Annotated[float | None, typer.Option(help="Share of answers that are compared with the teacher's.")]
Escalate = Annotated[Path | None, typer.Option(help="File of slimlmm calibrate: unsure answers are the teacher's.")]
Candidate = Annotated[Text, typer.Option(help="Folder or URL of another student.")]
Weight = Annotated[float | None, typer.Option(help="Share of requests that the candidate gets.")]
Where = Annotated[Text, typer.Option(help="File (SQLite) or URL of the database for answers and pairs.")]
Host = Annotated[Text, typer.Option(help="Address to listen on; default 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the bearer token that users must send.")
]
AdminTokenFile = Annotated[
    Path | None, typer.Option("--admin-token-file", help="File with the token for /admin/canary.")
]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings (docs/serving.md); options go over it.")]
Put = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the settings, such as limits.at_once=64; repeat.")
]


def serve(
    student: Student = None,
    engines: Engines = None,
    engine_model: EngineModel = None,
    teacher: Teacher = None,
    shadow: Shadow = None,
    escalate: Escalate = None,
    candidate: Candidate = None,
    weight: Weight = None,
    store: Where = None,
    host: Host = None,
    port: Port = None,
    token_file: TokenFile = None,
    admin_token_file: AdminTokenFile = None,
    config: Config = None,
    put: Put = None,
    quiet: Quiet = False,
) -> None:
    """Put a model behind OpenAI's chat completions: batches, limits, metrics; beside a teacher, and another student."""
    from slimlmm.progress import reporter

    options = {
        **pairs(put or [], "--set"),
        "student": {"urls": engines} if engines else student,
        "student.model": engine_model,
        "name": student if engines else None,
        "teacher": teacher,
        "shadow.share": shadow,
        "escalate": escalate,
        "candidate": candidate,
        "canary.weight": weight,
        "store.where": store,
        "host": host,
        "port": port,
    }
    told = {key: value for key, value in options.items() if value is not None}
    tokens = {
        "token": _token(token_file, "--token-file"),
        "admin_token": _token(admin_token_file, "--admin-token-file"),
    }
    try:
        from slimlmm.serving import serve as serving
        from slimlmm.serving import settings
    except ImportError as error:
        raise UserError(f"serving needs {error.name}, which is not installed: pip install 'slimlmm[serve]'.") from error
    with reporter(quiet) as tell:
        serving.serve(settings.read(config, told), tell, **tokens)


def pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Return key=value texts as a mapping, values read as YAML.

    Raises:
        UserError: a text has no ``=``.
    """
    if wrong := [text for text in texts if "=" not in text]:
        raise UserError(f"{option} {wrong[0]}: give key=value.")
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}


def _token(path: Path | None, option: str) -> str | None:
    token = path.read_text(encoding="utf-8").strip() if path else None
    if token == "":
        raise UserError(f"{option} {path}: holds no token.")
    return token


def calibrate(
    student: Annotated[str, typer.Argument(help="Folder of the student.")],
    teacher: Annotated[str, typer.Option(help="Folder of the teacher.")],
    source: Annotated[Path, typer.Option("--data", help="Rows; validation fits the threshold, test judges it.")],
    out: Annotated[Path, typer.Option(help="File to write for serve --escalate; a plot goes beside it.")],
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of requests that may go to the teacher.")
    ] = None,
    within: Annotated[
        float | None, typer.Option(help="Points that both may lose together against the teacher.")
    ] = None,
    kind: Annotated[Text, typer.Option(help="least, mean, sum or first; default: the best on these rows.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each split; default all.")] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    quiet: Quiet = False,
    json_out: Json = False,
) -> None:
    """Fit the confidence under which a served student's answers are left to the teacher."""
    from slimlmm.progress import reporter
    from slimlmm.serving import calibrate as calibrating

    wanted = calibrating.wanted(share, within, kind)
    with reporter(quiet or json_out) as tell:
        allowed = picture_options.allowed(pictures_from, max_picture_pixels)
        found = calibrating.calibrate(student, teacher, source, wanted, out, count=rows, tell=tell, allowed=allowed)
    if json_out:
        print(json.dumps(found, indent=1))
    else:
        Console().print(*calibrated(found, out), sep="\n")


def calibrated(found: Mapping[str, Any], out: Path) -> list[Any]:
    """Return what was fitted for the terminal."""
    from slimlmm.evaluate import Interval

    table = Table("rows", "n", "student", "teacher", "together", "to the teacher", "points below the teacher")
    for name, one in found["splits"].items():
        lost = one["lost"]
        accuracies = (f"{100 * one[key]:.1f} %" for key in ("student", "teacher", "together", "share"))
        interval = Interval.model_validate(lost).points()
        table.add_row(name, f"{one['rows']:,}", *accuracies, interval)
    escalation = found["escalation"]
    areas = ", ".join(f"{kind} {100 * value:.2f}" for kind, value in found["areas"].items())
    return [
        table,
        f"confidence {escalation['kind']}, threshold {escalation['threshold']:.4f} nats; areas under the curves: {areas}",
        f"written: {out}, {out.with_suffix('.png')}",
    ]
