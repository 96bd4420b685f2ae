"""A run made again: to the byte on the same machine; what differs is named, and what should not differ fails."""

import json
import shutil

import pytest

from conftest import stay_in_this_process
from slimlmm import pipeline, recipe, reproducing
from slimlmm.errors import UserError
from slimlmm.reproducing import compared, reproduce
from slimlmm.results import Results
from test_cli import call

RAW = {
    "bench_calls": 0,
    "data": {"calibration_rows": 20, "validation_rows": 20, "test_rows": 20},
    "stages": [
        {"name": "lossless", "rounds": [{"drop": ["unused_tokens"]}]},
        {
            "name": "inner",
            "rounds": [{"sizes": {"text.ffn": 32}, "repair": [], "train": {"steps": 2, "pictures_per_step": 4}}],
        },
    ],
}


@pytest.fixture(scope="module")
def finished(teacher, ads, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_in_this_process(monkeypatch)
        pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"))
    return out


@pytest.fixture
def pair(finished, tmp_path):
    """The run and a copy of it, which a test may change."""
    return finished, shutil.copytree(finished, tmp_path / "copy")


def held(first, again, **more):
    return compared(first, again, *(Results.load(one / "results.json") for one in (first, again)), **more)


def test_a_run_is_reproduced_to_the_byte_from_its_folder_alone(finished, tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "reproduce", finished, "--out", tmp_path / "again", "--quiet")
    assert code == 0, err
    assert "to the byte" in out
    found = reproducing.Reproduction.load(tmp_path / "again" / "reproduction.json")
    assert (found.outcome, found.machine, found.files, found.results) == ("to the byte", (), (), ())
    assert set(found.answers.values()) == {0}
    assert found.difference.mean == 0
    assert reproducing.left_by(finished) == reproducing.left_by(tmp_path / "again")


def test_another_model_or_data_set_is_refused_by_its_hash(finished, teacher, ads, tmp_path):
    other = shutil.copytree(ads, tmp_path / "ads")
    (table,) = other.glob("test.jsonl")
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(
        UserError,
        match=r"began with something else \(data: was \w+\.\.\., now \w+\.\.\.; rows: was .*40 test, now .*39 test\)",
    ):
        reproduce(finished, tmp_path / "again", source=other)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "is no run of slimlmm compress"),
        (lambda run: (run / "run.json").write_text("[]"), "run.json is not what was written there"),
        (lambda run: shutil.rmtree(run / "final"), "is not finished"),
        (lambda run: change(run / "run.json", lambda told: told.pop("given")), "give them with --model and --data"),
        (lambda run: change(run / "run.json", trusting), "ran code that came with its model; --trust-remote-code"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_with_what_to_do(spoil, message, pair, tmp_path):
    _, run = pair
    spoil(run)
    with pytest.raises(UserError, match=message):
        reproduce(run, tmp_path / "again")


def test_the_run_itself_is_no_place_for_its_reproduction(finished):
    with pytest.raises(UserError, match="is the run itself"):
        reproduce(finished, finished)


def trusting(told):
    told["given"]["trust_remote_code"] = True


def change(path, how):
    told = json.loads(path.read_text())
    how(told)
    path.write_text(json.dumps(told))


def test_equal_runs_are_equal_and_times_do_not_count(pair):
    first, again = pair
    change(again / "results.json", lambda told: told["totals"].update(seconds=1e9))
    change(again / "results.json", lambda told: told["environment"].update(created="another day", git="abc"))
    found = held(first, again)
    assert found.outcome == "to the byte"
    assert not found.failed
    assert found.seconds[1] == 1e9


def test_a_changed_weight_is_named_and_fails_on_the_same_machine_alone(pair):
    first, again = pair
    weights = again / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    found = held(first, again)
    assert [one.what for one in found.files] == ["model.safetensors"]
    assert found.outcome == "same answers"
    assert found.failed
    change(again / "results.json", lambda told: told["environment"]["versions"].update(torch="3.0"))
    elsewhere = held(first, again)
    assert [one.what for one in elsewhere.machine] == ["versions.torch"]
    assert not elsewhere.failed


def test_bits_of_a_run_whose_cache_was_shared_may_differ(pair):
    first, again = pair
    weights = again / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert held(first, again).failed
    found = held(first, again, shared=True)
    assert [one.what for one in found.machine] == ["cache"]
    assert not found.failed


@pytest.mark.parametrize(("wrong", "outcome"), [(1, "within chance"), (20, "different")])
def test_other_answers_are_counted_and_judged_by_the_paired_interval(wrong, outcome, pair):
    def answered(which, right):
        def how(told):
            for index, one in enumerate(told["predictions"]):
                one["correct"], one["answer"] = (True, "a") if index >= right else (False, "b")
                one["picture"] = str(index)

        change(which / "student-test.json", how)

    first, again = pair
    before = (first / "student-test.json").read_text()
    try:
        answered(first, 0)
        answered(again, wrong)
        found = held(first, again)
    finally:
        (first / "student-test.json").write_text(before)
    assert found.answers["student-test.json"] == wrong
    assert found.outcome == outcome
    assert found.difference.mean == pytest.approx(wrong / 20)
    assert found.failed


def test_a_figure_that_differs_is_named_with_both_values(pair):
    first, again = pair
    change(again / "results.json", lambda told: told["rounds"][1].update(row_visits=7))
    (one,) = held(first, again).results
    assert (one.what, one.again) == ("rounds.1.row_visits", "7")
