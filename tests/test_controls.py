"""Controls: a training from random weights that was killed goes on where it was."""

import pytest

from marks import thorough
from slimlmm import controls, pipeline, recipe, saving
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
