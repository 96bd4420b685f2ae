"""A run as validated settings: unknown keys refused, all errors at once, each with its YAML path.

``docs/recipes.md`` is `page`, generated from the fields' descriptions by ``python -m slimlmm.recipe docs/recipes.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, TypeAdapter, field_validator, model_validator

from slimlmm.pictures import PictureSettings
from slimlmm.settings import Settings, fields, read_yaml, valid
from slimlmm.trainings import Training

Level = Literal["blocks", "inner", "width"]
#: levels in the paper's order (arXiv 2312.05795): blocks, inner dimensions, residual width
LEVELS: tuple[Level, ...] = get_args(Level)
#: ways to choose sizes for a budget
SizesBy = Literal["shares", "importance", "search"]
Drop = Literal["unused_tokens", "dead_blocks"]
DROPS: tuple[Drop, ...] = get_args(Drop)
Repair = Literal["refit", "rotate", "merge", "bridge", "settle"]
REPAIRS: tuple[Repair, ...] = get_args(Repair)
#: what can fade out in a training, by noun
FADING = ("ffn", "kv_groups", "queries", "blocks", "decoder_blocks")
#: multiples of the sizes that are chosen, by noun: matrix units work on tiles of 64 or more
MULTIPLES = {"width": 64, "ffn": 64}


#: keys of a recipe that say how sizes are chosen; spent where stages are listed
CHOOSING = ("sizes_by", "curve_rows", "search_candidates", "search_row_visits")
#: keys of the default schedule, spent where stages are listed; those of the promise
SCHEDULED = ("shrink", *CHOOSING, "order", "multiples", "row_visits")
PROMISED = ("patience", "max_task_drop", "spared_tasks")


class Round(Settings):
    """One turn of score, cut, recover, evaluate."""

    drop: tuple[Drop, ...] = Field(
        (),
        description="Lossless cuts: tokens that the data never use; blocks that never reach the output. They come before all "
        "other rounds and without sizes: what they leave is the teacher.",
    )
    sizes: dict[str, int] = Field({}, description="New size of each axis that this round cuts.")
    criterion: Literal["obs", "taylor", "activation", "magnitude", "random"] = Field(
        "obs",
        description="How the units of other axes are scored. obs (Optimal Brain Surgeon): neurons of FFNs by what is lost "
        "without them once the linear layer that reads them is refitted; taylor then decides for all other units, and where "
        "`repair` has no refit.",
    )
    groups: Literal["ablation", "taylor", "activation", "magnitude", "random"] = Field(
        "ablation",
        description="How key/value groups are scored: few and dear, each can be measured by its absence (more than 256 of them "
        "on fewer rows).",
    )
    blocks: Literal["ablation", "taylor", "last", "random"] = Field(
        "ablation",
        description="Which blocks go: those whose greedy removal costs least, those of least first-order importance, the "
        "last ones, or random ones.",
    )
    repair: tuple[Repair, ...] = Field(
        REPAIRS,
        description="Closed-form repairs that are tried where they apply: refit (of what reads the dropped units), rotate (the "
        "residual stream before a width cut), merge (dropped heads into kept ones, values and all), bridge (what dropped blocks "
        "added), settle (the stream, block by block, after all cuts of the round). Of the ways to make a cut the one of least "
        "loss on pictures that no fit has seen stays; [] for none.",
    )
    fade: int = Field(
        0,
        ge=0,
        description="Optimizer steps of the first training over which what goes fades out before it is cut: the whole model "
        "trains, what reads units that go gets m = (1 + cos(pi step / fade)) / 2 of them, and what blocks that go add is scaled "
        "likewise. At m = 0 the cut loses nothing, so there is nothing to repair (`repair: []`), and the small model makes the "
        "other steps of that training, its learning rates going on, Adam's moments begun anew, `validate_every` from there on. "
        "For ffn, kv_groups, queries and blocks; all units are chosen before. 0 cuts at once.",
    )
    train: tuple[Training, ...] = Field(
        (),
        description="Recovery trainings after the cut, one after the other; one alone needs no list; none by default.",
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_alone(cls, train: Any) -> Any:
        return [] if train is None else [train] if isinstance(train, Mapping | Training) else train

    @model_validator(mode="after")
    def _can_fade(self) -> Round:
        if self.fade and (reason := self.cannot_fade()):
            raise ValueError(f"fade={self.fade}: {reason}")
        return self

    def cannot_fade(self) -> str:
        """Say what else in this round keeps `fade` from being done, "" where nothing does."""
        if not self.sizes or not self.train:
            return "needs sizes that are cut and a training that they fade in"
        if other := [axis for axis in self.sizes if axis.rpartition(".")[2] not in FADING]:
            return f"{', '.join(other)} cannot fade, only {', '.join(FADING)}; cut it in a round without fade"
        if self.fade >= self.train[0].steps:
            return (
                f"must be less than the {self.train[0].steps} steps of the first training, whose others follow the cut"
            )
        if self.train[0].compile:
            return "what fades changes at every step, which cannot be compiled; compile a training after the first"
        if self.repair:
            return "what has faded says nothing, so its cut needs no repair; write repair: []"
        if self.train[0].sees_pictures_alone and (text := [a for a in self.sizes if not a.startswith("vision.")]):
            return (
                f"picture_states alone does not run the language model, where {', '.join(text)} would be missed; "
                + ("put a training of answers first")
            )
        return ""


class Stage(Settings):
    """A list of rounds under one name."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Name of the stage, lower case.")
    rounds: tuple[Round, ...] = Field(description="Rounds, in order.")

    @field_validator("rounds")
    @classmethod
    def _some(cls, rounds: tuple[Round, ...]) -> tuple[Round, ...]:
        if not rounds:
            raise ValueError("a stage needs at least one round")
        return rounds


