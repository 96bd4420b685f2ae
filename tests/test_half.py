"""bfloat16 on devices that multiply it: the same training within rounding, weights in fp32, attention as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from slimlmm import checkpoint, half
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.forward import answer_logits
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(teacher):
    return checkpoint.load(teacher)


def ways(model):
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "set_attn_implementation")}


@pytest.mark.parametrize("units", [(), ("amx_tile",), ("avx512_bf16",), ("amx_tile", "avx512_bf16")])
def test_a_cpu_multiplies_bfloat16_by_units_of_either_kind(monkeypatch, units):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda there=name in units: there)
    assert half.has_half(CPU) is bool(units)
    assert half.trains_in_half("auto", CPU) is bool(units)
    assert not half.trains_in_half("float32", CPU)
    assert not half.has_half(torch.device("meta"))


@torch.no_grad()
def test_attention_is_eager_within_the_block_only_and_gives_the_same_logits(rows, loaded):
    model = loaded.model
    batch = Collator(loaded.processor, packed=True)(by_picture(rows.train, 16)[:2])
    wanted_AV = answer_logits(model, batch)[0]
    model.train()
    with half.quick_attention(model, batch) as eager:
        assert eager
        assert model.training
        assert ways(model) == {"eager"}
        model.eval()
        assert torch.allclose(answer_logits(model, batch)[0], wanted_AV, atol=1e-4 * float(wanted_AV.abs().max()))
    assert ways(model) == {"sdpa"}


def test_a_model_whose_eager_attention_says_something_else_keeps_its_own(rows, loaded, monkeypatch):
    model = loaded.model
    batch = Collator(loaded.processor, packed=True)(by_picture(rows.train, 16)[:2])
    found = iter([torch.zeros(1, 1), torch.ones(1, 1)])
    monkeypatch.setattr(half, "answer_logits", lambda *_: (next(found),))
    with half.quick_attention(model, batch) as eager:
        assert not eager
        assert ways(model) == {"sdpa"}


def test_a_model_that_attends_eagerly_stays_so(rows, loaded):
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        with half.quick_attention(model, {}) as changed:
            assert not changed
        assert ways(model) == {"eager"}
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.skipif(not half.has_half(CPU), reason="this CPU does not multiply bfloat16 by units of its own")
def test_a_step_in_bfloat16_is_that_in_fp32_within_rounding(rows, teacher, tmp_path):
    changes = []
    for precision in ("auto", "float32"):
        loaded = checkpoint.load(teacher)
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        settings = Training(steps=2, pictures_per_step=4, learning_rate=1e-3, precision=precision, warmup=0.0)
        cache = TeacherCache(
            checkpoint.load(teacher).model, Collator(loaded.processor, packed=True), tmp_path / precision
        )
        train(loaded.model, loaded.processor, rows.train, settings, tmp_path, teacher=cache)
        assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
        assert ways(loaded.model) == {"sdpa"}
        batch = Collator(loaded.processor, packed=True)(by_picture(rows.train, 16)[:2])
        checkpoint.save(loaded.model, loaded.processor, tmp_path / f"{precision}-trained")
        again = checkpoint.load(tmp_path / f"{precision}-trained").model
        with torch.no_grad():
            assert torch.equal(answer_logits(loaded.model, batch)[0], answer_logits(again, batch)[0])
        changes.append(
            torch.cat([(value - before[name]).flatten() for name, value in loaded.model.named_parameters()]).detach()
        )
    assert not torch.equal(*changes)
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9


@pytest.mark.skipif(not half.has_half(CPU), reason="this CPU does not multiply bfloat16 by units of its own")
def test_every_training_of_a_model_is_in_bfloat16_and_none_leaves_a_forward_behind(rows, teacher, tmp_path):
    loaded = checkpoint.load(teacher)
    seen = set()
    loaded.model.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, module.training))
    )
    for _ in range(3):
        seen.clear()
        settings = Training(steps=2, pictures_per_step=4, losses={"cross_entropy": 1.0})
        train(loaded.model, loaded.processor, rows.train, settings, tmp_path)
        assert {dtype for dtype, training in seen if training} >= {torch.bfloat16}
        assert "forward" not in vars(loaded.model)


def test_a_training_leaves_a_model_that_accelerate_prepares_again(rows, teacher, tmp_path):
    loaded = checkpoint.load(teacher)
    before = set(vars(loaded.model))
    train(loaded.model, loaded.processor, rows.train, Training(steps=1, losses={"cross_entropy": 1.0}), tmp_path)
    assert set(vars(loaded.model)) == before
