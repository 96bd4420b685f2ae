"""What `slimlmm plan` does: the shape that a budget leads to, what it would cost, the rounds to it; nothing is cut or trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Group as Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slimlmm import budget as budgets
from slimlmm import checkpoint, choosing, data, energy, vocab
from slimlmm import recipe as recipes
from slimlmm.anatomy import describe
from slimlmm.budget import Budget, Stopwatch, quantity
from slimlmm.choice_view import choice_lines, grouped
from slimlmm.choosing import Choice
from slimlmm.collate import texts_of
from slimlmm.costs import Answer, answer_use
from slimlmm.deployable import refuse_unsplittable
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.inspection import dtype_of, sizes_of
from slimlmm.lossless import Lossless, living_blocks, lossless_of
from slimlmm.measure import environment
from slimlmm.plan import Space, space_of
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, SizesBy, Stage
from slimlmm.resizing import cut_in_turn, most_parameters, predict_parameters, resized
from slimlmm.staging import check_stages, near_of, one_row_each, stages_for
from slimlmm.surgery import new_config
from slimlmm.teacher import config_fingerprint
from slimlmm.tree import human, plain, ratio

#: options that say a budget; one of them is given
BUDGETS = ("--shrink", "--parameters", "--bytes", "--flops", "--latency-ms", "--energy-j")
#: those that are measured -> their figure in `costs`
MEASURED = {"--latency-ms": "latency_ms", "--energy-j": "energy_j"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """Where a plan begins: the model's configuration, that of the lossless cuts, and how answers use both.

    `lossless`: what those cuts are; `a_step`: rows that a step visits; `rows`: those of the data, by split.
    """

    config: Any
    living: Any
    lossless: Lossless
    a_step: data.StepRows
    now: Answer
    then: Answer
    notes: tuple[str, ...]
    rows: Mapping[str, list[data.Row]]


def plan(
    model: str,
    asked: Mapping[str, float | str | None],
    *,
    floors: Sequence[str] = (),
    fixes: Sequence[str] = (),
    recipe: Path | None = None,
    source: Path | None = None,
    out: Path | None = None,
    by: str | None = None,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> dict[str, Any]:
    """Return the shape that a budget leads to, its cost, and the rounds of its schedule, which `out` gets as a recipe.

    `asked`: the value of each option in `BUDGETS`, None where it is not given. `floors` and `fixes`: ``axis=size``, sizes not
    to fall below and sizes to take. Parameters, bytes and FLOPs come from the configuration, latency is measured.

    Raises:
        UserError: not exactly one budget, one that no shape meets or that the model meets already, sizes that cannot be.
    """
    tell = tell or Quiet()
    settings = _settings(recipe, by, source)
    option, value = _asked(asked, settings, recipe)
    if out is not None and out.exists():
        raise UserError(f"--out {out}: exists; give a file that does not.")
    start = _start(model, source, settings, trust_remote_code)
    anatomy = describe(start.living)
    least, given = sizes_of(floors, anatomy, "--floor"), sizes_of(fixes, anatomy, "--fix")
    space = space_of(start.living, Grid.of(settings), settings.order, floors=least, fixes=given)
    watch = _watch(option, tell)
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        trials = settings.sizes_by, lambda: _ground(model, start, settings, place, trust_remote_code, tell)
        budget, choice = _chosen(start, space, (option, value), watch, trials)
    stated = space.stated(choice.sizes)
    measured = _measured(start, stated, watch, budget.limit) if option in MEASURED else None
    found = {
        "model": model,
        "model_type": start.config.model_type,
        "dtype": str(dtype_of(start.config)).removeprefix("torch."),
        "budget": {"option": option, "asked": value, "limit": budget.limit},
        "axes": _axes(start, stated, dict.fromkeys(least, "--floor") | dict.fromkeys(given, "--fix")),
        "costs": _costs(start, stated, (MEASURED.get(option, ""), measured)),
        "answer": {"tokens": start.now.tokens, "prompt": start.now.prompt, "reason": start.now.reason},
        "latency": measured if option == "--latency-ms" else None,
        "energy": measured if option == "--energy-j" else None,
        "choice": choice.record(),
    }
    return found | _schedule(start, space, choice, settings, out) | _origin(start, settings)


def _origin(start: _Start, settings: Recipe) -> dict[str, Any]:
    """Return what a plan was made from, and on what machine."""
    rows = [row for part in start.rows.values() for row in part]
    return {
        "seed": settings.seed,
        "config_fingerprint": config_fingerprint(start.config),
        "rows_fingerprint": data.fingerprint(rows) if rows else None,
        "environment": environment().model_dump(),
    }


def _settings(path: Path | None, by: str | None, source: Path | None) -> Recipe:
    """Return the recipe of a file (or the defaults) with the way to choose sizes that the command line asks for."""
    told = recipes.read(path) if path else Recipe()
    if by is not None:
        told = recipes.parse(told.model_dump(mode="json") | {"sizes_by": by}, "--by")
    if told.sizes_by not in (None, "shares") and source is None:
        raise UserError(f"--by {told.sizes_by} tries the model on rows: give --data.")
    return told


def _ground(
    model: str, start: _Start, settings: Recipe, folder: Path, trust_remote_code: bool, tell: Reporter
) -> choosing.Ground:
    """Load the model that trial cuts start from."""
    loaded = checkpoint.load_to_answer(model, trust_remote_code=trust_remote_code)
    return choosing.ground_of(loaded, start.rows, settings, folder, tell)


def _watch(option: str, tell: Reporter) -> Stopwatch:
    """Return what measures shapes here: a stopwatch, or an energy counter."""
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
    if option == "--energy-j":
        counter = energy.counter_of(device)
        return Stopwatch(
            device=device,
            seconds=energy.joules_of(counter),
            tell=lambda one: tell.say("measured a shape", parameters=one.parameters, joules=one.value),
            unit="J",
            scale=1.0,
            note=energy.NOT_COUNTED.format(name=counter.name),
        )
    return Stopwatch(device=device, tell=lambda one: tell.say("timed a shape", parameters=one.parameters, ms=one.ms))


def _schedule(start: _Start, space: Space, choice: Choice, settings: Recipe, out: Path | None) -> dict[str, Any]:
    """Return the rounds that lead to these sizes, what would hinder serving, and notes; write the recipe where one is wanted."""
    grid, sizes, told = Grid.of(settings), choice.sizes, [*start.notes, *filter(None, [choice.note])]
    stages = stages_for(
        start.living,
        sizes,
        row_visits=settings.row_visits,
        a_step=start.a_step,
        order=settings.order,
        grid=grid,
        drops=start.lossless.drops,
        near=near_of(settings),
    )
    check_stages(start.config, stages, settings.tensor_parallel)
    stated = space.stated(sizes)
    warnings = refuse_unsplittable(start.living, stated, settings.tensor_parallel)
    if out is not None:
        _write(out, settings.resolved(stages))
    return {
        "rounds": _rounds(start, stages),
        "warnings": warnings,
        "notes": [*told, *grid.notes(start.living), *_followers(stages, stated), *_unequal(start, stated)],
        "out": None if out is None else str(out),
    }


def _unequal(start: _Start, stated: Mapping[str, int]) -> list[str]:
    """Say what parameters are counted with where blocks differ in size."""
    most, first = most_parameters(start.living, stated), predict_parameters(start.living, stated)
    if most == first:
        return []
    return [
        f"blocks differ in size, and which of them stay is chosen in the run: {most:,} parameters are with the largest that may; "
        f"the rounds, FLOPs and times above are with the first, {first:,}."
    ]


def _asked(asked: Mapping[str, float | str | None], settings: Recipe, recipe: Path | None) -> tuple[str, float]:
    """Return the one budget that is given, on the command line or else as the recipe's `shrink`."""
    if settings.stages:
        raise UserError(f"{recipe} lists stages, so there is nothing to plan; give a recipe without them.")
    given = {option: value for option, value in asked.items() if value is not None}
    if not given and settings.shrink is not None:
        given = {"--shrink": settings.shrink}
    if len(given) != 1:
        raise UserError(f"give exactly one budget of {', '.join(BUDGETS)}, not {' and '.join(given) or 'none'}.")
    ((option, value),) = given.items()
    if isinstance(value, str):
        return option, quantity(option, value)
    least = 1 if option == "--shrink" else 0
    if not least < value < math.inf:
        raise UserError(f"{option} {value:g}: give a number above {least}.")
    return option, value


