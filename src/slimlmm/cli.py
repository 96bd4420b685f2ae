"""The command line: each verb parses, calls one function, prints; ``--json`` wherever something is reported."""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from slimlmm import checkdata_verb, energy_verb, export_verb, launchers, picture_options, verify_verb
from slimlmm.errors import UserError
from slimlmm.leaving import LeftError, heeding
from slimlmm.monitoring import verb as monitor_verb
from slimlmm.serving import verbs

#: what a wrong option raises: Click's, of which newer typers have a copy of their own
USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune and distill a vision-language model into a plain Hugging Face checkpoint 10-40x smaller, with the proof.",
)

Model = Annotated[str, typer.Argument(help="Local folder or hub id of the model.")]
Data = Annotated[Path, typer.Option("--data", help="Folder or file of rows: image, question, answer[, task].")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code from the hub. Off: stock classes only.")
]
Devices = Annotated[
    int,
    typer.Option("--tensor-parallel", min=1, max=1024, help="Devices that one model is split over when it is served."),
]
Minutes = Annotated[
    float,
    typer.Option("--save-minutes", min=0, help="Minutes between two times that a training writes its state to disk."),
]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="YAML recipe.")]


def main() -> None:
    """Run the command line; bad input gives one message and exit code 2, Ctrl-C and SIGTERM 128 and the signal's number."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        launchers.refuse()
        code = app(standalone_mode=False)
    except UserError as error:
        _stop(str(error), 2)
    except LeftError as error:
        _stop(f"{error}.", error.code)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted; the same command again resumes at the last finished round.", 130)
    except (OSError, SafetensorError) as error:
        _stop(f"{_reason(error)}. What was finished is kept; the same command again goes on from there.", 2)
    except USAGE as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _reason(error: OSError | SafetensorError) -> str:
    """Say which file could not be read or written, and why; an error that names neither is a bug and keeps its traceback."""
    if isinstance(error, SafetensorError):
        return str(error)
    if error.strerror is None:
        raise error
    return f"{error.filename or 'a file could not be read or written'}: {error.strerror}"


def _stop(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True).print(
        f"[red]slimlmm:[/red] {message.replace('[', chr(92) + '[')}", highlight=False
    )
    sys.exit(code)


def _report(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(value, indent=1, default=str))
    else:
        show()


@app.command(epilog="Example: `slimlmm inspect path/to/model --set text.ffn=1024 --set vision.blocks=12`")
def inspect(
    model: Model,
    sizes: Annotated[
        list[str] | None, typer.Option("--set", help="axis=size: say what the model would count at these sizes.")
    ] = None,
    tensor_parallel: Devices = 1,
    answer_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Generated tokens that FLOPs are told for.")] = 8,
    picture: Annotated[
        int, typer.Option(min=16, max=4096, help="Pixels per side where pictures may have any size.")
    ] = 448,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show the parts and axes of a model from its config alone: parameters, bytes, FLOPs, legal sizes, what cannot be cut."""
    gc.disable()  # a short process that builds thousands of small objects: collecting takes a third of its time
    from slimlmm import inspection, tree

    found = inspection.inspect(
        model,
        sizes or (),
        tensor_parallel=tensor_parallel,
        tokens=answer_tokens,
        picture=picture,
        trust_remote_code=trust_remote_code,
    )
    _report(found, json_out, lambda: Console().print(tree.view(found), highlight=False))


@app.command(
    epilog="Example: `slimlmm cut MODEL --set text.ffn=128 --set vision.blocks=3 --out small --criterion magnitude`"
)
def cut(
    model: Model,
    out: Out,
    sizes: Annotated[list[str], typer.Option("--set", help="axis=size; repeat for several axes.")],
    criterion: Annotated[
        str, typer.Option(help="magnitude or random (no data); taylor, activation or (few units) ablation with --data.")
    ] = "magnitude",
    data: Annotated[Path | None, typer.Option("--data", help="Rows for taylor, activation and ablation.")] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file of weights to write; by magnitude or random no more is held in memory.")
    ] = "50GB",
    seed: Seed = 0,
    tensor_parallel: Devices = 1,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Prune only: cut axes to the given sizes and save a plain checkpoint; no training."""
    from slimlmm import commands

    found = commands.cut(
        model,
        out,
        sizes,
        criterion=criterion,
        source=data,
        allowed=picture_options.allowed(pictures_from, max_picture_pixels),
        seed=seed,
        max_shard_size=max_shard_size,
        tensor_parallel=tensor_parallel,
        trust_remote_code=trust_remote_code,
    )
    _report(found, json_out, lambda: print(commands.cut_said(found)))


@app.command(epilog="Example: `slimlmm finetune MODEL --data DATA --out corrected`")
def finetune(
    model: Model,
    data: Data,
    out: Out,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML list of trainings (see docs/recipes.md).")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the train rows without a recipe; 3 by default.")
    ] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    seed: Seed = 0,
    save_minutes: Minutes = 5.0,
    quiet: Quiet = False,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Teacher correction: fine-tune a model on your own data, evaluated before and after; killed, it goes on where it was."""
    from slimlmm import finetuning
    from slimlmm.progress import reporter

    with heeding(), reporter(quiet) as tell:
        found = finetuning.finetune(
            model,
            data,
            out,
            recipe=recipe,
            epochs=epochs,
            seed=seed,
            trust_remote_code=trust_remote_code,
            tell=tell,
            save_every=60 * save_minutes,
            allowed=picture_options.allowed(pictures_from, max_picture_pixels),
        )
    _report(found, json_out, lambda: print(finetuning.finetuned(found)))


