"""The typed record of a run, ``results.json``: written by the pipeline, read by the report.

Its documentation ``docs/results-schema.md`` is `schema_page`, generated from the fields' descriptions by
``python -m slimlmm.results docs/results-schema.md``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from slimlmm.errors import UserError
from slimlmm.evaluate import Accuracy, Evaluation, Interval, Record, Score, agreement, drop
from slimlmm.files import write_text
from slimlmm.measure import Comparison, Environment, Memory
from slimlmm.recipe import Recipe
from slimlmm.settings import on_one_line

SCHEMA_VERSION: Literal[1] = 1


class File(Record):
    """A record that is a JSON file of its own; `WHAT` it is called in messages."""

    WHAT: ClassVar[str] = "results file"

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate; a UserError names each field that does not fit."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        except ValidationError as error:
            raise UserError(
                f"{path} is not a {cls.WHAT} of schema version {SCHEMA_VERSION}: {on_one_line(error)}."
            ) from error


class Dataset(Record):
    """The rows that the run saw."""

    name: str = Field(description="Name of the data set as given.")
    fingerprint: str | None = Field(None, description="Hash over all rows and pictures of all splits.")
    rows: dict[str, int] = Field(description="Rows per split.")
    notes: tuple[str, ...] = Field((), description="What was said while reading: skipped rows, splits made.")


def _with_total(counts: dict[str, int]) -> dict[str, int]:
    if counts.get("total", 0) <= 0:
        raise ValueError("has no total above 0")
    return counts


class Model(Record):
    """One model, measured; what was not measured is null."""

    name: str = Field(description="Folder name or hub id.")
    model_type: str = Field(description="model_type of its stock config.")
    fingerprint: str | None = Field(None, description="Hash over configuration and weights, by name.")
    sizes: dict[str, int] = Field(description="Size of every axis that can be cut.")
    parameters: Annotated[dict[str, int], AfterValidator(_with_total)] = Field(
        description="Parameters by part, and `total`; tied ones count once."
    )
    disk_bytes: int | None = Field(None, description="Bytes of all files of its folder.")
    accuracy: Accuracy | None = Field(None, description="Exact match on the test split.")
    validation: Score | None = Field(None, description="Exact match on the validation split, as in the rounds.")
    flops: float | None = Field(
        None,
        description="Floating-point operations per answer (multiply-add = 2), see `flops_answer_tokens`.",
    )
    flops_answer_tokens: int | None = Field(None, description="Answer tokens that `flops` was counted with.")
    flops_prompt_tokens: int | None = Field(None, description="Tokens of the prompt, with its picture, before them.")
    memory: Memory | None = Field(None, description="Peak of a new process that loads it and answers one row.")


class Look(Record):
    """A look at validation rows during a training."""

    step: int = Field(description="Optimizer steps made by then.")
    loss: float | None = Field(description="Cross-entropy per answer token; null where it was no number.")

    @field_validator("loss", mode="before")
    @classmethod
    def _number(cls, loss: float | None) -> float | None:
        return loss if loss is not None and math.isfinite(loss) else None


class Round(Record):
    """One turn of score, plan, cut, recover, evaluate."""

    number: int = Field(description="Position in the run, from 1.")
    stage: str = Field(description="Name of the stage: lossless, blocks, inner, width.")
    round: int = Field(description="Position in the stage, from 1.")
    criterion: str | None = Field(None, description="How units were scored; null when nothing had to be chosen.")
    before: dict[str, int] = Field(description="Sizes of the axes cut in this round, before it.")
    after: dict[str, int] = Field(description="Sizes of the same axes after it.")
    parameters_before: int = Field(description="Parameters before the cut.")
    parameters: int = Field(description="Parameters after the cut.")
    half: bool = Field(False, description="Whether this is half of a cut that missed the promise.")
    kept_promise: bool = Field(
        True, description="Whether validation stayed within `max_drop`; else it was rolled back."
    )
    fade: int = Field(
        0,
        description="Optimizer steps over which the units that went faded out; counted in `steps`, not in `trainings`.",
    )
    trainings: int = Field(0, description="Trainings made, those repeated for a missed promise included.")
    after_cut: Score | None = Field(None, description="Validation score after cut and repair, before any training.")
    after_recovery: Score | None = Field(None, description="Validation score after training; null if there was none.")
    losses: dict[str, float] = Field({}, description="Last mean losses per answer token by name; `total` is weighted.")
    steps: int = Field(0, description="Optimizer steps.")
    row_visits: int = Field(0, description="Rows seen in training; a row seen twice counts twice.")
    seconds: float = Field(description="Wall time of the round in seconds, evaluation included.")
    flops: float | None = Field(None, description="Floating-point operations of the training.")
    looks: tuple[Look, ...] = Field(
        (), description="What the last training saw of validation rows, where it looks at them."
    )
    kept_step: int | None = Field(
        None,
        description="Step of the last training whose weights stayed, where it looks; `losses` are those of its end.",
    )
    remarks: tuple[str, ...] = Field(
        (),
        description="Sizes that were planned and not possible any more; trainings that were made again, at half of the rate or "
        "with fewer pictures at once, and why.",
    )

    @model_validator(mode="after")
    def _same_axes(self) -> Self:
        if lacking := sorted(self.after.keys() - self.before.keys()):
            raise ValueError(f"after names {', '.join(lacking)}, of which before knows nothing")
        return self


class Ratios(Record):
    """Teacher over student: how many times smaller or faster; null where either was not measured."""

    parameters: float = Field(description="Parameters, all counted.")
    disk: float | None = Field(None, description="Bytes on disk.")
    flops: float | None = Field(None, description="Floating-point operations per answer.")
    latency: float | None = Field(None, description="Median seconds per answer at batch 1.")
    throughput: float | None = Field(None, description="Rows per second, student over teacher.")
    memory: float | None = Field(None, description="Peak memory.")


class Effect(Record):
    """What the compression changed, on the rows of the test split that both models answered."""

    drop: Interval = Field(description="Teacher's accuracy minus student's, 0 to 1, paired bootstrap over pictures.")
    drop_tasks: dict[str, Interval] = Field(description="The same per task.")
    agreement: float = Field(description="Share of rows that both answered alike, right or wrong.")


Verdict = Literal["kept", "undecided", "broken"]


class Promise(Record):
    """Whether the test rows bear out what was promised: a non-inferiority test on the paired interval of the drop.

    kept: the upper end of the interval is within the margin; broken: its lower end is beyond it; undecided: the margin lies
    inside, or there is no interval, so that more pictures are needed to tell.
    """

    margin: float = Field(description="Drop that was allowed over all rows, 0 to 1.")
    overall: Verdict = Field(description="Verdict over all rows.")
    task_margin: float = Field(description="Drop that was allowed in each task, 0 to 1.")
    tasks: dict[str, Verdict] = Field(description="Verdict per task; tasks that were spared are left out.")
    spared: tuple[str, ...] = Field((), description="Tasks of the test rows that were promised nothing.")


class Control(Record):
    """A control arm: the same final shape reached in another way."""

    name: str = Field(description="What was different: scratch, random units, ...")
    description: str = Field(description="How it was trained, in a sentence.")
    parameters: int = Field(description="Its parameters.")
    accuracy: Accuracy = Field(description="Exact match on the test split.")
    behind: Interval = Field(description="Student's accuracy minus the control's, paired bootstrap over pictures.")
    row_visits: int | None = Field(None, description="Rows seen in its training.")
    seconds: float | None = Field(None, description="Wall time of its training.")


class Totals(Record):
    """What the run cost, sums over the choice of sizes, the rounds and the evaluations of test rows."""

    seconds: float = Field(
        description="Wall time of these in seconds, without interruptions; reading data, checks and timing are not in it."
    )
    row_visits: int = Field(description="Rows seen in training; a row seen twice counts twice.")
    flops: float | None = Field(None, description="Floating-point operations of training; null if any round lacks it.")
    choice_seconds: float = Field(0.0, description="Of the seconds, those of choosing sizes by running the model.")
    choice_row_visits: int = Field(0, description="Of the row visits, those of shapes that a search recovered.")


class Results(File):
    """One compression run: what went in, every round, what came out, and what it cost."""

    schema_version: Literal[1] = Field(SCHEMA_VERSION, description="Version of this schema.")
    name: str = Field(description="Name of the run.")
    command: str | None = Field(None, description="Command line that started it.")
    seed: int = Field(description="Seed of the run.")
    remote_code: str | None = Field(
        None, description="Module of model code that came with the model and was run; null for stock classes alone."
    )
    environment: Environment = Field(description="Machine and versions.")
    data: Dataset = Field(description="Data set.")
    teacher: Model = Field(description="The model that was compressed.")
    rounds: tuple[Round, ...] = Field((), description="One record per finished round, in order.")
    student: Model | None = Field(None, description="The compressed model; null while the run is not finished.")
    effect: Effect | None = Field(None, description="Accuracy of the student against the teacher, paired.")
    promise: Promise | None = Field(None, description="Verdict on `max_drop`; null where nothing was promised.")
    latency: Comparison | None = Field(
        None, description="Batch 1, picture file to answer, teacher and student in turns."
    )
    throughput: Comparison | None = Field(None, description="Batch 32, the same.")
    ratios: Ratios | None = Field(None, description="Times smaller and faster.")
    controls: tuple[Control, ...] = Field((), description="Control arms, where they were run.")
    totals: Totals | None = Field(None, description="Cost of the run.")
    notes: tuple[str, ...] = Field((), description="Things that a reader should know.")


def effect(teacher: Evaluation, student: Evaluation, *, samples: int = 10_000, seed: int = 0) -> Effect:
    """Compare two evaluations of the same rows: drop overall and per task, agreement."""
    tasks = {}
    for task in student.summary.tasks:
        parts = [one.only(task) for one in (teacher, student)]
        tasks[task] = drop(parts[0], parts[1], samples=samples, seed=seed)
    return Effect(
        drop=drop(teacher, student, samples=samples, seed=seed),
        drop_tasks=tasks,
        agreement=agreement(teacher, student),
    )


def promise(effect: Effect, recipe: Recipe) -> Promise | None:
    """Return the verdict on the recipe's promise, None where it makes none."""
    if recipe.max_drop is None:
        return None

    def verdict(drop: Interval, points: float) -> Verdict:
        (low, high), margin = drop.ends, points / 100
        return "kept" if high <= margin else "broken" if low > margin else "undecided"

    tasks = {name: drop for name, drop in effect.drop_tasks.items() if name not in recipe.spared_tasks}
    return Promise(
        margin=recipe.max_drop / 100,
        overall=verdict(effect.drop, recipe.max_drop),
        task_margin=recipe.max_task_drop / 100,
        tasks={name: verdict(drop, recipe.max_task_drop) for name, drop in tasks.items()},
        spared=tuple(name for name in effect.drop_tasks if name not in tasks),
    )


