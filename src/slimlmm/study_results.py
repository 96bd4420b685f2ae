"""The typed record of a study, ``study.json``: gathered from its run folders, read by its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, model_validator
from scipy import stats

from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, Interval, Record, paired_test
from slimlmm.files import read_json
from slimlmm.measure import Environment
from slimlmm.results import File, Results
from slimlmm.snapshot import EVALUATION
from slimlmm.studies import Group, Kind, Study

SCHEMA_VERSION: Literal[1] = 1
#: seed of every bootstrap
SEED = 0
#: what equal differences of shares may differ by in floating point
ROUNDING = 1e-12


class Spread(Record):
    """A figure over seeds."""

    mean: float = Field(description="Mean over the seeds.")
    sd: float | None = Field(description="Standard deviation over the seeds (n - 1); null for one seed.")
    n: int = Field(description="Seeds.")


class Run(Record):
    """One arm with one seed."""

    seed: int = Field(description="Seed.")
    accuracy: float = Field(description="Exact match on the test rows, 0 to 1.")
    drop: float = Field(description="The teacher's exact match on the same rows minus that, 0 to 1.")
    tasks: dict[str, float] = Field(description="Exact match per task, 0 to 1.")
    rows: int = Field(description="Test rows.")
    parameters: int = Field(description="Parameters, all counted.")
    row_visits: int = Field(description="Rows seen in training; a row seen twice counts twice.")
    seconds: float = Field(description="Wall time in seconds, without interruptions.")


class Arm(Record):
    """One arm: what was planned, and what its seeds gave."""

    name: str = Field(description="Name of the arm, and of its folder.")
    description: str = Field("", description="What it is.")
    kind: Kind = Field("compress", description="How it reached its shape.")
    like: str | None = Field(None, description="Arm whose shape an untrained control takes.")
    same_as: str | None = Field(None, description="Arm of equal recipe that was run for it.")
    reason: str | None = Field(None, description="Why it was skipped before anything ran.")
    sizes: dict[str, int] = Field({}, description="Planned final size of every axis.")
    planned_parameters: int | None = Field(None, description="Planned parameters.")
    rounds: int | None = Field(None, description="Rounds of its schedule.")
    planned_row_visits: int | None = Field(None, description="Planned row visits of its trainings.")
    runs: tuple[Run, ...] = Field((), description="One record per finished seed.")
    failures: dict[int, str] = Field({}, description="Reason by seed that failed.")
    accuracy: Spread | None = Field(None, description="Exact match over the seeds.")
    drop: Spread | None = Field(None, description="Drop against the teacher over the seeds.")
    drop_interval: Interval | None = Field(
        None, description="The drop, rows of all seeds pooled, paired bootstrap over pictures."
    )
    tasks: dict[str, Spread] = Field({}, description="Exact match per task over the seeds.")


class Difference(Record):
    """An arm against the reference of its group, on the seeds and rows that both have."""

    interval: Interval = Field(
        description="Exact match of the arm minus the reference's; pooled, paired over pictures."
    )
    p: float | None = Field(
        description="Two-sided p-value of no difference, other pictures drawn; exact where few differ; null below two pictures."
    )
    seeds: dict[int, float] = Field(description="The difference of each seed.")
    seeds_p: float | None = Field(
        None,
        description="Two-sided p-value of Student's t-test over the seeds' differences; null where it says nothing.",
    )


class Compared(Record):
    """One group: its arms against its reference."""

    title: str = Field(description="Title.")
    arms: tuple[str, ...] = Field(description="Arms in order.")
    reference: str = Field(description="Arm that the others are compared with.")
    x: dict[str, float] = Field({}, description="A number for each arm, for a curve.")
    x_label: str = Field("", description="What the numbers are.")
    differences: dict[str, Difference] = Field({}, description="By arm; arms without finished seeds are left out.")
    row_visits: tuple[int, int] | None = Field(None, description="Fewest and most row visits of a finished run.")
    notes: tuple[str, ...] = Field((), description="What a reader should know.")


class StudyResults(File):
    """A study: what was asked, and what every arm gave."""

    WHAT: ClassVar[str] = "study.json"

    schema_version: Literal[1] = Field(SCHEMA_VERSION, description="Version of this schema.")
    name: str = Field(description="Name of the folder.")
    title: str = Field("", description="Title of its page.")
    about: str = Field("", description="What was asked, at what budget.")
    command: str | None = Field(None, description="Command line.")
    model: str = Field(description="The model that was compressed.")
    data: str = Field(description="The data.")
    seeds: tuple[int, ...] = Field(description="Seeds that were asked for.")
    environment: Environment = Field(description="Machine and versions at the last gathering.")
    model_fingerprint: str | None = Field(None, description="Hash over the model's configuration and weights, by name.")
    data_fingerprint: str | None = Field(None, description="Hash over all rows and pictures of all splits.")
    rows: dict[str, int] = Field({}, description="Rows per split.")
    teacher: Spread | None = Field(None, description="The teacher's exact match on the test rows over the seeds.")
    teacher_parameters: int | None = Field(None, description="The teacher's parameters.")
    arms: tuple[Arm, ...] = Field(description="Arms in order.")
    groups: tuple[Compared, ...] = Field(description="Comparisons in order.")

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        names = {arm.name for arm in self.arms}
        if unknown := sorted({name for group in self.groups for name in (*group.arms, group.reference)} - names):
            raise ValueError(f"groups name arms that there are not: {', '.join(unknown)}")
        return self


class Answers(Record):
    """Answers of one arm and its teacher, by seed."""

    students: dict[int, Evaluation]
    teachers: dict[int, Evaluation]


class _Control(BaseModel):
    """What ``control.json`` says of an untrained control."""

    parameters: int
    row_visits: int
    seconds: float


class _Failure(BaseModel):
    """Why a run failed."""

    reason: str


CONTROL, FAILURE = TypeAdapter(_Control), TypeAdapter(_Failure)


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """Return the run folder of an arm with a seed."""
    return out / "runs" / arm / f"seed-{seed}"


def failure_of(out: Path, arm: str, seed: int) -> Path:
    """Return where the reason of a failed run is kept."""
    return out / "runs" / arm / f"seed-{seed}.failed.json"


def gather(
    out: Path,
    study: Study,
    arms: Mapping[str, Arm],
    groups: Sequence[Group],
    finished: Mapping[str, Sequence[int]],
    *,
    command: str | None,
    identity: Mapping[str, str],
    environment: Environment,
) -> StudyResults:
    """Return the record of what is `finished` (seeds by arm that was run) in the folder of a study."""
    answers: dict[str, Answers] = {}
    filled: dict[str, Arm] = {}
    first: Results | None = None
    for name, arm in arms.items():
        run = arm.same_as or name
        if run not in answers:
            like = arms[arm.like].same_as or arm.like if arm.like else run
            answers[run] = _answers(out, run, like, finished[run])
        filled[name] = summarised(arm, answers[run], _costs(out, run, finished[run]), _failures(out, run, study.seeds))
        first = first or _first(out, run, finished[run])
    by_name = {name: answers[arm.same_as or name] for name, arm in arms.items()}
    teachers = {seed: one.accuracy for each in answers.values() for seed, one in sorted(each.teachers.items())}
    return StudyResults(
        name=out.resolve().name,
        title=study.title,
        about=study.about,
        command=command,
        model=study.model,
        data=study.data,
        seeds=study.seeds,
        environment=environment,
        model_fingerprint=identity["model"],
        data_fingerprint=identity["data"],
        rows=first.data.rows if first else {},
        teacher=spread(list(teachers.values())) if teachers else None,
        teacher_parameters=first.teacher.parameters["total"] if first else None,
        arms=tuple(filled.values()),
        groups=tuple(compared(group, by_name, filled) for group in groups),
    )


def _answers(out: Path, arm: str, like: str, seeds: Sequence[int]) -> Answers:
    """Read the answers of the finished seeds; the teacher's lie beside those of the arm whose shape was taken."""
    students, teachers = {}, {}
    for seed in seeds:
        folder, beside = folder_of(out, arm, seed), folder_of(out, like, seed)
        students[seed] = read_json(EVALUATION, folder / "student-test.json")
        teachers[seed] = read_json(EVALUATION, beside / "teacher-test.json")
    return Answers(students=students, teachers=teachers)


