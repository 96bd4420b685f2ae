"""Many runs for one question: plan the arms of a study, run each with every seed, gather what came out; all of it resumable.

DIR/run.json  study.yaml  cache/  sizes/ (choices that ran the model)  beginnings/ (what arms to come share)  study.json
runs/ARM/seed-N/ (run folders)  README.md  plots/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slimlmm import checkpoint, controls, data, pipeline, recipe, study_page, study_results, sweeps
from slimlmm.anatomy import describe
from slimlmm.beginnings import Beginnings
from slimlmm.errors import UserError
from slimlmm.files import read_json, write_json, write_text
from slimlmm.lessons import asked_of
from slimlmm.lossless import Lossless
from slimlmm.measure import environment
from slimlmm.progress import Quiet, Reporter
from slimlmm.recipe import Recipe, Round, Stage
from slimlmm.resizing import cut_in_turn, predict_parameters, resized
from slimlmm.runfolder import IDENTITY, claim, held
from slimlmm.sensitivity import TRIAL
from slimlmm.settings import on_one_line
from slimlmm.snapshot import identity_of
from slimlmm.studies import BASE, Group, Study, merged
from slimlmm.study_results import Arm, StudyResults
from slimlmm.sweeps import Comparison, Subject, Wanted
from slimlmm.trainings import DIVERGENCES, Training


def _with(one: Training, keys: Mapping[str, Any]) -> Training:
    """Return a training with the keys of an arm that say something to its losses."""
    judged = DIVERGENCES & set(keys.get("losses", one.losses))
    heard = {key: value for key, value in keys.items() if judged or key not in ("own_answers", "own_temperature")}
    return Training.model_validate({**one.model_dump(), **heard}).heard()


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A study whose arms have sizes, rounds and row visits: the records to be filled, their recipes, and what identifies it."""

    study: Study
    arms: dict[str, Arm]
    recipes: dict[str, Recipe]
    groups: tuple[Group, ...]
    teacher: dict[str, int]
    identity: dict[str, Any]
    unchosen: frozenset[str] = frozenset()
    """arms whose sizes wait for a choice that runs the model: `dry` tells of them, nothing else takes such a plan"""

    def run_of(self, name: str) -> str:
        """Return the arm that is run for this one: itself, or the first one of equal recipe."""
        return self.arms[name].same_as or name

    def seeded(self, name: str, seed: int) -> Recipe:
        """Return the recipe of an arm with a seed."""
        return self.recipes[name].model_copy(update={"seed": seed})

    def signature(self, name: str, seed: int) -> dict[str, Any]:
        """Return what the ``run.json`` of an arm with a seed says if its folder belongs to this plan; {} where none can."""
        arm = self.arms[name]
        run = self.run_of(arm.like) if arm.like else name
        if run not in self.recipes:
            return {}
        settings = recipe.dump(self.seeded(run, seed))
        return {"kind": arm.kind, "like": run, "recipe": settings} if arm.like else {"recipe": settings}

    def finished(self, out: Path, name: str, seed: int) -> bool:
        """Tell whether an arm with a seed is finished, by the recipe that it has in this plan."""
        folder, signed = study_results.folder_of(out, name, seed), self.signature(name, seed)
        last = folder / ("control.json" if self.arms[name].like else "results.json")
        if not signed or not last.exists() or not (folder / "run.json").exists():
            return False
        told = read_json(IDENTITY, folder / "run.json")
        return all(told.get(key) == value for key, value in signed.items())

    def todo(self, only: Sequence[str] = ()) -> list[str]:
        """Return the arms to run, in order: all, or those in `only` with the arms whose shape they take; untrained ones last.

        Raises:
            UserError: `only` names an arm that there is not.
        """
        if unknown := [name for name in only if name not in self.arms]:
            raise UserError(f"--arms: no arm {', '.join(unknown)}. Known: {', '.join(self.arms)}.")
        wanted = {self.run_of(name) for name in only or self.arms}
        wanted |= {self.run_of(like) for name in wanted if (like := self.arms[name].like)}
        names = [name for name in self.arms if name in wanted and self.arms[name].reason is None]
        return sorted(names, key=lambda name: self.arms[name].kind != "compress")


