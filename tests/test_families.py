"""The family lines name things that exist."""

import re

import pytest

from slimlmm.anatomy import describe
from slimlmm.backbones import BACKBONES
from slimlmm.errors import UserError
from slimlmm.families import FAMILIES, backbone_of, family_of, part_of
from slimlmm.probing import get, skeleton
from slimlmm.resizing import resized
from zoo import CONFIGS

FIELDS = {"width": "width", "blocks": "blocks", "ffn": "ffn", "kv_groups": "heads"}


def pattern(path: str) -> str:
    return re.escape(path).replace(r"\*", r"\d+")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_in_the_family_lines_exists_in_the_model(name):
    config = CONFIGS[name]()
    family, shapes = family_of(config), skeleton(config).shapes
    assert any(parameter.startswith(f"{family.joint}.") for parameter in shapes)
    for tower in family.towers:
        backbone = backbone_of(config, tower)
        assert backbone is not None
        if set(backbone.refusals) >= set(FIELDS):
            continue
        block = rf"{re.escape(tower.prefix)}\.{re.escape(backbone.layers)}\.\d+\."
        assert any(re.match(block, parameter) for parameter in shapes), block
        for noun, field in FIELDS.items():
            assert noun in backbone.refusals or get(config, (tower.config, getattr(backbone, field))), field
        for token in (*backbone.tokens, *((backbone.final_norm,) if backbone.root_of_width else ())):
            assert f"{tower.prefix}.{token}" in shapes
        for module in (*backbone.attention[0].produce, *backbone.attention[0].consume):
            where = block + re.escape(f"{backbone.attention[0].module}.{module}.weight")
            assert any(re.fullmatch(where, parameter) for parameter in shapes), where


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_path_of_a_family_exists_in_one_of_its_models(model_type):
    configs = [config for name in CONFIGS if (config := CONFIGS[name]()).model_type == model_type]
    assert configs, "no tiny configuration"
    names = {parameter for config in configs for parameter in skeleton(config).shapes}
    modules = {name.rpartition(".")[0] for name in names}
    family = FAMILIES[model_type]
    paths = [path for i in family.interiors for path in (*i.produce, *i.consume, *i.scale)]
    for path in (*paths, *family.raw, *family.raw_readers, *family.post_norms):
        assert any(re.fullmatch(pattern(path), module) for module in modules), path
    for path in (*family.layouts, *family.pieces):
        assert any(re.fullmatch(pattern(path), name) for name in names), path


def test_all_backbones_of_the_table_are_tested():
    configs = [CONFIGS[name]() for name in CONFIGS]
    used = {part_of(config, tower).model_type for config in configs for tower in family_of(config).towers}
    assert set(BACKBONES) == used


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2", "gemma3", "gemma4", "llava-dinov2-llama"])
def test_every_size_that_an_axis_offers_can_be_said_by_the_config(name):
    """Llama and Gemma 2 and 3 insist that the heads divide the width, though head_dim is a field of theirs."""
    config = CONFIGS[name]()
    for axis in describe(config).axes.values():
        for size in axis.choices()[-4:] if not axis.refusal and axis.kind != "blocks" else ():
            resized(config, {axis.name: size})


@pytest.mark.parametrize(
    ("name", "axis", "size"), [("glm4v_moe", "text.width", 36), ("qwen3_vl_moe", "text.expert_ffn", 12)]
)
def test_sizes_that_grouped_experts_cannot_multiply_are_neither_offered_nor_made(name, axis, size):
    """Their rows have to be whole 16 bytes; a width of 36 cuts well and fails in the first forward in half precision."""
    config = CONFIGS[name]()
    assert all(choice % 8 == 0 for choice in describe(config).axis(axis).choices())
    with pytest.raises(UserError, match=r"multiple of 8\. Possible: 8, 16"):
        resized(config, {axis: size})


@pytest.mark.parametrize(("name", "axis"), [("internvl", "vision.width"), ("llava-olmo2", "text.kv_groups")])
def test_heads_under_one_norm_are_refused(name, axis):
    """Found by random configurations: InternVL's large tower norms queries and keys over all heads, as OLMo 2 does."""
    config = CONFIGS[name]()
    if name == "internvl":
        assert not describe(config).axes[axis].refusal
        config.vision_config.use_qk_norm = True
    assert "norm over all heads at once" in describe(config).axes[axis].refusal