def _start(model: str, source: Path | None, settings: Recipe, trust_remote_code: bool) -> _Start:
    """Read the configuration, and what the rows need of the vocabulary where there are rows."""
    config = checkpoint.load_config(model, trust_remote_code=trust_remote_code)
    living, rows = config, dict[str, list[data.Row]]()
    a_step: data.StepRows = one_row_each
    if source is None:
        lossless = Lossless(blocks=living_blocks(config), whole=_kept_whole(model, config, trust_remote_code))
        counted = "steps for one row a picture; give --data to plan with yours."
        if settings.sizes_by is None:
            counted = "sizes by shares (compress chooses them by what its rows lose), " + counted
        trims = "" if lossless.whole else "vocabulary counted whole (compress trims it to its rows), "
        notes = [trims + counted]
    else:
        processor, generation = checkpoint.load_processor(model, config, trust_remote_code=trust_remote_code)
        used = settings.data
        splits = data.load(
            source,
            max_bad_share=used.max_bad_share,
            unlabelled=used.answers != "given",
            allowed=used.pictures,
        )
        train, validation = (splits.need(name, source) for name in ("train", "validation"))
        lossless = lossless_of(config, generation, processor, texts_of(processor, train + validation))
        if (kept := lossless.tokens) is not None:
            living = new_config(config, describe(config).axis("vocab"), len(kept), {"vocab": torch.tensor(kept)})
        a_step, notes = data.rows_a_step(data.sample(train, used.train_rows, settings.seed)), splits.notes
        if lossless.tokens is not None and used.answers != "given":
            notes = [
                *notes,
                "the teacher's answers are not made yet; the run keeps what tokens they add to the vocabulary",
            ]
        rows = {"train": train, "validation": validation}
    if lossless.blocks:
        living = resized(living, lossless.blocks)
    return _Start(
        config=config,
        living=living,
        lossless=lossless,
        a_step=a_step,
        now=answer_use(config, budgets.TOKENS),
        then=answer_use(living, budgets.TOKENS),
        notes=(*notes, *lossless.notes),
        rows=rows,
    )