@app.command(epilog="Example: `slimlmm compress MODEL --data DATA --out runs/mine --shrink 18`")
def compress(
    model: Model,
    data: Data,
    out: Out,
    shrink: Annotated[float | None, typer.Option(help="Teacher's parameters over the student's.")] = None,
    recipe: Recipe = None,
    max_drop: Annotated[float | None, typer.Option(help="Points of validation accuracy that may be lost.")] = None,
    pictures_from: picture_options.From = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    save_minutes: Minutes = 5.0,
    keep_rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Models of finished rounds that stay in OUT; all by default. Those of lossless rounds stay."
        ),
    ] = None,
    quiet: Quiet = False,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Prune and distill in stages, the main job; killed or stopped, the same command goes on where it was."""
    from slimlmm import commands, pipeline, report
    from slimlmm.progress import reporter
    from slimlmm.room import Keeping

    folders = pictures_from or ()
    settings = commands.settings(recipe, shrink=shrink, max_drop=max_drop, seed=seed, pictures_from=folders)
    with heeding(), reporter(quiet) as tell:
        found = pipeline.run(
            model,
            data,
            out,
            settings,
            command=_command(),
            trust_remote_code=trust_remote_code,
            tell=tell,
            keeping=Keeping(60 * save_minutes, keep_rounds),
        )
    _report(found.model_dump(mode="json"), json_out, lambda: Console().print(report.final_table(found)))


@app.command(epilog="Example: `slimlmm plan MODEL --latency-ms 30 --fix text.width=512 --out recipe.yaml`")
def plan(
    model: Model,
    shrink: Annotated[float | None, typer.Option(help="Budget: parameters now over those planned.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Budget: parameters, such as 300M or 0.3B.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", help="Budget: bytes in the config's number format, such as 600MB.")
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Budget: FLOPs of an answer as in inspect, such as 500G.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Budget: milliseconds an answer, measured here with random models.")
    ] = None,
    energy_j: Annotated[
        float | None, typer.Option(help="Budget: joules an answer, by an energy counter of this machine.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="importance (the default with --data), search (after brief recoveries) or shares."),
    ] = None,
    floor: Annotated[list[str] | None, typer.Option(help="axis=size: the least size of an axis; repeat.")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="axis=size: a given size, the rest is chosen; repeat.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe for order, multiples, tensor_parallel, row_visits.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows: the vocabulary is trimmed to them; --by tries axes on them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the recipe for compress to.")] = None,
    quiet: Quiet = False,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show the shape chosen for a budget, its predicted cost and its rounds; nothing is cut or trained."""
    from slimlmm import planning
    from slimlmm.progress import reporter

    values = (shrink, parameters, size, flops, latency_ms, energy_j)
    with reporter(quiet) as tell:
        found = planning.plan(
            model,
            dict(zip(planning.BUDGETS, values, strict=True)),
            floors=floor or (),
            fixes=fix or (),
            recipe=recipe,
            source=data,
            out=out,
            by=by,
            trust_remote_code=trust_remote_code,
            tell=tell,
        )
    _report(found, json_out, lambda: Console().print(planning.view(found), highlight=False))


