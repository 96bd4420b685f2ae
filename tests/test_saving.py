"""A training that was killed and taken up again is the one that never was: every bit of its weights, its history."""

import errno
import itertools
import os
import shutil
import signal
import time
import types

import pytest
import torch

from marks import thorough
from slimlmm import checkpoint, leaving, saving
from slimlmm.collate import Collator
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.saving import Saving, latest
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from tiny import tiny

NAME = "llava-dinov2-llama"
ALL = {"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 0.1, "answer_states": 1.0, "picture_states": 1.0}


def told(**more):
    plain = {"steps": 6, "pictures_per_step": 4, "learning_rate": 1e-2, "log_every": 2, "warmup": 0.2, "losses": ALL}
    return Training(**plain | {"precision": "float32"} | more)


#: three steps are an epoch of the 12 pictures
KILL = 5


class Dies(BaseException):
    """As a kill: nothing may catch it."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny(NAME), folder)
    return folder


@pytest.fixture(scope="module")
def whole(teacher, rows, tmp_path_factory):
    """The weights that six steps leave."""
    return trained(teacher, rows, tmp_path_factory.mktemp("whole"), told())[0]


@pytest.fixture(scope="module")
def short(teacher, rows, tmp_path_factory):
    """A training of three steps that was killed in the last, and the weights that it would have left."""
    root = tmp_path_factory.mktemp("short")
    wanted, _ = trained(teacher, rows, root / "whole", told(steps=3))
    with pytest.raises(Dies):
        trained(teacher, rows, root / "killed", told(steps=3), dies_at=3)
    return root / "killed", wanted


def trained(teacher, rows, out, settings, dies_at=None, seconds=0.0, of="it", made=None):
    """Train a student in a folder, which dies behind a step where that is said; returns its weights and what it told.

    The steps that are made are put into `made`.
    """
    model, processor = tiny(NAME, 3)
    cache = TeacherCache(checkpoint.load(teacher).model, Collator(processor, packed=True), out / "cache")
    saver = saving.Saver.on_step_end

    def dying(self, args, state, control, **rest):
        if made is not None:
            made.append(state.global_step)
        if state.global_step == dies_at:
            raise Dies
        saver(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Saver, "on_step_end", dying)
        found = train(
            model, processor, rows.train, settings, out / "training", teacher=cache,
            validation=rows.validation, seed=5, saving=Saving(seconds, of, print),
        )  # fmt: skip
    return model.state_dict(), found


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "more",
    [
        {},
        thorough({"accumulate": 2, "pictures_per_step": 8}),
        {"losses": {"cross_entropy": 1.0, "forward_kl": 1.0}, "own_answers": 0.5},
        {"validate_every": 2, "stop_after": 1, "learning_rate": 0.1},
        thorough({"losses": {"picture_states": 1.0}, "freeze": ("text",)}),
        thorough({"schedule": "linear", "steps": 9, "log_every": 20}),
        {"losses": {"block_states": 1.0, "forward_kl": 1.0}},
        {"optimizer": "muon", "losses": {"cross_entropy": 1.0, "picture_states": 1.0}},
    ],
)
def test_killed_and_taken_up_is_never_killed(more, teacher, rows, tmp_path):
    settings = told(**more)
    wanted, whole = trained(teacher, rows, tmp_path / "whole", settings)
    kill = min(KILL, whole.steps)
    with pytest.raises(Dies):
        trained(teacher, rows, tmp_path / "killed", settings, dies_at=kill)
    weights, found = trained(teacher, rows, tmp_path / "killed", settings, made=(made := []))
    assert made == list(range(kill, whole.steps + 1))
    assert same(wanted, weights)
    left = {"seconds"}
    assert found.model_dump(exclude=left) == whole.model_dump(exclude=left)


@pytest.mark.thorough
def test_killed_again_and_again_and_without_a_state_it_is_the_same_too(teacher, rows, whole, tmp_path):
    wanted, untouched = trained(teacher, rows, tmp_path / "whole", told(), seconds=1e9)
    assert not list((tmp_path / "whole" / "training").glob("checkpoint-*"))
    assert same(wanted, whole)
    for step in (1, 2, 2, 5):
        with pytest.raises(Dies):
            trained(teacher, rows, tmp_path / "killed", told(), dies_at=step)
    weights, found = trained(teacher, rows, tmp_path / "killed", told())
    assert same(wanted, weights)
    assert found.history == untouched.history
    assert len(list((tmp_path / "killed" / "training").glob("checkpoint-*"))) == 1


def test_the_wall_clock_may_jump(teacher, rows, whole, tmp_path, monkeypatch):
    plain, jumps = time.time, itertools.cycle([0, 4e8, -4e8, 3600, -3600])
    monkeypatch.setattr(time, "time", lambda: plain() + next(jumps))
    with pytest.raises(Dies):
        trained(teacher, rows, tmp_path, told(), dies_at=4)
    weights, found = trained(teacher, rows, tmp_path, told())
    assert same(whole, weights)
    assert 0 < found.seconds < 600


def _cut_short(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(folder):
    path = folder / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut_short, "weights.safetensors is not what was written"),
        (_flipped, "optimizer.pt is not what was written"),
        (lambda folder: (folder / "whole.json").unlink(), "was not written to its end"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is not what was written"),
        (lambda folder: (folder / "whole.json").write_text("[]"), "its whole.json cannot be read"),
        (lambda folder: (folder / "whole.json").write_text('{"of": '), "its whole.json cannot be read"),
    ],
)
def test_a_torn_state_is_told_and_removed(spoil, said, short, tmp_path):
    told_so = []
    shutil.copytree(short[0] / "training", tmp_path / "training")
    assert latest(tmp_path / "training", "it", told_so.append) == tmp_path / "training" / "checkpoint-2"
    spoil(tmp_path / "training" / "checkpoint-2")
    assert latest(tmp_path / "training", "it", told_so.append) is None
    assert not list((tmp_path / "training").glob("checkpoint-*"))
    assert [said in one and one.endswith("; removed") for one in told_so] == [True]


def test_the_state_of_another_training_is_not_taken_up(teacher, rows, short, tmp_path, capsys):
    killed, wanted = short
    shutil.copytree(killed, tmp_path / "killed")
    weights, _ = trained(teacher, rows, tmp_path / "killed", told(steps=3), of="another", made=(made := []))
    assert made == [1, 2, 3]
    assert same(wanted, weights)
    assert "removed" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_writes_its_state_first(number, teacher, rows, whole, tmp_path, monkeypatch):
    plain = saving.Saver.on_step_end

    def told_at(self, args, state, control, **rest):
        if state.global_step == 2:
            os.kill(os.getpid(), number)
        plain(self, args, state, control, **rest)

    monkeypatch.setattr(saving.Saver, "on_step_end", told_at)
    with leaving.heeding(), pytest.raises(leaving.LeftError, match=r"after step 2 of 6, which is on disk") as caught:
        trained(teacher, rows, tmp_path / "stopped", told(), seconds=1e9)
    assert caught.value.code == 128 + number
    monkeypatch.undo()
    weights, _ = trained(teacher, rows, tmp_path / "stopped", told(), made=(made := []))
    assert made == [3, 4, 5, 6]
    assert same(whole, weights)


def told_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def test_outside_of_a_training_and_the_second_time_a_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with leaving.heeding(), pytest.raises(leaving.LeftError, match="SIGTERM"):
        told_to_stop()
    with leaving.heeding(), leaving.patiently():
        os.kill(os.getpid(), signal.SIGTERM)
        assert leaving.asked()
        with pytest.raises(leaving.LeftError):
            told_to_stop()
    assert signal.getsignal(signal.SIGINT) is before
    assert not leaving.asked()


@pytest.mark.parametrize("refusing", ["save_file", "torch.save", "write_json"])
def test_a_full_disk_is_told_with_its_numbers_and_the_state_before_stays(
    refusing, teacher, rows, short, tmp_path, monkeypatch
):
    killed, wanted = short
    shutil.copytree(killed, tmp_path / "full")
    shutil.rmtree(tmp_path / "full" / "training")

    def full(*_, **__):
        if refusing == "torch.save":
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = saving.SavingTrainer._save_checkpoint

    def late(self, model, trial):
        if self.state.global_step == 2:
            place = torch if refusing == "torch.save" else saving
            monkeypatch.setattr(place, refusing.rpartition(".")[2], full)
        plain(self, model, trial)

    monkeypatch.setattr(saving.SavingTrainer, "_save_checkpoint", late)
    with pytest.raises(UserError, match=r"state of training at step 2 cannot be written .*MB are free"):
        trained(teacher, rows, tmp_path / "full", told(steps=3))
    monkeypatch.undo()
    assert latest(tmp_path / "full" / "training", "it", print).name == "checkpoint-1"
    if refusing == "save_file":
        weights, _ = trained(teacher, rows, tmp_path / "full", told(steps=3), made=(made := []))
        assert made == [2, 3]
        assert same(wanted, weights)


def test_weights_of_another_shape_are_no_state(tmp_path):
    model, _ = tiny(NAME)
    trainer = types.SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=False, model=model, _whole=lambda one: one
    )
    saving.save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(KeyError):
        saving.SavingTrainer._load_from_checkpoint(trainer, str(tmp_path), model)