class _UnchosenError(UserError):
    """The sizes of an arm are not chosen yet, and this plan may not run the model to choose them."""


@dataclass(slots=True)
class _Planner:
    """The model and rows that plans are made for; what arms have in common is planned once.

    Sizes that are chosen by running the model are kept in the folder `out`, and made where they are not there if it `chooses`.
    """

    loaded: checkpoint.Loaded
    rows: dict[str, list[data.Row]]
    identity: dict[str, Any]
    out: Path | None
    chooses: bool
    tell: Reporter
    lossless: Lossless | None = None
    schedules: dict[str, sweeps.Stages] = field(default_factory=dict)
    shapes: dict[str, tuple[dict[str, int], int]] = field(default_factory=dict)
    steps: dict[tuple[Any, ...], float] = field(default_factory=dict)
    visited: dict[int | None, data.StepRows] = field(default_factory=dict)

    def recipe(self, base: Recipe, wanted: Wanted) -> Recipe:
        """Return the arm's recipe with its schedule written out.

        Raises:
            UserError: its keys do not fit together, or its size cannot be reached or is not chosen yet.
        """
        if told := sweeps.conflicts(base, wanted.recipe):
            raise UserError(told)
        whole = merged(base, wanted.recipe)
        planned = whole.model_copy(update={"data": base.data})  # arms on other rows are of the same sizes
        asked = recipe.dump(planned)
        if asked not in self.schedules:
            self.schedules[asked] = self._schedule(planned, asked)
        stages = self.schedules[asked]
        if whole.data.teacher_rows is not None and not whole.stages:
            stages = sweeps.asked_of_some(stages)
        stages = self._as_many_visits(wanted.change(stages), planned, whole, wanted.train)
        stages = sweeps.everywhere(stages, wanted.rounds, {})
        found = whole.resolved(stages).model_copy(update={"seed": 0})  # that of a run is put in when it starts
        if vain := found.unheard():
            raise UserError("; ".join(vain))
        Recipe.model_validate(found.model_dump())  # sweeps put stages together that nobody has looked at as a whole
        return found

    def _schedule(self, planned: Recipe, asked: str) -> sweeps.Stages:
        """Return the schedule of a recipe, its sizes read where they were chosen before."""

        def made(folder: Path | None = None, tell: Reporter | None = None, kept: Path | None = None) -> sweeps.Stages:
            step, place = self._full(planned), (lambda: folder) if folder else None
            return pipeline.schedule(self.loaded, self.rows, planned, place, tell, a_step=step, kept=kept)[0]

        if planned.stages or planned.sizes_by == "shares":
            return made()
        folder = self.out and self.out / "sizes" / self._hashed(asked)
        if folder and (folder / "sizes.json").exists():
            return made(folder)
        if not self.chooses:
            raise _UnchosenError("choosing its sizes runs the model.")
        if not (self.out and folder):
            return made(None, self.tell)
        with held(self.out, self.identity):
            folder.mkdir(parents=True, exist_ok=True)
            tried = TRIAL.model_dump_json(), planned.data.model_dump_json(), planned.curve_rows, planned.seed
            return made(folder, self.tell, folder.with_name(f"trials-{self._hashed(*tried)}.json"))

    def _hashed(self, *what: Any) -> str:
        """Return a name for what was asked of this model and these rows."""
        return hashlib.sha256(json.dumps([self.identity, *what]).encode()).hexdigest()[:16]

    def _full(self, settings: Recipe) -> data.StepRows:
        """Return the row visits of steps as if all were full, so that arms may put steps together."""
        used = settings.data.train_rows
        if used not in self.visited:
            self.visited[used] = data.rows_a_step(data.sample(self.rows["train"], used, 0))
        return lambda pictures, questions: pictures * self.visited[used](1, questions)

    def _as_many_visits(
        self, stages: sweeps.Stages, planned: Recipe, whole: Recipe, keys: Mapping[str, Any]
    ) -> sweeps.Stages:
        """Return the stages with these keys in every training, and steps for as many row visits on the arm's rows as were meant.

        Epochs end in a part, which counts where pictures are few. Listed stages mean what they take on the rows they are for.
        """
        full = None if whole.stages else self._full(planned)

        def trained(one: Training) -> Training:
            shape = one.pictures_per_step, one.questions_per_picture
            meant = full(*shape) if full else self._rows_a_step(planned, one)
            new = _with(one, keys)
            return new.model_copy(update={"steps": max(1, round(one.steps * meant / self._rows_a_step(whole, new)))})

        def turned(turn: Round) -> Round:
            train = tuple(map(trained, turn.train))
            fade = round(turn.fade * train[0].steps / turn.train[0].steps) if turn.fade else 0
            return turn.model_copy(update={"train": train, "fade": fade})

        return sweeps.each(stages, turned, lambda one: one)

    def _rows_a_step(self, settings: Recipe, one: Training) -> float:
        """Return the mean row visits of a step of a training, on the rows of a recipe."""
        used = settings.data
        of = (used.train_rows, used.teacher_rows, *one.losses, one.pictures_per_step, one.questions_per_picture)
        if of not in self.steps:
            rows = data.sample(self.rows["train"], used.train_rows, 0)
            self.steps[of] = controls.rows_a_step(rows, one, asked_of(rows, used.teacher_rows, 0)[1])
        return self.steps[of]

    def facts(self, settings: Recipe) -> dict[str, Any]:
        """Return final sizes, parameters, rounds and planned row visits.

        Raises:
            UserError: its sizes cannot be said by the config, or not split.
        """
        turns = [turn for stage in settings.stages for turn in stage.rounds]
        cuts = repr([(turn.drop, turn.sizes) for turn in turns]) + str(settings.tensor_parallel)
        if cuts not in self.shapes:
            self.shapes[cuts] = self._shape(settings, turns)
        sizes, parameters = self.shapes[cuts]
        visits = sum(one.steps * self._rows_a_step(settings, one) for turn in turns for one in turn.train)
        return {
            "sizes": sizes,
            "planned_parameters": parameters,
            "rounds": len(turns),
            "planned_row_visits": round(visits),
        }

    def _shape(self, settings: Recipe, turns: Sequence[Round]) -> tuple[dict[str, int], int]:
        """Return final sizes and parameters, after checking that every round can be carried out."""
        config = self.loaded.model.config
        pipeline.check(self.loaded, settings.stages, settings.tensor_parallel)
        if drops := {what for turn in turns for what in turn.drop}:
            # a look at all texts, for all arms
            self.lossless = self.lossless or pipeline.lossless(self.loaded, self.rows)
            config = resized(config, self.lossless.sizes(drops))
        for turn in turns:
            config = cut_in_turn(config, turn.sizes)
        return describe(config).sizes, predict_parameters(config, {})