def short_of(recipe: Recipe, reached: float, missed: Sequence[Round]) -> list[str]:
    """Return the note on a `shrink` that the default schedule was made for and the parameters fall short of; none otherwise."""
    if recipe.stages or recipe.shrink is None or reached >= recipe.shrink:
        return []
    why = "the promise was missed" if missed else "cuts that were planned were not possible any more"
    return [f"{recipe.shrink:g} times fewer parameters were asked for, {reached:.4g} times fewer are left: {why}."]


def told(missed: Round) -> str:
    """Return the note on a round that missed the promise."""
    cut = ", ".join(f"{axis} {missed.before[axis]} -> {size}" for axis, size in missed.after.items())
    what = "half of the cut" if missed.half else "the cut"
    return (
        f"Round {missed.number} {missed.stage}.{missed.round} ({what}: {cut}) missed the promise and was rolled back."
    )


def remarks(rounds: Sequence[Round]) -> list[str]:
    """Return the notes on sizes that were not possible any more and on trainings that were made again."""
    return [f"Round {one.number} {one.stage}.{one.round}: {remark}" for one in rounds for remark in one.remarks]


def ratios(
    teacher: Model, student: Model, latency: Comparison | None = None, throughput: Comparison | None = None
) -> Ratios:
    """Return teacher over student for everything that both sides have."""

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    memory = over(
        teacher.memory.peak if teacher.memory else None,
        student.memory.peak if student.memory else None,
    )
    return Ratios(
        parameters=teacher.parameters["total"] / student.parameters["total"],
        disk=over(teacher.disk_bytes, student.disk_bytes),
        flops=over(teacher.flops, student.flops),
        latency=latency.ratio if latency else None,
        throughput=throughput.ratio if throughput else None,
        memory=memory,
    )


