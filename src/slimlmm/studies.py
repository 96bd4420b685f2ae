"""A study as validated settings: arms over one base recipe, sweeps that make arms, groups that compare them.

``docs/study.md`` is `page`, generated from the fields' descriptions by ``python -m slimlmm.studies docs/study.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from slimlmm import recipe
from slimlmm.errors import UserError, nearest
from slimlmm.recipe import Recipe, Round
from slimlmm.settings import Settings, fields, problems, read_yaml
from slimlmm.trainings import Training

Sweep = Literal[
    "orders",
    "criteria",
    "losses",
    "teachers",
    "own-answers",
    "repairs",
    "fades",
    "rounds",
    "planners",
    "samples",
    "frontier",
    "controls",
]
Kind = Literal["compress", "scratch", "random-init"]
#: name of the arm that is the base recipe itself
BASE = "base"
#: keys that an arm cannot set for all of its rounds and trainings at once, and why
PLANNED = "is planned for each round; say it in recipe.stages."
FIXED: dict[str, dict[str, str]] = {
    "recipe": {"seed": "has no effect; list `seeds`."},
    "rounds": dict.fromkeys(("drop", "sizes", "train"), PLANNED),
    "train": dict.fromkeys(("steps", "pictures_per_step"), PLANNED),
}


class Arm(Settings):
    """One arm: what it changes in the base recipe, or an untrained control of another arm."""

    description: str = Field("", description="What the arm is, for the report.")
    kind: Kind = Field(
        "compress",
        description="compress: the recipe is run. scratch: the final shape of `like` from random weights, cross-entropy alone. "
        "random-init: the same with the losses of `like`, which may not ask a previous model. Both take as many row visits as "
        "`like` took.",
    )
    like: str | None = Field(None, description="Arm whose shape, rows and row visits an untrained control takes.")
    recipe: dict[str, Any] = Field({}, description="Keys of a recipe, merged deeply into `base`; lists are replaced.")
    rounds: dict[str, Any] = Field(
        {},
        description="Keys of a round (criterion, groups, blocks, repair), set in every round of the planned schedule.",
    )
    train: dict[str, Any] = Field(
        {}, description="Keys of a training (losses, learning_rate ...), set in every training of the planned schedule."
    )


class Group(Settings):
    """A comparison of the report: one table, one plot."""

    title: str = Field(description="Title of its section.")
    arms: tuple[str, ...] = Field(min_length=1, description="Arms in the order of the table.")
    reference: str = Field(description="Arm that the others are compared with, paired by picture.")
    x: dict[str, float] = Field({}, description="A number for each arm: the plot is a curve over it.")
    x_label: str = Field("", description="What the numbers are.")


class Study(Settings):
    """A study: experiments that back a method, as one resumable recipe."""

    title: str = Field("", description="Title of its page; the name of the folder where there is none.")
    about: str = Field("", description="What the page says first: what was asked, at what budget.")
    model: str = Field(description="Local folder or hub id of the model, as for compress.")
    data: str = Field(description="Folder or file of rows, as for compress.")
    base: Recipe = Field(
        Recipe(),
        description="Recipe that all arms share, with the keys of docs/recipes.md; bench_calls is 0 here unless it is said.",
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds; every arm is run once with each.")
    arms: dict[str, Arm] = Field({}, description="Arms by name, or a list of arms with their `name`.")
    groups: tuple[Group, ...] = Field((), description="Comparisons for the report; sweeps add theirs.")
    sweeps: tuple[Sweep, ...] = Field((), description="Arms and groups that are made from the base; see below.")
    shrinks: tuple[float, ...] = Field((2, 4, 8, 18, 40, 100), description="Shrinks of the sweep `frontier`.")
    shares: tuple[float, ...] = Field(
        (0.05, 0.1, 0.25, 1.0), description="Shares of the train rows in (0, 1] of the sweep `samples`."
    )

    @field_validator("arms", mode="before")
    @classmethod
    def _by_name(cls, arms: Any) -> Any:
        return _named(arms)

    @field_validator("arms")
    @classmethod
    def _plain_names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        if wrong := [name for name in arms if not _plain(name)]:
            raise ValueError(f"{', '.join(map(repr, wrong))}: names are folders: lower case letters, digits, . _ and -")
        return arms

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ValueError("name each seed once, none below 0")
        return seeds

    @field_validator("shrinks")
    @classmethod
    def _smaller(cls, shrinks: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [shrink for shrink in shrinks if shrink <= 1]:
            raise ValueError(f"shrinks are above 1, not {wrong}")
        return shrinks

    @field_validator("shares")
    @classmethod
    def _parts(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [share for share in shares if not 0 < share <= 1]:
            raise ValueError(f"shares are above 0 and at most 1, not {wrong}")
        return shares


def _plain(name: str) -> bool:
    return name[:1].isalnum() and name == name.lower() and all(sign.isalnum() or sign in "._-" for sign in name)


def _named(arms: Any) -> Any:
    """Return a list of arms with names as a mapping; anything else as it is."""
    if not isinstance(arms, list) or not all(isinstance(one, Mapping) and "name" in one for one in arms):
        return arms
    names = [str(one["name"]) for one in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"arms with one name: {', '.join(twice)}")
    return {str(one["name"]): {key: value for key, value in one.items() if key != "name"} for one in arms}


def read(path: Path) -> Study:
    """Read a YAML study; its `model` and `data` are taken as given, from the working folder."""
    return parse(read_yaml(path, "study"), str(path))


def parse(raw: Any, source: str) -> Study:
    """Validate a study; a UserError lists every problem with its path, those of merged recipes included."""
    found, lines = None, []
    try:
        found = Study.model_validate(raw)
    except ValidationError as error:
        lines = problems(error, _kind)
    if isinstance(raw, Mapping):
        lines += _arm_problems(raw) + _name_problems(raw)
    if found is None or lines:
        raise UserError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines))
    return found


def _kind(place: tuple[Any, ...]) -> type[Settings]:
    """Return the settings that stand at a path."""
    if len(place) == 2 and place[0] == "arms":
        return Arm
    names = [part for part in place if isinstance(part, str)]
    known: dict[str, type[Settings]] = {"base": Recipe, "groups": Group}
    return ({**recipe.PLACES, **known}.get(names[-1], Study)) if names else Study


def _arms_of(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return those arms of an unchecked study that are mappings."""
    try:
        arms = _named(raw.get("arms") or {})
    except ValueError:
        return {}
    return {str(name): arm for name, arm in arms.items() if isinstance(arm, Mapping)} if isinstance(arms, dict) else {}


