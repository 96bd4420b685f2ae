import pytest
import torch

from slimlmm import plan
from slimlmm.anatomy import describe
from slimlmm.checkpoint import load_config
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.grid import Grid
from slimlmm.resizing import predict_parameters, resized
from tiny import NAMES, tiny, tiny_config

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
