"""What a serving engine would refuse, by arithmetic; and that every written configuration says its sizes out loud."""

import json

import pytest
import transformers as tf

from slimlmm import commands
from slimlmm.anatomy import describe
from slimlmm.checkpoint import load_config, save
from slimlmm.deployable import REPEATED, refuse_unsplittable, unsplittable, warnings_of
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.probing import edited, skeleton
from slimlmm.resizing import resized
from slimlmm.selfcheck import random_model
from slimlmm.views import view_of
from zoo import CONFIGS


def real(**changes):
    """Return a LLaVA of real sizes, its text part changed."""
    text = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 512,
    }
    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    return tf.LlavaConfig(text_config=text | changes, vision_config=vision | {"num_hidden_layers": 2, "image_size": 28})


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_plain_model_has_no_warnings(devices):
    assert warnings_of(real(), devices) == []


@pytest.mark.parametrize(
    ("changes", "devices", "sentence"),
    [
        ({}, 3, "text: 16 query heads cannot be shared by 3 devices"),
        (
            {"num_attention_heads": 16, "num_key_value_heads": 16},
            32,
            "text: 16 query heads cannot be shared by 32 devices",
        ),
        (
            {"num_key_value_heads": 4, "num_attention_heads": 12, "hidden_size": 768},
            6,
            "text: 4 key/value groups and 6",
        ),
        ({"intermediate_size": 2818}, 4, "text.ffn: 2818 neurons cannot be shared by 4 devices"),
        ({}, 8, "vision: 4 query heads cannot be shared by 8 devices"),
        ({"head_dim": 36}, 1, "heads of 36 channels; FlashAttention takes multiples of 8 up to 256"),
        ({"head_dim": 512}, 1, "heads of 512 channels; FlashAttention"),
        ({"head_dim": 16}, 1, "heads of 16 channels; Triton's attention kernels start at 32"),
    ],
)
def test_each_check_says_its_numbers(changes, devices, sentence):
    assert any(sentence in text for text in warnings_of(real(**changes), devices))


@pytest.mark.parametrize(("groups", "devices", "fine"), [(4, 8, True), (8, 4, True), (2, 16, True), (4, 6, False)])
def test_groups_are_split_or_copied(groups, devices, fine):
    found = unsplittable(
        real(num_attention_heads=48, num_key_value_heads=groups, hidden_size=3072, head_dim=64), devices
    )
    assert fine is not any("key/value groups" in text for text in found)


def test_rotary_sections_have_to_fill_half_a_head():
    config = CONFIGS["qwen2_5_vl"]()
    assert not any("mrope" in text for text in warnings_of(config))
    broken = config.to_dict()
    broken["text_config"]["rope_parameters"]["mrope_section"] = [2, 2, 2]
    assert any("[2, 2, 2] adds up to 6" in text for text in warnings_of(type(config).from_dict(broken)))


def test_float16_is_refused_where_engines_do():
    config = CONFIGS["gemma3"]()
    config.dtype = "float16"
    assert any("float16" in text for text in warnings_of(config))
    config.dtype = "bfloat16"
    assert not any("float16" in text for text in warnings_of(config))


def test_two_values_of_one_field_are_told():
    assert not any("on top" in text for text in warnings_of(CONFIGS["ovis2"]()))
    config = edited(CONFIGS["ovis2"](), {("", "vocab_size"): 999})
    assert any("vocab_size = 999 on top and 320 in text_config" in text for text in warnings_of(config))


def test_only_new_problems_are_refused():
    config = real(intermediate_size=2818)
    assert refuse_unsplittable(config, {"text.ffn": 2812}, 4) == []
    refuse_unsplittable(config, {"text.blocks": 1}, 4)
    with pytest.raises(UserError, match=r"text.ffn=2814 cannot be split over 4 devices:\n  text.ffn: 2814 neurons"):
        refuse_unsplittable(config, {"text.ffn": 2814}, 4)


def test_every_cut_writes_head_dim_and_the_same_value_everywhere(sampled_family, tmp_path):
    config = CONFIGS[sampled_family]()
    family, anatomy = family_of(config), describe(config)
    text = family.tower("text").config
    for axis in anatomy.axes.values():
        smaller = [size for size in axis.choices() if size < axis.size] if not axis.refusal else []
        if not smaller or axis.kind == "vocab":  # which goes with a tokenizer: test_vocab
            continue
        student_dims = {axis.name: smaller[len(smaller) // 2]}
        student = resized(config, student_dims)
        student.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        for tower in family.towers:
            heads = anatomy.axes.get(f"{tower.name}.kv_groups")
            if heads is not None and not heads.refusal:
                view = view_of(config, tower.name)
                part = written[tower.config] if tower.config else written
                dims = student_dims.get(f"{tower.name}.head_dim", next(iter(view.pin().values())))
                assert part[view.backbone.head_dim] == dims, (axis.name, tower.name)
        before = config.to_dict()
        for field in REPEATED:
            if text and field in before and before[field] == before[text].get(field):
                assert written.get(field, before[field]) == written[text].get(field, before[field]), (axis.name, field)
        assert skeleton(load_config(tmp_path)).shapes == skeleton(student).shapes, axis.name


def test_cut_tells_and_refuses_what_cannot_be_served(tmp_path):
    save(random_model(CONFIGS["llava-clip-llama"]()), None, tmp_path / "whole", source=tmp_path)
    found = commands.cut(str(tmp_path / "whole"), tmp_path / "cut", ["text.ffn=32"], tensor_parallel=2)
    assert any("heads of 10 channels" in text for text in found["warnings"])
    with pytest.raises(UserError, match="33 neurons cannot be shared by 2 devices"):
        commands.cut(str(tmp_path / "whole"), tmp_path / "odd", ["text.ffn=33"], tensor_parallel=2)
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("qwen3_vl", {"text.head_dim.triples": [1]}, "longrope and mrope_section"),
        ("aya_vision", {"text.head_dim.pairs": [0, 3]}, "neighbouring pairs"),
        ("llava-clip-llama", {"text.head_dim.pairs": [0, 3]}, ""),
    ],
)
def test_chosen_rotary_pairs_that_an_engine_would_turn_otherwise(name, kept, message):
    config = CONFIGS[name]()
    (group,) = (one for one in describe(config).axis("text.head_dim").groups if one.name in kept)
    size = len(kept[group.name]) * group.stride // group.rate
    told = [text for text in warnings_of(resized(config, {"text.head_dim": size}, kept)) if "longrope" in text]
    assert len(told) == bool(message)
    assert all(message in text for text in told)
