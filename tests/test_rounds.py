"""Rounds: what is chosen, and what happens when one misses the promised accuracy."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from conftest import stay_in_this_process
from slimlmm import checkpoint, data, pipeline, plan, recipe, results, rounds
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.evaluate import Interval, score
from slimlmm.grid import Grid
from slimlmm.resizing import resized
from slimlmm.teacher import TeacherCache
from test_pipeline import RAW, Recorder
from tiny import tiny, tiny_config

#: three rounds: FFN, then width with an FFN that the config holds as a multiple of it, then FFN again
STAGES = [
    RAW["stages"][0],
    {"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}, "train": {"steps": 2, "pictures_per_step": 4}}]},
    {"name": "width", "rounds": [{"sizes": {"vision.width": 16}, "train": {"steps": 2, "pictures_per_step": 4}}]},
    {"name": "last", "rounds": [{"sizes": {"vision.ffn": 32}, "train": {"steps": 1, "pictures_per_step": 4}}]},
]
PROMISING = {**RAW, "stages": STAGES, "max_drop": 1.0}


#: what the promise is missed by where half of a width is cut in the end
MISSED = ("width.1 recovered", "width.1 recovered further")


def miss(monkeypatch, *names):
    """Let the named evaluations miss the promise, and all others keep it."""

    def scored(job, model, processor, what):
        return score([what not in names], ["picture"])

    monkeypatch.setattr(rounds, "_score", scored)
    monkeypatch.setattr(rounds, "_promise", lambda job, found: found.correct > 0)


@pytest.fixture
def missing(monkeypatch):
    return functools.partial(miss, monkeypatch)


@pytest.fixture(scope="module")
def rolled_back(teacher, ads, tmp_path_factory):
    """The folder and the results of a run whose width missed the promise twice."""
    out = tmp_path_factory.mktemp("rolled-back") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_in_this_process(monkeypatch)
        miss(monkeypatch, *MISSED)
        return out, pipeline.run(teacher, ads, out, recipe.parse(PROMISING, "test"))


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_promise_in_tenths_is_kept_exactly():
    told = SimpleNamespace(correct=1400, n=1500)
    job = SimpleNamespace(
        recipe=recipe.Recipe(max_drop=4.6),
        teacher_validation=SimpleNamespace(summary=SimpleNamespace(overall=told)),
    )
    assert [rounds._promise(job, SimpleNamespace(correct=1400 - lost, n=1500)) for lost in (69, 70)] == [True, False]


def test_half_of_a_cut_can_be_shared_by_the_devices_too():
    config = tiny_config("llava-dinov2-llama")
    axis = describe(config).axis("text.ffn")
    odd = Grid(multiples={"ffn": 1}, tensor_parallel=2)
    for wanted in range(axis.size - 8, axis.size - 1):
        assert all(size % 2 == 0 for size in plan.halved(config, {"text.ffn": wanted}, odd).values())
    taken, _ = plan.carried(config, {"text.kv_groups": 2}, Grid(tensor_parallel=2))
    assert taken == {"text.kv_groups": 2}


def test_multiples_are_heard_where_a_promise_may_halve_a_cut():
    asked = recipe.Recipe(shrink=2.0, max_drop=1.0, multiples={"ffn": 128})
    stages = recipe.parse({"stages": STAGES}, "test").stages
    assert asked.resolved(stages).multiples == asked.multiples
    assert asked.resolved(stages).unheard() == []
    unpromised = asked.model_copy(update={"max_drop": None})
    assert unpromised.resolved(stages).multiples == recipe.Recipe().multiples


@pytest.mark.parametrize(("correct", "kept"), [(446, True), (445, False)])
def test_a_promise_is_kept_to_the_last_row(correct, kept):
    told = SimpleNamespace(correct=466, n=500)
    job = SimpleNamespace(
        recipe=recipe.Recipe(max_drop=4.0),
        teacher_validation=SimpleNamespace(accuracy=0.932, summary=SimpleNamespace(overall=told)),
    )
    assert rounds._promise(job, SimpleNamespace(correct=correct, n=500)) is kept


def test_the_promise_is_checked_on_the_weights_that_are_handed_over(ads, tmp_path, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model.to(torch.bfloat16), processor, tmp_path / "half")
    seen, evaluate = [], rounds.evaluate

    def watched(model, *more, **named):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *more, **named)

    monkeypatch.setattr(rounds, "evaluate", watched)
    out = tmp_path / "run"
    raw = {**PROMISING, "max_drop": 100.0, "stages": STAGES[:2]}
    pipeline.run(tmp_path / "half", ads, out, recipe.parse(raw, "test"))
    assert same(seen[-1], checkpoint.load(out / "final").model.state_dict())
    kept = checkpoint.load(out / "stages" / "02-inner.1" / "model").model.state_dict()
    assert not same(seen[-1], kept)  # what goes on to the next round is not rounded


def test_a_round_that_misses_the_promise_is_recovered_further(teacher, ads, tmp_path, missing):
    missing("inner.1 recovered")
    short = {**PROMISING, "stages": STAGES[:2]}
    found = pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(short, "test"))
    assert [one.trainings for one in found.rounds] == [0, 2]
    assert found.rounds[1].steps == 4
    assert all(one.kept_promise for one in found.rounds)
    assert found.notes == ()


def test_then_it_is_rolled_back_and_half_of_it_is_cut(rolled_back):
    out, found = rolled_back
    assert [(one.number, one.half, one.kept_promise) for one in found.rounds] == [
        (1, False, True),
        (2, False, True),
        (3, False, False),
        (3, True, True),
        (4, False, True),
    ]
    width = found.rounds[3].after["vision.width"]
    assert 16 < width < found.rounds[3].before["vision.width"]
    assert found.rounds[3].parameters_before == found.rounds[1].parameters
    # the FFN was planned as twice a width of 16
    assert found.student.sizes["vision.ffn"] == 2 * width
    assert "rolled back" in found.notes[0]
    assert "rolled back" in (out / "README.md").read_text()


@pytest.mark.thorough
def test_and_where_half_misses_too_the_run_stops_at_the_smallest_model_that_kept_it(teacher, ads, tmp_path, missing):
    missing(*(f"width.1{half} recovered{more}" for half in ("", "-half") for more in ("", " further")))
    out = tmp_path / "run"
    found = pipeline.run(teacher, ads, out, recipe.parse(PROMISING, "test"))
    assert [one.kept_promise for one in found.rounds] == [True, True, False, False]
    assert found.student.parameters["total"] == found.rounds[1].parameters
    # what the broken rounds tried leaves no trace in the model before them
    assert same(weights(out / "final"), weights(out / "stages" / "02-inner.1" / "model"))


def test_a_width_that_half_of_a_cut_leaves_impossible_becomes_the_next_smaller_one(teacher, ads, tmp_path, missing):
    missing("inner.1 recovered", "inner.1 recovered further")
    train = {"steps": 1, "pictures_per_step": 4}
    stages = [
        STAGES[0],
        {"name": "inner", "rounds": [{"sizes": {"text.kv_groups": 1}, "train": train}]},
        {"name": "width", "rounds": [{"sizes": {"text.width": 30}, "train": train}]},
    ]
    found = pipeline.run(teacher, ads, tmp_path / "run", recipe.parse({**PROMISING, "stages": stages}, "test"))
    assert [(one.half, one.kept_promise) for one in found.rounds[1:]] == [(False, False), (True, True), (False, True)]
    assert (found.student.sizes["text.kv_groups"], found.student.sizes["text.width"]) == (2, 24)
    assert "Round 3 width.1: text.width=30 is not possible any more; 24 is taken" in found.notes


def test_a_run_stopped_between_attempts_resumes_to_the_same_weights(teacher, ads, rolled_back, tmp_path, missing):
    missing(*MISSED)
    out = tmp_path / "run"
    for stop in ("half of it is tried", "round 4/4 last.1"):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(teacher, ads, out, recipe.parse(PROMISING, "test"), tell=Recorder(stop_at=stop))
    heard = Recorder()
    pipeline.run(teacher, ads, out, recipe.parse(PROMISING, "test"), tell=heard)
    assert "round 3/4 width.1-half was done" in heard.said
    assert same(weights(rolled_back[0] / "final"), weights(out / "final"))
    assert json.loads((out / "stages" / "03-width.1" / "metrics.json").read_text())["kept_promise"] is False


@pytest.mark.parametrize("name", ["llava-dinov2-llama", "qwen2_5_vl", "smolvlm"])
def test_half_of_a_cut_lies_between_and_can_be_said(name):
    config = tiny_config(name)
    anatomy = describe(config)
    for axis in anatomy.axes.values():
        choices = axis.choices() if not axis.refusal and axis.kind not in ("vocab", "tokens") else ()
        if len(choices) < 3:
            continue
        half = plan.halved(config, {axis.name: choices[0]}, Grid())
        if axis.noun == "ffn" or axis.name == "text.blocks":
            assert half
        for size in half.values():
            assert choices[0] < size < axis.size
            resized(config, half)


def test_half_of_a_round_that_cuts_the_width_first_states_ffns_at_that_width():
    config = tiny_config("llava-dinov2-llama")
    anatomy = describe(config)
    width = anatomy.axis("vision.width").size
    wanted = {"vision.width": width // 2, "vision.ffn": width // 2}
    assert plan.restated(anatomy, wanted, {"vision.width": width // 4}) == wanted
    half = plan.halved(config, wanted, Grid())
    assert list(half) == list(wanted)
    for name, size in half.items():
        config = resized(config, {name: size})
        assert describe(config).axis(name).size == size


def test_a_cut_of_several_single_steps_gives_up_the_later_axes():
    config = tiny_config("llava-dinov2-llama")
    sizes = describe(config).sizes
    wanted = {"vision.blocks": sizes["vision.blocks"] - 1, "text.blocks": sizes["text.blocks"] - 1}
    assert plan.halved(config, wanted, Grid()) == {"vision.blocks": wanted["vision.blocks"]}
    assert plan.halved(config, {"text.blocks": wanted["text.blocks"]}, Grid()) == {}


def test_verdicts_on_the_promise_are_those_of_a_non_inferiority_test():
    def drop(low, high):
        return Interval(mean=(low + high) / 2, low=low, high=high, level=0.95, samples=100, seed=0)

    tasks = {"price": drop(0.0, 0.019), "brand": drop(0.01, 0.03), "claim": drop(0.021, 0.04), "slogan": drop(0.1, 0.2)}
    change = results.Effect(drop=drop(-0.001, 0.008), drop_tasks=tasks, agreement=0.9)
    said = results.promise(change, recipe.Recipe(max_drop=0.8, spared_tasks=("slogan",)))
    assert said.overall == "kept"
    assert said.tasks == {"price": "kept", "brand": "undecided", "claim": "broken"}
    assert results.promise(change, recipe.Recipe(max_drop=0.7)).overall == "undecided"
    assert results.promise(change, recipe.Recipe()) is None


def test_judging_blocks_leaves_no_trace_in_what_the_teacher_said(teacher, ads, tmp_path):
    """The first round's model is the teacher itself, and its blocks are left out one by one while they are judged."""
    raw = {
        **RAW,
        "stages": [
            RAW["stages"][0],
            {
                "name": "blocks",
                "rounds": [{"sizes": {"text.blocks": 2}, "train": {"steps": 1, "pictures_per_step": 4}}],
            },
        ],
    }
    out = tmp_path / "run"
    pipeline.run(teacher, ads, out, recipe.parse(raw, "test"))
    lossless = checkpoint.load(out / "stages" / "01-lossless.1" / "model")
    cache = TeacherCache(lossless.model, Collator(lossless.processor, packed=True), out / "cache")
    kept = {key: value for shard in (out / "cache").glob("*.safetensors") for key, value in load_file(shard).items()}
    rows = [row for row in data.load(ads).train if cache.key(row) in kept]
    assert len(rows) == len(kept) >= 20
    batch = cache.collator(by_picture(rows, 16))
    for row, live in zip(batch["rows"], cache.live(batch), strict=True):
        assert torch.allclose(kept[cache.key(row)].float(), live, atol=2e-2 * float(live.abs().max()))
