"""What a batch shows where the teacher was asked about some of its pictures, all, or none."""

import copy

import pytest
import torch

from slimlmm import lessons
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.forward import answer_logits
from slimlmm.lessons import collator_for, fitted_readouts, look, matched_tokens
from slimlmm.losses import TEACHER_ENTRIES, Match, Seen, combine, forward_kl
from slimlmm.teacher import TeacherCache, Teachers
from slimlmm.trainings import Training
from tiny import tiny

LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0, "answer_states": 1.0, "picture_states": 1.0}
TAUGHT = [name for name in LOSSES if name in TEACHER_ENTRIES]


@pytest.fixture
def lesson(tmp_path, rows):
    """A student, a teacher that is another model, three pictures, and a function: taught pictures -> weighted losses."""
    teacher, processor = tiny("llava-dinov2-llama")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    groups = by_picture(rows.train[:40], 16)[:3]

    def seen(taught, shown=groups):
        cache = TeacherCache(teacher, Collator(processor, packed=True), tmp_path / str(taught and sorted(taught)))
        collate = collator_for(processor, packed=True, teacher=cache, losses=LOSSES, taught=taught)
        settings = Training(steps=1, losses=LOSSES)
        other = TeacherCache(teacher, Collator(processor, packed=True), tmp_path / "all")
        first = collator_for(processor, packed=True, teacher=other, losses=LOSSES, taught=None)
        readouts = fitted_readouts(student, describe(student.config), settings, first, groups)
        batch = collate(shown)
        logits_AV, labels_A, states = look(student, batch, readouts.block, stop=False)
        matches = {
            name: Match(matched_tokens(batch, name, states[name]), batch[TEACHER_ENTRIES[name]], readout)
            for name, readout in readouts.maps.items()
        }
        teacher_AV = cache.logits(batch["teacher_hidden"])
        return Seen(logits_AV, labels_A, teacher_AV, matches, 1.0, batch.get("taught_answers")), readouts, cache

    return teacher, student, processor, groups, seen


def test_asking_about_all_pictures_by_name_is_asking_about_all(lesson):
    _, _, _, groups, seen = lesson
    every, named = seen(None)[0], seen({group[0].picture_key() for group in groups})[0]
    for name, value in combine(LOSSES, every).items():
        assert torch.equal(value, combine(LOSSES, named)[name]), name


def test_asked_about_some_the_teachers_losses_are_those_of_these_alone(lesson):
    teacher, student, processor, groups, seen = lesson
    some, whole = combine(LOSSES, seen({groups[1][0].picture_key()})[0]), combine(LOSSES, seen(None)[0])
    alone = combine(LOSSES, seen(None, [groups[1]])[0])
    assert torch.equal(some["cross_entropy"], whole["cross_entropy"])
    for name in TAUGHT:
        assert float(some[name].detach()) == pytest.approx(float(alone[name].detach()), rel=1e-3), name
        assert float(some[name].detach()) != pytest.approx(float(whole[name].detach()), rel=1e-2), name
    batch = Collator(processor, packed=True)([groups[1]])
    by_hand = forward_kl(answer_logits(student, batch)[0], answer_logits(teacher, batch)[0])
    assert float(some["forward_kl"].detach()) == pytest.approx(float(by_hand.detach()), rel=2e-2)  # fp16 states


def test_asked_about_none_of_a_batch_they_are_zero_and_so_are_their_gradients(lesson):
    _, student, _, _, seen = lesson
    shown, readouts, cache = seen({"another picture"})
    parts = combine(LOSSES, shown)
    assert all(float(parts[name].detach()) == 0 for name in TAUGHT)
    assert float(parts["total"].detach()) == float(parts["cross_entropy"].detach()) > 0
    parts["total"].backward()
    assert all(not parameter.grad.any() for parameter in readouts.parameters())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in student.parameters())
    assert not cache._pending


def test_a_training_asks_the_teacher_about_no_other_picture(lesson, rows, tmp_path):
    teacher, student, processor, _, _ = lesson
    groups = by_picture(rows.train, 16)
    taught = {group[0].picture_key() for group in groups[:4]}
    cache = TeacherCache(teacher, Collator(processor, packed=True), tmp_path / "cache")
    found = train(
        student,
        processor,
        rows.train,
        Training(steps=4, pictures_per_step=3, losses=LOSSES, log_every=2),
        tmp_path,
        teacher=cache,
        taught=taught,
    )
    asked = {cache.picture_key(row) for row in rows.train if row.picture_key() in taught}
    assert {key for key in cache._where if key.startswith("picture-")} == asked
    assert found.row_visits == sum(len(groups[0]) for _ in range(12))
    assert all(record["loss/total"] > 0 for record in found.history)
    states = Training(steps=2, pictures_per_step=2, losses={"picture_states": 1.0})
    train(student, processor, rows.train, states, tmp_path, teacher=cache, taught=taught)
    assert {key for key in cache._where if key.startswith("picture-")} == asked


@pytest.mark.parametrize(("more", "most"), [({"accumulate": 4}, 2), ({"accumulate": 8}, 1), ({}, 8)])
def test_maps_are_fitted_on_no_more_pictures_at_once_than_a_training_takes(more, most, rows, tmp_path, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    settings = Training(steps=1, pictures_per_step=8, losses={"answer_states": 1.0, "picture_states": 1.0}, **more)
    cache, sizes = TeacherCache(model, Collator(processor, packed=True), tmp_path), []

    def counted(model, batch, block, *, stop):
        sizes.append(len(batch["picture_tokens"]))  # one sequence a picture
        return look(model, batch, block, stop=stop)

    monkeypatch.setattr(lessons, "look", counted)
    lessons.lessons_of(model, processor, describe(model.config), rows.train[:120], settings, Teachers(cache), None, {})
    assert max(sizes) == most
