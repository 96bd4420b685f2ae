"""Laws of a plan: what is predicted is what the cut model has, and no shape that was allowed is larger."""

import io
import json
import shutil
import struct
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

from slimlmm import budget, checkpoint, commands, data, plan, planning, recipe, staging, surgery, vocab
from slimlmm.anatomy import describe
from slimlmm.budget import Stopwatch, quantity
from slimlmm.collate import texts_of
from slimlmm.costs import answer_use
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.probing import skeleton
from slimlmm.resizing import predict_parameters, resized
from slimlmm.selfcheck import some_units
from slimlmm.teacher import config_fingerprint
from tiny import tiny, tiny_config
from zoo import CONFIGS

CPU = torch.device("cpu")
NAMES = ("llava-dinov2-llama", "smolvlm", "qwen2_5_vl")


def flops_of(config) -> float:
    return sum(answer_use(config).flops(skeleton(config).shapes).values())


#: what a shape really costs, counted on its own configuration
COUNTED = {
    "--parameters": lambda config: skeleton(config).parameters,
    "--bytes": lambda config: 2 * skeleton(config).parameters,
    "--flops": flops_of,
}


def budget_of(option, config, share) -> budget.Budget:
    limit = share * COUNTED[option](config)
    if option == "--parameters":
        return budget.by_parameters(config, limit, option)
    if option == "--bytes":
        return budget.by_bytes(config, limit, option, 2)
    return budget.by_flops(config, limit, option, answer_use(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its processor."""
    place = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny("llava-dinov2-llama"), place)
    return str(place)


@pytest.mark.parametrize("option", COUNTED)
@pytest.mark.parametrize("name", NAMES[:2])
def test_the_shape_fits_and_no_axis_can_take_its_next_size(name, option):
    config = tiny_config(name)
    allowed = budget_of(option, config, 0.4)
    space = plan.space_of(config)
    sizes = plan.sizes_within(space, allowed)
    assert COUNTED[option](resized(config, space.stated(sizes))) <= allowed.limit * (1 + 1e-9)
    for axis, size in sizes.items():
        larger = [one for one in space.choices[axis] if one > size]
        try:
            grown = resized(config, space.stated({**sizes, axis: larger[0]})) if larger else None
        except UserError:  # the config cannot say it
            continue
        assert grown is None or COUNTED[option](grown) > allowed.limit


@pytest.mark.parametrize("option", COUNTED)
def test_more_budget_never_gives_a_smaller_scale(option):
    config = tiny_config("llava-dinov2-llama")
    space = plan.space_of(config)
    scales = [plan.scaled_within(space, budget_of(option, config, share))[0] for share in (0.15, 0.4, 0.9)]
    assert scales == sorted(scales)
    assert scales[0] < scales[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_between_two_that_the_config_takes_is_no_refusal(name):
    """At some scales the heads do not divide any width that is left; then groups go too."""
    config = tiny_config(name)
    space = plan.space_of(config)
    for step in range(0, 101, 5):
        sizes = plan._fit(space, plan._scaled(space, step / 100))
        space.check(sizes)


def test_the_prediction_is_what_the_cut_model_has(folder, tmp_path):
    found = planning.plan(folder, {"--shrink": 3.0}, out=tmp_path / "r.yaml")
    student = checkpoint.load(folder).model
    for stage in recipe.read(tmp_path / "r.yaml").stages:
        for turn in stage.rounds:
            for axis, size in turn.sizes.items():
                anatomy = describe(student.config)
                keep = some_units(anatomy.axis(axis), size)
                student = surgery.cut(student, anatomy, axis, keep)
    assert student.num_parameters() == found["costs"]["parameters"]["planned"] == found["rounds"][-1]["parameters"]
    sizes = describe(student.config).sizes
    assert {axis["axis"]: axis["planned"] for axis in found["axes"]} == {"text.queries": 2} | sizes
    assert found["costs"]["flops"]["planned"] == pytest.approx(flops_of(student.config))
    checkpoint.save(student, None, tmp_path / "small")
    content = (tmp_path / "small" / "model.safetensors").read_bytes()
    assert len(content) - 8 - struct.unpack("<Q", content[:8])[0] == found["costs"]["bytes"]["planned"]
    json.dumps(found)


def test_bytes_are_those_of_the_number_format():
    config = checkpoint.load_config(bundled("teacher"))
    stored = sum(path.stat().st_size for path in bundled("teacher").glob("*.safetensors"))
    found = planning.plan(str(bundled("teacher")), {"--bytes": "20MB"})
    assert found["costs"]["bytes"]["now"] == pytest.approx(stored, rel=1e-3)
    assert found["costs"]["bytes"]["now"] == 2 * predict_parameters(config, {})
    assert found["costs"]["bytes"]["planned"] <= 20e6


def test_the_recipe_is_one_that_compress_takes_and_says_what_was_printed(folder, ads, tmp_path):
    (tmp_path / "in.yaml").write_text(
        "order: [inner, width, blocks]\nrow_visits: 5000\nmultiples: 8\nshrink: 2.5\nsizes_by: shares\n"
    )
    out = tmp_path / "deep" / "r.yaml"
    found = planning.plan(folder, {}, recipe=tmp_path / "in.yaml", source=ads, out=out, floors=["text.ffn=40"])
    read = commands.settings(out, shrink=None, max_drop=None, seed=None)
    rounds = [(f"{stage.name}.{number}", turn) for stage in read.stages for number, turn in enumerate(stage.rounds, 1)]
    assert [(name, turn.sizes) for name, turn in rounds[1:]] == [
        (one["round"], one["sizes"]) for one in found["rounds"][1:]
    ]
    assert [stage.name for stage in read.stages] == ["lossless", "inner", "width", "blocks"]
    assert sum(one["row_visits"] for one in found["rounds"]) == pytest.approx(5000, rel=0.02)
    assert read.unheard() == []
    assert read.shrink is None
    staging.check_stages(checkpoint.load_config(folder), read.stages)


@pytest.mark.parametrize("order", [["width", "inner", "blocks"], ["inner", "blocks"]])
def test_any_order_ends_at_the_planned_shape_and_cuts_its_levels_alone(folder, order, tmp_path):
    (tmp_path / "in.yaml").write_text(json.dumps({"order": order, "multiples": 8}))
    found = planning.plan(folder, {"--shrink": 1.8}, recipe=tmp_path / "in.yaml")
    config = checkpoint.load_config(folder)
    for turn in found["rounds"]:
        config = resized(config, turn["sizes"])
        assert turn["parameters"] == predict_parameters(config, {})
    assert found["rounds"][-1]["parameters"] == found["costs"]["parameters"]["planned"]
    cut = {one["axis"] for one in found["axes"] if one["planned"] < one["now"]}
    anatomy = describe(checkpoint.load_config(folder))
    assert {anatomy.axis(name).kind for name in cut} <= set(order)
    assert not [note for note in found["notes"] if "in the end" in note]
    if "width" not in order:
        with pytest.raises(UserError, match=r"allow in inner, blocks takes"):
            planning.plan(folder, {"--shrink": 99.0}, recipe=tmp_path / "in.yaml")
        with pytest.raises(UserError, match="no round of a plan cuts it"):
            planning.plan(folder, {"--shrink": 1.8}, recipe=tmp_path / "in.yaml", fixes=["text.width=48"])


def test_rows_trim_the_vocabulary_as_compress_does(folder, ads, rows):
    found = planning.plan(folder, {"--shrink": 3.0}, source=ads, by="shares")
    loaded = checkpoint.load(folder)
    trimmed, _ = vocab.trim(loaded.model, loaded.processor, texts_of(loaded.processor, rows.train + rows.validation))
    (axis,) = (axis for axis in found["axes"] if axis["axis"] == "vocab")
    assert axis["planned"] == describe(trimmed.config).sizes["vocab"] == found["rounds"][0]["sizes"]["vocab"]
    assert found["rounds"][0]["parameters"] == trimmed.num_parameters()
    assert found["rows_fingerprint"] == data.fingerprint(rows.train + rows.validation)
    assert found["config_fingerprint"] == config_fingerprint(loaded.model.config) != config_fingerprint(trimmed.config)
    assert (found["seed"], found["environment"]["versions"]["torch"]) == (0, version("torch"))
    whole = loaded.model.num_parameters()
    final = {
        axis["axis"]: axis["planned"] for axis in found["axes"] if axis["axis"].endswith(("blocks", "width", "groups"))
    }
    chosen = plan.sizes_for(loaded.model.config, 3.0, whole, {"vocab": axis["planned"]})
    assert final == {name: size for name, size in chosen.items() if name in final}


def test_rows_that_the_teacher_will_label_are_planned_with(folder, ads, tmp_path):
    shutil.copytree(ads, tmp_path / "bare")
    table = tmp_path / "bare" / "train.jsonl"
    told = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text(
        "".join(json.dumps(one | {"answer": "" if n < 60 else one["answer"]}) + "\n" for n, one in enumerate(told))
    )
    (tmp_path / "in.yaml").write_text("data: {answers: filled}\nshrink: 2\n")
    found = planning.plan(folder, {}, recipe=tmp_path / "in.yaml", source=tmp_path / "bare")
    assert found["costs"]["parameters"]["ratio"] >= 2
    assert any("answers are not made yet" in note for note in found["notes"])


def test_given_and_least_sizes_are_kept(folder):
    fixes = ["text.width=36", "vision.width=16", "vision.ffn=32", "text.queries=1"]
    found = planning.plan(folder, {"--shrink": 2.0}, fixes=fixes, floors=["text.blocks=3", "text.ffn=33"])
    planned = {axis["axis"]: axis["planned"] for axis in found["axes"]}
    assert [planned[one.partition("=")[0]] for one in fixes] == [36, 16, 32, 1]
    assert planned["text.blocks"] == 3
    assert planned["text.ffn"] >= 33
    assert found["costs"]["parameters"]["ratio"] >= 2
    given = {axis["axis"]: axis["given"] for axis in found["axes"] if axis["given"]}
    assert given == dict.fromkeys(
        ("text.width", "vision.width", "vision.ffn", "text.queries"), "--fix"
    ) | dict.fromkeys(("text.blocks", "text.ffn"), "--floor")


@pytest.mark.parametrize(
    ("floors", "fixes", "message"),
    [
        ([], ["text.width=5"], "no size of this axis; the nearest: 6, 12|no size of this axis; the nearest: "),
        ([], ["vision.ffn=32"], "give --fix vision.width=SIZE too"),
        ([], ["vision.ffn=30", "vision.width=16"], "must be 1 to 3 times the width 16"),
        (["text.ffn=30"], ["text.ffn=40"], "has a floor and a given size"),
        (["text.queries=1"], [], "leaves this axis as it is"),
        (["text.width=48", "text.blocks=3", "text.ffn=68"], [], r"smallest shape .* with these --floor .* takes \d+"),
        (["text.wdth=48"], [], "text.width"),
        ([], ["text.ffn=99"], "the axis has 68; give 1 to 68"),
        ([], ["vocab=99"], "goes with the tokenizer"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_numbers(folder, floors, fixes, message):
    with pytest.raises(UserError, match=message):
        planning.plan(folder, {"--shrink": 4.0}, floors=floors, fixes=fixes)


@pytest.mark.parametrize("asked", [{"--shrink": 1e4}, {"--flops": "9"}])
def test_what_a_refusal_proposes_is_possible(folder, asked):
    with pytest.raises(UserError, match="smallest shape") as caught:
        planning.plan(folder, asked)
    option, number = str(caught.value).split("Ask for ")[1].split()[:2]
    found = planning.plan(folder, {option: float(number) if option == "--shrink" else number})
    assert found["costs"]["parameters"]["ratio"] > 10


def test_multiples_of_an_axis_that_there_is_not_are_refused(folder, tmp_path):
    (tmp_path / "in.yaml").write_text("shrink: 2\nmultiples: {text.wdth: 8}\n")
    with pytest.raises(UserError, match=r"multiples: unknown axis 'text.wdth' .* Did you mean 'text.width'"):
        planning.plan(folder, {}, recipe=tmp_path / "in.yaml")


def test_axes_that_no_round_cuts_cannot_be_given():
    with pytest.raises(UserError, match=r"qformer.query_tokens=2: no round of a plan cuts it; cut it first"):
        plan.space_of(CONFIGS["blip2-opt"](), fixes={"qformer.query_tokens": 2})


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe", "llama4_moe", "gemma4-moe"])
def test_whole_experts_are_cut_with_what_is_inside_of_blocks(name):
    config = CONFIGS[name]()
    experts = describe(config).axis("text.experts")
    whole = predict_parameters(config, {})
    sizes = plan.sizes_for(config, 2, whole)
    assert experts.minimum <= sizes["text.experts"] < experts.size
    stages = staging.stages_for(config, sizes, row_visits=4000)
    final = config
    for turn in (turn for stage in stages for turn in stage.rounds):
        final = resized(final, turn.sizes)
    assert describe(final).sizes["text.experts"] == sizes["text.experts"]
    assert {stage.name for stage in stages for turn in stage.rounds if "text.experts" in turn.sizes} == {"inner"}
    assert whole / predict_parameters(final, {}) >= 2
    given = plan.space_of(config, fixes={"text.experts": experts.minimum})
    assert given.choices["text.experts"] == [experts.minimum]


@pytest.mark.parametrize(
    ("option", "text", "number"),
    [
        ("--parameters", "300M", 3e8),
        ("--parameters", "0.3B", 3e8),
        ("--parameters", "1234", 1234),
        ("--bytes", "600MB", 6e8),
        ("--bytes", "1.2gb", 1.2e9),
        ("--bytes", "12 KB", 12e3),
        ("--flops", "500G", 5e11),
        ("--flops", "1.2T", 1.2e12),
    ],
)
def test_quantities(option, text, number):
    assert quantity(option, text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "0", "-3M", "1e9", "3X", "M", "1.M", "300MB", "٣", "9" * 400])
def test_no_quantities(text):
    with pytest.raises(UserError, match=r"--parameters .*: give a number above 0, alone or with one of K, M"):
        quantity("--parameters", text)


def fake(configs, device, n) -> list[list[float]]:
    """A microsecond a parameter."""
    return [[1e-6 * skeleton(config).parameters] * n for config in configs]


def test_the_search_by_time_finds_the_largest_shape_of_the_scale():
    config = tiny_config("llava-dinov2-llama")
    space, watch = plan.space_of(config), Stopwatch(device=CPU, seconds=fake)
    limit = 0.4e-3 * skeleton(config).parameters
    _, sizes = plan.scaled_within(space, budget.by_latency(config, limit, "--latency-ms", watch))
    path = [plan._fit(space, plan._scaled(space, step / 200)) for step in range(201)]
    counts = [predict_parameters(config, space.stated(one)) for one in path]
    assert predict_parameters(config, space.stated(sizes)) == max(one for one in counts if 1e-3 * one <= limit)
    assert len(watch.found) <= 10
    assert all(one.ms == pytest.approx(1e-3 * one.parameters) and one.n == budget.CALLS for one in watch.found.values())


def test_a_model_that_memory_does_not_hold_is_not_timed(folder, monkeypatch):
    config = checkpoint.load_config(folder)
    room = int(budget.ROOM * 4 * predict_parameters(config, {})) - 1
    monkeypatch.setattr(planning, "Stopwatch", lambda **more: Stopwatch(seconds=fake, available=lambda _: room, **more))
    found = planning.plan(folder, {"--latency-ms": 40.0})
    costs = found["costs"]["latency_ms"]
    assert costs["now"] is None
    assert costs["ratio"] is None
    assert costs["planned"] <= 40
    assert "GB are free" in costs["reason"]
    assert [one["ms"] for one in found["latency"]["candidates"]].count(None) == 1
    monkeypatch.setattr(planning, "Stopwatch", lambda **more: Stopwatch(seconds=fake, available=lambda _: 0, **more))
    with pytest.raises(UserError, match=r"smallest shape .* more memory than there is"):
        planning.plan(folder, {"--latency-ms": 40.0})


@pytest.mark.thorough
def test_a_real_clock_and_the_view_in_eighty_columns(tmp_path, monkeypatch):
    config = tiny_config("llava-dinov2-llama")
    config.text_config.intermediate_size = 32768  # far from the smallest shape, so that a busy machine does not matter
    monkeypatch.setattr(budget, "CALLS", 5)
    config.save_pretrained(tmp_path / "wide")
    small = resized(config, {"text.blocks": 2, "vision.blocks": 2, "text.ffn": 4096})
    slow, fast = budget.answer_seconds([config, small], CPU, 5)
    assert len(slow) == len(fast) == 5
    limit = 1e3 * (sorted(slow)[2] * sorted(fast)[2]) ** 0.5
    found = planning.plan(str(tmp_path / "wide"), {"--latency-ms": limit})
    costs, candidates = found["costs"]["latency_ms"], found["latency"]["candidates"]
    assert costs["ratio"] == costs["now"] / costs["planned"]
    chosen = next(one for one in candidates if one["sizes"] == found["latency"]["chosen"])
    assert chosen["ms"] <= limit < candidates[0]["ms"]
    assert found["dtype"] == "float32"
    text = io.StringIO()
    Console(file=text, width=80).print(planning.view(found), highlight=False)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    assert "…" not in text.getvalue()
    for words in ("latency p50", "as it is", "are not in", "vocabulary counted whole"):
        assert words in text.getvalue()
    json.dumps(found)
