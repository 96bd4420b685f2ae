"""States behind blocks: which block stands for which, what they lose, and what a training makes of it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from slimlmm import lineage, surgery
from slimlmm.anatomy import describe
from slimlmm.bridging import stream
from slimlmm.collate import Collator, real_tokens
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.forward import output_of
from slimlmm.lessons import lessons_of
from slimlmm.lineage import pairs_of
from slimlmm.losses import Match, Seen, combine
from slimlmm.readouts import Readout, SameBasis
from slimlmm.recipe import Recipe
from slimlmm.selfcheck import random_model, some_units
from slimlmm.streams import Streams, _heard, streams_of
from slimlmm.teacher import TeacherCache, Teachers
from slimlmm.trainings import Training
from slimlmm.vocab import trim
from tiny import tiny
from zoo import CONFIGS

BLOCKS = {"block_states": 1.0}


def cache_of(model, processor, folder, *, packed=True):
    return TeacherCache(model, Collator(processor, packed=packed), folder)


def loss_of(student, teacher, kept, rows, folder, processor, *, packed=True):
    """Return the loss of one batch of two pictures, with the maps and pairs."""
    groups = by_picture(rows.train[:40], 16)[:2]
    collator = Collator(processor, packed=packed)
    streams, maps = streams_of(student, cache_of(teacher, processor, folder, packed=packed), kept, collator, groups)
    batch = collator(groups)
    with streams.student(batch) as states:
        labels_A = batch["shift_labels"][batch["shift_labels"] != -100]
        student(
            **{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
        )
    said = streams.said(batch)
    matches = {name: Match(one, said[name], maps[name]) for name, one in states.items()}
    parts = combine(BLOCKS, Seen(torch.zeros(len(labels_A), 1), labels_A, matches=matches))
    return parts["total"] / len(labels_A), streams, maps, batch


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_the_mean_over_blocks_of_what_is_told_by_hand(packed, rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    found, streams, maps, batch = loss_of(student, teacher, {}, rows, tmp_path, processor, packed=packed)
    real_BT = real_tokens(batch)
    assert not real_BT.all(), "padding is there, and must not count"
    by_hand = []
    with torch.no_grad():
        for name, pair in streams.pairs.items():
            assert isinstance(maps[name], SameBasis)
            mine, others = (
                stream(output_of(one, one.get_submodule(place), batch))
                for one, place in ((student, pair.block), (teacher, pair.before))
            )
            if pair.axis == "text.blocks":
                mine, others = mine[real_BT], others[real_BT]
            mine, others = mine.flatten(0, -2), others.flatten(0, -2)
            spread = (others - others.mean(0)).square().sum(1).mean()
            by_hand.append((mine - others).square().sum(1).mean() / spread)
    layers = describe(teacher.config).sizes
    assert len(by_hand) == layers["vision.blocks"] + layers["text.blocks"]
    assert float(found.detach()) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)
    found.backward()
    reached = {name for name, one in student.named_parameters() if one.grad is not None and one.grad.any()}
    assert any(".layers.0." in name for name in reached)
    assert any("vision" in name for name in reached)


def test_a_whole_model_loses_nothing_and_one_without_idle_blocks_neither(rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    assert float(loss_of(copy.deepcopy(teacher), teacher, {}, rows, tmp_path / "a", processor)[0].detach()) == 0
    anatomy = describe(teacher.config)
    axis = anatomy.axis("vision.blocks")
    with torch.no_grad():  # the second block adds nothing
        for name, parameter in teacher.named_parameters():
            if name.startswith(f"{axis.layers}.1.") and "layer_scale" in name:
                parameter.zero_()
    stays = [0, *range(2, axis.size)]
    student = surgery.cut(teacher, anatomy, "vision.blocks", {"vision.blocks": torch.tensor(stays)})
    found, streams, _, _ = loss_of(student, teacher, {"vision.blocks": stays}, rows, tmp_path / "b", processor)
    assert float(found.detach()) == pytest.approx(0, abs=1e-9)
    pairs = {one.block: one.before for one in streams.pairs.values()}
    assert pairs[f"{axis.layers}.0"] == f"{axis.layers}.1"
    with pytest.raises(UserError, match=f"the student has {axis.size - 1} blocks, the model before {axis.size}"):
        pairs_of(student, teacher, {})


def test_streams_of_other_widths_are_read_by_maps(rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    anatomy = describe(teacher.config)
    student = surgery.cut(teacher, anatomy, "text.width", some_units(anatomy.axis("text.width"), 24))
    found, streams, maps, _ = loss_of(student, teacher, {}, rows, tmp_path, processor)
    kinds = {pair.axis: type(maps[name]) for name, pair in streams.pairs.items()}
    assert kinds == {"vision.blocks": SameBasis, "text.blocks": Readout}
    assert 0 < float(found.detach()) < 1


def test_kept_layers_are_those_of_the_first_model_through_all_rounds(tmp_path):
    rounds = [tmp_path / str(number) for number in range(4)]
    cuts = [{"vision.blocks": [0, 2, 3]}, {}, {"vision.blocks": [0]}, {"vision.blocks": [1, 2], "text.blocks": [1]}]
    for folder, cut, good in zip(rounds, cuts, (True, True, False, True), strict=True):
        folder.mkdir()
        lineage.keep(folder, cut)
        (folder / "metrics.json").write_text(json.dumps({"kept_promise": good}))
    assert lineage.of_run(rounds) == {"vision.blocks": [2, 3], "text.blocks": [1]}
    assert lineage.after(tmp_path / "none", {"text.blocks": [3]}) == {"text.blocks": [3]}


@pytest.mark.parametrize("more", [{}, {"forward_kl": 1.0}])
def test_training_by_it_brings_the_streams_together(more, rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    anatomy = describe(teacher.config)
    stays = [0, *range(2, anatomy.axis("vision.blocks").size)]
    student = surgery.cut(teacher, anatomy, "vision.blocks", {"vision.blocks": torch.tensor(stays)})
    student = surgery.cut(student, describe(student.config), "text.ffn", some_units(anatomy.axis("text.ffn"), 32))
    kept = {"vision.blocks": stays}
    before = float(loss_of(student, teacher, kept, rows, tmp_path / "a", processor)[0].detach())
    settings = Training(steps=12, pictures_per_step=2, learning_rate=3e-3, losses={**BLOCKS, **more})
    cache = cache_of(teacher, processor, tmp_path / "cache")
    done = train(student, processor, rows.train[:40], settings, tmp_path / "out", teacher=cache, kept=kept)
    after = float(loss_of(student, teacher, kept, rows, tmp_path / "b", processor)[0].detach())
    assert after < 0.7 * before
    assert done.flops > 0
    assert bool(list((tmp_path / "cache").glob("*.safetensors"))) == bool(more), "nothing of it is cached"


def test_what_cannot_be_had_is_refused(rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    with pytest.raises(ValueError, match="compile: block_states looks behind every block"):
        Training(steps=1, losses=BLOCKS, compile=True)
    with pytest.raises(UserError, match="needs a teacher"):
        train(copy.deepcopy(teacher), processor, rows.train, Training(steps=1, losses=BLOCKS), tmp_path / "o")
    cache = cache_of(teacher, processor, tmp_path / "c")
    groups = by_picture(rows.train[:40], 16)[:2]
    assert streams_of(teacher, cache, {}, Collator(processor, packed=False), groups)
    cache.collator.processor = trim(teacher, processor, ["other words"])[1]
    with pytest.raises(UserError, match="its processor makes other tokens"):
        streams_of(teacher, cache, {}, Collator(processor, packed=True), groups)
    cache.collator.processor = processor
    some = Training(steps=1, losses={**BLOCKS, "cross_entropy": 1.0})
    few = frozenset({rows.train[0].picture_key()})
    with pytest.raises(UserError, match="about every picture of a step"):
        lessons_of(teacher, processor, describe(teacher.config), rows.train, some, Teachers(cache), few, {})
    for losses in (BLOCKS, some.losses):
        asked = {"stages": [{"name": "a", "rounds": [{"train": {"steps": 1, "losses": losses}}]}]}
        assert Recipe.model_validate(asked)
        some_rows = {**asked, "data": {"teacher_rows": 10}}
        if losses is BLOCKS:
            assert Recipe.model_validate(some_rows)
        else:
            with pytest.raises(
                ValueError, match=r"teacher_rows=10: block_states \(in a\) asks the teacher about every"
            ):
                Recipe.model_validate(some_rows)


def test_padded_patches_do_not_count_where_the_processor_tells_them():
    block = torch.nn.Linear(3, 3)
    pairs = {"a": lineage.Pair("vision.blocks", "x", "x"), "b": lineage.Pair("text.blocks", "x", "x")}
    mask_BT = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"pixel_attention_mask": mask_BT, "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])}
    with _heard({"a": block, "b": block}, pairs, batch) as states:
        block(torch.randn(2, 3, 3))
    assert [len(states[name]) for name in "ab"] == [5, 4]
    with _heard({"a": block}, pairs, batch) as states:
        block(torch.randn(2, 7, 3))
    assert len(states["a"]) == 14, "a mask of something else"
    assert not block._forward_hooks


def test_towers_whose_blocks_are_not_known_are_not_left_out_in_silence():
    model = random_model(CONFIGS["fast_vlm"]())
    with pytest.raises(UserError, match="where the blocks of vision are is not known for fast_vlm"):
        Streams(model, SimpleNamespace(model=model), {})


def test_a_student_that_can_be_packed_is_not_where_its_teacher_cannot(rows, tmp_path):
    teacher, processor = tiny("llava-dinov2-llama")
    settings, found = Training(steps=1, losses=BLOCKS), {}
    for packed in (True, False):
        teachers = Teachers(cache_of(teacher, processor, tmp_path / str(packed), packed=packed))
        lessons = lessons_of(
            teacher, processor, describe(teacher.config), rows.train[:40], settings, teachers, None, {}
        )
        found[packed] = len(lessons.collate(lessons.groups.groups[:2])["input_ids"])
    assert found == {True: 2, False: sum(len(group) for group in lessons.groups.groups[:2])}
