from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from slimlmm import checkpoint, data
from slimlmm.calibration import calibration_of, loss_against
from slimlmm.collate import Collator
from slimlmm.forward import answer_logits
from slimlmm.teacher import TeacherCache


@pytest.fixture(scope="module")
def loaded(teacher):
    return checkpoint.load(teacher)


def pictures(batches):
    return {row.picture_key() for batch in batches for row in batch["rows"]}


@pytest.mark.parametrize("packed", [True, False])
def test_every_third_picture_judges_and_is_in_no_fit(rows, loaded, packed):
    chosen = data.spread(rows.train, 18, 2, seed=0)
    found = calibration_of(chosen, Collator(loaded.processor, packed=packed), torch.device("cpu"))
    assert len(pictures(found.fit)) == 6
    assert len(pictures(found.judge)) == 3
    assert not pictures(found.fit) & pictures(found.judge)
    told = [row for batch in (*found.fit, *found.judge) for row in batch["rows"]]
    assert sorted(map(repr, told)) == sorted(map(repr, chosen))


def test_a_picture_with_many_questions_is_on_one_side_alone(rows, loaded):
    many = [
        dataclasses.replace(group[0], id=f"{number}-{n}", question=f"{group[0].question} {n}")
        for number, group in enumerate(data.by_picture(rows.train, 16)[:6])
        for n in range(40)
    ]
    found = calibration_of(many, Collator(loaded.processor, packed=True), torch.device("cpu"))
    assert (len(pictures(found.fit)), len(pictures(found.judge))) == (4, 2)
    assert not pictures(found.fit) & pictures(found.judge)
    assert sum(len(batch["rows"]) for batch in (*found.fit, *found.judge)) == 240


def test_of_fewer_than_three_pictures_all_do_both(rows, loaded):
    few = data.by_picture(rows.train, 16)[:2]
    found = calibration_of(
        [row for group in few for row in group], Collator(loaded.processor, packed=True), torch.device("cpu")
    )
    assert len(pictures(found.fit)) == 2
    assert found.judge is found.fit


@torch.no_grad()
def test_the_loss_is_cross_entropy_and_forward_kl_a_token(rows, loaded, tmp_path):
    collator = Collator(loaded.processor, packed=True)
    (batch, *_) = calibration_of(rows.train[:20], collator, torch.device("cpu")).fit
    loss = loss_against(TeacherCache(loaded.model, collator, tmp_path))
    teacher_AV, labels_A, _ = answer_logits(loaded.model, batch)
    same = float(loss(loaded.model, batch))
    assert same == pytest.approx(float(cross_entropy(teacher_AV, labels_A)), abs=2e-3)  # half precision in the cache
    student = copy.deepcopy(loaded.model)
    norm = student.model.language_model.norm.weight
    norm *= 1 + torch.rand_like(norm)
    student_AV, _, _ = answer_logits(student, batch)
    logs, teacher = student_AV.log_softmax(-1), teacher_AV.softmax(-1)
    wanted = cross_entropy(student_AV, labels_A) + (teacher * (teacher.log() - logs)).sum(-1).mean()
    assert float(loss(student, batch)) == pytest.approx(float(wanted), rel=2e-3)
    assert float(wanted) > same
