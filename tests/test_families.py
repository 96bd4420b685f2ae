"""The family lines name things that exist."""

import pytest

from slimlmm.families import BACKBONES, FAMILIES, backbone_of, family_of
from slimlmm.probing import get, skeleton
from tiny import NAMES, tiny_config


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_family_lines_exists_in_the_model(name):
    config = tiny_config(name)
    family, shapes = family_of(config), skeleton(config).shapes
    assert any(parameter.startswith(f"{family.joint}.") for parameter in shapes)
    for interior in family.interiors:
        assert {f"{interior.produce}.weight", f"{interior.consume}.weight"} <= set(shapes)
    for tower in family.towers:
        backbone = backbone_of(config, tower)
        assert backbone is not None
        prefix = f"{tower.prefix}.{backbone.layers}.0."
        assert any(parameter.startswith(prefix) for parameter in shapes), prefix
        for field in (backbone.width, backbone.blocks, backbone.heads, backbone.ffn):
            assert get(config, (tower.config, field)), field
        for token in backbone.tokens:
            assert f"{tower.prefix}.{token}" in shapes
        first = backbone.attention[0]
        for module in (*first.produce, *first.consume):
            assert f"{prefix}{first.module}.{module}.weight" in shapes


def test_all_families_of_the_table_are_tested():
    assert {tiny_config(name).model_type for name in NAMES} == set(FAMILIES)
    used = {getattr(tiny_config(n), t.config).model_type for n in NAMES for t in family_of(tiny_config(n)).towers}
    assert set(BACKBONES) - used == {"mistral", "qwen3"}, "known, but llama-like and not built here"
