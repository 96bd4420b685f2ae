"""Disk: what a run needs is known before it starts, and models of earlier rounds go where they are not kept."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import stay_in_this_process
from slimlmm import checkpoint, pipeline, recipe, room, runfolder, staging
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.resizing import predict_parameters, resized
from slimlmm.room import Keeping
from slimlmm.teacher import TeacherCache
from test_pipeline import Recorder

STATES = {"cross_entropy": 1.0, "forward_kl": 1.0, "picture_states": 1.0}
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
                    "train": {"steps": 2, "pictures_per_step": 4, "losses": STATES, "validate_every": 1},
                },
                {
                    "sizes": {"vision.ffn": 64, "vision.width": 24},
                    "repair": [],
                    "train": {"steps": 2, "pictures_per_step": 4},
                },
                {"sizes": {"text.ffn": 16}, "repair": [], "train": {"steps": 2, "pictures_per_step": 4}},
            ],
        },
    ],
}


class Watching(Recorder):
    """A reporter that looks at how much lies on disk whenever something is told."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.most = folder, 0

    def say(self, text, **facts):
        super().say(text, **facts)
        self._look()

    def step(self, *args, **facts):
        self._look()

    def _look(self):
        sizes = (path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.most = max(self.most, sum(sizes))


def models(out):
    return [any((one / "model").glob("*.safetensors")) for one in sorted((out / "stages").iterdir())]


@pytest.fixture(scope="module")
def whole(teacher, ads, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    watch = Watching(out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_in_this_process(monkeypatch)
        pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=watch, keeping=Keeping(seconds=0))
    return out, watch


@pytest.mark.parametrize(
    ("model", "file"), [("teacher", "demo"), ("teacher", "headline-18x"), ("student/model", "headline-40x")]
)
def test_recipes_that_come_along_are_told_what_they_take(model, file):
    path = bundled("demo.yaml") if file == "demo" else Path(__file__).parents[1] / "benchmarks" / f"{file}.yaml"
    config, wanted = checkpoint.load_config(bundled(model)), recipe.read(path)
    staging.check_stages(config, wanted.stages)
    need = room.need_of(config, wanted.stages, 2, 0, Keeping())
    for turn in (turn for stage in wanted.stages for turn in stage.rounds):
        for axis, size in turn.sizes.items():
            config = resized(config, {axis: size})
    assert need.final in (0, 2 * predict_parameters(config, {}))
    assert need.total > 4 * predict_parameters(config, {})


def test_what_is_told_before_a_run_is_what_it_takes_at_most(whole):
    _, watch = whole
    (told,) = [text for text in watch.said if text.startswith("disk: ")]
    megabytes = float(told.split("at most ")[1].split(" MB")[0])
    assert watch.most < 1e6 * megabytes < 5 * watch.most, "a tiny model is mostly tokenizer and vocabulary that goes"


def test_states_of_the_teacher_are_counted_to_the_byte(teacher, rows, tmp_path):
    loaded = checkpoint.load(teacher)
    cache = TeacherCache(loaded.model, Collator(loaded.processor, packed=True), tmp_path)
    groups = by_picture(rows.train, len(rows.train))
    cache.pictures(cache.collator(groups))
    cache.flush()
    kept = sum(value.nbytes for path in tmp_path.glob("*.safetensors") for value in load_file(path).values())
    raw = {"name": "a", "rounds": [{"sizes": {"text.ffn": 32}, "train": {"steps": 6, "losses": STATES}}]}
    stages = recipe.parse({"stages": [raw]}, "test").stages
    hidden = loaded.model.config.get_text_config().hidden_size
    plain = Collator(loaded.processor, packed=False)
    assert room.cache_of(plain, rows.train, stages, hidden) == kept


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(teacher, ads, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    told = Recorder()
    with pytest.raises(
        UserError, match=r"run: about [\d.]+ MB are needed there \(.*the teacher's states.*\), 0.3 MB are free .*--keep"
    ):
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(RAW, "test"), tell=told)
    assert not any("round" in text for text in told.said)


def test_a_disk_that_fills_meanwhile_is_refused_before_the_next_round(teacher, ads, tmp_path, monkeypatch):
    left = iter([10**12, 10**12, 1000])
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(left)))
    with pytest.raises(
        UserError, match=r"02-inner.1: about .* MB are needed there \(round 2/4 inner.1: parts and states"
    ):
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(RAW, "test"))
    assert (tmp_path / "run" / "stages" / "01-lossless.1" / "done.json").exists(), "what was made stays"


@pytest.mark.parametrize(("free", "fits"), [(1000, True), (999, False)])
def test_room_is_counted_to_the_byte_and_what_lies_there_is_room(free, fits, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 50)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if fits:
        room.refuse({tmp_path: 1050}, "")
    else:
        with pytest.raises(UserError, match="are needed there"):
            room.refuse({tmp_path: 1050}, "")


def test_earlier_models_go_and_the_run_goes_on_without_them_to_the_same_weights(teacher, ads, whole, tmp_path):
    out = tmp_path / "run"
    wanted = load_file(whole[0] / "final" / "model.safetensors")
    few = Keeping(rounds=1)
    for where in ("inner.2 recovered", "inner.3 recovered"):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=Recorder(where), keeping=few)
    assert models(out) == [True, False, True, False], (
        "the lossless one, which is the teacher, and the last finished one"
    )
    pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), keeping=few)
    assert models(out) == [True, False, False, True]
    found = load_file(out / "final" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.thorough
def test_rounds_whose_models_went_are_made_again_where_they_are_needed(teacher, ads, whole, tmp_path):
    out, told = tmp_path / "run", Recorder()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(
            teacher, ads, out, recipe.parse(RAW, "test"), tell=Recorder("inner.3 recovered"), keeping=Keeping(rounds=1)
        )
    last = out / "stages" / "03-inner.2" / "model" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=told)
    assert any("02-inner.1/model was let go, and is needed; the rounds" in text for text in told.said)
    wanted, found = (load_file(one / "final" / "model.safetensors") for one in (whole[0], out))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_blocks_that_went_are_those_of_the_whole_model_when_rounds_are_made_again(teacher, ads, tmp_path):
    cuts, train = ({"vision.blocks": 2}, {"text.ffn": 32}, {"text.ffn": 16}), {"steps": 1, "pictures_per_step": 4}
    turns = [{"sizes": one, "repair": [], "train": train} for one in cuts]
    raw = {**RAW, "stages": [{"name": "all", "rounds": turns}]}
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(
            teacher, ads, out, recipe.parse(raw, "test"), tell=Recorder("all.3 recovered"), keeping=Keeping(rounds=1)
        )
    last = out / "stages" / "02-all.2" / "model" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    found = pipeline.run(teacher, ads, out, recipe.parse(raw, "test"), tell=(told := Recorder()))
    assert any("01-all.1/model was let go, and is needed; the rounds" in text for text in told.said)
    assert len(found.rounds) == 3


def test_a_run_killed_while_a_model_goes_is_none_the_worse(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("a.safetensors", "b.safetensors", "config.json"):
        (model / name).write_text(name)
    record = tmp_path / "done.json"
    runfolder.write_json(record, {"files": runfolder.digests(model)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runfolder.let_go(record, model)
    assert runfolder.is_whole(record, model), "told, and nothing went yet"
    (model / "a.safetensors").unlink()
    assert runfolder.is_whole(record, model), "half of it went"
    runfolder.let_go(record, model)
    assert [path.name for path in model.iterdir()] == ["config.json"]
    assert runfolder.is_whole(record, model)
    (model / "config.json").write_text("other")
    assert not runfolder.is_whole(record, model)