def plan(
    study: Study,
    *,
    out: Path | None = None,
    choose: bool = True,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> Planned:
    """Expand sweeps, plan every arm's schedule, find arms of equal recipe; what cannot be planned gets its reason.

    Sizes that are chosen by running the model (``sizes_by``) are read from the study's folder `out`; those that are not there
    are chosen and kept in it, or, without `choose`, left open.

    Raises:
        UserError: bad model or data, or names that do not fit.
    """
    tell = tell or Quiet()
    device = None if choose else "cpu"
    loaded = checkpoint.load_to_answer(study.model, device=device, trust_remote_code=trust_remote_code)
    if vain := study.base.unheard():
        raise UserError("base: " + "\n  ".join(vain))
    rows = _rows(study)
    identity = identity_of(loaded, rows)
    planner = _Planner(loaded, rows, identity, out, choose, tell)
    train = rows["train"]
    pictures = len({row.picture_key() for row in train})
    wanted, comparisons = sweeps.expand(study, Subject(len(train), len(train) / pictures, loaded.model.config))
    arms: dict[str, Arm] = {}
    recipes: dict[str, Recipe] = {}
    timed = "bench_calls" in study.base.model_fields_set
    base = study.base if timed else study.base.model_copy(update={"bench_calls": 0})
    for number, (name, one) in enumerate(wanted.items(), 1):
        tell.step("planning arms", number, len(wanted))
        arms[name] = _arm(name, one, base, planner, arms, recipes)
    return Planned(
        study=study,
        arms=arms,
        recipes=recipes,
        groups=tuple(_group(one, arms) for one in comparisons),
        teacher=describe(loaded.model.config).sizes,
        identity=identity,
        unchosen=frozenset(name for name, arm in arms.items() if not (arm.like or arm.reason or name in recipes)),
    )


def _rows(study: Study) -> dict[str, list[data.Row]]:
    settings = study.base.data
    splits = data.load(
        study.data,
        max_bad_share=settings.max_bad_share,
        unlabelled=settings.answers != "given",
        allowed=settings.pictures,
    )
    return {name: splits.need(name, study.data) for name in ("train", "validation", "test")}


def _arm(
    name: str, wanted: Wanted, base: Recipe, planner: _Planner, arms: Mapping[str, Arm], recipes: dict[str, Recipe]
) -> Arm:
    """Plan one arm after those in `arms`; its recipe goes into `recipes`."""
    arm = Arm(name=name, description=wanted.description, kind=wanted.kind, like=wanted.like)
    if wanted.like is not None:
        return arm
    try:
        found = planner.recipe(base, wanted)
        facts = planner.facts(found)
    except _UnchosenError:
        return arm
    except UserError as error:
        return arm.model_copy(update={"reason": str(error)})
    except ValidationError as error:
        return arm.model_copy(update={"reason": f"its recipe is not valid: {on_one_line(error)}"})
    recipes[name] = found
    same = next((other for other in arms if recipes.get(other) == found), None)
    return arm.model_copy(update={**facts, "same_as": arms[same].same_as or same if same else None})


def _group(one: Comparison, arms: Mapping[str, Arm]) -> Group:
    """Return the group with its reference: the one said, the arm that is the base, or the base put before the arms."""
    names, reference = one.arms, one.reference
    if reference is None:
        reference = next((name for name in names if arms[name].same_as == BASE), BASE)
        names = names if reference in names else (BASE, *names)
    x = {name: one.x[name] for name in names} if set(names) <= set(one.x) else {}
    return Group(title=one.title, arms=names, reference=reference, x=x, x_label=one.x_label)


def run(
    planned: Planned,
    out: Path,
    *,
    only: Sequence[str] = (),
    command: str | None = None,
    trust_remote_code: bool = False,
    tell: Reporter | None = None,
) -> StudyResults:
    """Run what is not finished, seed after seed, and write ``study.json`` and the page after each seed.

    An arm that fails with a UserError is recorded with its reason; the others go on.

    Raises:
        UserError: `out` belongs to another model or data, or `only` names an unknown arm.
    """
    names, study = planned.todo(only), planned.study
    claim(out, planned.identity)
    with held(out):
        write_text(
            out / "study.yaml", yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        )
        work = _Work(planned, out, command, trust_remote_code, tell or Quiet())
        for turn, seed in enumerate(study.seeds, 1):
            for number, name in enumerate(names, 1):
                where = f"arm {number} of {len(names)}: {name}, seed {seed} ({turn} of {len(study.seeds)})"
                work.settle(name, seed, where)
            found = gathered(planned, out, command)
            found.save(out / "study.json")
            study_page.write([found], out / "README.md")
        work.shared()
    return found


def gathered(planned: Planned, out: Path, command: str | None = None) -> StudyResults:
    """Return the record of what is finished in the folder."""
    runs = {planned.run_of(name) for name in planned.arms}
    return study_results.gather(
        out,
        planned.study,
        planned.arms,
        planned.groups,
        {name: [seed for seed in planned.study.seeds if planned.finished(out, name, seed)] for name in runs},
        command=command,
        identity=planned.identity,
        environment=environment().model_copy(update={"git": None}),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What every run of one study shares."""

    planned: Planned
    out: Path
    command: str | None
    trust_remote_code: bool
    tell: Reporter

    def shared(self, now: tuple[str, int] | None = None) -> Beginnings:
        """Return what runs that are to come have in common, of all arms and seeds; what is kept for none of them goes.

        Those that are finished or have failed are not to come, but for the one that is made `now`.
        """
        planned, out = self.planned, self.out

        def comes(name: str, seed: int) -> bool:
            over = planned.finished(out, name, seed) or study_results.failure_of(out, name, seed).exists()
            return (name, seed) == now or not over

        arms = [name for name in planned.todo() if name in planned.recipes]
        recipes = [planned.seeded(name, seed) for seed in planned.study.seeds for name in arms if comes(name, seed)]
        return Beginnings.of(out / "beginnings", recipes)

    def settle(self, name: str, seed: int, place: str) -> None:
        """Run one arm with one seed unless it is finished; a UserError becomes its recorded reason."""
        failed = study_results.failure_of(self.out, name, seed)
        if self.planned.finished(self.out, name, seed):
            failed.unlink(missing_ok=True)
            self.tell.say(f"{place} was done")
            return
        self.tell.say(place)
        try:
            (self._compress if self.planned.arms[name].kind == "compress" else self._control)(name, seed)
            failed.unlink(missing_ok=True)
        except UserError as error:
            self.tell.say(f"{place} failed: {error}")
            failed.parent.mkdir(parents=True, exist_ok=True)
            write_json(failed, {"reason": str(error)})

    def _compress(self, name: str, seed: int) -> None:
        pipeline.run(
            self.planned.study.model,
            self.planned.study.data,
            study_results.folder_of(self.out, name, seed),
            self.planned.seeded(name, seed),
            command=self.command,
            trust_remote_code=self.trust_remote_code,
            tell=self.tell,
            cache=self.out / "cache",
            beginnings=self.shared((name, seed)),
        )

    def _control(self, name: str, seed: int) -> None:
        """Train an untrained control of a finished arm."""
        arm, study, cache = self.planned.arms[name], self.planned.study, self.out / "cache"
        assert arm.like is not None
        assert arm.kind != "compress"
        like = self.planned.run_of(arm.like)
        if reason := self.planned.arms[like].reason:
            raise UserError(f"its shape is that of {like}, which cannot be planned: {reason}")
        if not self.planned.finished(self.out, like, seed):
            raise UserError(f"its shape is that of {like} with seed {seed}, which is not finished.")
        run, folder = (study_results.folder_of(self.out, one, seed) for one in (like, name))
        claim(folder, self.planned.signature(name, seed))
        done = controls.untrained(arm.kind, run, study.model, study.data, folder, tell=self.tell, cache=cache)
        write_text(folder / "student-test.json", done.answers.model_dump_json())
        facts = {"parameters": done.parameters, "row_visits": done.row_visits, "seconds": done.seconds}
        write_json(folder / "control.json", facts)


def rounds_of(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield one line per round: its stage and what it cuts."""
    for stage in stages:
        for number, turn in enumerate(stage.rounds, 1):
            cuts = ", ".join(turn.drop) or ", ".join(f"{axis}={size}" for axis, size in turn.sizes.items())
            yield f"{stage.name}.{number}: {cuts or 'nothing'}"


def dry(planned: Planned, only: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `--dry-run` tells: every arm, or those of `only`, with final sizes, parameters, rounds and row visits.

    Of an arm whose sizes are not chosen yet these are not known, nor whether another one has its recipe.
    """
    arms, todo = [], planned.todo(only)
    for name, arm in planned.arms.items():
        if only and name not in (*only, *todo):
            continue
        found = planned.recipes.get(name)
        arms.append(
            {
                "name": name,
                "description": arm.description,
                "kind": arm.kind,
                "like": arm.like,
                "same_as": arm.same_as,
                "skipped": arm.reason,
                "chosen": name not in planned.unchosen,
                "sizes": arm.sizes,
                "cut": {axis: size for axis, size in arm.sizes.items() if size != planned.teacher[axis]},
                "parameters": arm.planned_parameters,
                "row_visits": arm.planned_row_visits,
                "rounds": list(rounds_of(found.stages)) if found else [],
            }
        )
    runs = len(todo) * len(planned.study.seeds)
    return {"seeds": list(planned.study.seeds), "runs": runs, "arms": arms, "groups": [g.title for g in planned.groups]}