def _kept_whole(model: str, config: Any, trust_remote_code: bool) -> str:
    """Return why the vocabulary stays whole, "" where it need not or where only the tokenizer could tell, and there is none."""
    try:
        processor, generation = checkpoint.load_processor(model, config, trust_remote_code=trust_remote_code)
    except UserError:  # a configuration alone can be planned for
        return describe(config).axes["vocab"].refusal or ""
    return vocab.refusal(config, generation, processor)


def _budget(start: _Start, config: Any, asked: tuple[str, float], watch: Stopwatch) -> Budget:
    """Return the budget as a cost of the sizes of `config`."""
    option, value = asked
    words = f"{option} {value:.15g}"
    if option == "--shrink":
        return budgets.by_shrink(config, value, predict_parameters(start.config, {}))
    if option == "--parameters":
        return budgets.by_parameters(config, value, words)
    if option == "--bytes":
        return budgets.by_bytes(config, value, words, dtype_of(config).itemsize)
    if option == "--flops":
        return budgets.by_flops(config, value, words, start.now if config is start.config else start.then)
    by = {"--latency-ms": budgets.by_latency, "--energy-j": budgets.by_energy}[option]
    return by(config, value, words, watch)


def _chosen(
    start: _Start,
    space: Space,
    asked: tuple[str, float],
    watch: Stopwatch,
    how: tuple[SizesBy | None, Callable[[], choosing.Ground]],
) -> tuple[Budget, Choice]:
    """Return the budget and the sizes that it leads to; refuse one that the model meets as it is, or by lossless cuts alone.

    Of a measured budget nothing is spent step by step: one step of one axis is less than measuring can tell.
    """
    budget = _budget(start, start.config, asked, watch)
    now = budget.cost({})
    if now <= budget.limit:
        raise UserError(
            f"{budget.asked} allows {budget.said(budget.limit)}, and the model as it is takes {budget.said(now)}: "
            "nothing has to be cut."
        )
    budget = _budget(start, space.config, asked, watch)
    by, ground = how
    choice = choosing.chosen(
        space, budget, by if start.rows else "shares", ground, start.then if asked[0] in MEASURED else None
    )
    if space.whole(choice.sizes):
        raise UserError(
            f"{budget.asked} allows {budget.said(budget.limit)}, which dropping unused tokens and dead blocks alone meets: "
            "no axis has to be cut."
        )
    return budget, choice