@app.command(
    epilog="Example: `slimlmm study STUDY.yaml --out runs/study --dry-run`",
    context_settings={"allow_extra_args": True},  # --arms a b
)
def study(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="STUDY", help="YAML study; with --page, folders or study.json files.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arms", help="Arms to run: names with spaces or commas between; all by default."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List arms, sizes, rounds and row visits only.")] = False,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write the page anew, from study.json alone; runs nothing.")
    ] = None,
    quiet: Quiet = False,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Run the experiments that back a method, arms and seeds, with error bars; the same command again resumes."""
    from slimlmm import commands
    from slimlmm.progress import reporter

    if context.args and not arms and not page:
        raise UserError(f"unexpected {' '.join(context.args)!r}: one STUDY at a time; arms come after --arms.")
    others = [Path(name) for name in context.args] if page else []
    only = [name for text in (*(arms or ()), *context.args) for name in text.replace(",", " ").split()]
    with heeding(), reporter(quiet) as tell:
        found, shown = commands.study(
            [source, *others],
            out=out,
            only=only,
            dry_run=dry_run,
            page=page,
            command=_command(),
            trust_remote_code=trust_remote_code,
            tell=tell,
        )
    _report(found, json_out, lambda: Console().print(shown))


@app.command(epilog="Example: `slimlmm evaluate runs/mine/final --data DATA --split test`")
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    rows: Annotated[int | None, typer.Option(help="Most rows, whole pictures, seeded; all by default.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model on the same rows: paired drop and agreement.")
    ] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    seed: Seed = 0,
    quiet: Quiet = False,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Exact match of generated answers per task, with n and standard error."""
    from slimlmm import commands
    from slimlmm.progress import reporter

    with reporter(quiet) as tell:
        found = commands.evaluate(
            model,
            data,
            split=split,
            count=rows,
            against=against,
            seed=seed,
            trust_remote_code=trust_remote_code,
            tell=tell,
            allowed=picture_options.allowed(pictures_from, max_picture_pixels),
        )
    _report(found, json_out, lambda: Console().print(commands.accuracy_table(found)))


@app.command(epilog="Example: `slimlmm bench runs/mine/final --against MODEL --data DATA`")
def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(help="Another model, timed in turns with the first.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Rows to answer; AdReview creatives without it.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls at batch 1; a sixth of it at batch 32.")] = 50,
    energy: Annotated[
        bool, typer.Option("--energy", help="Joules a request by the machine's counter, or null.")
    ] = False,
    watts: Annotated[
        float | None, typer.Option(help="Also estimate joules from these watts of the device; labelled declared.")
    ] = None,
    pictures_from: picture_options.From = None,
    max_picture_pixels: picture_options.MaxPixels = picture_options.USUAL_PIXELS,
    json_out: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Parameters, bytes, FLOPs, memory, batch-1 latency and batch-32 throughput; measured, or null."""
    from slimlmm import commands

    joules = energy or watts is not None
    found = commands.bench(
        model,
        against=against,
        source=data,
        calls=calls,
        energy=joules,
        watts=watts,
        trust_remote_code=trust_remote_code,
        allowed=picture_options.allowed(pictures_from, max_picture_pixels),
    )
    _report(found, json_out, lambda: Console().print(commands.bench_table(found)))


app.command(epilog=checkdata_verb.EXAMPLE)(checkdata_verb.check_data)
app.command(epilog=energy_verb.EXAMPLE)(energy_verb.energy)
app.command(epilog=export_verb.EXAMPLE)(export_verb.export)
app.command(epilog=verbs.SERVE)(verbs.serve)
app.command(epilog=verbs.CALIBRATE)(verbs.calibrate)
app.command(epilog=monitor_verb.EXAMPLE)(monitor_verb.monitor)
app.command(epilog=verify_verb.VERIFY)(verify_verb.verify)
app.command(epilog=verify_verb.REPRODUCE)(verify_verb.reproduce)
app.command(epilog=verify_verb.CONVERT)(verify_verb.convert)


@app.command(epilog="Example: `slimlmm adreview data/adreview --train 12000 --val 1000 --test 2400`")
def adreview(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    train: Annotated[int, typer.Option(min=0, help="Train rows (10 a picture).")] = 12_000,
    val: Annotated[int, typer.Option(min=0, help="Validation rows.")] = 1_000,
    test: Annotated[int, typer.Option(min=0, help="Test rows.")] = 2_400,
    seed: Seed = 0,
    json_out: Json = False,
) -> None:
    """Write AdReview, the open advertisement-review data set, as JSONL and pictures."""
    from slimlmm import commands

    found = commands.adreview(folder, train=train, val=val, test=test, seed=seed)
    _report(found, json_out, lambda: print(f"{folder}: {found['rows']} rows, sha256 {found['sha256']}"))


@app.command(epilog="Example: `slimlmm demo --out runs/demo`")
def demo(out: Out = Path("runs/demo"), quiet: Quiet = False, json_out: Json = False) -> None:
    """Compress the bundled teacher live on AdReview, and evaluate the bundled 18x student."""
    from slimlmm import commands
    from slimlmm.demo import demo as run
    from slimlmm.progress import reporter

    with heeding(), reporter(quiet) as tell:
        found = run(out, command=_command(), tell=tell)
    _report(found, json_out, lambda: Console().print(commands.demo_page(found)))


def _command() -> str:
    return shlex.join(["slimlmm", *sys.argv[1:]])
