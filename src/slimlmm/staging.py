"""Sizes -> rounds with their trainings: the default schedule; and what a list of stages asks for that cannot be carried out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from slimlmm import vocab
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy
from slimlmm.data import StepRows
from slimlmm.deployable import unsplittable
from slimlmm.errors import UserError
from slimlmm.families import FAMILIES
from slimlmm.grid import Grid
from slimlmm.lineage import unknown_towers
from slimlmm.lossless import living_blocks
from slimlmm.plan import follow_width
from slimlmm.recipe import DROPS, LEVELS, Drop, Level, Recipe, Round, Stage
from slimlmm.resizing import predict_parameters, resized
from slimlmm.selfcheck import shallow
from slimlmm.trainings import LossName, Training

#: most that one round may divide the parameters by, and most that it may divide an axis by
ROUND_RATIO, AXIS_RATIO = 2.5, 2.0
#: share of the recovery's compute (row visits x parameters) that the last shape gets; the rest is shared evenly
LAST_SHARE = 0.75
#: share of a round's row visits that stop at the language model, and the most steps of that training
STATES_SHARE, MOST_STATES = 0.25, 200
#: steps that the training of answers needs; where row visits are too few for that, rounds are joined
LEAST_STEPS = 12
#: peak learning rate of answers for a whole model, the power of whole / left parameters that it grows by, and where that ends
FIRST_RATE, RATE_POWER, MOST_RATE = 1e-4, 0.6, 6e-4
#: ratio of parameters from which a step takes twice the pictures, and matrices of linear maps move by Muon
MANY_RATIO = 6.0
#: how many times AdamW's rate of answers Muon bears
MUON_RATE = 5 / 3
#: how many times the rate of answers the states of pictures bear
STATES_RATE = 2.5
#: what of the teacher's states shapes below `MANY_RATIO` match beside answers, where the teacher is asked about all pictures
BLOCK_STATES: dict[LossName, float] = {"block_states": 10.0}
#: what is matched elsewhere
PICTURE_STATES: dict[LossName, float] = {"picture_states": 1.0}


def one_row_each(pictures: int, questions: int) -> float:
    """Return the row visits of a step where every picture has one row and there are more pictures than a step takes."""
    return float(pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """What a round cuts: sizes `stated` at its width, and the parameters it leaves."""

    level: Level
    stated: dict[str, int]
    parameters: int


def stages_for(
    config: Any,
    final: Mapping[str, int],
    *,
    row_visits: int,
    a_step: StepRows = one_row_each,
    order: Sequence[Level] = LEVELS,
    grid: Grid | None = None,
    drops: tuple[Drop, ...] = DROPS,
    near: dict[LossName, float] = BLOCK_STATES,
) -> tuple[Stage, ...]:
    """Return the default schedule: lossless cuts (`drops`), then the levels of `order`, each round at most `ROUND_RATIO`.

    Every round is recovered before the next cut, for `row_visits` in all; `a_step` says what a step makes of them. Compute is
    shared, not visits: a visit of a small shape is cheap, so the last one gets most of them. Where that leaves a training
    of answers fewer than `LEAST_STEPS`, as many rounds of a level are joined as it takes. `near`: see `near_of`.
    """
    anatomy = describe(config)
    levels = {level: {n: s for n, s in final.items() if anatomy.axis(n).level == level} for level in order}
    recovery = partial(_trainings, anatomy, a_step=a_step, near=PICTURE_STATES if unknown_towers(anatomy) else near)
    planned = _planned(config, levels, row_visits, recovery, grid or Grid())
    stages = [Stage(name="lossless", rounds=(Round(drop=drops),))] if drops else []
    for level in order:
        rounds = [turn for name, turn in planned if name == level]
        stages += [Stage(name=level, rounds=tuple(rounds))] if rounds else []
    return tuple(stages)


def near_of(recipe: Recipe) -> dict[LossName, float]:
    """Return what of the teacher's states a run's default schedule matches while a shape is near the teacher's, by weight.

    The stream behind every block tells hundreds of times as much of a picture as its answers do; the teacher runs at every step
    for it, so not where it is asked about some pictures alone.
    """
    return BLOCK_STATES if recipe.data.teacher_rows is None else PICTURE_STATES


def _planned(
    config: Any,
    levels: Mapping[Level, Mapping[str, int]],
    row_visits: int,
    recovery: Callable[[float, float], tuple[Training, ...]],
    grid: Grid,
) -> list[tuple[Level, Round]]:
    """Return the rounds, each with its level and the `recovery` of a ratio and row visits: as few joined as answers need."""
    whole = _count(config, {})
    for joined in itertools.count(1):
        cuts = _cuts(config, levels, grid, joined)
        if not cuts:
            raise UserError("no axis has to be cut for that; ask for a smaller model.")
        planned = [
            (cut.level, Round(sizes=cut.stated, train=recovery(whole / cut.parameters, visits)))
            for cut, visits in zip(cuts, _visits(cuts, row_visits), strict=True)
        ]
        least = min(turn.train[-1].steps for _, turn in planned)
        if least >= LEAST_STEPS or len(cuts) == len({cut.level for cut in cuts}):
            break
    return planned


def _cuts(config: Any, levels: Mapping[Level, Mapping[str, int]], grid: Grid, joined: int) -> list[_Cut]:
    """Return the rounds of every level in turn, `joined` of those that `ROUND_RATIO` asks for made one."""
    anatomy = describe(config)
    current = {name: anatomy.axis(name).size for final in levels.values() for name in final}
    cuts: list[_Cut] = []
    for level, final in levels.items():
        for sizes in _steps(config, current, final, grid, joined):
            stated = follow_width(anatomy, sizes, current)
            current |= sizes
            cuts.append(_Cut(level=level, stated=stated, parameters=_count(config, current)))
    return cuts


def _visits(cuts: Sequence[_Cut], row_visits: int) -> list[float]:
    """Return each round's row visits: equal row visits x parameters for all but the last, which gets `LAST_SHARE`."""
    shares = [(1 - LAST_SHARE) / (len(cuts) - 1)] * (len(cuts) - 1) if len(cuts) > 1 else []
    weights = [share / cut.parameters for share, cut in zip([*shares, LAST_SHARE], cuts, strict=True)]
    return [row_visits * weight / sum(weights) for weight in weights]


