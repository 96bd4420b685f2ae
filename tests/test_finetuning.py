"""Fine-tuning that was killed goes on where it was, to the same bytes, and never on what is another's."""

import math

import pytest
import yaml
from safetensors.torch import load_file

from slimlmm import finetuning, saving
from slimlmm.data import Row
from slimlmm.errors import LossError, UserError
from test_pipeline import Recorder
from test_saving import Dies, same

TRAININGS = [
    {
        "steps": 4,
        "pictures_per_step": 4,
        "learning_rate": 1e-3,
        "losses": {"cross_entropy": 1.0},
        "precision": "float32",
    },
    {
        "steps": 3,
        "pictures_per_step": 4,
        "learning_rate": 1e-4,
        "losses": {"cross_entropy": 1.0},
        "precision": "float32",
    },
]


def tuned(teacher, ads, out, recipe=TRAININGS, dies_after=None, tell=None, seed=0):
    """Fine-tune; die behind so many steps, where that is said. Returns what it told and its weights."""
    path = out.parent / "trainings.yaml"
    out.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    plain, made = saving.Saver.on_step_end, []

    def dying(self, args, state, control, **rest):
        made.append(state.global_step)
        if len(made) == dies_after:
            raise Dies
        plain(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Saver, "on_step_end", dying)
        found = finetuning.finetune(
            str(teacher), ads, out, recipe=path, epochs=None, seed=seed, tell=tell or Recorder(), save_every=0.0
        )
    return found, load_file(out / "model.safetensors"), made


@pytest.fixture(scope="module")
def whole(teacher, ads, tmp_path_factory):
    return tuned(teacher, ads, tmp_path_factory.mktemp("tuned") / "whole")


@pytest.mark.parametrize(
    "dies", [(3,), (4, 2)], ids=["in the first training", "at the end of the first, in the second"]
)
def test_killed_and_taken_up_is_never_killed(dies, teacher, ads, whole, tmp_path):
    out, steps = tmp_path / "out", []
    for after in dies:
        with pytest.raises(Dies):
            tuned(teacher, ads, out, dies_after=after)
        assert not out.exists()
    told = Recorder()
    found, weights, steps = tuned(teacher, ads, out, tell=told)
    assert len(steps) < 7, "not from the start"
    assert same(whole[1], weights)
    assert any("fine-tuning goes on" in text for text in told.said)
    for key in (
        "validation_before",
        "validation_after",
        "row_visits",
        "flops",
        "rows_fingerprint",
        "model_fingerprint",
    ):
        assert found[key] == whole[0][key]
    assert not (tmp_path / ".out.training").exists()


def test_what_another_left_half_finished_is_not_gone_on_with(teacher, ads, tmp_path):
    with pytest.raises(Dies):
        tuned(teacher, ads, tmp_path / "out", dies_after=2)
    with pytest.raises(UserError, match=r"\.out\.training belongs to another run \(seed: was 0, now 1\)"):
        tuned(teacher, ads, tmp_path / "out", seed=1)


def test_a_loss_that_is_no_number_begins_again_lower_and_is_refused(teacher, ads, tmp_path):
    told = Recorder()
    with pytest.raises(LossError, match=r"Tried at 1e\+30 and down to 2.5e\+29"):
        tuned(teacher, ads, tmp_path / "out", [TRAININGS[0] | {"learning_rate": 1e30, "log_every": 1}], tell=told)
    assert sum("fine-tuning 1/1: " in text for text in told.said) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epochs", [0, -1, math.nan, math.inf])
def test_passes_are_more_than_none(epochs, rows):
    with pytest.raises(UserError, match="give a number above 0"):
        finetuning.trainings(None, rows.train, epochs)


def test_passes_beside_a_recipe_are_refused(rows, tmp_path):
    with pytest.raises(UserError, match="--epochs 50 has no effect beside --recipe"):
        finetuning.trainings(tmp_path / "r.yaml", rows.train, 50)


@pytest.mark.parametrize(
    ("pictures", "epochs", "steps"), [(1, 3.0, 3), (16, 3.0, 3), (17, 3.0, 6), (40, 1.5, 5), (40, 0.1, 1)]
)
def test_an_epoch_ends_in_a_part_of_a_step(pictures, epochs, steps):
    rows = [Row(str(n), b"%d" % (n // 3), "q", "a") for n in range(3 * pictures)]
    assert finetuning.trainings(None, rows, epochs)[0].steps == steps


def test_a_training_that_names_no_losses_learns_from_labels_alone(rows, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump([{"steps": 2}, {"steps": 1, "losses": {"pairwise_margin": 1.0}}]))
    first, second = finetuning.trainings(path, rows.train, None)
    assert first.losses == finetuning.trainings(None, rows.train, None)[0].losses == {"cross_entropy": 1.0}
    assert second.losses == {"pairwise_margin": 1.0}


def test_what_a_later_training_asks_for_in_vain_is_refused_before_anything_is_written(teacher, ads, tmp_path):
    with pytest.raises(UserError, match="forward_kl needs a teacher"):
        tuned(teacher, ads, tmp_path / "new" / "out", [TRAININGS[0], TRAININGS[1] | {"losses": {"forward_kl": 1.0}}])
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["trainings.yaml"]
