"""Sweeps: arms and groups made from a base recipe, so that nobody writes forty arms by hand.

An arm is what it changes in the recipe (`Wanted.recipe`) and in the schedule that was planned from that: its shape
(`Wanted.change`), then keys of every training (steps follow, for equal row visits) and of every round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from slimlmm import controls, staging
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.plan import follow_width
from slimlmm.recipe import CHOOSING, LEVELS, REPAIRS, Recipe, Round, Stage
from slimlmm.resizing import cut_in_turn
from slimlmm.studies import BASE, Arm, Group, Kind, Study, group_problems
from slimlmm.trainings import DIVERGENCES, LossName, Training

Stages = tuple[Stage, ...]
Change = Callable[[Stages], Stages]
#: losses on answer tokens
ANSWERS = tuple(name for name in get_args(LossName) if name not in ("picture_states", "block_states"))
CRITERIA = ("obs", "taylor", "activation", "magnitude", "random")


def unchanged(stages: Stages) -> Stages:
    """Return the stages as they are."""
    return stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An arm before it is planned."""

    description: str
    kind: Kind = "compress"
    like: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    change: Change = unchanged
    rounds: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A group before it is planned; without a reference it is the arm that turns out to be the base."""

    title: str
    arms: tuple[str, ...]
    reference: str | None = None
    x: Mapping[str, float] = field(default_factory=dict)
    x_label: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a study is about: how many train rows there are, how many of them a picture has in the mean, the model's config."""

    count: int
    per_picture: float
    config: Any


def expand(study: Study, subject: Subject) -> tuple[dict[str, Wanted], tuple[Comparison, ...]]:
    """Return all arms by name (the base first, if anything refers to it) and all comparisons of a study.

    Args:
        study: the settings.
        subject: the train rows of the data, which shares are shares of, and the config that is cut.

    Raises:
        UserError: an arm has the name of one that a sweep makes, or a group does not fit the arms that there are.
    """
    arms = {name: _own(arm) for name, arm in study.arms.items()}
    groups = [_listed(group) for group in study.groups]
    referred = {name for group in study.groups for name in group.arms} | {arm.like for arm in study.arms.values()}
    if study.sweeps or BASE in referred:
        arms = {BASE: Wanted(description="the base recipe"), **arms}
    for sweep in study.sweeps:
        made, group = SWEEPS[sweep](study, subject)
        if taken := sorted(set(made) & set(study.arms)):
            raise UserError(f"arms.{taken[0]}: the sweep {sweep!r} makes an arm of that name; choose another.")
        arms |= made
        groups.append(group)
    lost = [
        line
        for number, group in enumerate(study.groups)
        for line in group_problems(f"groups.{number}", group.model_dump(), list(arms))
    ]
    if lost:
        raise UserError("the study's groups do not fit its arms:\n  " + "\n  ".join(lost))
    alone = [name for name in study.arms if not any(name in group.arms for group in groups)]
    if alone:
        reference = BASE if BASE in arms else alone[0]
        names = tuple(alone) if reference in alone else (reference, *alone)
        groups.append(Comparison(title="Other arms" if groups else "Arms", arms=names, reference=reference))
    return arms, tuple(groups)


def _own(arm: Arm) -> Wanted:
    return Wanted(
        description=arm.description,
        kind=arm.kind,
        like=arm.like,
        recipe=arm.recipe,
        rounds=arm.rounds,
        train=arm.train,
    )


def _listed(group: Group) -> Comparison:
    return Comparison(title=group.title, arms=group.arms, reference=group.reference, x=group.x, x_label=group.x_label)


def everywhere(stages: Stages, rounds: Mapping[str, Any], train: Mapping[str, Any]) -> Stages:
    """Return the stages with these keys set in every round, and those in every training."""
    return each(
        stages,
        lambda turn: Round.model_validate({**turn.model_dump(), **rounds}),
        lambda one: Training.model_validate({**one.model_dump(), **train}),
    )


def each(stages: Stages, turned: Callable[[Round], Round], trained: Callable[[Training], Training]) -> Stages:
    """Return the stages with every training changed, then every round."""

    def changed(turn: Round) -> Round:
        return turned(turn.model_copy(update={"train": tuple(map(trained, turn.train))}))

    return tuple(one.model_copy(update={"rounds": tuple(map(changed, one.rounds))}) for one in stages)