def _trainings(
    anatomy: Anatomy, ratio: float, row_visits: float, *, a_step: StepRows, near: dict[LossName, float]
) -> tuple[Training, ...]:
    """Return one round's recovery: first what comes before the language model learns the teacher's states, then all the answers.

    A picture costs far less where the language model does not run, and says more: one state a picture token; in long rounds that
    is soon learnt (MOST_STATES). The further a model is cut (`ratio`: whole / left parameters), the higher a learning rate it
    bears and needs; a nearly whole one is damaged by it: rate = FIRST_RATE ratio^RATE_POWER, at most MOST_RATE, and STATES_RATE
    times that for states. From MANY_RATIO on it moves by Muon, at MUON_RATE times the rate for answers (docs/lab-notes.md).
    """
    far, questions = ratio >= MANY_RATIO, Training.model_fields["questions_per_picture"].default
    pictures, optimizer = (16, "muon") if far else (8, "adamw")
    rate = min(MOST_RATE, FIRST_RATE * ratio**RATE_POWER)
    answers_rate = rate * MUON_RATE if far else rate

    def steps(visits: float, pictures: int) -> int:
        return max(1, round(visits / a_step(pictures, questions)))

    def training(steps: int, pictures: int, rate: float, **more: Any) -> Training:
        return Training(
            steps=steps,
            pictures_per_step=pictures,
            learning_rate=float(f"{rate:.2g}"),
            optimizer=optimizer,
            warmup=0.1,
            **more,
        )

    if anatomy.axes["text.blocks"].refusal or FAMILIES[anatomy.model_type].beside:
        return (training(steps(row_visits, pictures), pictures, answers_rate),)
    seen = min(MOST_STATES, steps(row_visits * STATES_SHARE, 2 * pictures))
    left = row_visits - seen * a_step(2 * pictures, questions)
    return (
        training(seen, 2 * pictures, STATES_RATE * rate, losses=PICTURE_STATES, freeze=("patch_embedding", "text")),
        training(
            steps(left, pictures),
            pictures,
            answers_rate,
            losses=Training.model_fields["losses"].default | (PICTURE_STATES if far else near),
        ),
    )


