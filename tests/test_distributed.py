"""A training in two processes is the one in one process; as a script, this file is one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimlmm import data
from slimlmm.collate import Collator
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.saving import Saving
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from test_cli import call
from tiny import tiny

NAME = "llava-dinov2-llama"
STATES = {"answer_states": 0.5, "picture_states": 1.0, "block_states": 1.0}
LOSSES = [{"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 0.1} | STATES, {"picture_states": 1.0}]


def trained(folder, out, losses):
    """Train on the rows of a folder, save the weights, return what the training told."""
    rows = data.load(folder).train
    model, processor = tiny(NAME, 3)
    cache = TeacherCache(tiny(NAME)[0], Collator(processor, packed=True), out / "cache")
    settings = Training(
        steps=3,
        pictures_per_step=4,
        learning_rate=1e-3,
        warmup=0.0,
        optimizer="muon",
        precision="float32",
        losses=losses,
    )
    found = train(model, processor, rows, settings, out / "training", teacher=cache, seed=5)
    torch.save(model.state_dict(), out / "weights.pt")
    return found


@pytest.mark.parametrize("losses", LOSSES)
def test_two_processes_make_the_steps_of_one(losses, ads, tmp_path):
    (alone := tmp_path / "alone").mkdir()
    wanted = trained(ads, alone, losses)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    told = subprocess.run(
        [*command, str(ads), str(tmp_path), json.dumps(losses)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    first, second, one = (torch.load(tmp_path / name / "weights.pt") for name in ("0", "1", "alone"))
    began = tiny(NAME, 3)[0].state_dict()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        if not name.endswith("k_proj.bias"):  # moves every score of a query alike: its gradient is rounding
            assert (first[name] - value).norm() <= 1e-3 * (value - began[name]).norm() + 1e-9, name
    visits = [json.loads((tmp_path / rank / "told.json").read_text()) for rank in ("0", "1")]
    assert visits == [wanted.row_visits] * 2


def test_what_several_processes_cannot_do_is_refused_with_their_number(tmp_path, rows, monkeypatch, capsys):
    model, processor = tiny(NAME)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        UserError, match=r"pictures_per_step=4 must be a multiple of train.accumulate=2 times 3 processes = 6"
    ):
        train(model, processor, rows.train, told(pictures_per_step=4, accumulate=2), tmp_path)
    with pytest.raises(UserError, match="in 3 processes cannot be interrupted"):
        train(model, processor, rows.train, told(pictures_per_step=6), tmp_path, saving=Saving(1.0, "it", print))
    code, _, error = call(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 2
    assert "a launcher started 3 processes" in error


def told(**more):
    return Training(steps=1, losses={"cross_entropy": 1.0}, **more)


if __name__ == "__main__":
    mine = Path(sys.argv[2]) / os.environ["RANK"]
    mine.mkdir()
    (mine / "told.json").write_text(json.dumps(trained(Path(sys.argv[1]), mine, json.loads(sys.argv[3])).row_visits))
