"""After a cut the residual stream is fitted back, block by block, to what it was."""

import copy

import pytest
import torch

from slimlmm import surgery
from slimlmm.anatomy import describe
from slimlmm.bridging import stream
from slimlmm.calibration import Calibration
from slimlmm.forward import first_text_block, output_of
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import resized
from slimlmm.selfcheck import random_model, some_units
from slimlmm.settling import _pairs, settle_best, settled
from test_bridging import batches_of, loss, outputs, scaled_model, with_a_dead_block
from tiny import tiny_config
from zoo import CONFIGS

NAME = "llava-dinov2-llama"


@pytest.fixture(scope="module")
def whole():
    model = scaled_model(NAME)
    return model, batches_of(NAME, model)


def cut_to(model, sizes):
    for axis, size in sizes.items():
        anatomy = describe(model.config)
        model = surgery.cut(model, anatomy, axis, some_units(anatomy.axis(axis), size))
    return model


def apart(student, before, kept, batches):
    """Return the mean squared distance of the streams behind each pair of blocks."""
    found = {}
    with torch.no_grad():
        for place, wanted in _pairs(student, before, kept):
            one, other = student.get_submodule(place), before.get_submodule(wanted)
            found[place] = sum(
                float(
                    (stream(output_of(student, one, batch)) - stream(output_of(before, other, batch))).square().mean()
                )
                for batch in batches
            )
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {"text.ffn": 32, "text.kv_groups": 1},
        {"vision.ffn": 32, "vision.kv_groups": 2},
        {"text.ffn": 24, "vision.ffn": 32},
    ],
)
def test_the_stream_is_nearer_to_what_it_was_behind_every_mended_block(whole, sizes):
    model, batches = whole
    student = cut_to(model, sizes)
    trial = copy.deepcopy(student)
    mended = settled(trial, model, {}, batches)
    before, after = apart(student, model, {}, batches), apart(trial, model, {}, batches)
    assert mended
    assert after[mended[-1]] < 0.9 * before[mended[-1]]
    first = min(("vision", "text").index(axis.partition(".")[0]) for axis in sizes)
    assert any("vision_tower" in place for place in before) is (first == 0), (
        "a tower before the first cut lacks nothing"
    )


def test_what_dropped_blocks_added_is_the_task_of_the_kept_one_before_them(whole):
    model, batches = whole
    anatomy = describe(model.config)
    size = anatomy.axis("text.blocks").size
    kept = {"text.blocks": [0, *range(2, size)]}
    student = surgery.cut(model, anatomy, "text.blocks", {"text.blocks": torch.tensor(kept["text.blocks"])})
    layers = anatomy.axis("text.blocks").layers
    pairs = dict(_pairs(student, model, kept))
    assert pairs[f"{layers}.0"] == f"{layers}.1"
    assert pairs[f"{layers}.{size - 2}"] == f"{layers}.{size - 1}"
    trial = copy.deepcopy(student)
    settled(trial, model, kept, batches)
    before, after = apart(student, model, kept, batches), apart(trial, model, kept, batches)
    assert after[f"{layers}.0"] < 0.9 * before[f"{layers}.0"]


def test_the_better_of_both_is_taken_and_no_input_is_touched(whole):
    model, batches = whole
    student = cut_to(model, {"text.ffn": 32, "vision.ffn": 32})
    states = [{name: value.clone() for name, value in one.state_dict().items()} for one in (model, student)]
    found, tries = settle_best(student, model, {}, Calibration(fit=batches, judge=batches[:1]), loss)
    assert [one.name for one in tries] == ["cut", "settled"]
    assert float(loss(found, batches[0]).detach()) == pytest.approx(min(one.loss for one in tries), rel=1e-5)
    for one, state in zip((model, student), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_a_model_that_was_not_cut_and_a_stream_of_another_width_are_left_alone(whole):
    model, batches = whole
    same = copy.deepcopy(model)
    assert settled(same, model, {}, batches) == []
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())
    narrow = cut_to(model, {"text.width": 24})
    assert not any("language_model" in place for place, _ in _pairs(narrow, model, {}))


def test_units_of_several_layers_are_settled_by_their_layers():
    model = random_model(tiny_config("blip2-opt"))
    anatomy, batches = describe(model.config), batches_of("blip2-opt", model, count=2)
    axis = anatomy.axis("qformer.blocks")
    assert axis.groups[0].stride == 2
    units = list(range(axis.groups[0].units))[1:]
    layers = axis.groups[0].layers(units)
    student = surgery.cut(model, anatomy, axis.name, {axis.name: torch.tensor(units)})
    pairs = dict(_pairs(student, model, {axis.name: layers}))
    kept = {place: wanted for place, wanted in pairs.items() if place.startswith(axis.layers)}
    assert list(kept.values()) == [f"{axis.layers}.{number}" for number in layers]
    assert settled(copy.deepcopy(student), model, {axis.name: layers}, batches)


def test_a_block_is_not_settled_where_tokens_are_merged_behind_it():
    model = random_model(CONFIGS["minicpmv4_6"]())
    anatomy, batches = describe(model.config), [picture_prompt(model.config) for _ in range(3)]
    for kept in ([0], [0, 1], [1, 3], [0, 1, 3]):
        student = surgery.cut(model, anatomy, "vision.blocks", {"vision.blocks": torch.tensor(kept)})
        layers = describe(student.config).axis("vision.blocks").layers
        mended = [one for one in settled(student, model, {"vision.blocks": kept}, batches) if one.startswith(layers)]
        assert len(mended) < len(kept)


def test_a_tower_whose_blocks_must_all_stay_is_left_alone():
    config = resized(CONFIGS["qwen3_vl"](), {"text.blocks": 2}, {"text.blocks": [0, 1]})
    assert describe(config).axes["text.blocks"].refusal
    model, batches = random_model(config), [picture_prompt(config)]
    student = cut_to(model, {"text.ffn": 32, "vision.ffn": 32})
    layers = describe(config).axes["text.blocks"].layers
    assert not [place for place in settled(student, model, {}, batches) if place.startswith(layers)]
    assert first_text_block(student, describe(student.config)) is student.get_submodule(f"{layers}.0")


def test_the_stream_is_settled_as_far_as_it_is_read():
    model, anatomy, batches = with_a_dead_block()
    axis, kept = "vision.blocks", [0, 1, 2, 4]
    layers = anatomy.axis(axis).layers
    student = surgery.cut(model, anatomy, axis, {axis: torch.tensor(kept)})
    pairs = dict(_pairs(student, model, {axis: kept}))
    assert {place: wanted for place, wanted in pairs.items() if place.startswith(layers)} == {
        f"{layers}.0": f"{layers}.0",
        f"{layers}.1": f"{layers}.1",
        f"{layers}.2": f"{layers}.3",
    }
    wanted, trial = outputs(model, f"{layers}.3", batches), copy.deepcopy(student)
    settled(trial, model, {axis: kept}, batches)
    distances = [float((outputs(one, f"{layers}.2", batches) - wanted).square().mean()) for one in (student, trial)]
    assert distances[1] < 0.01 * distances[0]
