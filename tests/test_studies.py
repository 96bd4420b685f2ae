"""Settings of studies, and what sweeps make of them."""

import itertools
from pathlib import Path

import pytest

from slimlmm import checkpoint, controls, studies, study, sweeps
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.recipe import LEVELS, Recipe, Round, Stage
from slimlmm.resizing import cut_in_turn
from slimlmm.trainings import Training
from tiny import tiny, tiny_config

SWEEPS = [
    "orders",
    "criteria",
    "losses",
    "teachers",
    "own-answers",
    "repairs",
    "fades",
    "rounds",
    "samples",
    "frontier",
    "controls",
]


@pytest.fixture(scope="module")
def planned(ads, tmp_path_factory):
    """Every sweep over one base, planned for a tiny model."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny("llava-dinov2-llama"), folder)
    base = {"shrink": 4, "row_visits": 100_000, "sizes_by": "shares"}
    raw = {"model": str(folder), "data": str(ads), "base": base, "sweeps": SWEEPS, "shrinks": [2, 4, 1000]}
    return study.plan(
        studies.parse(
            {**raw, "arms": {"lone": {"train": {"learning_rate": 1e-5}}, "hot": {"train": {"temperature": 2.0}}}},
            "study",
        )
    )


def test_all_problems_at_once_with_their_paths():
    raw = {
        "model": "m",
        "base": {"shrnk": 4, "seed": 3},
        "seeds": [1, 1],
        "sweeps": ["order"],
        "arms": {
            "base": {},
            "a": {"recipe": {"data": {"train_row": 3}}, "rounds": {"repair": "beast", "drop": []}},
            "b": {"kind": "scratch"},
            "c": {"train": {"lossses": {}}, "like": "a", "colour": 1},
        },
    }
    with pytest.raises(UserError) as caught:
        studies.parse(raw, "s.yaml")
    text = str(caught.value)
    for part in (
        "data: Field required",
        "base.shrnk: unknown key. Did you mean 'shrink'",
        "base.seed: has no effect; list `seeds`",
        "seeds: name each seed once",
        "sweeps.0:",
        "arms.base: this name is taken",
        "arms.a.recipe.data.train_row: unknown key. Did you mean 'train_rows'",
        "arms.a.rounds.repair:",
        "arms.a.rounds.drop: is planned",
        "arms.b.like: a scratch arm needs",
        "arms.c.train.lossses: unknown key. Did you mean 'losses'",
        "arms.c.like: has no effect",
        "arms.c.colour: unknown key. Known: description",
    ):
        assert part in text, part
    assert f"{text.count(chr(10))} problem(s)" in text


def test_groups_name_arms_that_are_there():
    raw = {"model": "m", "data": "d", "arms": [{"name": "fast"}, {"name": "slow"}]}
    assert list(studies.parse(raw, "s").arms) == ["fast", "slow"]
    groups = [{"title": "t", "arms": ["fast", "slwo"], "reference": "slow", "x": {"fast": 1}}]
    with pytest.raises(UserError) as caught:
        studies.parse({**raw, "groups": groups}, "s")
    text = str(caught.value)
    assert "groups.0.arms: no arm 'slwo'. Did you mean 'slow'" in text
    assert "groups.0.reference: 'slow' is not among" in text
    assert "groups.0.x: no number for slwo" in text
    with pytest.raises(UserError, match="the sweep 'repairs' makes an arm of that name"):
        sweeps.expand(
            studies.parse({**raw, "arms": {"repair-none": {}}, "sweeps": ["repairs"]}, "s"), sweeps.Subject(9, 1, None)
        )
    with pytest.raises(UserError, match="has no arms"):
        studies.parse({"model": "m", "data": "d"}, "s")


def test_groups_beside_sweeps_are_looked_at_when_the_sweeps_have_made_their_arms():
    raw = {"model": "m", "data": "d", "base": {"shrink": 4}, "sweeps": ["repairs"], "arms": {"a": {}}}
    groups = [
        {"title": "t", "arms": ["base", "repair-none"], "reference": "bse"},
        {"title": "u", "arms": ["a", "repair-nine"], "reference": "a", "x": {"repair-nine": 1}},
    ]
    with pytest.raises(UserError) as caught:
        sweeps.expand(studies.parse({**raw, "groups": groups}, "s"), sweeps.Subject(9, 1, None))
    for part in (
        "groups.0.reference: 'bse' is not among",
        "groups.1.arms: no arm 'repair-nine'. Did you mean",
        "groups.1.x: no number for a",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize("name", ["A", "../up", "a/b", "", ".x"])
def test_names_are_folders(name):
    with pytest.raises(UserError, match="names are folders"):
        studies.parse({"model": "m", "data": "d", "arms": {name: {}}}, "s")


def test_every_sweep_makes_its_arms(planned):
    names = set(planned.arms)
    orders = {f"order-{'-'.join(order)}" for order in itertools.permutations(LEVELS)}
    assert len(orders) == 6
    for part in (
        orders,
        {f"criterion-{name}" for name in ("obs", "taylor", "activation", "magnitude", "random")},
        {f"losses-{name}" for name in ("margin", "no-margin", "ce", "kl", "ce-kl", "no-teacher")},
        {"teachers-first", "teachers-previous", "teachers-both", *(f"own-answers-{share}" for share in (0, 50, 100))},
        {
            "repair-all",
            "repair-none",
            "repair-without-settle",
            "repair-without-bridge",
            "fade-none",
            "fade-25",
            "fade-50",
            "rounds-planned",
            "rounds-per-level",
            "rounds-one-shot",
        },
        {f"only-{level}" for level in LEVELS},
        {f"samples-{share}" for share in (5, 10, 25, 100)},
        {"frontier-2", "frontier-4", "frontier-1000"},
        {"base", "lone", "control-scratch", "control-random-init", "control-random-units"},
    ):
        assert part <= names
    assert [group.title for group in planned.groups][-1] == "Other arms"
    assert planned.groups[-1].arms == ("base", "lone", "hot")


def test_arms_of_equal_recipe_are_run_once_and_stand_for_the_base(planned):
    same = {name: arm.same_as for name, arm in planned.arms.items() if arm.same_as}
    for name in (
        "order-blocks-inner-width",
        "criterion-obs",
        "losses-margin",
        "repair-all",
        "samples-100",
        "teachers-first",
        "own-answers-0",
    ):
        assert same[name] == "base"
    assert same["frontier-4"] == same["rounds-planned"] == "base"
    assert same["losses-ce-kl"] == "losses-no-margin"
    assert not set(same) & set(planned.todo())
    assert [group.reference for group in planned.groups][:3] == [
        "order-blocks-inner-width",
        "criterion-obs",
        "losses-margin",
    ]


def test_a_key_for_all_trainings_is_set_where_it_has_an_effect(planned):
    trainings = [one for stage in planned.recipes["hot"].stages for turn in stage.rounds for one in turn.train]
    assert {one.temperature for one in trainings if "forward_kl" in one.losses} == {2.0}
    assert {one.temperature for one in trainings if "forward_kl" not in one.losses} == {1.0}


def test_orders_end_at_one_size_after_equal_row_visits(planned):
    orders = [arm for name, arm in planned.arms.items() if name.startswith("order-")]
    assert all(arm.reason is None for arm in orders)
    assert len({str(arm.sizes) for arm in orders}) == 1
    assert {arm.planned_parameters for arm in orders} == {planned.arms["base"].planned_parameters}
    cuts = {
        name: [stage.name for stage in planned.recipes[name].stages][1:]
        for name in planned.recipes
        if name.startswith("order-")
    }
    assert all(name == f"order-{'-'.join(stages)}" for name, stages in cuts.items())
    for arm in planned.arms.values():
        if arm.planned_row_visits and not arm.name.startswith(("rounds-", "only-", "frontier-", "samples-")):
            assert arm.planned_row_visits == pytest.approx(planned.arms["base"].planned_row_visits, rel=0.02), arm.name


def test_fewer_rows_and_fewer_rounds_take_as_many_visits_to_the_same_size(planned):
    base = planned.arms["base"]
    for name in ("samples-5", "samples-25", "rounds-per-level", "rounds-one-shot", "only-width", "frontier-2"):
        assert planned.arms[name].planned_row_visits == pytest.approx(base.planned_row_visits, rel=0.02), name
    for name, rounds in (("rounds-per-level", 4), ("rounds-one-shot", 2)):
        assert planned.arms[name].sizes == base.sizes
        assert planned.arms[name].rounds == rounds < base.rounds
    counts = [planned.recipes[f"samples-{share}"].data.train_rows for share in (5, 25, 100)]
    assert counts == [10, 30, None]


def test_fewer_questions_and_fewer_rows_of_the_teacher_take_as_many_visits(ads, tmp_path):
    checkpoint.save(*tiny("llava-dinov2-llama"), tmp_path / "teacher")
    arms = {
        "few-questions": {"train": {"questions_per_picture": 2}},
        "few-asked": {"recipe": {"data": {"teacher_rows": 20}}},
        "alone": {"recipe": {"data": {"teacher_rows": 20}}, "train": {"losses": {"forward_kl": 1.0}}},
    }
    raw = {
        "model": str(tmp_path / "teacher"),
        "data": str(ads),
        "base": {"shrink": 2, "row_visits": 8000, "sizes_by": "shares"},
        "arms": arms,
    }
    group = {"title": "t", "arms": ["base", *arms], "reference": "base"}
    found = study.plan(studies.parse({**raw, "groups": [group]}, "s"))
    visits = found.arms["base"].planned_row_visits
    for name in arms:
        assert found.arms[name].planned_row_visits == pytest.approx(visits, rel=0.02), name
    for stage in found.recipes["few-questions"].stages:
        assert all(one.questions_per_picture == 2 for turn in stage.rounds for one in turn.train)
    for name, matched in (("base", "block_states"), ("few-asked", "picture_states")):
        answers = [turn.train[-1].losses for stage in found.recipes[name].stages for turn in stage.rounds if turn.train]
        assert all({"block_states", "picture_states"} & set(losses) == {matched} for losses in answers), name


def test_what_cannot_be_reached_is_skipped_with_the_numbers(planned):
    assert "--shrink 1000 allows" in planned.arms["frontier-1000"].reason
    assert "allow in blocks takes" in planned.arms["only-blocks"].reason
    assert not {"frontier-1000", "only-blocks"} & set(planned.todo())
    told = {arm["name"]: arm for arm in study.dry(planned)["arms"]}
    assert told["only-blocks"]["skipped"]
    assert told["frontier-2"]["parameters"] > told["base"]["parameters"]


def test_an_arm_changes_what_it_says_and_nothing_else(planned):
    def trainings(name):
        return [one for stage in planned.recipes[name].stages for turn in stage.rounds for one in turn.train]

    for one, had in zip(trainings("losses-ce"), trainings("base"), strict=True):
        states = {"picture_states", "block_states"} & set(had.losses)
        assert set(one.losses) == states | ({"cross_entropy"} if set(had.losses) - states else set())
        assert one.model_copy(update={"losses": had.losses}) == had
    assert {str(one.losses) for one in trainings("losses-no-teacher")} == {"{'cross_entropy': 1.0}"}
    assert {one.learning_rate for one in trainings("lone")} == {1e-5}
    for name, key, value in (
        ("teachers-both", "teachers", {"first": 1.0, "previous": 1.0}),
        ("teachers-previous", "teachers", {"previous": 1.0}),
        ("own-answers-50", "own_answers", 0.5),
    ):
        for one, had in zip(trainings(name), trainings("base"), strict=True):
            assert one == had.model_copy(update={key: value} if "forward_kl" in had.losses else {})
    rounds = [turn for stage in planned.recipes["control-random-units"].stages for turn in stage.rounds]
    assert all(turn.model_dump().items() >= controls.AT_RANDOM.items() for turn in rounds)


def test_only_some_arms_bring_those_whose_shape_they_take(planned):
    assert planned.todo(["control-scratch"]) == ["base", "control-scratch"]
    assert planned.todo(["frontier-4"]) == ["base"]
    with pytest.raises(UserError, match="no arm nobody"):
        planned.todo(["nobody"])


def test_arms_without_a_teachers_distribution_leave_out_what_needs_one():
    teachers = {"first": 1.0, "previous": 1.0}
    stages = (Stage(name="a", rounds=(Round(train=(Training(steps=1, own_answers=0.5, teachers=teachers),)),)),)
    study_of = studies.parse({"model": "m", "data": "d", "sweeps": ["losses", "teachers"]}, "s")
    arms, _ = sweeps.expand(study_of, sweeps.Subject(9, 1, None))
    for name, changed in (("losses-ce", True), ("losses-no-teacher", True), ("losses-kl", False)):
        (one,) = arms[name].change(stages)[0].rounds[0].train
        assert (one.own_answers, one.teachers) == ((0.0, {"first": 1.0}) if changed else (0.5, teachers)), name
    states = {"losses": {"cross_entropy": 1.0, "forward_kl": 1.0, "block_states": 1.0}}
    for asked in ({"previous": 1.0}, teachers):
        one = Training(steps=1, teachers=asked, **states)
        (left,) = arms["losses-ce"].change((Stage(name="a", rounds=(Round(train=(one,)),)),))[0].rounds[0].train
        assert left.losses == {"cross_entropy": 1.0, "block_states": 1.0}
        assert left.teachers == ({"first": 1.0} if "first" in asked else asked), "states are those of the same teacher"
    labels = arms["losses-ce"].change(stages)
    with pytest.raises(UserError, match="no training of the base has one of"):
        arms["teachers-both"].change(labels)


def test_merging_all_rounds_keeps_order_sizes_and_visits():
    def turn(steps, **sizes):
        cuts = {name.replace("_", ".", 1): size for name, size in sizes.items()}
        return Round(sizes=cuts, train=(Training(steps=steps, pictures_per_step=8),))

    stages = (
        Stage(name="lossless", rounds=(Round(drop=("unused_tokens",)),)),
        Stage(name="inner", rounds=(turn(10, text_ffn=64), turn(20, text_ffn=32, text_kv_groups=2))),
        Stage(name="width", rounds=(turn(30, text_width=24),)),
    )
    config = tiny_config("llava-dinov2-llama")
    _, shot = sweeps.one_shot(stages, config)
    assert list(shot.rounds[0].sizes.items()) == [("text.ffn", 32), ("text.kv_groups", 2), ("text.width", 24)]
    assert shot.rounds[0].train[0].steps == 60
    levels = sweeps.one_round_per_level(stages, config)
    assert [len(stage.rounds) for stage in levels] == [1, 1, 1]
    assert levels[1].rounds[0].train[0].steps == 30


def ended(config, stages):
    for stage in stages:
        for turn in stage.rounds:
            config = cut_in_turn(config, turn.sizes)
    return describe(config).sizes


@pytest.mark.parametrize(
    "order", list(itertools.permutations([("width", 3, 4), ("ffn", 2, 1), ("width", 1, 2), ("ffn", 1, 1)]))
)
def test_merged_rounds_end_in_the_shape_of_the_listed_ones(order):
    """An FFN that is a whole number of the width means another size before a width cut than behind it."""
    config = tiny_config("llava-dinov2-llama")
    first, now, cuts = describe(config).sizes, config, []
    for noun, part, of in order:
        width = describe(now).sizes["vision.width"]
        size = first["vision.width"] * part // of if noun == "width" else width * part // of
        if (noun == "ffn" and size % width) or size > describe(now).sizes[f"vision.{noun}"]:
            continue
        cuts.append(Round(sizes={f"vision.{noun}": size}))
        now = cut_in_turn(now, cuts[-1].sizes)
    stages = (Stage(name="a", rounds=tuple(cuts)),)
    for merge in (sweeps.one_round_per_level, sweeps.one_shot):
        (stage,) = merge(stages, config)
        assert len(stage.rounds) == 1
        assert ended(config, (stage,)) == ended(config, stages)


def test_a_base_of_stages_has_no_order_to_change():
    base = Recipe(stages=(Stage(name="a", rounds=(Round(sizes={"text.ffn": 8}),)),))
    assert "the base lists stages" in sweeps.conflicts(base, {"order": ["inner"]})
    assert "so sizes_by has no effect" in sweeps.conflicts(base, {"sizes_by": "importance"})
    assert sweeps.conflicts(base, {"data": {"train_rows": 3}}) is None


def test_the_page_of_studies_is_current():
    page = Path(__file__).parent.parent / "docs" / "study.md"
    assert page.read_text() == studies.page(), "run python -m slimlmm.studies docs/study.md"


def test_planners_are_compared_with_the_base():
    told = {"model": "m", "data": "d", "base": {"shrink": 4}, "sweeps": ["planners"]}
    arms, (group,) = sweeps.expand(studies.parse(told, "s"), sweeps.Subject(9, 1, None))
    assert {name: dict(arm.recipe) for name, arm in arms.items()} == {
        "base": {},
        "sizes-by-shares": {"sizes_by": "shares"},
        "sizes-by-importance": {"sizes_by": "importance"},
    }
    assert group.arms == ("sizes-by-shares", "sizes-by-importance")
    told["base"] = {"shrink": 4, "sizes_by": "search", "curve_rows": 32, "search_candidates": 3}
    arms, _ = sweeps.expand(studies.parse(told, "s"), sweeps.Subject(9, 1, None))
    base = Recipe.model_validate(told["base"]).model_dump(exclude_unset=True)
    for way, rows in (("shares", 64), ("importance", 32)):
        found = Recipe.model_validate(base | arms[f"sizes-by-{way}"].recipe)
        assert (found.sizes_by, found.curve_rows) == (way, rows)
