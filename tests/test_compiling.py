"""Compiled blocks: the same training within rounding, whatever its losses, and a plain model behind it."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from marks import thorough
from slimlmm import checkpoint, compiling
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.compiling import compiled
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits
from slimlmm.recipe import Round
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler on this machine"
)


def changes_of(teacher, rows, folder, **settings):
    """Return what a training changes in each parameter, as one vector, and the trained model."""
    loaded = checkpoint.load(teacher)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    told = {
        "steps": 3,
        "pictures_per_step": 5,
        "learning_rate": 1e-3,
        "precision": "float32",
        "warmup": 0.0,
        "log_every": 1,
    }
    cache = TeacherCache(checkpoint.load(teacher).model, Collator(loaded.processor, packed=True), folder / "cache")
    done = train(loaded.model, loaded.processor, rows.train, Training(**told | settings), folder, teacher=cache,
                 validation=rows.validation)  # fmt: skip
    moved = [(value - before[name]).flatten() for name, value in loaded.model.named_parameters()]
    return torch.cat(moved).detach(), loaded, done


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {"losses": {"cross_entropy": 1.0, "forward_kl": 1.0, "picture_states": 1.0}},
        thorough({"losses": {"picture_states": 1.0}, "freeze": ("text",)}),
        {"losses": {"cross_entropy": 1.0, "forward_kl": 1.0}, "own_answers": 0.5, "validate_every": 2},
    ],
)
def test_a_compiled_training_is_the_plain_one_within_rounding(settings, rows, teacher, tmp_path):
    plain, _, told = changes_of(teacher, rows, tmp_path / "plain", **settings)
    quick, loaded, found = changes_of(teacher, rows, tmp_path / "quick", compile=True, **settings)
    assert [one["loss"] for one in found.history] == pytest.approx([one["loss"] for one in told.history], rel=1e-3)
    assert torch.nn.functional.cosine_similarity(plain, quick, dim=0) > 0.99
    assert plain.norm() > 0
    assert not any(part._compiled_call_impl for part in loaded.model.modules())


@needs_compiler
def test_blocks_are_compiled_within_the_block_and_only_those_that_run_whole(rows, teacher):
    loaded = checkpoint.load(teacher)
    batch = Collator(loaded.processor, packed=True)(by_picture(rows.train, 16)[:2])
    anatomy = describe(loaded.model.config)
    wanted_AV = answer_logits(loaded.model, batch)[0]
    settings = Training(steps=1, compile=True, losses={"cross_entropy": 1.0, "picture_states": 1.0})
    with compiled(loaded.model, anatomy, settings, batch, in_half=False):
        names = {name for name, part in loaded.model.named_modules() if part._compiled_call_impl}
        depth = {tower: anatomy.axis(f"{tower}.blocks") for tower in ("vision", "text")}
        every = {f"{axis.layers}.{block}" for axis in depth.values() for block in range(axis.size)}
        assert names == every - {f"{depth['text'].layers}.0"}
    assert torch.equal(answer_logits(loaded.model, batch)[0], wanted_AV)


def test_blocks_that_say_something_else_are_refused(rows, teacher, monkeypatch):
    loaded = checkpoint.load(teacher)
    found = iter([torch.ones(1, 1), torch.zeros(1, 1)])
    monkeypatch.setattr(compiling, "answer_logits", lambda *_: (next(found),))
    with (
        pytest.raises(UserError, match=r"off by 1\.0e\+00 of the largest"),
        compiled(loaded.model, describe(loaded.model.config), Training(steps=1, compile=True), {}, in_half=False),
    ):
        pytest.fail("entered")
    assert not any(part._compiled_call_impl for part in loaded.model.modules())


def test_a_machine_without_compiler_says_so(rows, teacher, monkeypatch):
    torch._dynamo.reset()
    loaded = checkpoint.load(teacher)
    batch = Collator(loaded.processor, packed=True)(by_picture(rows.train, 16)[:2])
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    with (
        pytest.raises(UserError, match="a CPU needs a C\\+\\+ compiler"),
        compiled(loaded.model, describe(loaded.model.config), Training(steps=1, compile=True), batch, in_half=False),
    ):
        pytest.fail("entered")


def test_fading_in_a_compiled_training_is_refused():
    with pytest.raises(ValueError, match="cannot be compiled"):
        Round(sizes={"text.ffn": 8}, fade=2, repair=(), train=(Training(steps=4, compile=True),))
