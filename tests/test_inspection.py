"""What `inspect` tells, against brute force."""

import io
import json

import pytest
from rich.console import Console

from marks import thorough
from slimlmm import inspection, measure, tree
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.families import stock_class
from slimlmm.parts import parts_of
from slimlmm.probing import skeleton
from slimlmm.resizing import resized
from zoo import CONFIGS


@pytest.fixture
def folder(tmp_path):
    """Write one configuration of the zoo, and nothing else."""

    def write(name):
        CONFIGS[name]().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_every_parameter_has_one_part_and_blocks_are_told_apart(sampled_family):
    config = CONFIGS[sampled_family]()
    parts, whole = parts_of(config), skeleton(config)
    assert set(parts) == set(whole.shapes)
    towers = {tower for tower, _ in parts.values()}
    assert {"vision", "text", "head"} <= towers
    inside = {part for part in parts.values() if part[0] == "text"}
    assert {("text", "embeddings"), ("text", "attention"), ("text", "norms")} <= inside
    assert inside & {("text", "ffn"), ("text", "experts")}
    for alias, owner in whole.tied.items():
        assert {parts[alias], parts[owner]} & {("head", ""), ("text", "embeddings"), ("text", "other")}


@pytest.mark.parametrize(
    "name", ["llava-clip-llama", "blip-2-t5", "llama4_moe", thorough("qwen3_vl"), thorough("mllama")]
)
def test_the_tree_adds_up(name, folder):
    found = inspection.inspect(folder(name), tokens=2, picture=56)
    for key in ("parameters", "bytes", "flops"):
        assert sum(tower[key] for tower in found["tree"]) == pytest.approx(found[key])
        for tower in found["tree"]:
            assert not tower["parts"] or sum(part[key] for part in tower["parts"]) == pytest.approx(tower[key])
    model = stock_class(CONFIGS[name]()).from_config(CONFIGS[name]())
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["parts"] == measure.parameters(model)
    assert found["bytes"] == 4 * found["parameters"]


def test_a_step_of_an_axis_is_what_goes_with_it(folder):
    found = inspection.inspect(folder("llava-clip-llama"), tokens=2)
    config = CONFIGS["llava-clip-llama"]()
    for axis in found["axes"]:
        if axis["refusal"] or axis["axis"] == "vocab":
            continue
        less = resized(config, {axis["axis"]: axis["size"] - axis["unit"]["size"]})
        assert axis["unit"]["parameters"] == found["parameters"] - skeleton(less).parameters
        less.save_pretrained(folder("llava-clip-llama") + "-less")
        again = inspection.inspect(folder("llava-clip-llama") + "-less", tokens=2)
        assert axis["unit"]["flops"] == pytest.approx(found["flops"] - again["flops"])


def test_other_sizes_are_told_with_bytes_and_flops(folder):
    place = folder("llava-clip-llama")
    found = inspection.inspect(place, ("text.ffn=32", "vision.width=16", "text.blocks=2"), tokens=2)
    sizes = {"text.ffn": 32, "vision.width": 16, "text.blocks": 2}
    student = resized(CONFIGS["llava-clip-llama"](), sizes)
    student.save_pretrained(place + "-cut")
    again = inspection.inspect(place + "-cut", tokens=2)
    for key in ("parameters", "bytes", "parts"):
        assert found["after"][key] == again[key]
    assert found["after"]["flops"] == pytest.approx(again["flops"])
    assert found["after"]["sizes"] == sizes
    json.dumps(found)


def test_the_view_fits_eighty_columns(sampled_family, folder):
    name, config = sampled_family, CONFIGS[sampled_family]()
    name_axis = next(name for name, axis in describe(config).axes.items() if not axis.refusal and axis.kind == "inner")
    least = describe(config).axes[name_axis].choices()[0]
    found = inspection.inspect(folder(name), (f"{name_axis}={least}",), tokens=2, tensor_parallel=1)
    text = io.StringIO()
    Console(file=text, width=80).print(tree.view(found), highlight=False)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for axis in describe(config).axes:
        assert any(line.startswith(f"{axis} ") for line in lines), axis
    assert "…" not in text.getvalue()


def test_without_a_figure_the_view_says_why(folder, monkeypatch):
    monkeypatch.setattr("slimlmm.costs.LARGEST", 10)
    found = inspection.inspect(folder("smolvlm"))
    assert found["flops"] is None
    assert found["axes"][0]["unit"]["flops"] is None
    text = io.StringIO()
    Console(file=text, width=80).print(tree.view(found))
    assert "no answer could be counted" in text.getvalue()


def test_sizes_that_devices_cannot_share_are_refused_with_the_numbers(folder):
    place = folder("llava-clip-llama")
    inspection.inspect(place, ("text.kv_groups=2",), tensor_parallel=2)
    with pytest.raises(UserError, match=r"text.ffn=33 cannot be split over 2 devices(.|\n)*33 neurons"):
        inspection.inspect(place, ("text.ffn=33",), tensor_parallel=2)
    with pytest.raises(UserError, match=r"text.kv_groups=2 cannot(.|\n)*4 query heads"):
        inspection.inspect(place, ("text.kv_groups=2",), tensor_parallel=3)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (999, "999"), (999.6, "1.00 k"), (73.4e9, "73.4 G"), (2.4e15, "2.40 P")]
)
def test_numbers_have_three_digits(value, text):
    assert tree.human(value) == text


def test_mergers_of_deeper_states_are_projector():
    parts = parts_of(CONFIGS["qwen3_vl"]())
    assert parts["model.visual.deepstack_merger_list.0.linear_fc1.weight"] == ("projector", "")
    assert parts["model.visual.merger.linear_fc1.weight"] == ("projector", "")
    assert parts["model.visual.blocks.0.mlp.linear_fc1.weight"] == ("vision", "ffn")
