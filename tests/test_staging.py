import pytest

from slimlmm import data, plan, staging
from slimlmm.anatomy import describe
from slimlmm.checkpoint import load_config
from slimlmm.data import Row
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.recipe import DataSettings, Recipe
from slimlmm.resizing import cut_in_turn, predict_parameters, resized
from tiny import tiny, tiny_config
from zoo import CONFIGS


def ten_each(pictures, questions):
    """Ten rows a picture."""
    return 10 * pictures


def test_default_schedule_goes_lossless_blocks_inner_width_and_ends_at_the_final_sizes():
    model, _ = tiny("llava-dinov2-llama")
    sizes = plan.sizes_for(model.config, 4, model.num_parameters())
    stages = staging.stages_for(model.config, sizes, row_visits=10_000, a_step=ten_each)
    names = [stage.name for stage in stages]
    assert names == [name for name in ("lossless", "blocks", "inner", "width") if name in names]
    reached = {name: axis.size for name, axis in describe(model.config).axes.items()}
    turns = [turn for stage in stages for turn in stage.rounds if turn.sizes]
    for turn in turns:
        assert all(reached[name] / 3 <= size < reached[name] for name, size in turn.sizes.items())
        reached |= turn.sizes
    assert {name: reached[name] for name in sizes} == sizes
    visits = [10 * pictures(turn) for turn in turns]
    assert visits == sorted(visits)
    assert sum(visits) == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize("each", [1, 1.4, 2.5, 16, 17, 24, 40])