class Spent(Record):
    """What choosing sizes took, by running the model."""

    seconds: float = 0.0
    row_visits: int = 0
    flops: float | None = 0.0


def totals(rounds: Sequence[Round], evaluation_seconds: float = 0.0, choice: Spent | None = None) -> Totals:
    """Sum what the choice of sizes and the rounds cost; FLOPs are null if a trained round lacks them."""
    choice = choice or Spent()
    trained = [choice.flops, *(one.flops for one in rounds if one.steps)]
    known = [flops for flops in trained if flops is not None]
    return Totals(
        seconds=choice.seconds + sum(one.seconds for one in rounds) + evaluation_seconds,
        row_visits=choice.row_visits + sum(one.row_visits for one in rounds),
        flops=sum(known) if len(known) == len(trained) else None,
        choice_seconds=choice.seconds,
        choice_row_visits=choice.row_visits,
    )


def schema_page() -> str:
    """Return the documentation of results.json as Markdown, from the fields' descriptions."""
    schema = Results.model_json_schema()
    records = {"Results": schema, **schema["$defs"]}
    order = ["Results"]
    for name in order:
        for field in records[name]["properties"].values():
            order += [found for found in _references(field) if found not in order]
    lines = [
        "# results.json",
        "",
        f"Schema version {SCHEMA_VERSION}. Generated: `python -m slimlmm.results docs/results-schema.md`.",
        "Unknown fields are refused. What was not measured is null, never estimated.",
        "Times are seconds, sizes bytes, accuracies shares from 0 to 1.",
    ]
    for name in order:
        lines += ["", f"## {name}", "", *records[name]["description"].splitlines(), ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field}` | {_type(value)} | {value['description']} |"
            for field, value in records[name]["properties"].items()
        ]
    return "\n".join(lines) + "\n"


def _references(field: dict[str, Any]) -> list[str]:
    """Return the names of the records that a field's schema refers to."""
    text = json.dumps(field)
    return [part.split('"')[0] for part in text.split("#/$defs/")[1:]]


def _type(field: dict[str, Any]) -> str:
    """Return a field's type in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "const" in field or "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        return f"name -> {_type(field['additionalProperties'])}"
    return str(field["type"])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_page(), encoding="utf-8")
