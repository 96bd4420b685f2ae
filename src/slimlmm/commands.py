"""What the command line's verbs do, as plain functions: input checked, result returned as a dictionary, tables beside."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Group as Lines
from rich.markup import escape
from rich.table import Table

from slimlmm import adreview as generator
from slimlmm import checkpoint, data, importance, measure, plan, streaming, studies, study_page, surgery, tables
from slimlmm import energy as joules
from slimlmm import evaluate as evaluation
from slimlmm import recipe as recipes
from slimlmm import study as studying
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.deployable import refuse_unsplittable, warnings_of
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, to_device
from slimlmm.inspection import sizes_of
from slimlmm.losses import cross_entropy
from slimlmm.packing import can_pack
from slimlmm.pictures import USUAL, PictureSettings
from slimlmm.progress import Reporter
from slimlmm.recipe import Recipe
from slimlmm.report import ROUNDS, duration, error, final_table, points, rounds_table
from slimlmm.report import Table as PlainTable
from slimlmm.resizing import resized
from slimlmm.results import Results, effect
from slimlmm.selfcheck import self_check
from slimlmm.shards import first_of
from slimlmm.snapshot import model_record
from slimlmm.study_results import StudyResults
from slimlmm.teacher import weights_fingerprint


def settings(
    path: Path | None,
    *,
    shrink: float | None,
    max_drop: float | None,
    seed: int | None,
    pictures_from: Sequence[Path] = (),
) -> Recipe:
    """Return the recipe of a file (or the defaults) with what the command line says over it."""
    base = recipes.read(path) if path else Recipe()
    said = {"shrink": shrink, "max_drop": max_drop, "seed": seed}
    if shrink is not None and base.stages:
        raise UserError(f"{path} lists stages, so --shrink has no effect; leave one of the two out.")
    raw = base.model_dump(mode="json") | {key: value for key, value in said.items() if value is not None}
    raw["data"]["pictures"]["folders"] += pictures_from
    return recipes.parse(raw, "command line")


def cut(
    model: str,
    out: Path,
    texts: Sequence[str],
    *,
    criterion: str = "magnitude",
    source: Path | None = None,
    allowed: PictureSettings = USUAL,
    seed: int = 0,
    max_shard_size: str = checkpoint.SHARD,
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Prune without training: prove the cut on a shallow copy, score, slice, save.

    By weights alone file by file (`streaming`); a criterion that runs the model holds all of it in memory, in fp32.
    """
    runs_it = importance.needs_of(criterion) in ("activations", "loss")
    if criterion == "obs":
        raise UserError("the criterion 'obs' chooses for a refit, which only compress makes behind a cut; take taylor.")
    if runs_it and source is None:
        raise UserError(f"the criterion {criterion!r} needs --data; magnitude and random do not.")
    if source is not None and not runs_it:
        raise UserError(f"the criterion {criterion!r} looks at no data; leave --data out, or take taylor.")
    largest = checkpoint.shard_size(max_shard_size)
    checkpoint.refuse_foreign(out.expanduser().absolute())
    weights = checkpoint.open_weights(model, trust_remote_code=trust_remote_code)
    sizes = sizes_of(texts, describe(weights.config))
    warnings = refuse_unsplittable(weights.config, sizes, tensor_parallel)
    sizes = one_by_one(weights.config, sizes)
    failed = [check for check in self_check(weights.config, sizes) if not check.ok]
    if failed:
        raise UserError("cannot be cut: " + "; ".join(f"{check.axis}: {check.reason}" for check in failed))
    found = {"out": str(out), "sizes": sizes, "left_behind": weights.left, "warnings": warnings, "seed": seed}
    found["environment"] = measure.environment().model_dump()
    if source is not None:
        rows = data.sample(data.load(source, allowed=allowed).need("train", source), 256, seed)
        return found | _cut_in_memory(model, out, sizes, criterion, rows, seed, largest, trust_remote_code)
    done = streaming.cut_folder(weights, sizes, out, criterion=criterion, seed=seed, max_shard_size=largest)
    # which rotary pairs stayed is known only now
    return found | {
        "warnings": warnings_of(checkpoint.load_config(out), tensor_parallel),
        "way": "file by file",
        "parameters_before": done.parameters_before,
        "parameters": done.parameters,
        "bytes": done.bytes,
    }