def answered_by(stages: Stages, losses: Callable[[dict[str, float]], dict[str, float]]) -> Stages:
    """Return the stages with the losses on answer tokens replaced where there are any; picture_states and block_states stay.

    Raises:
        UserError: no loss would be left.
    """

    def trained(one: Training) -> Training:
        answer = {str(name): weight for name, weight in one.losses.items() if name in ANSWERS}
        if not answer:
            return one
        rest = {name: weight for name, weight in one.losses.items() if name not in ANSWERS}
        if not (wanted := losses(answer)):
            raise UserError(f"the base trains answers with {', '.join(answer)} alone; without it no loss is left.")
        plain = {} if DIVERGENCES & set(wanted) else dict(controls.NO_TEACHER)
        if rest:  # states are still those of the teacher that they were
            plain["teachers"] = {"first": 1.0} if "first" in one.teachers else one.teachers
        return Training.model_validate({**one.model_dump(), **plain, "losses": {**wanted, **rest}}).heard()

    return each(stages, lambda turn: turn, trained)


def asked_of_some(stages: Stages) -> Stages:
    """Return a default schedule for a teacher that is asked about some pictures: none of what needs it at each is matched."""

    def trained(one: Training) -> Training:
        rest = {name: weight for name, weight in one.losses.items() if name not in staging.BLOCK_STATES}
        return one if rest == one.losses else one.model_copy(update={"losses": rest | staging.PICTURE_STATES})

    return each(stages, lambda turn: turn, trained)


def judged(stages: Stages, keys: Mapping[str, Any]) -> Stages:
    """Return the stages with these keys set in every training that has a divergence from a teacher.

    Raises:
        UserError: none has.
    """

    def trained(one: Training) -> Training:
        return Training.model_validate({**one.model_dump(), **keys}) if DIVERGENCES & set(one.losses) else one

    if not any(DIVERGENCES & set(one.losses) for stage in stages for turn in stage.rounds for one in turn.train):
        raise UserError(
            f"no training of the base has one of {', '.join(sorted(DIVERGENCES))}, so no teacher is heard there."
        )
    return each(stages, lambda turn: turn, trained)


def one_round_per_level(stages: Stages, config: Any) -> Stages:
    """Return the stages with the cuts of each made at once, trained as its last round for as many row visits as all of them."""
    found = []
    for one in stages:
        found.append(one.model_copy(update={"rounds": _at_once(one.rounds, config)}))
        for turn in one.rounds:
            config = cut_in_turn(config, turn.sizes)
    return tuple(found)


def one_shot(stages: Stages, config: Any) -> Stages:
    """Return one stage with all cuts at once after the lossless ones, trained as the last round for as many row visits."""
    lossless = [one for one in stages if all(turn.drop for turn in one.rounds)]
    rounds = tuple(turn for one in stages if one not in lossless for turn in one.rounds)
    return (*lossless, Stage(name="one-shot", rounds=_at_once(rounds, config))) if rounds else tuple(lossless)


def _at_once(rounds: Sequence[Round], config: Any) -> tuple[Round, ...]:
    """Return one round for these, of which the first begins with `config`; rounds that cut nothing by size stay before it."""
    plain, cuts = [one for one in rounds if not one.sizes], [one for one in rounds if one.sizes]
    if not cuts:
        return tuple(plain)
    trainings = next((one.train for one in reversed(cuts) if one.train), ())
    whole = sum(picture_visits(one.train) for one in cuts)
    scale = whole / picture_visits(trainings) if trainings else 0.0
    longer = tuple(one.model_copy(update={"steps": max(1, round(one.steps * scale))}) for one in trainings)
    sizes = _sizes_at_once(config, [one.sizes for one in cuts])
    return (*plain, cuts[-1].model_copy(update={"sizes": sizes, "train": longer}))


