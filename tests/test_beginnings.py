"""Beginnings that runs share: the runs equal those that share nothing, to the byte; none stays when no run is to come."""

import json

import pytest

from slimlmm import beginnings, studies, study
from slimlmm import study_results as sr
from slimlmm.beginnings import Beginnings, keys_of
from slimlmm.recipe import Recipe
from test_pipeline import Recorder

CUT = {"sizes": {"text.ffn": 32}, "criterion": "magnitude"}
FEW = {"calibration_rows": 10, "validation_rows": 10, "test_rows": 20}
STAGES = [
    {"name": "lossless", "rounds": [{"drop": ["unused_tokens"]}]},
    {"name": "inner", "rounds": [{**CUT, "train": [{"steps": 2}, {"steps": 2}]}]},
    {"name": "blocks", "rounds": [{"sizes": {"vision.blocks": 1}, "train": [{"steps": 2}]}]},
]


def staged(**trained):
    """Return the stages with keys for the last training of a stage."""
    found = json.loads(json.dumps(STAGES))
    for stage in found:
        if stage["name"] in trained:
            stage["rounds"][0]["train"][-1] |= trained[stage["name"]]
    return {"stages": found}


@pytest.fixture
def settings(teacher, ads):
    """Arms that part from the base behind its first training of answers, behind its first round, and at once."""
    return {
        "model": str(teacher),
        "data": str(ads),
        "base": {**staged(), "data": FEW},
        "seeds": [4],
        "arms": {
            "inner-rate": {"recipe": staged(inner={"learning_rate": 1e-3})},
            "blocks-rate": {"recipe": staged(blocks={"learning_rate": 1e-3})},
            "other-units": {"rounds": {"criterion": "random"}},
        },
        "groups": [{"title": "All", "arms": ["base", "inner-rate", "blocks-rate", "other-units"], "reference": "base"}],
    }


def test_arms_that_share_are_those_that_do_not_to_the_byte(settings, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    planned = study.plan(studies.parse(settings, "s"))
    study.run(planned, shared, tell=(heard := Recorder()))
    taken = [text for text in heard.said if "another run has made" in text]
    assert taken == [
        "round 2/3 inner.1 begins with what another run has made",  # inner-rate, behind the first training
        "round 2/3 inner.1 begins with what another run has made",  # blocks-rate, the whole round
        "round 3/3 blocks.1 begins with what another run has made",  # blocks-rate, its cuts
    ]
    assert not (shared / "beginnings").exists()
    for name in planned.arms:
        study.run(planned, alone, only=[name])
        runs = [sr.folder_of(out, name, 4) for out in (shared, alone)]
        for part in ("final", "stages"):
            files = [sorted(p.relative_to(one) for p in (one / part).rglob("*") if p.is_file()) for one in runs]
            assert files[0] == files[1], name
            for path in files[0]:
                if path.suffix in (".safetensors", ".jinja") or path.name.startswith("plan-"):
                    assert runs[0].joinpath(path).read_bytes() == runs[1].joinpath(path).read_bytes(), (name, path)
        records = [json.loads((one / "results.json").read_text()) for one in runs]
        for one in records:
            for turn in one["rounds"]:
                del turn["seconds"]
        assert records[0]["rounds"] == records[1]["rounds"]


def test_a_study_that_was_killed_shares_what_it_had_and_what_is_not_whole_is_made(settings, tmp_path):
    planned = study.plan(studies.parse(settings, "s"))
    with pytest.raises(KeyboardInterrupt):
        study.run(planned, tmp_path, tell=Recorder(stop_at="arm 2 of 4"))
    kept = sorted((tmp_path / "beginnings").iterdir())
    assert len(kept) == 3, "behind a training, behind a round, behind a cut"
    whole = keys_of(planned.recipes["base"].model_copy(update={"seed": 4}))[1][-1]
    spoilt = tmp_path / "beginnings" / whole / "part" / "model" / "model.safetensors"
    spoilt.unlink()  # a link: the run's own file stays
    spoilt.write_bytes(b"spoilt")
    study.run(planned, tmp_path, tell=(heard := Recorder()))
    taken = [text for text in heard.said if "another run has made" in text]
    assert len(taken) == 3, "blocks-rate begins where inner-rate did, and makes the last training of that round itself"
    assert not (tmp_path / "beginnings").exists()


def test_other_seeds_and_arms_leave_what_a_killed_one_has_made(settings, tmp_path):
    settings["seeds"] = [4, 5]
    planned = study.plan(studies.parse(settings, "s"))
    study.run(planned, tmp_path, only=["base"])
    kept = sorted(one.name for one in (tmp_path / "beginnings").iterdir())
    assert len(kept) == 6, "three a seed: its other arms are not made"
    (tmp_path / "beginnings" / ".DS_Store").write_text("not ours")
    study.run(planned, tmp_path, only=["other-units"])
    assert kept == sorted(one.name for one in (tmp_path / "beginnings").iterdir() if one.is_dir())
    study.run(planned, tmp_path, tell=(heard := Recorder()))
    assert sum("another run has made" in text for text in heard.said) == 6
    assert not (tmp_path / "beginnings").exists()


def test_where_there_is_no_room_for_beginnings_every_arm_makes_its_own(settings, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beginnings, "_link", full)
    planned = study.plan(studies.parse(settings, "s"))
    found = study.run(planned, tmp_path, only=["base"], tell=(heard := Recorder()))
    assert found.arms[0].runs
    assert any("cannot keep what other runs could begin with" in text for text in heard.said)
    assert not list((tmp_path / "beginnings").glob("*"))


def test_what_decides_a_model_is_in_its_key():
    base = Recipe.model_validate({**staged(), "data": FEW})
    keys = keys_of(base)
    assert [len(one) for one in keys] == [1, 3, 2]
    assert keys_of(base.model_copy(update={"bench_calls": 7})) == keys
    for change in ({"seed": 1}, {"data": {**FEW, "train_rows": 3}}, {"max_drop": 1.0}):
        other = Recipe.model_validate({**json.loads(base.model_dump_json()), **change})
        assert not {key for one in keys for key in one} & {key for one in keys_of(other) for key in one}
    fading = {**staged(), "data": FEW}
    rates = []
    for rate in (1e-4, 1e-3):
        fading["stages"][1]["rounds"] = [
            {**CUT, "repair": [], "fade": 1, "train": [{"steps": 2, "learning_rate": rate}]}
        ]
        rates.append(keys_of(Recipe.model_validate(fading))[1][0])
    assert rates[0] != rates[1], "what fades does so in the first training"


def test_only_the_last_common_model_of_a_round_is_kept(tmp_path):
    recipes = [Recipe.model_validate({**one, "data": FEW}) for one in (staged(), staged(blocks={"steps": 3}))]
    whole, other = (keys_of(one) for one in recipes)
    assert Beginnings.of(tmp_path, recipes).wanted == {whole[0][0], whole[1][-1], whole[2][0]}
    assert whole[2][0] == other[2][0]
    assert Beginnings.of(tmp_path, recipes[:1]).wanted == set()
    (tmp_path / "old").mkdir()
    (tmp_path / whole[2][0]).mkdir()
    Beginnings.of(tmp_path, recipes[:1])
    assert [one.name for one in tmp_path.iterdir()] == [whole[2][0]]