def _arm_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with recipes after merging, and with changes to rounds and trainings."""
    lines, told_base = [], raw.get("base")
    if isinstance(told_base, Mapping) and "seed" in told_base:
        lines.append("base.seed: has no effect; list `seeds`.")
    try:
        base = Recipe.model_validate(told_base or {})
    except ValidationError:
        base = Recipe()  # its own problems are told already
    for name, arm in _arms_of(raw).items():
        parts: list[tuple[str, type[Settings], Any]] = [
            ("recipe", Recipe, lambda told: merged(base, told).model_dump()),
            ("rounds", Round, dict),
            ("train", Training, lambda told: {"steps": 1, **told}),
        ]
        for key, kind, whole in parts:
            told = arm.get(key)
            if not isinstance(told, Mapping) or not told:
                continue
            try:
                kind.model_validate(whole(told))
            except ValidationError as error:
                lines += problems(error, lambda at, k=kind: _below(at, k), ("arms", name, key))  # type: ignore[misc]
        for key, keys in FIXED.items():
            given = arm.get(key)
            lines += [
                f"arms.{name}.{key}.{one}: {why}"
                for one, why in keys.items()
                if isinstance(given, Mapping) and one in given
            ]
    return lines


def _below(place: tuple[Any, ...], root: type[Settings]) -> type[Settings]:
    names = [part for part in place if isinstance(part, str)]
    return recipe.PLACES.get(names[-1], root) if names else root


def _name_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return where arms are referred to that do not exist."""
    arms, lines = _arms_of(raw), []
    sweeps = raw.get("sweeps") or []
    known = [*arms, BASE]
    if BASE in arms:
        lines.append(f"arms.{BASE}: this name is taken by the base recipe itself; choose another.")
    for name, arm in arms.items():
        kind, like = arm.get("kind", "compress"), arm.get("like")
        if kind != "compress" and like is None:
            lines.append(f"arms.{name}.like: a {kind} arm needs the arm whose shape it takes.")
        if kind == "compress" and like is not None:
            lines.append(f"arms.{name}.like: has no effect on a compress arm; say kind: scratch or random-init.")
        if kind != "compress" and (given := [key for key in ("recipe", "rounds", "train") if arm.get(key)]):
            lines.append(f"arms.{name}.{given[0]}: has no effect; a {kind} arm takes its settings from its `like`.")
        if like is not None and like not in known:
            lines.append(f"arms.{name}.like: no arm {like!r}. {nearest(str(like), known)}")
        elif like in arms and arms[like].get("kind", "compress") != "compress":
            lines.append(f"arms.{name}.like: {like!r} is no compress arm, so it has no shape of its own.")
    groups = raw.get("groups")
    for number, group in enumerate(groups if isinstance(groups, list) else []):
        if not isinstance(group, Mapping) or sweeps:  # whose arms are made later: `sweeps.expand` looks at groups then
            continue
        lines += group_problems(f"groups.{number}", group, known)
    if not arms and not sweeps and not raw.get("groups"):
        lines.append("study: has no arms; list some, or sweeps.")
    return lines