class DataSettings(Settings):
    """What of the data is used for what."""

    max_bad_share: float = Field(0.01, ge=0, lt=1, description="Share of broken rows in [0, 1) that may be skipped.")
    answers: Literal["given", "filled", "teacher"] = Field(
        "given",
        description="Where the answers of train rows come from: all given; filled in by the teacher where a row has none; or all "
        "from the teacher.",
    )
    train_rows: int | None = Field(None, gt=0, description="Train rows used; null for all.")
    teacher_rows: int | None = Field(
        None,
        gt=0,
        description="Train rows that the teacher is asked about, whole pictures, drawn by the seed; null for all. The others "
        "are learnt from their own answers (cross_entropy, pairwise_margin): asking costs more than a step of a small student.",
    )
    calibration_rows: int = Field(
        256,
        gt=0,
        description="Train rows for scores, repairs and ablation, two a picture where there are enough pictures; every third "
        "picture judges what was fitted on the others.",
    )
    validation_rows: int | None = Field(
        500, gt=0, description="Validation rows evaluated in every round; null for all."
    )
    test_rows: int | None = Field(None, gt=0, description="Test rows for teacher and student at the end; null for all.")
    pictures: PictureSettings = PictureSettings()


class Recipe(Settings):
    """A whole run."""

    stages: tuple[Stage, ...] = Field((), description="Stages in order; empty for the default schedule of `shrink`.")
    shrink: float | None = Field(None, gt=1, description="Parameters of the teacher over those of the student.")
    sizes_by: SizesBy | None = Field(
        None,
        description="How the default schedule chooses sizes for its budget. importance: least predicted loss, each axis tried "
        "alone on train rows (`curve_rows`). search: several shapes are cut at once, briefly recovered, and the one of least "
        "validation loss is taken. shares: every axis keeps a fixed share of one scale, and nothing is tried. null: importance, "
        "or by shares where that cannot be had (the reason is told).",
    )
    curve_rows: int = Field(
        64, gt=0, description="Train rows that importance and search try axes on; each size is a cut with its repair."
    )
    search_candidates: int = Field(
        6,
        ge=2,
        description="Shapes that a search recovers: by shares, by importance, and trades of one axis for another.",
    )
    search_row_visits: int = Field(10_000, gt=0, description="Row visits of each of them.")
    order: tuple[Level, ...] = Field(
        LEVELS,
        description="Levels that the default schedule cuts, in order; one left out is not cut. inner: FFNs, experts, KV groups.",
    )
    multiples: dict[str, int] = Field(
        MULTIPLES,
        description="Multiples that sizes chosen by the default schedule keep to, by noun (width, ffn) or axis (text.width), or "
        "one number for both nouns. An axis that they leave fewer than five sizes takes a smaller power of two, and says so. "
        "Sizes in `stages` are taken as they are.",
    )
    tensor_parallel: int = Field(
        1,
        gt=0,
        description="Devices that the result will be split over: heads, key/value groups and FFN widths of the default schedule "
        "stay shareable, and so must the last sizes of `stages`.",
    )
    row_visits: int = Field(
        400_000,
        gt=0,
        description="Row visits of all recoveries of the default schedule, most of them on the last shape. Where the "
        "teacher is asked about all train rows, shapes less than six times smaller match the stream behind every block "
        "(block_states; the teacher runs at every step), others what enters the language model at pictures.",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        description="Points of exact match that may be lost against the teacher: the floor of every round on validation rows, "
        "and the margin of the test at the end; null for no floor. A round that misses it is recovered further, then rolled back "
        "and half of it is tried; then the run stops at the smallest model that kept it.",
    )
    patience: int = Field(
        1,
        ge=0,
        description="Times that a round which misses `max_drop` makes its last training again before it is rolled back.",
    )
    max_task_drop: float = Field(
        2.0, ge=0, description="Points that any one task may lose on test rows, where `max_drop` promises something."
    )
    spared_tasks: tuple[str, ...] = Field((), description="Tasks that may lose more than `max_task_drop`.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    data: DataSettings = DataSettings()
    bench_calls: int = Field(
        30,
        ge=0,
        description="Timed calls at batch 1 and a sixth of it at batch 32; 0 to measure neither times nor memory.",
    )

    @model_validator(mode="after")
    def _heard(self) -> Recipe:
        """Refuse settings of ways to choose sizes that are not taken."""
        search = ("search",)
        needs = {"curve_rows": (None, "importance", *search), "search_candidates": search, "search_row_visits": search}
        for name, ways in needs.items():
            if self.sizes_by not in ways and getattr(self, name) != _default(name):
                raise ValueError(f"{name} has no effect with sizes_by: {self.sizes_by}")
        return self

    @model_validator(mode="after")
    def _asks_whom_it_may(self) -> Recipe:
        """Refuse streams of pictures that the teacher is not asked about."""
        turns = ((stage.name, turn) for stage in self.stages for turn in stage.rounds)
        some = {name for name, turn in turns for one in turn.train if one.asks_of_every_picture}
        if self.data.teacher_rows is not None and some:
            raise ValueError(
                f"data.teacher_rows={self.data.teacher_rows}: block_states (in {', '.join(sorted(some))}) asks the teacher about "
                "every picture of a step; leave out one of them, or the losses of labels"
            )
        return self

    def resolved(self, stages: tuple[Stage, ...]) -> Recipe:
        """Return the recipe with these stages, the keys that led to them as if nobody had set them."""
        return self.model_copy(update={"stages": stages} | {key: _default(key) for key in self._spent()})

    def _spent(self) -> list[str]:
        """Return the keys that stages have no use for: a promise may halve a cut, to sizes that keep to multiples."""
        return [key for key in SCHEDULED if key != "multiples" or self.max_drop is None]

    def unheard(self) -> list[str]:
        """Return what is asked for in vain: keys of the default schedule beside stages, of a promise that is none, of trainings.

        No part of validation: files that a run has written have to be read again.
        """
        vain = dict.fromkeys(self._spent(), "stages are listed") if self.stages else {}
        vain |= dict.fromkeys(PROMISED, "there is no max_drop") if self.max_drop is None else {}
        told = ((key, getattr(self, key), why) for key, why in vain.items())
        return [
            f"{key}: {value!r} has no effect where {why}; leave it out."
            for key, value, why in told
            if value != _default(key)
        ] + [
            f"stages.{stage.name}.rounds.{index}.train.{number}.{name}: {getattr(one, name)} has no effect without {what}; "
            "leave it out."
            for stage in self.stages
            for index, turn in enumerate(stage.rounds)
            for number, one in enumerate(turn.train)
            for name, what in one.vain().items()
        ]

    @field_validator("multiples", mode="before")
    @classmethod
    def _by_noun(cls, multiples: Any) -> Any:
        return dict.fromkeys(MULTIPLES, multiples) if isinstance(multiples, int) else multiples

    @field_validator("multiples")
    @classmethod
    def _positive(cls, multiples: dict[str, int]) -> dict[str, int]:
        if wrong := [f"{name}: {value}" for name, value in multiples.items() if value < 1]:
            raise ValueError(f"multiples are 1 or more, not {', '.join(wrong)}")
        if wrong := [name for name in multiples if name not in MULTIPLES and "." not in name]:
            raise ValueError(f"{', '.join(wrong)}: name a noun ({', '.join(MULTIPLES)}) or an axis (text.width)")
        return MULTIPLES | multiples

    @field_validator("order")
    @classmethod
    def _each_once(cls, order: tuple[Level, ...]) -> tuple[Level, ...]:
        if not order or len(set(order)) != len(order):
            raise ValueError("name one or more of blocks, inner and width, each once")
        return order


def _default(key: str) -> Any:
    return Recipe.model_fields[key].default


def parse(raw: Any, source: str) -> Recipe:
    """Validate a recipe; a UserError lists every problem with its path and, for unknown keys, the nearest valid name."""
    return valid(TypeAdapter(Recipe), raw, source, lambda place: _kind(place, Recipe))


def parse_trainings(raw: Any, source: str) -> list[Training]:
    """Validate a list of trainings, as `parse` does a recipe."""
    return valid(TypeAdapter(list[Training]), raw, source, lambda place: _kind(place, Training))


def read(path: Path) -> Recipe:
    """Read a YAML recipe."""
    return parse(read_yaml(path, "recipe"), str(path))


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, defaults included."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _kind(place: tuple[Any, ...], root: type[Settings]) -> type[Settings]:
    names = [part for part in place if isinstance(part, str)]
    return PLACES.get(names[-1], root) if names else root


#: settings by the key that holds them
PLACES: dict[str, type[Settings]] = {
    "stages": Stage,
    "rounds": Round,
    "train": Training,
    "data": DataSettings,
    "pictures": PictureSettings,
}


def page() -> str:
    """Return the documentation of recipes as Markdown."""
    lines = [
        "# Recipes",
        "",
        "A recipe is a YAML file for `slimlmm compress --recipe`; unknown keys are refused. `slimlmm finetune --recipe` takes",
        "a list of trainings (the keys under `train`; there is no teacher, and without `losses` cross_entropy alone counts).",
        "A run folder holds the whole recipe, defaults and planned sizes included.",
        "Generated: `python -m slimlmm.recipe docs/recipes.md`.",
        "",
        "```yaml",
        "max_drop: 1.0",
        "stages:",
        "  - name: lossless",
        "    rounds:",
        "      - drop: [unused_tokens, dead_blocks]",
        "  - name: blocks",
        "    rounds:",
        "      - sizes: {vision.blocks: 8, text.blocks: 12}",
        "        train: {steps: 2000, learning_rate: 3.0e-4}",
        "```",
    ]
    places = {kind: key for key, kind in PLACES.items()}
    for kind in (Recipe, DataSettings, PictureSettings, Stage, Round, Training):
        lines += fields(kind, places.get(kind, "top level"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
