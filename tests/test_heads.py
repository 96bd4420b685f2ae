"""The axes inside attention: what belongs to a query head, a key/value head, one dimension of a head."""

import dataclasses
import itertools

import pytest
import torch

from slimlmm import backbones, families
from slimlmm.anatomy import describe
from slimlmm.probing import edited, skeleton
from slimlmm.resizing import predict_parameters, resized
from slimlmm.selfcheck import random_model, self_check, some_units
from slimlmm.surgery import cut
from zoo import CONFIGS

INSIDE = ("kv_groups", "queries", "head_dim")


def test_every_row_of_a_parameter_belongs_to_at_most_one_unit(sampled_family):
    config = CONFIGS[sampled_family]()
    anatomy, shapes = describe(config), skeleton(config).shapes
    for axis in anatomy.axes.values():
        if axis.noun not in INSIDE or axis.refusal:
            continue
        owners: dict[tuple[str, int], list[int]] = {}
        for group in axis.groups:
            for slot in group.slots:
                rows = slot.rows(torch.arange(group.units), group.units).tolist()
                owners.setdefault((slot.parameter, slot.dim), []).extend(rows)
        for (parameter, dim), rows in owners.items():
            assert len(set(rows)) == len(rows), (axis.name, parameter)
            assert set(rows) <= set(range(shapes[parameter][dim])), (axis.name, parameter)
            if "qkv" not in parameter:  # where queries are only a part of the rows
                assert len(rows) == shapes[parameter][dim], (axis.name, parameter)


@pytest.mark.parametrize(
    "name", ["llava-clip-llama", "qwen3_vl", "phi4_multimodal", "qwen3_5", "blip-2-t5", "glm4v_moe", "llama4_moe"]
)
def test_joint_predictions_multiply(name):
    """Key/value groups, queries and head_dim cut the same rows; the rebuilt configuration counts the same."""
    config = CONFIGS[name]()
    axes = [axis for axis in describe(config).axes.values() if axis.noun in (*INSIDE, "experts") and not axis.refusal]
    for size in range(len(axes) + 1):
        for chosen in itertools.combinations(axes, size):
            sizes = {axis.name: axis.choices()[0] for axis in chosen}
            assert predict_parameters(config, sizes) == skeleton(resized(config, sizes)).parameters, sizes


def test_cuts_inside_attention_come_in_any_order():
    config = CONFIGS["llava-clip-llama"]()
    model = random_model(config)
    sizes = {"text.kv_groups": 2, "text.queries": 1, "text.head_dim": 4, "text.width": 24}
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for order in list(itertools.permutations(sizes))[::3]:
        student = model
        for name in order:
            anatomy = describe(student.config)
            student = cut(student, anatomy, name, some_units(anatomy.axis(name), sizes[name]))
        text = student.config.text_config
        assert [getattr(text, field) for field in fields] == [24, 2, 2, 4]
        assert student.num_parameters() == predict_parameters(config, sizes)
    both = resized(config, sizes).text_config
    assert [getattr(both, field) for field in fields] == [24, 2, 2, 4]


def test_values_choose_for_each_head_and_rotary_pairs_for_the_whole_tower():
    groups = describe(CONFIGS["llava-clip-llama"]()).axis("text.head_dim").groups
    names = [group.name for group in groups]
    assert names[0] == "text.head_dim.pairs"
    assert names[1:] == [f"text.head_dim[{layer}].heads.values[{kv}]" for layer in range(3) for kv in range(3)]
    assert {(group.units, group.stride) for group in groups} == {(5, 2), (10, 1)}
    free = describe(CONFIGS["blip-2-t5"]()).axis("text.head_dim").groups
    assert {name.name.rpartition(".")[2].partition("[")[0] for name in free} == {"scores", "values"}


def test_a_width_that_heads_must_divide_leaves_only_some_sizes():
    config = CONFIGS["llava-clip-llama"]()
    config = edited(config, {("text_config", "hidden_size"): 50, ("text_config", "num_attention_heads"): 10})
    config = edited(config, {("text_config", "num_key_value_heads"): 2})
    assert describe(config).axis("text.queries").choices() == (1, 5)


@pytest.mark.parametrize(
    ("name", "model_type", "wrong", "axis"),
    [
        ("gemma3", "gemma3_text", {"fixed_scale": False}, "text.head_dim"),
        ("granite_vision", "granite", {"fixed_scale": False}, "text.head_dim"),
        ("aya_vision", "cohere2", {"neighbours": False}, "text.head_dim"),
        ("smolvlm", "llama", {"neighbours": True}, "text.head_dim"),
        ("smolvlm", "llama", {"fixed_scale": True}, "text.head_dim"),
        ("glm4v_moe", "glm4v_moe_text", {"mrope": "interleaved"}, "text.head_dim"),
        ("qwen3_5", "qwen3_5_text", {"attention": (backbones.Attention(),)}, "text.head_dim"),
    ],
)
def test_wrong_facts_do_not_get_past_the_self_check(monkeypatch, name, model_type, wrong, axis):
    line = dataclasses.replace(backbones.BACKBONES[model_type], **wrong)
    monkeypatch.setattr(families, "BACKBONES", {**backbones.BACKBONES, model_type: line})
    monkeypatch.setattr("slimlmm.anatomy._ANATOMIES", {})
    (check,) = self_check(CONFIGS[name](), [axis])
    assert not check.ok, check
    monkeypatch.undo()
