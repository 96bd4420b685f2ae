"""Cuts of the tiny families that have a processor, on its own prompts; and what must be refused or noticed."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimlmm import backbones, families, selfcheck
from slimlmm.anatomy import describe
from slimlmm.axes import Axis
from slimlmm.errors import UserError
from slimlmm.resizing import dead_blocks, predict_parameters
from slimlmm.selfcheck import random_model, self_check, some_units
from slimlmm.surgery import cut, living, masked
from tiny import NAMES, tiny, tiny_batch, tiny_config
from zoo import CONFIGS

TOLERANCE = 1e-5


@functools.cache
def ready(name: str):
    """Model, anatomy, batch and logits of one family, made once."""
    model, _ = tiny(name)
    batch = tiny_batch(name, model)
    del batch["labels"]
    with torch.no_grad():
        return model, describe(model.config), batch, model(**batch).logits


def cuttable(name: str) -> list[str]:
    return [
        axis.name
        for axis in describe(tiny_config(name)).axes.values()
        if not axis.refusal and axis.kind not in ("vocab", "tokens")  # which change the prompt: see the self-check
    ]


CASES = [(name, axis) for name in NAMES for axis in cuttable(name)]


def half(axis: Axis) -> int:
    smaller = [size for size in axis.choices() if size < axis.size]
    return smaller[len(smaller) // 2]


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize(("name", "axis_name"), CASES)
def test_cut_equals_masked_and_predicted_equals_counted(name, axis_name):
    model, anatomy, batch, before = ready(name)
    axis = anatomy.axis(axis_name)
    size = half(axis)
    for seed in range(5):  # a choice that drops blocks behind the last one read says nothing
        keep = some_units(axis, size, seed)
        with torch.no_grad(), masked(model, anatomy, axis_name, keep):
            wanted = model(**batch).logits
        if not torch.equal(wanted, before):
            break
    student = cut(model, anatomy, axis_name, keep)
    got = logits(student, batch)
    assert (got - wanted).abs().max() <= TOLERANCE
    assert (got - before).abs().max() > 1e-2, "a vacuous test: the axis does not matter"
    assert torch.equal(logits(model, batch), before), "the input model was touched"
    assert predict_parameters(model.config, {axis_name: size}) == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("name", ["llava-dinov2-llama", "qwen2_5_vl"])
def test_a_chain_of_all_cuts_generates(name):
    model, _, batch, _ = ready(name)
    student = model
    for axis_name in cuttable(name):
        anatomy = describe(student.config)
        axis = anatomy.axis(axis_name)
        if any(size < axis.size for size in axis.choices()):
            student = cut(student, anatomy, axis_name, some_units(axis, half(axis)))
    answer = student.generate(**batch, max_new_tokens=3, min_new_tokens=1, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]


def test_dead_blocks_go_with_no_change_of_output():
    model, anatomy, batch, before = ready("llava-clip-llama")
    assert dead_blocks(model.config) == {"vision.blocks": [2]}
    student = cut(model, anatomy, "vision.blocks", {"vision.blocks": torch.tensor([0, 1])})
    assert torch.equal(logits(student, batch), before)
    assert student.config.vision_feature_layer == -1
    assert dead_blocks(student.config) == {}
    assert torch.equal(logits(living(model), batch), before)
    assert living(model).config.to_dict() == student.config.to_dict()
    assert living(student) is student


def test_dtype_ties_mode_grad_and_generation_config_come_along():
    model, _ = tiny("llava-dinov2-llama")
    model = model.to(torch.bfloat16).train()
    model.model.vision_tower.embeddings.patch_embeddings.projection.weight.requires_grad_(False)
    model.generation_config.max_new_tokens = 17
    anatomy = describe(model.config)
    axis = anatomy.axis("text.width")
    student = cut(model, anatomy, axis.name, some_units(axis, 24))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student.lm_head.weight is student.model.language_model.embed_tokens.weight
    assert student.training
    assert student.generation_config.max_new_tokens == 17
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.vision_tower.embeddings.patch_embeddings.projection.weight"]
    assert not any(b.is_meta for b in student.buffers())


def test_masked_lets_gradients_flow_and_restores_after_an_error():
    model, anatomy, batch, before = ready("llava-clip-llama")
    keep = some_units(anatomy.axis("text.ffn"), 10)

    def fail_inside():
        with masked(model, anatomy, "text.ffn", keep):
            model(**batch).logits.sum().backward()
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_inside()
    model.zero_grad()
    assert torch.equal(logits(model, batch), before)


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    heads=st.sampled_from([2, 3, 5]),
    head_dim=st.sampled_from([4, 6]),
    ffn=st.integers(3, 21),
    width=st.sampled_from([30, 60]),
    ratio=st.integers(1, 3),
)
def test_odd_sizes(heads, head_dim, ffn, width, ratio):
    """Sizes that coincide or divide nothing: W = Q*D, FFN = W, odd head counts."""
    config = tiny_config("llava-dinov2-llama")
    for field, value in {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "num_hidden_layers": 2,
    }.items():
        setattr(config.text_config, field, value)
    config.vision_config.mlp_ratio = ratio
    model = random_model(type(config).from_dict(config.to_dict()))
    batch = tiny_batch("llava-dinov2-llama", model, n=1)
    anatomy = describe(model.config)
    for axis in anatomy.axes.values():
        if axis.kind == "vocab" or len(axis.choices()) < 2:
            continue
        keep = some_units(axis, half(axis))
        with torch.no_grad(), masked(model, anatomy, axis.name, keep):
            wanted = model(**batch).logits
        got = logits(cut(model, anatomy, axis.name, keep), batch)
        assert (got - wanted).abs().max() <= TOLERANCE * max(1, float(wanted.abs().max())), axis.name


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({}, "needs a choice for"),
        ({"text.width": torch.arange(24)}, "needs a choice for"),
        ({"text.width": torch.arange(24), "text.width.projector": torch.arange(30)}, "different sizes"),
        ({"text.width": torch.arange(24).flip(0), "text.width.projector": torch.arange(24)}, "sorted"),
        ({"text.width": torch.arange(25, 49), "text.width.projector": torch.arange(24)}, "within 0..47"),
        ({"text.width": torch.arange(25), "text.width.projector": torch.arange(25)}, "cannot be said"),
    ],
)
def test_illegal_choices_are_refused(keep, message):
    model, anatomy, _, _ = ready("llava-clip-llama")
    with pytest.raises(UserError, match=message):
        cut(model, anatomy, "text.width", keep)


def test_the_self_check_passes_and_names_what_is_refused():
    checks = {check.axis: check for check in self_check(tiny_config("llava-clip-llama"))}
    assert all(check.ok for check in checks.values()), checks
    (refused,) = self_check(tiny_config("llava-clip-llama"), ["vision.kv_groups"])
    assert not refused.ok
    assert "heads go with vision.width" in refused.reason
    (unknown,) = self_check(tiny_config("llava-clip-llama"), ["vision.wdth"])
    assert "Did you mean 'vision.width'" in unknown.reason


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("blip_2_vision_model", {"produce": ("qkv",), "consume": (), "outer": 3}),  # a forgotten name
        (
            "blip_2_vision_model",
            {"produce": ("qkv",), "consume": ("projection",), "outer": 1},
        ),  # a wrong order
    ],
)
def test_the_self_check_notices_wrong_family_lines(monkeypatch, model_type, changes):
    wrong = dataclasses.replace(backbones.BACKBONES[model_type], attention=(backbones.Attention(**changes),))
    monkeypatch.setattr(families, "BACKBONES", {**backbones.BACKBONES, model_type: wrong})
    monkeypatch.setattr("slimlmm.anatomy._ANATOMIES", {})
    (check,) = self_check(tiny_config("blip2-opt"), ["vision.width"])
    assert not check.ok
    monkeypatch.undo()


def test_the_shallow_copy_has_few_tokens_and_proves_the_same(sampled_family, monkeypatch):
    config = CONFIGS[sampled_family]()
    axis = describe(config).axes["vocab"]
    monkeypatch.setattr(selfcheck, "VOCABULARY", 200)
    copied = selfcheck.shallow(config)
    assert describe(copied).axes["vocab"].size == (axis.size if axis.refusal else 200)
    (check,) = self_check(config, ["text.ffn"] if "text.ffn" in describe(config).sizes else ["text.blocks"])
    assert check.ok, check
