"""Controls: a training from random weights that was killed goes on where it was."""

import math

import pytest

from marks import thorough
from slimlmm import checkpoint, controls, data, pipeline, recipe, saving
from slimlmm.collate import Collator
from slimlmm.distill import train
from slimlmm.lessons import asked_of, learnt_from
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from test_pipeline import Recorder
from test_saving import Dies

RAW = {
    "bench_calls": 0,
    "data": {"calibration_rows": 20, "validation_rows": 20, "test_rows": 20},
    "stages": [
        {"name": "lossless", "rounds": [{"drop": ["unused_tokens"]}]},
        {"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}, "repair": [], "train": {"steps": 4}}]},
    ],
}


def test_a_control_is_trained_as_its_like_but_for_what_fresh_weights_cannot_have():
    last = Training(
        steps=9,
        pictures_per_step=12,
        questions_per_picture=5,
        accumulate=3,
        learning_rate=2e-5,
        optimizer="muon",
        weight_decay=0.2,
        warmup=0.3,
        schedule="linear",
        clip=0.5,
        precision="float32",
        freeze=("vision",),
        losses={"forward_kl": 1.0},
        teachers={"first": 1.0, "previous": 0.5},
        own_answers=0.25,
        temperature=2.0,
        validate_every=3,
    )
    fresh = {"freeze": (), "learning_rate": controls.RATE, "validate_every": None}
    assert controls._training("random-init", last) == last.model_copy(update=fresh)
    still = last.model_copy(update={"vision_rate": 0.0})
    assert controls._training("random-init", still).vision_rate == 1.0
    alone = {"losses": {"cross_entropy": 1.0}, **controls.NO_TEACHER}
    assert controls._training("scratch", last) == last.model_copy(update={**fresh, **alone})


def test_a_step_counts_the_rows_that_its_training_goes_through(teacher, ads, tmp_path):
    rows = data.load(ads).train
    taught = asked_of(rows, 20, 0)[1]
    loaded = checkpoint.load(teacher)
    cache = TeacherCache(loaded.model, Collator(loaded.processor, packed=True), tmp_path / "cache")
    for losses in ({"forward_kl": 1.0}, {"forward_kl": 1.0, "cross_entropy": 1.0}):
        few = {"losses": losses, "pictures_per_step": 2, "questions_per_picture": 5, "precision": "float32"}
        one = Training(steps=1, **few)
        useful = learnt_from(rows, losses, taught)
        epoch = math.ceil(len(data.by_picture(useful, 5)) / 2)
        whole = one.model_copy(update={"steps": epoch})
        done = train(
            loaded.model, loaded.processor, rows, whole, tmp_path / f"{len(losses)}", teacher=cache, taught=taught
        )
        assert done.row_visits == len(useful) == pytest.approx(epoch * controls.rows_a_step(rows, one, taught))
        assert (len(useful) < len(rows)) == (len(losses) == 1)


@pytest.mark.parametrize("kind", ["scratch", thorough("random-init")])
def test_a_control_that_was_killed_is_the_one_that_never_was(kind, teacher, ads, tmp_path, monkeypatch):
    run = tmp_path / "run"
    pipeline.run(teacher, ads, run, recipe.parse(RAW, "test"))
    monkeypatch.setattr(controls, "SAVE_EVERY", 0.0)
    wanted = controls.untrained(kind, run, teacher, ads, tmp_path / "whole", tell=Recorder())
    plain, made = saving.Saver.on_step_end, []

    def dying(self, args, state, control, **rest):
        made.append(state.global_step)
        if len(made) == 3:
            raise Dies
        plain(self, args, state, control, **rest)

    monkeypatch.setattr(saving.Saver, "on_step_end", dying)
    with pytest.raises(Dies):
        controls.untrained(kind, run, teacher, ads, tmp_path / "killed", tell=Recorder())
    found = controls.untrained(kind, run, teacher, ads, tmp_path / "killed", tell=Recorder())
    assert made[:4] == [1, 2, 3, 3], "the third step again, no other"
    assert (found.answers.predictions, found.row_visits) == (wanted.answers.predictions, wanted.row_visits)
    assert not (tmp_path / "killed" / "training").exists()