def _costs(out: Path, arm: str, seeds: Sequence[int]) -> dict[int, tuple[int, int, float]]:
    """Return parameters, row visits and seconds of the finished seeds."""
    found = {}
    for seed in seeds:
        folder = folder_of(out, arm, seed)
        if (folder / "results.json").exists():
            one = Results.load(folder / "results.json")
            assert one.student is not None
            assert one.totals is not None
            found[seed] = (one.student.parameters["total"], one.totals.row_visits, one.totals.seconds)
        else:
            told = read_json(CONTROL, folder / "control.json")
            found[seed] = (told.parameters, told.row_visits, told.seconds)
    return found


def _failures(out: Path, arm: str, seeds: Sequence[int]) -> dict[int, str]:
    places = {seed: failure_of(out, arm, seed) for seed in seeds}
    return {seed: read_json(FAILURE, path).reason for seed, path in places.items() if path.exists()}


def _first(out: Path, arm: str, seeds: Sequence[int]) -> Results | None:
    paths = [folder_of(out, arm, seed) / "results.json" for seed in seeds]
    return next((Results.load(path) for path in paths if path.exists()), None)


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (n - 1) of figures over seeds."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean=float(np.mean(values)), sd=sd, n=len(values))


def summarised(
    arm: Arm, answers: Answers, costs: Mapping[int, tuple[int, int, float]], failures: dict[int, str]
) -> Arm:
    """Return the arm's record with its runs, and their spread over the seeds."""
    runs = []
    for seed, one in answers.students.items():
        parameters, visits, seconds = costs[seed]
        runs.append(
            Run(
                seed=seed,
                accuracy=one.accuracy,
                drop=answers.teachers[seed].accuracy - one.accuracy,
                tasks={task: score.accuracy for task, score in one.summary.tasks.items()},
                rows=one.summary.overall.n,
                parameters=parameters,
                row_visits=visits,
                seconds=seconds,
            )
        )
    if not runs:
        return arm.model_copy(update={"failures": failures})
    tasks = sorted({task for one in runs for task in one.tasks})
    return arm.model_copy(
        update={
            "runs": tuple(runs),
            "failures": failures,
            "accuracy": spread([one.accuracy for one in runs]),
            "drop": spread([one.drop for one in runs]),
            "drop_interval": pooled(answers.teachers, answers.students)[0],
            "tasks": {task: spread([one.tasks[task] for one in runs if task in one.tasks]) for task in tasks},
        }
    )