def one_by_one(config: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes in an order in which each can be cut on its own and all end as asked for, or refuse them."""
    problems = []
    for order in itertools.islice(itertools.permutations(sizes), 120):
        small = config
        try:
            for name in order:
                small = resized(small, {name: sizes[name]})
        except UserError as error:
            problems.append(str(error))
            continue
        found = describe(small).sizes
        if all(found.get(name, size) == size for name, size in sizes.items()):
            return {name: sizes[name] for name in order}
        moved = [f"{name} ends at {found[name]}" for name, size in sizes.items() if found.get(name, size) != size]
        problems.append(f"cut in turn, {', '.join(moved)}; give that size, or cut in two runs")
    raise UserError(f"{', '.join(f'{name}={size}' for name, size in sizes.items())}: {problems[0]}")


def cut_said(found: dict[str, Any]) -> str:
    """Return the sentences that `cut` prints."""
    left = found["left_behind"]
    lines = [f"{found['parameters_before']:,} -> {found['parameters']:,} parameters ({found['way']}): {found['out']}"]
    if left:
        lines.append(f"left behind: {len(left)} tensors that the stock class has no place for: {first_of(left)}")
    return "\n".join(lines + [f"when it is served: {warning}" for warning in found["warnings"]])


def _cut_in_memory(
    model: str,
    out: Path,
    sizes: dict[str, int],
    criterion: str,
    rows: Sequence[data.Row],
    seed: int,
    max_shard_size: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Cut as a criterion says that runs the model; weights go back into the number format of their files."""
    if tokens := [name for name in sizes if name.endswith(".query_tokens")]:
        raise UserError(
            f"{tokens[0]} changes the prompts that {criterion!r} looks at: cut it by magnitude, without --data."
        )
    loaded = checkpoint.load(model, trust_remote_code=trust_remote_code)
    before, student = loaded.model.num_parameters(), loaded.model
    for axis, size in sizes.items():
        anatomy = describe(student.config)
        batches = _batches(student, loaded.processor, rows)
        scores = importance.score(student, anatomy, [axis], criterion, batches, _answer_loss, seed=seed)
        student = surgery.cut(student, anatomy, axis, plan.choose(scores, anatomy, axis, size))
    student = checkpoint.as_stored(student, loaded.stored)
    checkpoint.save(student, loaded.processor, out, source=loaded.path, max_shard_size=max_shard_size)
    return {
        "way": f"all in memory, in fp32: {criterion} runs the model",
        "parameters_before": before,
        "parameters": student.num_parameters(),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }


def _batches(model: Any, processor: Any, rows: Sequence[data.Row]) -> list[dict[str, Any]]:
    if not rows:
        return []
    collator = Collator(processor, packed=can_pack(model, processor, rows))
    groups = data.by_picture(rows, 16)
    return [to_device(collator(groups[at : at + 4]), model.device) for at in range(0, len(groups), 4)]


def _answer_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    logits_AV, labels_A, _ = answer_logits(model, batch)
    return cross_entropy(logits_AV, labels_A) / labels_A.numel()


def evaluate(
    model: str,
    source: Path,
    *,
    split: str,
    count: int | None,
    against: str | None,
    seed: int,
    tell: Reporter,
    allowed: PictureSettings = USUAL,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate one model, or two on the same rows, on a split of the data."""
    if split not in tables.SPLITS:
        raise UserError(f"--split {split!r}: known: {', '.join(tables.SPLITS)}.")
    splits = data.load(source, allowed=allowed)
    for note in splits.notes:
        tell.say(note)
    rows = data.sample(splits.need(split, source), count, seed)
    found, prints = [], {}
    for name in [model] + ([against] if against else []):
        loaded = checkpoint.load_to_answer(name, trust_remote_code=trust_remote_code)
        prints[name] = weights_fingerprint(loaded.model)
        found.append(
            evaluation.evaluate(
                loaded.model, loaded.processor, rows, progress=lambda done, total: tell.step("evaluating", done, total)
            )
        )
    result: dict[str, Any] = {
        "model": model,
        "split": split,
        **found[0].summary.model_dump(),
        "seed": seed,
        "rows_fingerprint": data.fingerprint(rows),
        "fingerprints": prints,
        "environment": measure.environment().model_dump(),
    }
    if against:
        result |= {
            "against": against,
            "effect": effect(found[1], found[0], seed=seed).model_dump(),
            "other": found[1].summary.model_dump(),
        }
    return result


def study(
    sources: Sequence[Path],
    *,
    out: Path | None,
    only: Sequence[str],
    dry_run: bool,
    page: Path | None,
    command: str,
    tell: Reporter,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], Lines]:
    """Plan and run a study, or render the page of some anew; return the record and its terminal view."""
    if page is not None:
        told = [StudyResults.load(one / "study.json" if one.is_dir() else one) for one in sources]
        return {"page": str(study_page.write(told, page))}, Lines(f"{page} and its plots")
    settings = studies.read(sources[0])
    if out is None and not dry_run:
        raise UserError("say where the runs go: --out DIR; or --dry-run to see what would run.")
    planned = studying.plan(settings, out=out, choose=not dry_run, trust_remote_code=trust_remote_code, tell=tell)
    if out is None or dry_run:
        found = studying.dry(planned, only)
        return found, Lines(study_plan(found))
    done = studying.run(planned, out, only=only, command=command, trust_remote_code=trust_remote_code, tell=tell)
    where = f"{out / 'study.json'}, {out / 'README.md'}"
    return done.model_dump(mode="json"), Lines(*study_page.terminal(done), where)


def study_plan(found: dict[str, Any]) -> Table:
    """Return the terminal view of `study --dry-run`."""
    rows = []
    for arm in found["arms"]:
        about = " ".join(f"{axis}={size}" for axis, size in arm["cut"].items())
        about = f"same run as {arm['same_as']}" if arm["same_as"] else about
        about = f"skipped: {' '.join(arm['skipped'].split())}" if arm["skipped"] else about
        about = (
            about if arm["chosen"] else "sizes are not chosen yet: the study runs the model for them, then keeps them"
        )
        about = f"{arm['kind']}, shape and row visits of {arm['like']}" if arm["like"] else about
        figures = ["-" if arm[key] is None else f"{arm[key]:,}" for key in ("parameters", "row_visits")]
        rows.append((arm["name"], about, *figures, str(len(arm["rounds"])) if arm["rounds"] else "-"))
    head = ("arm", "final sizes", "parameters", "row visits", "rounds")
    most = "" if all(arm["chosen"] for arm in found["arms"]) else "at most "
    title = f"{most}{found['runs']} runs, seeds {', '.join(map(str, found['seeds']))}"
    return PlainTable(head=head, rows=tuple(rows), left=2).rich(title)


def accuracy_table(found: dict[str, Any]) -> Table:
    """Return the terminal view of `evaluate`."""
    table = Table(title=escape(f"{found['model']}: exact match on {found['split']}, per cent"))
    for head in ("task", "n", "accuracy", "± s.e.") + (("other", "drop [95 %]") if "effect" in found else ()):
        table.add_column(head, justify="left" if head == "task" else "right")
    for task in (*found["tasks"], None):  # None: all rows
        told = found["overall"] if task is None else found["tasks"][task]
        score = evaluation.Score.model_validate(told)
        cells = [escape(task or "all"), str(score.n), f"{100 * score.accuracy:.1f}", f"{100 * error(score):.1f}"]
        if "effect" in found:
            other = found["other"]["overall"] if task is None else found["other"]["tasks"][task]
            drop = found["effect"]["drop"] if task is None else found["effect"]["drop_tasks"][task]
            cells += [f"{100 * other['accuracy']:.1f}", evaluation.Interval.model_validate(drop).points(1)]
        table.add_row(*cells)
    return table


def bench(
    model: str,
    *,
    against: str | None,
    source: Path | None,
    calls: int,
    energy: bool = False,
    watts: float | None = None,
    allowed: PictureSettings = USUAL,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure one model, or two in turns, on rows of the data (or fresh AdReview creatives)."""
    stated = None if watts is None else joules.Declared(watts)
    names = [name for name in (model, against) if name]
    sides = [checkpoint.load_to_answer(name, trust_remote_code=trust_remote_code) for name in names]
    rows = _bench_rows(source, allowed)
    found: dict[str, Any] = {"environment": measure.environment().model_dump(), "rows": len(rows)}
    found["rows_fingerprint"] = data.fingerprint(rows)
    found["models"] = [model_record(side, None, rows).model_dump() for side in sides]
    batches = max(3, calls // 6)
    if against:
        found["latency"] = measure.compare(sides[0], sides[1], rows, n=calls).model_dump()
        found["throughput"] = measure.compare(sides[0], sides[1], rows, batch_size=32, n=batches, warmup=1).model_dump()
    else:
        one = sides[0]
        found["latency"] = {"first": measure.latency(one.model, one.processor, rows, n=calls).model_dump()}
        found["throughput"] = {"first": measure.throughput(one.model, one.processor, rows, n=batches).model_dump()}
    found["energy"] = joules.bench(sides, rows, stated).model_dump() if energy else None
    return found


def _bench_rows(source: Path | None, allowed: PictureSettings) -> list[data.Row]:
    if source is not None:
        splits = data.load(source, allowed=allowed)
        return splits.test or splits.validation or splits.train
    rows = []
    for index in range(16):
        picture, questions = generator.creative(index, "test")
        content = generator.build.jpeg(picture)
        rows += [data.Row(one["id"], content, one["question"], one["answer"], one["task"]) for one in questions]
    return rows


def bench_table(found: dict[str, Any]) -> Table:
    """Return the terminal view of `bench`."""
    names = [one["name"] for one in found["models"]]
    table = Table(title="measured on this machine")
    table.add_column("figure")
    for name in names:
        table.add_column(escape(name), justify="right")
    table.add_column("ratio", justify="right")
    sides = ("first", "second")[: len(names)]

    def row(label: str, values: list[float | None], shown: str, ratio: float | None = None) -> None:
        cells = ["-" if value is None else format(value, shown) for value in values]
        table.add_row(label, *cells, "-" if ratio is None else f"{ratio:.2f}")

    counts = [one["parameters"]["total"] for one in found["models"]]
    row("parameters", counts, ",", counts[0] / counts[-1] if len(counts) > 1 else None)
    row("bytes on disk", [one["disk_bytes"] for one in found["models"]], ",")
    row(
        f"FLOPs, {found['models'][0]['flops_answer_tokens']}-token answer",
        [one["flops"] for one in found["models"]],
        ".3g",
    )
    row("peak memory, MB", [one["memory"]["peak"] / 1e6 if one["memory"] else None for one in found["models"]], ",.0f")
    latency, throughput = found["latency"], found["throughput"]
    for label, key in (("latency p50, ms (batch 1)", "p50"), ("latency p95, ms", "p95")):
        row(label, [1e3 * latency[side][key] for side in sides], ".1f", latency.get("ratio") if key == "p50" else None)
    row("rows/s at batch 32", [throughput[side]["rows_per_second"] for side in sides], ".1f", throughput.get("ratio"))
    for basis in ("measured", "declared") if found["energy"] else ():
        for one in found["energy"][basis] or ():
            label = f"J a request, batch {one['batch_size']}, {basis}"
            row(label, [one[side]["joules"] for side in sides], ".3g", one["ratio"])
            row(f"- standard deviation, n = {one['first']['n']}", [one[side]["sd"] for side in sides], ".2g")
    table.caption = escape(found["energy"]["reason"] or "") if found["energy"] else None
    return table


def adreview(folder: Path, *, train: int, val: int, test: int, seed: int) -> dict[str, Any]:
    """Write AdReview into a new or empty folder."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder.")
    return asdict(generator.write(folder, train=train, val=val, test=test, seed=seed))


def demo_page(found: dict[str, Any]) -> Lines:
    """Return the terminal view of the demo: the live run, then what the bundled student costs and keeps."""
    live = Results.model_validate(found["live"])
    parts: list[Any] = [rounds_table(live).rich("rounds of the live run", ROUNDS), final_table(live)]
    if "student" in found:
        one, headline = found["student"], Results.model_validate(found["student"]["headline"])
        score, totals = one["accuracy"]["overall"], headline.totals
        whole = live.teacher.parameters["total"]
        lost = "" if headline.effect is None else f"; drop in its own run {points(headline.effect.drop)} points"
        cost = (
            ""
            if totals is None
            else f", which took {duration(totals.seconds)} on {headline.environment.gpu or headline.environment.cpu}"
        )
        parts.append(
            f"bundled student: {one['parameters']:,} parameters ({whole / one['parameters']:.1f}x fewer), "
            f"{100 * score['accuracy']:.1f} % exact match on the same {score['n']} test rows{lost}{cost} "
            "(benchmarks/headline-18x.yaml)"
        )
    else:
        parts.append("no 18x student is bundled in this version: `make headline` makes one (hours on 2 cores)")
    parts.append(
        f"all of it took {duration(found['seconds'])}; the checkpoint, results.json and README.md are in {found['folder']}"
    )
    return Lines(*parts)