@pytest.mark.parametrize("count", [20, 2000])
def test_the_steps_make_the_row_visits_that_were_asked_for(each, count):
    config = tiny_config("llava-dinov2-llama")
    sizes = plan.sizes_for(config, 4, predict_parameters(config, {}))
    held = [int(each * (n + 1)) - int(each * n) for n in range(count)]
    rows = [Row(str(n), b"%d" % n, "q", "a", "t") for n, many in enumerate(held) for _ in range(many)]
    stages = staging.stages_for(config, sizes, row_visits=400_000, a_step=data.rows_a_step(rows))
    made = 0
    for one in (one for stage in stages for turn in stage.rounds for one in turn.train):
        groups = data.by_picture(rows, one.questions_per_picture)
        made += one.steps * len(rows) / -(-len(groups) // one.pictures_per_step)  # an epoch visits all rows
    assert made == pytest.approx(400_000, rel=0.01)


def pictures(turn):
    return sum(training.steps * training.pictures_per_step for training in turn.train)


def test_every_round_teaches_the_picture_first_without_the_language_model():
    model, _ = tiny("llava-dinov2-llama")
    sizes = plan.sizes_for(model.config, 4, model.num_parameters())
    stages = staging.stages_for(model.config, sizes, row_visits=100_000, a_step=ten_each)
    for turn in (turn for stage in stages for turn in stage.rounds if turn.sizes):
        states, answers = turn.train
        assert set(states.losses) == {"picture_states"}
        assert "text" in states.freeze
        assert set(answers.losses) == {"cross_entropy", "forward_kl", "pairwise_margin", "block_states"}
        spent = states.steps * states.pictures_per_step
        assert spent / pictures(turn) == pytest.approx(staging.STATES_SHARE, abs=0.1)


@pytest.mark.parametrize("order", [("inner", "width", "blocks"), ("width", "blocks", "inner")])
def test_levels_go_in_the_order_that_was_asked_for(order):
    model, _ = tiny("llava-dinov2-llama")
    sizes = plan.sizes_for(model.config, 4, model.num_parameters())
    stages = staging.stages_for(model.config, sizes, row_visits=10_000, a_step=ten_each, order=order)
    assert [stage.name for stage in stages] == ["lossless", *order]
    config = model.config
    for stage in stages:
        for turn in stage.rounds:
            for name, size in turn.sizes.items():
                assert size < describe(config).axis(name).size
                config = resized(config, {name: size})
    reached = describe(config).sizes
    assert {name: reached[name] for name in sizes} == plan.follow_width(describe(model.config), sizes, sizes)


def test_the_last_shape_gets_its_share_of_the_compute():
    model, _ = tiny("llava-dinov2-llama")
    sizes = plan.sizes_for(model.config, 4, model.num_parameters())
    stages = staging.stages_for(model.config, sizes, row_visits=1_000_000, a_step=ten_each)
    reached, work = {}, []
    for turn in (turn for stage in stages for turn in stage.rounds if turn.sizes):
        reached |= turn.sizes
        stated = plan.follow_width(describe(model.config), reached, reached)
        work.append(pictures(turn) * predict_parameters(model.config, stated))
    assert work[-1] / sum(work) == pytest.approx(staging.LAST_SHARE, rel=0.02)
    assert work[:-1] == pytest.approx([work[0]] * len(work[:-1]), rel=0.05)


def teacher():
    """The bundled teacher without its unused tokens, and sizes of it at 18x."""
    config = resized(load_config(bundled("teacher")), {"vocab": 1092})
    return config, plan.sizes_for(config, 18, predict_parameters(config, {}))


def turns_of(config, sizes, row_visits):
    stages = staging.stages_for(config, sizes, row_visits=row_visits, a_step=ten_each)
    return [turn for stage in stages for turn in stage.rounds if turn.sizes]


def test_rounds_are_joined_as_far_as_answers_need_for_their_least_steps():
    config, sizes = teacher()
    levels = {describe(config).axis(name).kind for name, size in sizes.items() if size < describe(config).sizes[name]}
    counts = []
    for row_visits in (5_000, 50_000, 500_000, 5_000_000):
        turns = turns_of(config, sizes, row_visits)
        counts.append(len(turns))
        least = min(turn.train[-1].steps for turn in turns)
        assert least >= staging.LEAST_STEPS or len(turns) == len(levels)
        assert sum(10 * pictures(turn) for turn in turns) == pytest.approx(row_visits, rel=0.1)
    assert counts == sorted(counts)
    assert counts[0] == len(levels) < counts[-1]


def test_with_visits_enough_no_round_cuts_more_than_its_ratios():
    config, sizes = teacher()
    left, reached = predict_parameters(config, {}), describe(config).sizes
    for turn in turns_of(config, sizes, 50_000_000):
        for name, size in turn.sizes.items():
            assert reached[name] / size <= 1.6 * staging.AXIS_RATIO  # legal sizes lie apart
        config = cut_in_turn(config, turn.sizes)
        reached = describe(config).sizes
        assert left / predict_parameters(config, {}) <= 1.3 * staging.ROUND_RATIO
        left = predict_parameters(config, {})


def test_rates_rise_with_what_was_cut_and_end_and_muon_takes_over():
    config, sizes = teacher()
    whole, rates = predict_parameters(config, {}), []
    for turn in turns_of(config, sizes, 5_000_000):
        config = cut_in_turn(config, turn.sizes)
        states, answers = turn.train
        ratio = whole / predict_parameters(config, {})
        rate, far = min(6e-4, 1e-4 * ratio**0.6), ratio >= staging.MANY_RATIO
        assert answers.optimizer == states.optimizer == ("muon" if far else "adamw")
        assert answers.learning_rate == pytest.approx(rate * (staging.MUON_RATE if far else 1), rel=0.05)
        assert states.learning_rate == pytest.approx(staging.STATES_RATE * rate, rel=0.05)
        rates.append(answers.learning_rate)
    assert rates == sorted(rates)
    assert rates[-1] > 5 * staging.FIRST_RATE
    assert answers.optimizer == "muon"


def test_states_of_pictures_get_so_many_steps_at_most_and_answers_the_rest():
    config, sizes = teacher()
    turns = turns_of(config, sizes, 5_000_000)
    assert turns[-1].train[0].steps == staging.MOST_STATES
    assert all(turn.train[0].steps <= staging.MOST_STATES for turn in turns)
    assert sum(10 * pictures(turn) for turn in turns) == pytest.approx(5_000_000, rel=0.01)
    few = turns_of(config, sizes, 50_000)[-1]
    assert few.train[0].steps < staging.MOST_STATES
    spent = few.train[0].steps * few.train[0].pictures_per_step
    assert spent / pictures(few) == pytest.approx(staging.STATES_SHARE, abs=0.02)


def test_a_schedule_that_cuts_nothing_is_refused():
    config, _ = teacher()
    with pytest.raises(UserError, match="no axis has to be cut"):
        staging.stages_for(config, describe(config).sizes, row_visits=1000)


def trainings(stages):
    return [turn.train[-1] for stage in stages for turn in stage.rounds if turn.sizes]


@pytest.mark.parametrize("asked", [None, 100])
def test_shapes_near_the_teachers_are_matched_behind_every_block_where_it_is_asked_about_all_rows(asked):
    config, near = load_config(bundled("teacher")), staging.near_of(Recipe(data=DataSettings(teacher_rows=asked)))
    for shrink in (3, 18):
        sizes, whole = plan.sizes_for(config, shrink, predict_parameters(config, {})), predict_parameters(config, {})
        stages = staging.stages_for(config, sizes, row_visits=400_000, a_step=ten_each, near=near)
        for one, ratio in zip(trainings(stages), ratios(config, stages, whole), strict=True):
            behind = asked is None and ratio < staging.MANY_RATIO
            matched = {"picture_states", "block_states"} & set(one.losses)
            assert matched == {"block_states" if behind else "picture_states"}
            assert {"cross_entropy", "forward_kl", "pairwise_margin"} <= set(one.losses)


def ratios(config, stages, whole):
    for turn in (turn for stage in stages for turn in stage.rounds if turn.sizes):
        config = cut_in_turn(config, turn.sizes)
        yield whole / predict_parameters(config, {})


def test_towers_whose_blocks_are_not_known_are_not_asked_for_what_is_behind_them():
    config = CONFIGS["fast_vlm"]()
    sizes = plan.sizes_for(config, 1.5, predict_parameters(config, {}))
    stages = staging.stages_for(config, sizes, row_visits=400_000, a_step=ten_each)
    assert all("block_states" not in one.losses for one in trainings(stages))