def group_problems(where: str, group: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return the arms of one group that do not exist or do not fit together; with sweeps `known` is known once they have run."""
    arms = group.get("arms")
    arms = list(arms) if isinstance(arms, list | tuple) else []
    lines = [f"{where}.arms: no arm {name!r}. {nearest(str(name), known)}" for name in arms if name not in known]
    reference = group.get("reference")
    if reference is not None and arms and reference not in arms:
        lines.append(f"{where}.reference: {reference!r} is not among its arms ({', '.join(map(str, arms))}).")
    x = group.get("x")
    if (
        isinstance(x, Mapping)
        and x
        and (lacking := [name for name in arms if not isinstance(name, str) or name not in x])
    ):
        lines.append(f"{where}.x: no number for {', '.join(map(str, lacking))}.")
    return lines


def merged(base: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the base recipe with the overrides merged deeply; mappings merge, anything else is replaced.

    Raises:
        ValidationError: the result is no recipe.
    """
    return Recipe.model_validate(_deep(base.model_dump(mode="json"), overrides))


def _deep(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _deep(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in over.items()
    }
    return {**base, **both}


INTRODUCTION = """# Studies

`slimlmm study STUDY.yaml --out DIR` runs the experiments that back a method as one recipe: every arm with every seed, each in a
run folder `DIR/runs/ARM/seed-N`, with one cache of what the teacher says. Killed at any time, the same command goes on at the
first round that is not finished. Sizes that `sizes_by` has the model run for are chosen once, before the first run, and kept in
`DIR/sizes/`; a dry run reads them there, or says that they are not chosen yet. An arm that cannot be carried out is reported
with its reason, and the others go on.

Arms with the same beginning (cuts, then training after training, with one seed) make it once: what the first of them got to
is kept in `DIR/beginnings/`, a model for each place where arms to come will go on, and each goes on from the last place that
it has in common with one before. Its record counts those seconds as its own, so that they say what the arm alone would take.

```
slimlmm study STUDY.yaml --out DIR --dry-run         # arms with final sizes, parameters, rounds, row visits; runs nothing
slimlmm study STUDY.yaml --out DIR --arms base fast  # these arms only, and those whose shape they take
slimlmm study DIR --page docs/results.md             # the page and its plots again, from DIR/study.json alone; of several
                                                     # folders or files, all studies on one page
```

`DIR/study.json` holds for every arm mean and standard deviation over the seeds, and for every group the paired bootstrap by
picture against its reference: rows of all seeds are pooled, pictures (each with its rows of all seeds) are drawn with
replacement; 95 % interval and two-sided p-value; where fewer than ten pictures differ, bounds for few and an exact sign test,
and neither of one picture. So the interval is over pictures, with the seeds pooled: it leaves out the
variation between seeds, which the standard deviation and the p-value of a paired t-test over the seeds show. All arms of one
seed answer the same test rows; `data.test_rows` are drawn by the seed, so that over the seeds the rows vary too, which the page
notes. `DIR/README.md` shows one table and one plot per group.

```yaml
model: path/to/model
data: path/to/rows
base: {shrink: 18, row_visits: 600000}
seeds: [0, 1, 2]
sweeps: [orders, controls]
arms:
  gentle: {description: a lower learning rate, train: {learning_rate: 1.0e-4}}
groups:
  - {title: Learning rate, arms: [base, gentle], reference: base}
```

| sweep | arms |
|---|---|
| `orders` | all six orders of the levels |
| `criteria` | units by OBS, Taylor, activation, magnitude, at random; blocks and key/value groups as in the base |
| `losses` | on answers: with and without the margin, cross-entropy, KL, both; and cross-entropy in every training (no teacher) |
| `teachers` | divergences from the first teacher, from the model that the round began with, from both |
| `own-answers` | none, half, all of the pictures that the teacher is asked about learnt from the student's own answers |
| `repairs` | all, none, and all but each of refit, rotate, merge, bridge and settle |
| `fades` | what goes of inner dimensions and blocks is cut at once, or fades out over a quarter or half of the first training |
| `rounds` | as planned; one round per level; all levels in one round; one level alone, to the same number of parameters |
| `planners` | sizes by shares of one scale; by importance per cost (the model is tried before the first run) |
| `samples` | `shares` of the train rows |
| `frontier` | `shrinks` |
| `controls` | from scratch; random weights with the same losses; units and blocks at random without repair |

The arm `base` is the base recipe. Arms equal in recipe are run once. The schedule of `shrink` is planned before `rounds` and
`train` change it, so row visits stay equal; the report says how equal they were. `orders`, `planners`, `frontier` and the arms
of one level need a base with `shrink`; where a size cannot be reached, the arm is skipped and the report says why. Where
`data.answers` lets the teacher label rows, sizes are planned before it has answered, with the tokens of the rows as they are.
"""


def page() -> str:
    """Return the documentation of studies as Markdown."""
    lines = INTRODUCTION.rstrip("\n").split("\n")
    for kind, title in ((Study, "top level"), (Arm, "arms"), (Group, "groups")):
        lines += fields(kind, title)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