def pooled(
    first: Mapping[int, Evaluation], second: Mapping[int, Evaluation], *, samples: int = 10_000
) -> tuple[Interval, float | None]:
    """Return accuracy of the first minus the second's with interval and p-value (`paired_test`), rows of all seeds pooled.

    A picture is drawn with its rows of all seeds, so that answers to one picture never count as independent. What the seeds
    themselves vary is not in the interval; the standard deviation over them tells that.

    Raises:
        UserError: there is no common seed, or the rows of a seed differ.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise UserError("no seed is finished in both.")
    for seed in seeds:
        rows = [[one.id for one in side[seed].predictions] for side in (first, second)]
        if rows[0] != rows[1]:
            raise UserError(f"seed {seed}: the two answered different test rows ({len(rows[0])} and {len(rows[1])}).")
    right = [np.concatenate([side[seed].correct for seed in seeds]) for side in (first, second)]
    pictures = _clusters([first[seed] for seed in seeds])
    return paired_test(right[0], right[1], pictures, samples=samples, seed=SEED)


def _clusters(seeds: Sequence[Evaluation]) -> list[str]:
    """Return the key of every row's picture, seed after seed; a picture that a later seed found elsewhere keeps its first key.

    Data are told by what they hold, so their folder may move between seeds; rows of one id are one row then.
    """
    known: dict[str, str] = {}
    found: list[str] = []
    for seed in seeds:
        ids = [one.id for one in seed.predictions]
        if len(set(ids)) < len(ids):
            found += seed.clusters
            continue
        moved = {key: known[name] for name, key in zip(ids, seed.clusters, strict=True) if name in known}
        keys = [moved.get(key, key) for key in seed.clusters]
        known |= dict(zip(ids, keys, strict=True))
        found += keys
    return found


def over_seeds(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value that another draw of seeds would show no difference; None for one seed or no spread.

    Student's paired t-test: t = m / (s / sqrt(n)) with n - 1 degrees of freedom, m and s the mean and standard deviation
    (n - 1) of the n differences. The rows are taken as given where all seeds have the same; `pooled` asks the other question,
    with the seeds given. Shares of rows that differ at all differ by more than `ROUNDING`, so less is no spread.
    """
    if len(differences) < 2 or np.ptp(differences) <= ROUNDING:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def compared(group: Group, answers: Mapping[str, Answers], arms: Mapping[str, Arm]) -> Compared:
    """Return the arms of a group against its reference, and how equal their row visits were."""
    differences, notes = {}, []
    reference = answers[group.reference].students
    for name in group.arms:
        students = answers[name].students
        if name == group.reference or not students:
            continue
        try:
            interval, p = pooled(students, reference)
        except UserError as error:
            notes.append(f"{name} is not compared with {group.reference}: {error}")
            continue
        seeds = {seed: students[seed].accuracy - reference[seed].accuracy for seed in students if seed in reference}
        differences[name] = Difference(interval=interval, p=p, seeds=seeds, seeds_p=over_seeds(list(seeds.values())))
    if len({tuple(sorted(one.id for one in told.predictions)) for told in reference.values()}) > 1:
        notes.append(
            "Each seed drew test rows of its own, so p (seeds) is for other seeds and other test rows together."
        )
    visits = [run.row_visits for name in group.arms for run in arms[name].runs]
    return Compared(
        title=group.title,
        arms=group.arms,
        reference=group.reference,
        x=group.x,
        x_label=group.x_label,
        differences=differences,
        row_visits=(min(visits), max(visits)) if visits else None,
        notes=tuple(notes),
    )