def _steps(
    config: Any, current: Mapping[str, int], final: Mapping[str, int], grid: Grid, joined: int
) -> list[dict[str, int]]:
    """Split one level's cut geometrically, in legal sizes, into rounds of at most `ROUND_RATIO`, none more than halving an axis.

    That is where sizes allow; of these rounds `joined` are made one.
    """
    if all(current[name] == size for name, size in final.items()):
        return []
    anatomy = describe(config)
    ratio = _count(config, current) / _count(config, {**current, **final})
    steepest = max(current[name] / size for name, size in final.items())
    rounds = max(math.log(ratio) / math.log(ROUND_RATIO), math.log(steepest) / math.log(AXIS_RATIO) - 1e-9)
    count = max(1, math.ceil(math.ceil(rounds) / joined))
    steps: list[dict[str, int]] = []
    last = dict(current)
    legal = {name: grid.sizes(config, anatomy.axis(name)) for name in final}
    for index in range(1, count + 1):
        sizes: dict[str, int] = {}
        for name, size in final.items():
            wanted = current[name] * (size / current[name]) ** (index / count)
            choices = [c for c in legal[name] if size <= c < last[name]] if index < count else []
            near = sorted(choices, key=lambda c: abs(math.log(c / wanted)))
            sizes |= _accepted(config, last | sizes, name, [*near, size])
        sizes = {name: size for name, size in sizes.items() if size < last[name]}
        if sizes:
            last |= sizes
            steps.append(sizes)
    return steps


def _accepted(config: Any, others: Mapping[str, int], name: str, choices: Sequence[int]) -> dict[str, int]:
    """Return the first size of the axis that the stock config accepts beside the others (heads divide the width, for one)."""
    anatomy = describe(config)
    for size in choices:
        whole = {**others, name: size}
        try:
            resized(config, follow_width(anatomy, whole, whole))
        except UserError:
            continue
        return {name: size}
    return {name: choices[-1]}


def _count(config: Any, sizes: Mapping[str, int]) -> int:
    return predict_parameters(config, follow_width(describe(config), sizes, sizes))


def check_stages(config: Any, stages: Sequence[Stage], tensor_parallel: int = 1, *, whole: str = "") -> None:
    """Refuse what cannot be carried out, all at once, before anything runs.

    That is axes and sizes that the config cannot say or the devices cannot split, and unused tokens where the vocabulary has to
    stay `whole`, for this reason. Lossless cuts come before all others: what they leave is the teacher.
    """
    anatomy, problems, living = describe(config), [], living_blocks(config)
    blocks = {name: axis.size for name, axis in anatomy.axes.items() if axis.kind == "blocks"}
    config = shallow(config)  # sizes other than those of blocks do not depend on the depth
    turns = [(stage.name, number, turn) for stage in stages for number, turn in enumerate(stage.rounds)]
    cuts = False
    for stage, number, turn in turns:
        cuts = cuts or not turn.drop
        if turn.drop and (cuts or turn.sizes):
            late = "drop comes before all other rounds and without sizes, for what it leaves is the teacher"
            problems.append(f"stages.{stage}.rounds.{number}: {late}; move it to a round of its own at the start.")
        if whole and "unused_tokens" in turn.drop:
            problems.append(f"stages.{stage}.rounds.{number}.drop: {vocab.KeptWholeError(whole)}")
        blocks |= {name: min(size, blocks[name]) for name, size in living.items() if "dead_blocks" in turn.drop}
        for name, size in turn.sizes.items():
            try:
                if anatomy.axis(name).kind == "tokens":
                    raise UserError(
                        f"{name} changes the prompt, and the teacher would read another one than the student: "
                        f"cut it first (slimlmm cut MODEL --set {name}={size}) and compress what comes out."
                    )
                if name not in blocks:
                    config = resized(config, {name: size})
                elif not 0 < size <= blocks[name]:
                    raise UserError(f"{name}={size}: the axis has {blocks[name]} by then; give 1 to {blocks[name]}.")
                else:
                    blocks[name] = size
            except UserError as error:
                problems.append(f"stages.{stage}.rounds.{number}.sizes: {error}")
    problems += unsplittable(config, tensor_parallel)
    if problems:
        raise UserError("the recipe cannot be carried out:\n  " + "\n  ".join(problems))
