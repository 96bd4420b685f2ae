"""Faults of a whole run: other processes, broken files, losses that are no numbers, labels that are not the answers."""

import errno
import io
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import stay_in_this_process
from slimlmm import checkpoint, job, leaving, pipeline, recipe, runfolder
from slimlmm.checkdata.alignment import Probe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.errors import LossError, UserError
from slimlmm.teacher import TeacherCache
from test_cli import call
from test_pipeline import Recorder
from tiny import tiny

RAW = {
    "bench_calls": 0,
    "data": {"calibration_rows": 20, "validation_rows": 20, "test_rows": 20},
    "stages": [
        {"name": "lossless", "rounds": [{"drop": ["unused_tokens"]}]},
        {
            "name": "inner",
            "rounds": [
                {
                    "sizes": {"text.ffn": 32},
                    "repair": [],
                    "train": [{"steps": 2, "pictures_per_step": 4}, {"steps": 2, "pictures_per_step": 4}],
                }
            ],
        },
    ],
}
HOLDS = """
import sys
from pathlib import Path
from slimlmm.runfolder import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny("llava-dinov2-llama"), folder)
    return folder


@pytest.fixture(scope="module")
def finished(teacher, ads, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_in_this_process(monkeypatch)
        pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"))
    return out, load_file(out / "final" / "model.safetensors")


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_second_process_is_refused_by_name_and_let_in_when_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on .* is at work in it"):
            runfolder.hold(tmp_path)
        other.kill()
    with runfolder.held(tmp_path):
        assert str(os.getpid()) in (tmp_path / "owner.json").read_text()
    assert not (tmp_path / "owner.json").exists()


def test_a_run_holds_its_folder_and_lets_go_of_it(finished):
    out, _ = finished
    assert (out / ".lock").exists()
    assert not (out / "owner.json").exists()


def test_a_finished_round_whose_model_is_broken_is_made_again_to_the_same_weights(teacher, ads, finished):
    out, wanted = finished
    spoil(out / "stages" / "01-lossless.1" / "model" / "model.safetensors")
    told = Recorder()
    pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=told)
    assert any("is not what was written; the round is made again" in text for text in told.said)
    found = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.thorough
def test_a_broken_part_of_a_round_is_made_again_to_the_same_weights(teacher, ads, finished, tmp_path, monkeypatch):
    _, wanted = finished
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=Recorder("inner.1 recovered:"))
    (part,) = (out / "stages" / "02-inner.1" / "parts").iterdir()
    assert part.name == "2", "cuts and both trainings are done"
    spoil(part / "model" / "model.safetensors")
    told = Recorder()
    pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=told)
    assert not any("goes on" in text for text in told.said)
    found = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_stopped_after_the_cuts_it_asks_no_row_in_other_company(teacher, ads, finished, tmp_path, monkeypatch):
    """Rows asked with others beside them give other last bits, so what was asked before a state has to be on disk with it."""
    _, wanted = finished
    asked, live = [], TeacherCache.live
    monkeypatch.setattr(
        TeacherCache, "live", lambda self, batch: (asked.extend(row.id for row in batch["rows"]), live(self, batch))[1]
    )

    def heed(where):
        if where.startswith(" after the cuts"):
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(leaving, "heed", heed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(RAW, "test"))
    assert asked
    told = Recorder()
    pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(RAW, "test"), tell=told)
    assert any("goes on" in text for text in told.said)
    assert len(asked) == len(set(asked)), "no row was asked twice"
    found = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.parametrize("how", [spoil, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_broken_shard_of_the_teachers_cache_is_told_and_asked_again(how, teacher, rows, tmp_path):
    loaded = checkpoint.load(teacher)
    collator = Collator(loaded.processor, packed=True)
    cache = TeacherCache(loaded.model, collator, tmp_path)
    batch = collator(by_picture(rows.train, 16)[:2])
    wanted = cache.of(batch)
    cache.flush()
    (shard,) = tmp_path.glob("*.safetensors")
    how(shard)
    with pytest.warns(UserWarning, match=r"shard-00000.safetensors: is not what was written; removed"):
        again = TeacherCache(loaded.model, collator, tmp_path)
    assert not shard.exists()
    assert torch.equal(again.of(batch), wanted)


def test_a_loss_that_is_no_number_is_told_tried_lower_and_refused(teacher, ads, tmp_path):
    inner = {"sizes": {"text.ffn": 32}, "repair": [], "train": {"steps": 4, "learning_rate": 1e30, "log_every": 1}}
    raw = RAW | {"stages": [RAW["stages"][0], {"name": "inner", "rounds": [inner]}]}
    told = Recorder()
    with pytest.raises(
        LossError, match=r"lower train.learning_rate in the recipe. Tried at 1e\+30 and down to 2.5e\+29"
    ):
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw, "test"), tell=told)
    assert sum("It begins again at" in text for text in told.said) == 2


@pytest.mark.parametrize("loss", [0.5, math.inf, math.nan])
def test_a_teacher_that_is_not_its_own_student_is_refused(loss, teacher, ads, tmp_path, monkeypatch):
    monkeypatch.setattr(job.alignment, "probed", lambda *_: Probe(loss, loss, 0.0, 9))
    with pytest.raises(
        UserError, match=r"distilling the teacher from itself starts at .* not at 0 \(at most 0\.0?01\)"
    ):
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(RAW, "test"))
    assert not (tmp_path / "run" / "final").exists()


def test_an_output_that_turns_read_only_is_told_and_the_run_goes_on_from_there(
    teacher, ads, finished, tmp_path, monkeypatch, capsys
):
    out, recipe_path, plain, broken = tmp_path / "run", tmp_path / "recipe.yaml", io.open, []
    recipe_path.write_text(yaml.safe_dump(RAW))
    words = ("compress", teacher, "--data", ads, "--recipe", recipe_path, "--out", out)

    def refusing(path, mode="r", *rest, **more):
        if str(path).startswith(str(out)) and mode[0] in "wax" and "02-inner" in str(path):
            broken.append(path)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return plain(path, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", refusing)
        code, _, err = call(patch, capsys, *words)
    assert broken
    assert code == 2
    assert "02-inner.1" in err
    assert "Read-only file system" in err
    assert "the same command again goes on from there" in err
    assert call(monkeypatch, capsys, *words)[0] == 0
    wanted, found = finished[1], load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
