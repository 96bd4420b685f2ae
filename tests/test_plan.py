import pytest
import torch

from slimlmm import plan
from slimlmm.anatomy import describe
from slimlmm.budget import by_shrink
from slimlmm.checkpoint import load_config
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.resizing import predict_parameters, resized
from slimlmm.views import view_of
from tiny import NAMES, tiny, tiny_config
from zoo import CONFIGS

#: sizes that were chosen before other budgets than `shrink` came: (model, shrink) -> sizes in the order of the axes
CHOSEN = {
    (
        "llava-clip-llama",
        2.5,
    ): "2 68 3 24 3 44 16",
    (
        "llava-siglip-qwen2",
        2.5,
    ): "2 68 2 24 3 40 16",
    (
        "llava-dinov2-llama",
        2.5,
    ): "2 48 3 30 2 64 3 20",
    (
        "smolvlm",
        2.5,
    ): "2 48 3 30 3 44 16",
    (
        "idefics3",
        2.5,
    ): "2 48 3 24 2 44 24",
    ("qwen2_5_vl", 2.5): "2 48 32 2 32 16",
    (
        "blip2-opt",
        2.5,
    ): "2 48 32 2 40 16 4 36 12",
    (
        "teacher",
        2.5,
    ): "2 1152 3 360 6 1152 6 256",
    (
        "teacher",
        18,
    ): "2 512 2 144 4 1152 3 64",
}


@pytest.mark.parametrize(("name", "shrink"), CHOSEN)
def test_the_same_shrink_gives_the_same_sizes(name, shrink):
    teacher = name == "teacher"
    config = load_config(bundled("teacher")) if teacher else tiny_config(name)
    sizes = plan.sizes_for(config, shrink, predict_parameters(config, {}), {"vocab": 1092} if teacher else None)
    assert " ".join(map(str, sizes.values())) == CHOSEN[name, shrink]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_fit_the_budget_and_the_config(name):
    model, _ = tiny(name)
    whole = model.num_parameters()
    sizes = plan.sizes_for(model.config, 2.5, whole)
    anatomy = describe(model.config)
    stated = plan.follow_width(anatomy, sizes, sizes)
    assert predict_parameters(model.config, stated) <= whole / 2.5
    assert predict_parameters(model.config, stated) >= whole / 2.5 / 1.4
    resized(model.config, stated)


def test_an_unreachable_budget_says_how_far_one_can_go():
    model, _ = tiny("llava-dinov2-llama")
    with pytest.raises(UserError, match=r"smallest shape .* \(\d+\.\dx\)"):
        plan.sizes_for(model.config, 10_000, model.num_parameters())


def test_key_value_groups_go_least():
    model, _ = tiny("llava-dinov2-llama")
    fine = Grid(multiples={"width": 1, "ffn": 1})
    sizes = plan.sizes_for(model.config, 4, model.num_parameters(), grid=fine)
    left = {name: size / describe(model.config).axis(name).size for name, size in sizes.items()}
    assert left["text.kv_groups"] > left["text.ffn"] > left["text.width"]


def test_choose_takes_the_best_units_in_order():
    model, _ = tiny("llava-dinov2-llama")
    anatomy = describe(model.config)
    scores = {group.name: torch.arange(group.units).flip(0).double() for group in anatomy.axis("text.ffn").groups}
    keep = plan.choose(scores, anatomy, "text.ffn", 8)
    assert all(units.tolist() == list(range(8)) for units in keep.values())


@pytest.mark.parametrize("name", ["llava-dinov2-llama", "smolvlm", "gemma3", "paligemma2"])
def test_planned_widths_stay_possible_after_any_other_cut_of_heads(name):
    config = tiny_config(name) if name in NAMES else CONFIGS[name]()
    axes = describe(config).axes
    moved = 0
    for groups in axes["text.kv_groups"].choices():
        less = resized(config, {"text.kv_groups": groups})
        for width in axes["text.width"].choices()[:-1]:
            sizes, told = plan.carried(less, {"text.width": width}, Grid())
            resized(less, sizes)
            assert set(sizes) == {"text.width"}
            assert bool(told) == (sizes["text.width"] != width)
            moved += bool(told)
    assert moved or not view_of(config, "text").backbone.width_by_heads


def test_an_axis_that_went_with_the_blocks_falls_away_and_is_told():
    config = CONFIGS["glm4v_moe"]()
    wanted = {"text.ffn": 64, "text.expert_ffn": 16}
    assert plan.carried(config, wanted, Grid()) == (wanted, [])
    experts_only = resized(config, {"text.blocks": 2}, {"text.blocks": [1, 2]})
    sizes, (told,) = plan.carried(experts_only, wanted, Grid())
    assert sizes == {"text.expert_ffn": 16}
    assert told.startswith("text.ffn=64 falls away: ")


def test_groups_that_must_stay_get_a_width_that_their_heads_divide():
    """Sixteen heads of 3,840 channels in eight groups; the least width on offer suits fewer heads only."""
    config = CONFIGS["gemma3"]()
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim = 3840, 16, 8, 16
    whole = predict_parameters(config, {})
    for given in ({"floors": {"text.kv_groups": 5}}, {"fixes": {"text.kv_groups": 5}}):
        space = plan.space_of(config, **given)
        sizes = plan.sizes_within(space, by_shrink(config, 3, whole))
        assert sizes["text.kv_groups"] >= 5
        assert predict_parameters(config, space.stated(sizes)) <= whole / 3


@pytest.mark.parametrize("name", ["florence2", "blip-2-t5"])
def test_blocks_of_a_decoder_are_planned_too(name):
    config = CONFIGS[name]()
    for depth in ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"):
        setattr(config.text_config, depth, 6)
    space = plan.space_of(config)
    sizes = plan.sizes_within(space, by_shrink(config, 3, predict_parameters(config, {})))
    assert sizes["text.decoder_blocks"] < 6
    resized(config, space.stated(sizes))


def test_a_budget_that_only_smaller_floors_can_meet_says_so():
    config = tiny_config("llava-dinov2-llama")
    whole = predict_parameters(config, {})
    floors = {name: axis.size for name, axis in plan.space_of(config).axes.items() if name != "vision.width"}
    fixes = {"vision.width": describe(config).sizes["vision.width"]}
    with pytest.raises(UserError, match="Ask for smaller or fewer --floor and --fix"):
        plan.sizes_within(plan.space_of(config, floors=floors, fixes=fixes), by_shrink(config, 2, whole))
