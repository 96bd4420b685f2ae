"""Rotary settings after a cut of head_dim, against the frequencies that the stock classes really use."""

import pytest
import torch

from slimlmm import rope
from slimlmm.anatomy import describe
from slimlmm.families import part_of
from slimlmm.probing import edited
from slimlmm.resizing import resized
from slimlmm.slots import RefusedError
from slimlmm.views import view_of
from tiny import tiny_config
from zoo import CONFIGS

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


def config_with(settings, head_dim=12):
    """A LLaVA whose language model has these rotary settings and six rotary pairs."""
    config = tiny_config("llava-clip-llama")
    fields = {("text_config", "rope_parameters"): settings, ("text_config", "head_dim"): head_dim}
    return edited(config, fields)


def cosines(config, positions):
    """What the stock class multiplies queries and keys with: [positions, D]."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    part = part_of(config, view_of(config, "text").tower)
    rotary = LlamaRotaryEmbedding(part)
    return rotary(torch.zeros(1, 1, 1, dtype=torch.float64), torch.tensor([positions]))[0][0]


@pytest.mark.parametrize("settings", [PLAIN, LINEAR, LLAMA3, YARN, LONG], ids=lambda one: one["rope_type"])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [0, 2, 4], [0, 3], [1, 2, 5], [5]])
def test_the_kept_pairs_turn_as_they_did(settings, kept):
    config = config_with(settings)
    new = resized(config, {"text.head_dim": 2 * len(kept)}, {"text.head_dim.pairs": kept})
    places = [0, 1, 2, 3, 40] if settings is LONG else [0, 1, 2, 3, 40, 200]
    before, after = cosines(config, places), cosines(new, places)
    assert after.shape[-1] == 2 * len(kept)
    assert torch.allclose(after[:, : len(kept)], before[:, kept], atol=2e-5)
    if settings is LONG:  # beyond the first length the other factors count
        far = [0, 1, 200]
        assert torch.allclose(cosines(new, far)[:, : len(kept)], cosines(config, far)[:, kept], atol=2e-5)
        assert not torch.allclose(cosines(config, far)[1], cosines(config, [0, 1, 40])[1], atol=1e-3)


def test_evenly_spaced_pairs_need_no_factors():
    new = resized(config_with(PLAIN), {"text.head_dim": 6}).text_config
    assert (new.head_dim, new.rope_parameters["rope_type"]) == (6, "default")
    other = resized(config_with(PLAIN), {"text.head_dim": 8}).text_config
    assert other.rope_parameters["rope_type"] == "longrope"
    assert len(other.rope_parameters["short_factor"]) == 4
    again = resized(resized(config_with(YARN), {"text.head_dim": 6}), {"text.head_dim": 4}).text_config
    assert again.rope_parameters["rope_type"] == "longrope", "yarn's frequencies depend on the number of dimensions"
    assert again.rope_parameters["attention_factor"] == pytest.approx(1.1386, abs=1e-4)


def test_frequencies_that_change_while_the_model_runs_are_refused():
    config = config_with({"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0})
    assert "'dynamic' cannot be said" in describe(config).axes["text.head_dim"].refusal


@pytest.mark.parametrize(
    ("name", "sizes", "multiple"),
    [
        ("qwen3_vl", {"triples": 2}, 6),
        ("qwen3_5", {"triples": 2, "tail": 2, "rest": 16}, 16),
        ("glm4v_moe", {"section0": 2, "section1": 2, "section2": 2, "rest": 12}, 12),
        ("gemma3", {"pairs": 5}, 2),
        ("aya_vision", {"pairs": 5}, 2),
    ],
)
def test_how_a_head_falls_into_units(name, sizes, multiple):
    view = view_of(CONFIGS[name](), "text")
    found = rope.runs(view)
    assert {run.name: run.units for run in found} == sizes
    assert rope.proportion(view.head_dim, found) == multiple
    owned = []
    for run in found:
        for offset, inner in run.places(rope.rotated(view), neighbours=view.backbone.neighbours):
            owned += range(offset, offset + run.units * inner)
    assert sorted(owned) == list(range(view.head_dim)), "every dimension belongs to one unit"


def test_three_coordinates_keep_their_turns():
    data = CONFIGS["qwen3_vl"]().to_dict()
    data["text_config"] |= {"head_dim": 32}
    data["text_config"]["rope_parameters"] |= {"mrope_section": [8, 4, 4]}
    config = type(CONFIGS["qwen3_vl"]()).from_dict({k: v for k, v in data.items() if k != "transformers_version"})
    axis = describe(config).axis("text.head_dim")
    assert axis.choices() == (8, 16, 24, 32)
    new = resized(config, {"text.head_dim": 16}, {"text.head_dim.triples": [1, 3], "text.head_dim.tail": [0, 2]})
    assert new.text_config.rope_parameters["mrope_section"] == [4, 2, 2]
    assert sum(new.text_config.rope_parameters["mrope_section"]) == 16 // 2


def test_shares_that_do_not_add_up_are_refused():
    data = CONFIGS["qwen3_vl"]().to_dict()
    data["text_config"]["rope_parameters"] |= {"mrope_section": [2, 2, 1]}
    config = type(CONFIGS["qwen3_vl"]()).from_dict({k: v for k, v in data.items() if k != "transformers_version"})
    with pytest.raises(RefusedError, match="does not share out its 6 rotary pairs"):
        rope.runs(view_of(config, "text"))
    assert "mrope_section" in describe(config).axes["text.head_dim"].refusal
