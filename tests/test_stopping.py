"""Overfitting is seen on validation rows, and the weights from before it are what stays."""

import copy

import pytest
import torch

from slimlmm import stopping
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import LossError, UserError
from slimlmm.stopping import validation_loss
from slimlmm.trainings import Training
from tiny import tiny


def test_training_on_one_picture_keeps_the_weights_before_it_was_learnt_by_heart(rows, tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    before = copy.deepcopy(model.state_dict())
    few = by_picture(rows.train, 16)[0]
    settings = Training(
        steps=60, pictures_per_step=1, learning_rate=2e-2, losses={"cross_entropy": 1.0}, validate_every=5, stop_after=3
    )
    found = train(model, processor, few, settings, tmp_path, validation=rows.validation)
    losses = dict(found.looks)
    assert found.steps < 60, "it must overfit and be stopped"
    assert losses[found.kept_step] == min(losses.values()) < losses[found.steps]
    assert found.steps - found.kept_step == 15
    collator = Collator(processor, packed=True)
    batches = [collator(by_picture(rows.validation, 16))]
    assert validation_loss(model, batches) == pytest.approx(losses[found.kept_step], rel=1e-4)
    assert not model.training
    frozen = "model.vision_tower.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(model.state_dict()[frozen], before[frozen])


def test_looking_does_not_change_a_training_whose_last_weights_are_best(rows, tmp_path):
    def trained(**looks):
        model, processor = tiny("llava-dinov2-llama")
        settings = Training(steps=6, pictures_per_step=4, learning_rate=1e-3, losses={"cross_entropy": 1.0}, **looks)
        found = train(model, processor, rows.train, settings, tmp_path, validation=rows.validation)
        return model.state_dict(), found

    plain, _ = trained()
    looked, found = trained(validate_every=4)
    assert [step for step, _ in found.looks] == [4, 6]
    assert found.kept_step == 6
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


def test_weights_of_which_no_look_gave_a_number_are_not_handed_over(rows, tmp_path, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    monkeypatch.setattr(stopping, "validation_loss", lambda *_: float("nan"))
    settings = Training(steps=2, pictures_per_step=2, losses={"cross_entropy": 1.0}, validate_every=1)
    with pytest.raises(LossError, match="no number at any of 2 looks"):
        train(model, processor, rows.train, settings, tmp_path, validation=rows.validation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"cross_entropy": 1.0}}, "needs validation rows"),
        ({"losses": {"picture_states": 1.0}}, "does not train"),
    ],
)
def test_looks_that_would_see_nothing_are_refused(changes, message, rows, tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    settings = Training(steps=2, validate_every=1, **changes)
    validation = rows.validation if "picture_states" in changes["losses"] else ()
    with pytest.raises(UserError, match=message):
        train(model, processor, rows.train, settings, tmp_path, validation=validation)
