"""FLOPs told from a configuration alone against those that torch counts while the whole model answers."""

import math

import pytest
import torch
from transformers import BatchFeature

from marks import thorough
from slimlmm import costs, measure, prompts
from slimlmm.anatomy import describe
from slimlmm.costs import answer_use, flop_counter
from slimlmm.families import FAMILIES
from slimlmm.probing import get, skeleton
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import predict_parameters, resized, shapes_at
from slimlmm.selfcheck import random_model
from tiny import tiny
from zoo import CONFIGS

TOKENS, PIXELS = 3, 112
#: relative error; a short convolution over a growing window counts a few positions more in lfm2
TOLERANCE = 1e-3


def counted(config) -> float:
    """Let a random model of full size answer, and count."""
    model = random_model(config).requires_grad_(False)
    for part in (model, *(one for one in model.modules() if hasattr(one, "config"))):
        part.config._experts_implementation = "eager"  # plain products, which torch counts by itself
    inputs = {key: value for key, value in picture_prompt(config, pixels=PIXELS).items() if key != "decoder_input_ids"}
    with torch.no_grad(), flop_counter() as counter:
        model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return float(counter.get_total_flops())


def told(config, shapes=None) -> float:
    answer = answer_use(config, TOKENS, PIXELS)
    assert not answer.reason
    return sum(answer.flops(shapes or skeleton(config).shapes).values())


def test_flops_of_an_answer_are_those_that_torch_counts(sampled_family):
    if sampled_family == "llama4_moe":
        pytest.skip("its stock code runs every expert: the test below")
    config = CONFIGS[sampled_family]()
    assert told(config) == pytest.approx(counted(config), rel=TOLERANCE)


def test_only_the_chosen_experts_count():
    """Llama 4's stock code runs every expert on every token; an engine does not."""
    config = CONFIGS["llama4_moe"]()
    text = config.text_config
    share = text.num_experts_per_tok / text.num_local_experts
    assert share < 1
    shapes = skeleton(config).shapes
    flops = answer_use(config, TOKENS, PIXELS).flops(shapes)
    experts = {slot.parameter for group in describe(config).axes["text.expert_ffn"].groups for slot in group.slots}
    chosen = sum(flops[name] for name in experts if len(shapes[name]) == 3)
    assert chosen > 0
    assert sum(flops.values()) + chosen * (1 / share - 1) == pytest.approx(counted(config), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["llava-clip-llama", "smolvlm", "blip2-opt"])
def test_they_are_those_of_a_measurement(name):
    model, processor = tiny(name)
    batch = BatchFeature(dict(picture_prompt(model.config, pixels=PIXELS)))
    assert told(model.config) == measure.flops(model, processor, batch, answer_tokens=TOKENS)


def test_the_copy_that_answers_is_smaller_in_every_axis_that_can_be():
    config = CONFIGS["qwen3_vl_moe"]()
    small, blocks = costs.narrow(config)
    assert skeleton(small).parameters < skeleton(config).parameters
    assert describe(small).sizes["text.ffn"] < describe(config).sizes["text.ffn"]
    text = get(config, ("text_config", "num_hidden_layers"))
    assert len(set(blocks["model.language_model.layers"].values())) < text == len(blocks["model.language_model.layers"])


@pytest.mark.parametrize("name", ["qwen3_vl_moe", thorough("blip-2-t5")])
def test_shapes_and_flops_after_a_cut_are_those_of_the_cut_configuration(name):
    """The way without building anything against the configuration that a cut writes, one axis at a time."""
    config = CONFIGS[name]()
    for axis in describe(config).axes.values():
        smaller = [size for size in axis.choices() if size < axis.size] if not axis.refusal else []
        if not smaller or axis.kind == "vocab":
            continue
        size = smaller[len(smaller) // 2]
        student, shapes = resized(config, {axis.name: size}), shapes_at(config, {axis.name: size})
        assert sorted(shapes.values()) == sorted(skeleton(student).shapes.values()), axis.name
        assert predict_parameters(config, {axis.name: size}) == skeleton(student).parameters
        if axis.kind not in (
            "blocks",
            "tokens",
        ):  # fewer query tokens are another prompt; the copy keeps other blocks than the cut where they differ
            assert told(config, shapes) == pytest.approx(told(student), rel=TOLERANCE), axis.name


def test_a_tied_head_costs_what_a_free_one_does():
    config = CONFIGS["smolvlm"]()
    shapes = skeleton(config).shapes
    flops = answer_use(config, TOKENS, PIXELS).flops(shapes)
    assert skeleton(config).tied == {"lm_head.weight": "model.text_model.embed_tokens.weight"}
    assert flops["lm_head.weight"] == 2 * math.prod(shapes["lm_head.weight"]) * TOKENS
    assert flops.get("model.text_model.embed_tokens.weight", 0) == 0


def test_without_a_prompt_there_is_a_reason_and_no_figure(monkeypatch):
    monkeypatch.delitem(prompts.PICTURES, "smolvlm")
    answer = answer_use(CONFIGS["smolvlm"]())
    assert "no picture prompt" in answer.reason
    assert answer.flops(skeleton(CONFIGS["smolvlm"]()).shapes) is None


def test_a_model_that_cannot_be_made_small_has_no_figure(monkeypatch):
    monkeypatch.setattr(costs, "LARGEST", 10)
    assert "weights" in answer_use(CONFIGS["smolvlm"]()).reason


def test_every_family_has_a_prompt():
    assert set(FAMILIES) == set(prompts.PICTURES)