def _sizes_at_once(config: Any, cuts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return one cut to the sizes that these end at: each axis once, at its first place, an FFN stated at the width of then."""
    small = config
    for sizes in cuts:
        small = cut_in_turn(small, sizes)
    end, widths = describe(small), dict(describe(config).sizes)
    stated: dict[str, int] = {}
    for axis in dict.fromkeys(axis for sizes in cuts for axis in sizes):
        stated |= follow_width(end, {axis: end.axis(axis).size}, widths | stated)
    return stated


def picture_visits(trainings: Sequence[Training]) -> int:
    """Return how many groups of questions about one picture these trainings see."""
    return sum(one.steps * one.pictures_per_step for one in trainings)


def _set(**keys: Any) -> Change:
    return lambda stages: everywhere(stages, keys, {})


def _orders(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    made = {
        f"order-{'-'.join(order)}": Wanted(description=", then ".join(order), recipe={"order": list(order)})
        for order in itertools.permutations(LEVELS)
    }
    return made, Comparison(title="Order of the levels", arms=tuple(made))


def _criteria(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    made = {
        f"criterion-{name}": Wanted(description=f"units by {name}", change=_set(criterion=name)) for name in CRITERIA
    }
    return made, Comparison(title="Criterion", arms=tuple(made))


def _losses(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    def only(*names: str) -> Change:
        return lambda stages: answered_by(stages, lambda had: {name: had.get(name, 1.0) for name in names})

    def margin(had: dict[str, float]) -> dict[str, float]:
        return {"pairwise_margin": Training.model_fields["losses"].default["pairwise_margin"], **had}

    def no_margin(had: dict[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in had.items() if name != "pairwise_margin"}

    alone = {"losses": {"cross_entropy": 1.0}, "freeze": ("patch_embedding",), **controls.NO_TEACHER}
    ways: dict[str, tuple[str, Change]] = {
        "margin": ("with the pairwise margin", lambda stages: answered_by(stages, margin)),
        "no-margin": ("without the pairwise margin", lambda stages: answered_by(stages, no_margin)),
        "ce": ("answers by cross-entropy only", only("cross_entropy")),
        "kl": ("answers by forward KL only", only("forward_kl")),
        "ce-kl": ("answers by cross-entropy and forward KL", only("cross_entropy", "forward_kl")),
        "no-teacher": ("cross-entropy in every training, no teacher", lambda stages: everywhere(stages, {}, alone)),
    }
    made = {f"losses-{name}": Wanted(description=told, change=change) for name, (told, change) in ways.items()}
    return made, Comparison(title="Losses", arms=tuple(made))


def _judged(**keys: Any) -> Change:
    return lambda stages: judged(stages, keys)


def _teachers(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    ways: dict[str, tuple[str, dict[str, float]]] = {
        "first": ("the first teacher", {"first": 1.0}),
        "previous": ("the model that the round began with", {"previous": 1.0}),
        "both": ("the first teacher and the model that the round began with", {"first": 1.0, "previous": 1.0}),
    }
    made = {
        f"teachers-{name}": Wanted(description=f"taught by {told}", change=_judged(teachers=weights))
        for name, (told, weights) in ways.items()
    }
    return made, Comparison(title="Teachers", arms=tuple(made))


def _own_answers(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    shares = (0.0, 0.5, 1.0)
    made = {
        f"own-answers-{100 * share:g}": Wanted(
            description=f"{100 * share:g} % of the pictures learnt from the student's own answers",
            change=_judged(own_answers=share),
        )
        for share in shares
    }
    x = dict(zip(made, shares, strict=True))
    return made, Comparison(title="Own answers", arms=tuple(made), x=x, x_label="share of own answers")


def _repairs(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    made = {
        "repair-all": Wanted(description="all repairs where they apply", change=_set(repair=REPAIRS)),
        "repair-none": Wanted(description="no repair", change=_set(repair=())),
    }
    for name in REPAIRS:
        others = tuple(other for other in REPAIRS if other != name)
        made[f"repair-without-{name}"] = Wanted(description=f"all but {name}", change=_set(repair=others))
    return made, Comparison(title="Repair", arms=tuple(made))


def _fades(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    ways = {"none": ("at once", 0.0), "25": ("over a quarter", 0.25), "50": ("over half", 0.5)}
    made = {
        f"fade-{name}": Wanted(description=f"units go {told} of the first training, no repair", change=_fading(share))
        for name, (told, share) in ways.items()
    }
    return made, Comparison(title="Fade against hard cut", arms=tuple(made))


def _fading(share: float) -> Change:
    return lambda stages: faded(stages, share)


def faded(stages: Stages, share: float) -> Stages:
    """Return the stages where units fade over a share of the first training, in every round in which they can, without repair.

    There the trainings of answers come first, for any share, 0 (the hard cut) included, so that arms differ in nothing else.

    Raises:
        UserError: in no round they can.
    """
    able = 0

    def turned(turn: Round) -> Round:
        nonlocal able
        trainings = tuple(sorted(turn.train, key=lambda one: one.sees_pictures_alone))
        first = trainings[0].steps if trainings else 0
        whole = turn.model_copy(update={"train": trainings, "repair": (), "fade": min(round(share * first), first - 1)})
        if first < 2 or whole.cannot_fade():
            return turn
        able += 1
        return whole

    found = each(stages, turned, lambda one: one)
    if not able:
        raise UserError(
            "the base has no round of inner dimensions or blocks alone that trains answers, so nothing can fade."
        )
    return found


def _rounds(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    def merging(merge: Callable[[Stages, Any], Stages]) -> Change:
        return lambda stages: merge(stages, subject.config)

    made = {
        "rounds-planned": Wanted(description="all rounds, each recovered"),
        "rounds-per-level": Wanted(description="one round per level", change=merging(one_round_per_level)),
        "rounds-one-shot": Wanted(description="all levels in one round", change=merging(one_shot)),
    }
    for level in LEVELS:
        made[f"only-{level}"] = Wanted(description=f"only {level}, to the same parameters", recipe={"order": [level]})
    return made, Comparison(title="Stages", arms=tuple(made))


def _planners(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    heard = {"shares": (), "importance": ("curve_rows",)}
    defaults = {key: Recipe.model_fields[key].default for key in CHOOSING}
    changed = {key: value for key, value in defaults.items() if getattr(study.base, key) != value}
    made = {
        f"sizes-by-{way}": Wanted(
            description=f"sizes by {way}",
            recipe={key: value for key, value in changed.items() if key not in keys} | {"sizes_by": way},
        )
        for way, keys in heard.items()
    }
    return made, Comparison(title="Choice of sizes", arms=tuple(made))


def _samples(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    used = study.base.data.train_rows
    whole, made = min(used or subject.count, subject.count), {}
    x = {BASE: float(whole)}
    for share in study.shares:
        name = f"samples-{100 * share:g}"
        count = min(
            whole, round(max(1, round(share * whole / subject.per_picture)) * subject.per_picture)
        )  # whole pictures
        train_rows = used if share == 1 else count
        made[name] = Wanted(
            description=f"{100 * share:g} % of the train rows", recipe={"data": {"train_rows": train_rows}}
        )
        x[name] = float(count)
    return made, Comparison(title="Train rows", arms=tuple(made), x=x, x_label="train rows")


def _frontier(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    made = {
        f"frontier-{shrink:g}": Wanted(description=f"{shrink:g}x fewer parameters", recipe={"shrink": shrink})
        for shrink in study.shrinks
    }
    x = {name: float(shrink) for name, shrink in zip(made, study.shrinks, strict=True)}
    x |= {BASE: study.base.shrink} if study.base.shrink else {}
    return made, Comparison(title="Frontier", arms=tuple(made), x=x, x_label="times fewer parameters")


def _controls(study: Study, subject: Subject) -> tuple[dict[str, Wanted], Comparison]:
    made = {
        "control-scratch": Wanted(description=controls.DESCRIPTIONS["scratch"], kind="scratch", like=BASE),
        "control-random-init": Wanted(description=controls.DESCRIPTIONS["random-init"], kind="random-init", like=BASE),
        "control-random-units": Wanted(description=controls.DESCRIPTIONS["random-units"], change=controls.at_random),
    }
    return made, Comparison(title="Controls", arms=(BASE, *made), reference=BASE)


SWEEPS: dict[str, Callable[[Study, Subject], tuple[dict[str, Wanted], Comparison]]] = {
    "orders": _orders,
    "criteria": _criteria,
    "losses": _losses,
    "teachers": _teachers,
    "own-answers": _own_answers,
    "repairs": _repairs,
    "fades": _fades,
    "rounds": _rounds,
    "planners": _planners,
    "samples": _samples,
    "frontier": _frontier,
    "controls": _controls,
}


def conflicts(base: Recipe, overrides: Mapping[str, Any]) -> str | None:
    """Say why overrides of the default schedule have no effect on a recipe that lists stages; None where they have."""
    lost = [key for key in ("shrink", "order", "row_visits", "multiples", *CHOOSING) if key in overrides]
    if base.stages and lost and "stages" not in overrides:
        return f"the base lists stages, so {', '.join(lost)} has no effect; give the base a shrink instead."
    return None