def _axes(start: _Start, stated: Mapping[str, int], given: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return size now and planned of every axis that can be cut; `given` names the option that stated it."""
    after = describe(resized(start.living, stated)).sizes
    found = []
    for name, now in describe(start.config).sizes.items():
        planned = after.get(name, stated.get(name, now))
        found.append({"axis": name, "now": now, "planned": planned, "kept": planned / now, "given": given.get(name)})
    return found


def _followers(stages: Sequence[Stage], stated: Mapping[str, int]) -> list[str]:
    """Say which sizes of the rounds go on shrinking after they were cut."""
    cut = {name: size for stage in stages for turn in stage.rounds for name, size in turn.sizes.items()}
    return [
        f"{name}: cut to {size} at the width of that round, and {stated[name]} in the end: it is a whole number of the width"
        for name, size in cut.items()
        if stated[name] != size
    ]


def _costs(
    start: _Start, stated: Mapping[str, int], measured: tuple[str, Mapping[str, Any] | None]
) -> dict[str, dict[str, Any]]:
    """Return what the model costs now and planned, and how many times less."""
    size = dtype_of(start.config).itemsize
    counts = predict_parameters(start.config, {}), most_parameters(start.living, stated)
    flops = budgets.flops_at(start.config, start.now, {}), budgets.flops_at(start.living, start.then, stated)
    pairs: dict[str, tuple[float | None, float | None]] = {
        "parameters": counts,
        "bytes": (size * counts[0], size * counts[1]),
        "flops": flops,
    }
    costs = {
        name: {"now": now, "planned": planned, "ratio": now / planned if now and planned else None}
        for name, (now, planned) in pairs.items()
    }
    name, found = measured
    return costs if found is None else costs | {name: found["costs"]}


def _measured(start: _Start, stated: Mapping[str, int], watch: Stopwatch, limit: float) -> dict[str, Any]:
    """Time (or measure) the chosen shape again, in turns with the model as it is, and return all figures.

    Where both do not fit into memory at once there is no ratio: times of different moments are not compared.
    """
    found = watch.pair(start.config, resized(start.living, stated))
    alone = {"now": watch.timed(start.config, {}).value, "planned": watch.timed(start.living, stated).value}
    costs: dict[str, Any] = alone | {"ratio": None, "reason": found if isinstance(found, str) else ""}
    if not isinstance(found, str):
        now, planned = (watch.scale * float(np.median(values)) for values in found)
        costs |= {"now": now, "planned": planned, "ratio": now / planned, "n": len(found[0])}
    candidates = sorted(watch.found.values(), key=lambda one: -one.parameters)
    return {
        "device": str(watch.device),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "unit": watch.unit,
        "limit": limit,
        "note": watch.note,
        "candidates": [
            {"sizes": dict(one.sizes), "parameters": one.parameters, watch.unit.lower(): one.value}
            | {"n": one.n, "reason": one.reason}
            for one in candidates
        ],
        "chosen": dict(stated),
        "costs": costs,
    }


def _rounds(start: _Start, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Return every round of the schedule: what it cuts, the parameters after it, the row visits of its recovery."""
    found, config = [], start.living
    for stage in stages:
        for number, turn in enumerate(stage.rounds, 1):
            config = cut_in_turn(config, turn.sizes)
            each = (one.steps * start.a_step(one.pictures_per_step, one.questions_per_picture) for one in turn.train)
            found.append(
                {
                    "round": f"{stage.name}.{number}",
                    "sizes": start.lossless.sizes(turn.drop) if turn.drop else dict(turn.sizes),
                    "parameters": predict_parameters(config, {}),
                    "row_visits": round(sum(each)),
                }
            )
    return found


def _write(out: Path, recipe: Recipe) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(recipes.dump(recipe), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}.") from error


def view(found: dict[str, Any]) -> Lines:
    """Return the terminal view of `plan`, to be read in 80 columns."""
    asked = found["budget"]
    title = Text(f"{found['model']}\n", style="bold")
    title.append(f"{found['model_type']}: a plan for {asked['option']} {asked['asked']:.15g}", style="not bold")
    parts: list[Any] = [title, "", _axes_table(found), "", _costs_table(found), *_reasons(found)]
    parts += choice_lines(found["choice"])
    if measured := found["latency"] or found["energy"]:
        parts += ["", *_measured_lines(measured)]
    parts += ["", _rounds_table(found)]
    if found["warnings"]:
        parts += ["", Text("What may stand in the way when it is served (docs/deploy.md):", style="bold")]
        parts += [Padding(Text(f"- {line}"), (0, 0, 0, 2)) for line in found["warnings"]]
    parts += ["", *(Text(note, style="dim") for note in found["notes"])]
    if found["out"]:
        parts.append(Text(f"written: {found['out']} (slimlmm compress MODEL --data DATA --recipe {found['out']})"))
    return Lines(*parts)


def _axes_table(found: dict[str, Any]) -> Table:
    table = plain("axis", "now", "planned", "kept", "given")
    for axis in found["axes"]:
        cut = axis["planned"] < axis["now"]
        cells = [str(axis["now"]), str(axis["planned"]), f"{100 * axis['kept']:.1f} %", axis["given"] or ""]
        table.add_row(axis["axis"], *cells, style="" if cut else "dim")
    return table


def _costs_table(found: dict[str, Any]) -> Table:
    table, costs = plain("cost", "now", "planned", "ratio"), found["costs"]
    labels = {"parameters": "parameters", "bytes": f"bytes ({found['dtype']})", "flops": "FLOPs an answer"}
    for name, label in labels.items():
        now, planned = costs[name]["now"], costs[name]["planned"]
        shown = [human(value, "B" if name == "parameters" else "G") for value in (now, planned)]
        table.add_row(label, *(f"{one}B" if name == "bytes" else one for one in shown), ratio(now, planned))
    for name, label, unit in (("latency_ms", "latency p50, batch 1", "ms"), ("energy_j", "energy p50, batch 1", "J")):
        if name in costs:
            times = costs[name]["ratio"]
            cells = [_shown(costs[name][key], unit) for key in ("now", "planned")]
            table.add_row(label, *cells, "-" if times is None else f"{times:.2f}x")
    return table


def _shown(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} ms" if unit == "ms" else f"{value:.3g} {unit}"


def _reasons(found: dict[str, Any]) -> list[Text]:
    """Say what an answer is, and why a figure is missing."""
    answer = found["answer"]
    told = f"an answer: a prompt of {answer['prompt']} tokens with a picture, {answer['tokens']} tokens out"
    lines = [answer["reason"] or told]
    figures = [found["costs"][name] for name in MEASURED.values() if name in found["costs"]]
    lines += [f"no ratio: the model beside the chosen shape {one['reason']}" for one in figures if one["reason"]]
    return [Text(line, style="dim") for line in lines]


def _measured_lines(measured: dict[str, Any]) -> list[Any]:
    unit = measured["unit"]
    table = plain("sizes", "parameters", "p50", "n")
    for one in measured["candidates"]:
        chosen = one["sizes"] == measured["chosen"]
        sizes = grouped(one["sizes"]) or "as it is"
        cells = [human(one["parameters"], "B"), _shown(one[unit.lower()], unit), str(one["n"])]
        table.add_row(sizes + (f" ({one['reason']})" if one["reason"] else ""), *cells, style="bold" if chosen else "")
    told = (
        f"p50 of n answers on {measured['device']} (threads: {measured['threads']}), {measured['dtype']}, batch 1, random "
        f"weights; what is quoted above was measured in turns. {measured['note']}"
    )
    lines: list[Any] = [table, Text(told, style="dim")]
    planned, limit = measured["costs"]["planned"], measured["limit"]
    if planned > limit:
        again = f"Measured again in turns, the chosen shape took {_shown(planned, unit)}, more than the {limit:.15g} asked for."
        lines.append(Text(f"{again} Figures wander by as much here; plan anew, or for less.", style="yellow"))
    return lines


def _rounds_table(found: dict[str, Any]) -> Table:
    table = plain("round", "sizes", "parameters", "row visits")
    for one in found["rounds"]:
        table.add_row(
            one["round"], grouped(one["sizes"]) or "-", human(one["parameters"], "B"), f"{one['row_visits']:,}"
        )
    return table
