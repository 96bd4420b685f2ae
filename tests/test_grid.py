"""Sizes that are chosen: multiples, a handful at least, and shares that devices can split."""

import pytest

from slimlmm import plan, recipe, staging
from slimlmm.anatomy import describe
from slimlmm.checkpoint import load_config
from slimlmm.demo import bundled
from slimlmm.deployable import unsplittable
from slimlmm.errors import UserError
from slimlmm.grid import HANDFUL, Grid
from slimlmm.recipe import Recipe, Round, Stage
from slimlmm.resizing import predict_parameters, resized
from test_deployable import real
from tiny import tiny_config
from zoo import CONFIGS


def test_widths_and_ffns_are_multiples_of_64():
    config = real(hidden_size=1024)
    axes = describe(config).axes
    assert Grid().sizes(config, axes["text.ffn"]) == list(range(64, 2817, 64))
    assert all(size % 64 == 0 for size in Grid().sizes(config, axes["text.width"]))
    assert Grid().notes(config) == [
        "vision.width: multiples of 64 leave 4 of its 4 legal sizes; multiples of 32 are taken"
    ] or all("vision" in note for note in Grid().notes(config))


def test_an_axis_with_few_such_sizes_takes_a_smaller_power_of_two_and_says_so():
    config = tiny_config("llava-clip-llama")
    axis = describe(config).axes["text.ffn"]
    sizes = Grid().sizes(config, axis)
    assert sizes == [16, 32, 48, 64, 68]
    assert len(sizes) >= HANDFUL
    assert any(
        note == "text.ffn: multiples of 64 leave 1 of its 68 legal sizes; multiples of 16 are taken"
        for note in Grid().notes(config)
    )


def test_an_axis_by_name_has_the_last_word():
    config = real()
    grid = Grid(multiples={"width": 64, "ffn": 128, "text.width": 1})
    assert 992 in grid.sizes(config, describe(config).axes["text.width"])
    assert all(size % 128 == 0 for size in grid.sizes(config, describe(config).axes["text.ffn"]))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_plan_can_be_split(devices):
    config = real()
    grid = Grid(tensor_parallel=devices)
    sizes = plan.sizes_for(config, 3, predict_parameters(config, {}), grid=grid)
    assert unsplittable(resized(config, sizes), devices) == []
    for stage in staging.stages_for(config, sizes, row_visits=1000, grid=grid):
        for turn in stage.rounds:
            assert unsplittable(resized(config, turn.sizes), devices) == []


def test_heads_that_no_size_can_split_are_refused_with_the_numbers():
    config = tiny_config("llava-clip-llama")
    with pytest.raises(UserError, match=r"tensor_parallel 8: .*6 query heads in 3 key/value groups"):
        plan.sizes_for(config, 2, predict_parameters(config, {}), grid=Grid(tensor_parallel=8))


def test_stages_that_devices_cannot_split_are_refused():
    stages = (Stage(name="inner", rounds=(Round(sizes={"text.ffn": 1023}),)),)
    staging.check_stages(real(), stages)
    with pytest.raises(UserError, match="1023 neurons cannot be shared by 2 devices"):
        staging.check_stages(real(), stages, 2)


def test_a_schedule_goes_through_widths_that_the_config_accepts():
    """Sizes of the first bundled student, made before sizes kept to multiples of 64; widths that six heads divide."""
    config = load_config(bundled("teacher"))
    grid = Grid(multiples={"width": 16, "ffn": 16, "text.width": 1})
    whole = predict_parameters(config, {})
    sizes = plan.sizes_for(config, 18, whole, {"vocab": 1092}, grid)
    assert (sizes["text.width"], sizes["vision.width"], sizes["text.ffn"], sizes["text.blocks"]) == (126, 96, 448, 2)
    order = ("inner", "width", "blocks")
    stages = staging.stages_for(
        config, sizes, row_visits=600_000, a_step=lambda pictures, _: 10 * pictures, order=order, grid=grid
    )
    widths = [turn.sizes["text.width"] for stage in stages for turn in stage.rounds if "text.width" in turn.sizes]
    assert widths == [342, 216, 126]


@pytest.mark.parametrize(
    ("said", "meant"),
    [(32, {"width": 32, "ffn": 32}), ({"ffn": 128}, {"width": 64, "ffn": 128}), ({"text.width": 8}, None)],
)
def test_a_recipe_says_multiples_in_short(said, meant):
    found = recipe.parse({"multiples": said}, "r.yaml").multiples
    assert found == (meant or {"width": 64, "ffn": 64, "text.width": 8})


@pytest.mark.parametrize("wrong", [0, {"ffn": -1}, {"heads": 4}])
def test_wrong_multiples_are_refused(wrong):
    with pytest.raises(UserError, match="multiples"):
        recipe.parse({"multiples": wrong}, "r.yaml")
    assert Recipe().tensor_parallel == 1


def test_every_axis_leaves_some_sizes(sampled_family):
    config = CONFIGS[sampled_family]()
    for axis in describe(config).axes.values():
        if not axis.refusal and axis.kind != "vocab":
            sizes = Grid().sizes(config, axis)
            assert set(sizes) <= set(axis.choices())
            assert axis.size in sizes
