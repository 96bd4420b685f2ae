"""What probing must find, and what it must refuse: axes, sizes, groups, roles, configs."""

import re

import pytest
import torch
import transformers
from transformers import AutoConfig

from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.families import FAMILIES, HOLDS
from slimlmm.probing import edited, skeleton
from slimlmm.resizing import dead_blocks, predict_parameters, resized
from tiny import NAMES, tiny_config

PLAIN = ["text.blocks", "text.ffn", "text.width", "vision.blocks", "vision.ffn", "vision.width", "vocab"]
INSIDE = ["text.kv_groups", "text.queries", "text.head_dim"]
QFORMER = ["qformer.blocks", "qformer.ffn", "qformer.query_tokens", "qformer.width"]
CUTTABLE = {
    "llava-clip-llama": [*PLAIN, *INSIDE],
    "llava-siglip-qwen2": [*PLAIN, *INSIDE],
    "llava-dinov2-llama": [*PLAIN, *INSIDE, "vision.kv_groups", "vision.head_dim"],
    "smolvlm": [*PLAIN, *INSIDE],
    "idefics3": [*PLAIN, *INSIDE],
    "qwen2_5_vl": PLAIN,
    "blip2-opt": [*PLAIN, *QFORMER],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_axes_of_every_family(name):
    anatomy = describe(tiny_config(name))
    assert sorted(anatomy.sizes) == sorted(CUTTABLE[name])
    for axis in anatomy.axes.values():
        assert bool(axis.groups) != bool(axis.refusal), axis.name
        assert axis.refusal or axis.choices()[-1] == axis.size
        for group in axis.groups:
            assert group.kept(axis.size) == group.units, group.name
            assert anatomy.group(group.name) is group
    assert {"text", "vision", "projector"} <= set(anatomy.towers)


@pytest.mark.parametrize("name", NAMES)
def test_slots_cover_every_axis_of_their_parameters_once(name):
    """All rows of a parameter axis belong to units of the axis, each row to one unit."""
    config = tiny_config(name)
    anatomy, shapes = describe(config), skeleton(config).shapes
    for axis in anatomy.axes.values():
        owned = {}
        for group in axis.groups:
            for slot in group.slots:
                assert slot.parameter not in anatomy.tied
                rows = slot.rows(torch.arange(group.units), group.units).tolist()
                owned.setdefault((slot.parameter, slot.dim), []).extend(rows)
        for (parameter, dim), rows in owned.items():
            assert sorted(rows) == list(range(shapes[parameter][dim])), (axis.name, parameter)


def test_groups_and_roles_of_the_llava_width():
    anatomy = describe(tiny_config("llava-dinov2-llama"))
    stream, interior = anatomy.group("text.width"), anatomy.group("text.width.projector")
    roles = {(slot.parameter, slot.dim): slot.role for slot in (*stream.slots, *interior.slots)}
    assert roles["model.language_model.embed_tokens.weight", 1] == "produce"
    assert roles["model.language_model.layers.0.self_attn.q_proj.weight", 1] == "consume"
    assert roles["model.language_model.layers.0.self_attn.o_proj.weight", 0] == "produce"
    assert roles["model.language_model.norm.weight", 0] == "affine"
    assert roles["model.multi_modal_projector.linear_2.weight", 0] == "produce"
    assert {(slot.parameter.split(".")[2], slot.role) for slot in interior.slots} == {
        ("linear_1", "produce"),
        ("linear_2", "consume"),
    }
    vision = {(slot.parameter, slot.dim): slot for slot in anatomy.group("vision.width").slots}
    layer = "model.vision_tower.encoder.layer.0"
    assert vision[f"{layer}.layer_scale1.lambda1", 0].role == "affine"
    assert vision[f"{layer}.layer_scale1.lambda1", 0].norm == ""
    assert vision[f"{layer}.norm1.weight", 0].norm == "layer"
    assert vision["model.vision_tower.embeddings.cls_token", 2].role == "produce"
    clip = describe(tiny_config("llava-clip-llama")).group("vision.width")
    assert {s.role for s in clip.slots if s.parameter.endswith("class_embedding")} == {"produce"}


def test_layouts_of_products():
    merger = describe(tiny_config("qwen2_5_vl")).group("vision.width").slots
    assert {s.outer for s in merger if s.parameter == "model.visual.merger.mlp.0.weight"} == {4}
    qkv = describe(tiny_config("qwen2_5_vl")).group("vision.width[0].heads").slots
    assert {(s.outer, s.inner) for s in qkv if s.parameter.endswith("attn.qkv.weight")} == {(3, 8)}
    text = describe(tiny_config("qwen2_5_vl")).group("text.width[0].heads")
    inner = {s.parameter.split(".")[-2]: s.inner for s in text.slots}
    assert inner == {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
    assert text.stride == 16
    ffn = describe(tiny_config("llava-dinov2-llama")).group("vision.width[0].ffn")
    assert (ffn.units, ffn.rate, ffn.kept(20)) == (96, 3, 60)


def test_refusals_say_why():
    anatomy = describe(tiny_config("blip2-opt"))
    with pytest.raises(UserError, match="re-cut the same matrices"):
        anatomy.axis("text.kv_groups")
    with pytest.raises(
        UserError, match=r"text\.head_dim .* cannot be cut: head_dim is hidden_size / num_attention_heads"
    ):
        anatomy.axis("text.head_dim")
    with pytest.raises(UserError, match="every key/value head has one query head already"):
        describe(tiny_config("llava-dinov2-llama")).axis("vision.queries")
    with pytest.raises(UserError, match=r"Did you mean 'text\.width'"):
        anatomy.axis("text.wdth")
    with pytest.raises(UserError, match="'llama' is not supported"):
        describe(tiny_config("llava-clip-llama").text_config)


def test_a_model_that_holds_one_of_a_family_says_how_to_take_it_out():
    for holder, told in HOLDS.items():
        with pytest.raises(UserError) as caught:
            describe(AutoConfig.for_model(holder))
        assert str(caught.value) == f"model type '{holder}' is not supported. {told}"
        model, processor = (getattr(transformers, name) for name in re.findall(r"(\w+)\.from_pretrained", told))
        assert model.config_class.model_type in FAMILIES
        assert issubclass(processor, transformers.ProcessorMixin)


def test_an_unknown_tower_refuses_its_own_axes_only():
    config = tiny_config("llava-clip-llama")
    data = config.to_dict()
    data["vision_config"] = {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    anatomy = describe(type(config).from_dict(data))
    assert "'vit' is not known" in anatomy.axes["vision.width"].refusal
    assert sorted(anatomy.sizes) == sorted(["text.blocks", "text.ffn", "text.width", "vocab", *INSIDE])


@pytest.mark.parametrize("name", NAMES)
def test_predictions_of_joint_changes_equal_the_rebuilt_model(name):
    """The polynomial of the sizes agrees with building the resized configuration."""
    config = tiny_config(name)
    axes = [axis for axis in describe(config).axes.values() if not axis.refusal and axis.kind != "vocab"]
    sizes = {axis.name: axis.choices()[0 if axis.kind == "blocks" else len(axis.choices()) // 2] for axis in axes}
    if name == "llava-dinov2-llama":
        sizes["vision.ffn"] = 2 * sizes["vision.width"]
    if "text.kv_groups" in sizes:
        sizes |= {"text.kv_groups": 1, "text.width": 24}
    new = resized(config, sizes)
    assert predict_parameters(config, sizes) == skeleton(new).parameters
    assert {axis: size for axis, size in describe(new).sizes.items() if axis in sizes} == sizes
    assert predict_parameters(config, {}) == skeleton(config).parameters


def test_dinov2_ffn_goes_in_whole_ratios():
    config = tiny_config("llava-dinov2-llama")
    assert describe(config).axis("vision.ffn").choices() == (32, 64, 96)
    assert resized(config, {"vision.ffn": 64}).vision_config.mlp_ratio == 2
    assert resized(config, {"vision.width": 20}).vision_config.mlp_ratio == 3
    with pytest.raises(UserError, match="Possible: 32, 64, 96"):
        resized(config, {"vision.ffn": 50})
    both = resized(config, {"vision.width": 20, "vision.ffn": 40}).vision_config
    assert (both.hidden_size, both.mlp_ratio, both.head_dim, both.num_attention_heads) == (20, 2, 8, 4)


def test_what_a_config_class_forbids_is_refused_with_the_numbers():
    config = tiny_config("llava-clip-llama")
    with pytest.raises(UserError, match=r"hidden.*25.*multiple.*6"):
        resized(config, {"text.width": 25})
    with pytest.raises(UserError, match="must be a multiple of 8"):
        resized(config, {"vision.width": 20})
    with pytest.raises(UserError, match="between 1 and its present size 48"):
        resized(config, {"text.width": 96})
    config.text_config.hidden_size = 60
    assert describe(type(config).from_dict(config.to_dict())).axis("text.kv_groups").choices() == (1, 2, 3)
    config.text_config.hidden_size = 66
    assert describe(type(config).from_dict(config.to_dict())).axis("text.kv_groups").choices() == (1, 3)


def test_lists_per_block_and_block_numbers_follow_the_blocks():
    config = tiny_config("qwen2_5_vl")
    kept = resized(config, {"text.blocks": 2, "vision.blocks": 2}, {"vision.blocks": [1, 2], "text.blocks": [0, 2]})
    assert kept.vision_config.fullatt_block_indexes == [0]
    assert len(kept.text_config.layer_types) == kept.text_config.num_hidden_layers == 2
    gone = resized(config, {"vision.blocks": 2}, {"vision.blocks": [0, 2]})
    assert gone.vision_config.fullatt_block_indexes == []
    dino = resized(tiny_config("llava-dinov2-llama"), {"vision.blocks": 1})
    assert dino.vision_config.stage_names == ["stem", "stage1"]


@pytest.mark.parametrize(
    ("layer", "kept", "new", "dead"),
    [
        (-2, [0, 1], -1, []),
        (-2, [0, 2], -2, [1]),
        (-1, [0, 2], -1, []),
        (2, [1, 2], 1, [1]),
        ([1, -1], [0, 2], [1, -1], []),
    ],
)
def test_the_feature_layer_stays_behind_the_same_blocks(layer, kept, new, dead):
    config = tiny_config("llava-clip-llama")
    config.vision_feature_layer = layer
    config = type(config).from_dict(config.to_dict())
    cut = resized(config, {"vision.blocks": len(kept)}, {"vision.blocks": kept})
    assert cut.vision_feature_layer == new
    assert dead_blocks(cut).get("vision.blocks", []) == dead


def test_qformer_blocks_go_by_whole_periods():
    axis = describe(tiny_config("blip2-opt")).axis("qformer.blocks")
    assert (axis.choices(), axis.groups[0].units, axis.groups[0].stride) == ((2, 4), 2, 2)
    with pytest.raises(UserError, match="multiple of 2"):
        resized(tiny_config("blip2-opt"), {"qformer.blocks": 3})


def test_an_edited_configuration_is_the_callers_own_and_numbers_keep_their_kind():
    config = tiny_config("llava-clip-llama")
    field = ("text_config", "intermediate_size")
    first = edited(config, {field: 34})
    first.text_config.intermediate_size, first.vision_config.num_hidden_layers = 1, 1
    again = edited(config, {field: 34})
    assert again.text_config.intermediate_size == 34
    assert again.vision_config.num_hidden_layers == config.vision_config.num_hidden_layers
    assert [type(edited(config, {("", "note"): value}).note) for value in (1, 1.0, True)] == [int, float, bool]


def test_axes_are_those_of_the_configuration_as_it_was_described():
    config, same = tiny_config("llava-clip-llama"), tiny_config("llava-clip-llama")
    config.text_config.intermediate_size = same.text_config.intermediate_size = 36  # described nowhere else
    anatomy = describe(config)
    config.text_config.intermediate_size = 20
    assert anatomy.axis("text.ffn").size == describe(same).axis("text.ffn").size == 36
    assert describe(config).axis("text.ffn").size == 20
    assert describe(same) is anatomy
