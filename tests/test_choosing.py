"""Ways to choose sizes: the line through measured costs, and the whole way from rows to a shape on a tiny model."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.optimize import nnls

from slimlmm import budget, checkpoint, choosing, pipeline, plan, planning, pricing, recipe
from slimlmm.allocation import least_loss
from slimlmm.anatomy import describe
from slimlmm.budget import Stopwatch
from slimlmm.costs import answer_use
from slimlmm.errors import UntriedError, UserError
from slimlmm.grid import Grid
from slimlmm.resizing import predict_parameters
from test_allocation import COARSE, drawn, space_of
from tiny import tiny, tiny_config

FIXED = ["text.blocks=3", "text.width=48", "text.kv_groups=3", "vision.blocks=3", "vision.kv_groups=4"]
RAW = {
    "multiples": 16,
    "curve_rows": 20,
    "row_visits": 200,
    "bench_calls": 0,
    "data": {"validation_rows": 20, "test_rows": 20},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny("llava-dinov2-llama"), place)
    return place


@pytest.mark.parametrize("seed", range(6))
def test_weights_that_are_not_negative_are_those_of_a_reference(seed):
    rng = np.random.default_rng(seed)
    a = rng.random((12, 5)) * 10.0 ** rng.integers(-3, 6, 5)
    b = rng.normal(size=12) + 1
    ours, theirs = pricing.nonnegative(a, b), nnls(a / np.linalg.norm(a, axis=0), b)[0] / np.linalg.norm(a, axis=0)
    assert (ours >= 0).all()
    assert np.linalg.norm(a @ ours - b) == pytest.approx(np.linalg.norm(a @ theirs - b), rel=1e-6)


def test_the_line_finds_costs_that_are_sums_of_its_features_and_rises_with_every_size():
    config = tiny_config("llava-dinov2-llama")
    space, answer = plan.space_of(config, COARSE), answer_use(config, 8)
    count = len(pricing.features(config, answer, {}))
    true = np.array(
        [2.0] + [0.5] * len(describe(config).towers) + [3e-7] * (count - 2 - len(describe(config).towers)) + [1e-5]
    )
    shapes = pricing.table(space, lambda scale: plan.scaled(space, scale))
    costs = [float(pricing.features(config, answer, space.stated(one)) @ true) for one in shapes]
    line = pricing.fitted(space, answer, shapes, costs)
    other = plan.scaled(space, 0.45)
    told = float(pricing.features(config, answer, space.stated(other)) @ true)
    assert line.cost(space.stated(other)) == pytest.approx(told, rel=1e-3)
    assert (line.weights >= 0).all()


def test_a_measured_budget_is_kept_although_the_line_is_wrong_and_loses_no_more_than_the_shares():
    config = tiny_config("llava-dinov2-llama")
    space = space_of("llava-dinov2-llama", ("text.ffn", "vision.width", "text.blocks", "text.width"))

    def milliseconds(sizes):
        return 5 + 1e-4 * predict_parameters(config, sizes) ** 1.2

    whole = milliseconds({})
    allowed = budget.Budget(
        asked="--latency-ms", limit=0.7 * whole, cost=milliseconds, said=lambda _: "", again=lambda _: ""
    )
    start, curves = plan.scaled_within(space, allowed)[1], drawn(space, 4)
    line = lambda sizes: 0.4 * milliseconds(sizes)  # noqa: E731 - tells too little
    market, limit, sizes = pricing.within_measured(space, allowed, line, curves, start)
    assert milliseconds(space.stated(sizes)) <= allowed.limit
    assert market.loss(sizes) <= market.loss(start)
    assert limit < allowed.limit
    assert market.loss(sizes) <= 1.2 * market.loss(least_loss(market, 0.4 * allowed.limit))


def test_importance_on_real_rows_keeps_budget_and_floor_and_is_shown(folder, ads, tmp_path):
    (tmp_path / "in.yaml").write_text(json.dumps(RAW | {"sizes_by": "importance"}))
    found = planning.plan(
        str(folder),
        {"--shrink": 1.3},
        source=ads,
        recipe=tmp_path / "in.yaml",
        floors=["text.ffn=40"],
        fixes=FIXED,
        out=tmp_path / "o",
    )
    choice = found["choice"]
    assert found["costs"]["parameters"]["ratio"] >= 1.3
    assert choice["by"] == "importance"
    assert choice["sizes"]["text.ffn"] >= 40
    named = {one["axis"]: one for one in choice["curves"]}
    assert set(named) == {"text.ffn", "vision.width", "vision.ffn"}
    for one in named.values():
        assert one["measured"][0] == 0
        assert list(one["losses"]) == sorted(one["losses"])
    text = io.StringIO()
    Console(file=text, width=80).print(planning.view(found), highlight=False)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    assert "Predicted for the chosen sizes" in text.getvalue()
    written = recipe.read(tmp_path / "o")
    assert written.stages
    assert written.sizes_by is None
    json.dumps(found)


def test_a_search_recovers_its_shapes_and_a_run_takes_the_best_and_keeps_it(folder, ads, rows, tmp_path):
    raw = RAW | {
        "sizes_by": "search",
        "search_candidates": 2,
        "search_row_visits": 100,
        "shrink": 1.05,
        "order": ["blocks"],
    }
    settings = recipe.parse(raw, "test")
    loaded = checkpoint.load(folder)
    parts = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    first, _ = pipeline.schedule(loaded, parts, settings, lambda: tmp_path)
    kept = json.loads((tmp_path / "sizes.json").read_text())
    losses = [one["loss"] for one in kept["candidates"]]
    assert losses == sorted(losses)
    assert len(losses) == 2
    assert kept["sizes"] == kept["candidates"][0]["sizes"]
    whole = loaded.model.num_parameters()
    for one in kept["candidates"]:
        assert one["parameters"] <= whole / 1.05
        assert one["row_visits"] > 0
    took = choosing.spent(tmp_path)
    assert took.row_visits == sum(one["row_visits"] for one in kept["candidates"])
    assert took.flops == pytest.approx(sum(one["flops"] for one in kept["candidates"]))
    assert took.flops > 0
    assert took.seconds > sum(one["seconds"] for one in kept["candidates"])
    reached = {name: size for stage in first for turn in stage.rounds for name, size in turn.sizes.items()}
    assert reached.items() <= kept["sizes"].items()
    assert not (tmp_path / "sizes").exists()
    other = next(one for one in kept["candidates"] if one["sizes"] != kept["sizes"])
    (tmp_path / "sizes.json").write_text(json.dumps(kept | {"sizes": other["sizes"]}))
    assert pipeline.schedule(loaded, parts, settings, lambda: tmp_path)[0] != first  # read, not made again


def test_trial_cuts_are_kept_and_not_made_again(folder, rows, tmp_path):
    parts = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    settings = recipe.parse(RAW | {"shrink": 1.1, "order": ["blocks"]}, "test")
    loaded, kept = checkpoint.load(folder), tmp_path / "trials.json"
    first, told = pipeline.schedule(loaded, parts, settings, kept=kept)
    losses = json.loads(kept.read_text())
    assert losses.keys() == {"uncut", "text.blocks=2", "vision.blocks=2"}
    assert not [note for note in told if "shares" in note]
    drawn_out = {name: 9.0 if name.startswith("text") else loss for name, loss in losses.items()}
    kept.write_text(json.dumps(drawn_out))
    other, _ = pipeline.schedule(loaded, parts, settings, kept=kept)
    assert json.loads(kept.read_text()) == drawn_out
    sizes = {name: size for stage in other for turn in stage.rounds for name, size in turn.sizes.items()}
    assert "text.blocks" not in sizes
    assert first


def test_without_a_way_it_is_importance_or_shares_with_the_reason(folder, rows, tmp_path, monkeypatch):
    loaded = checkpoint.load(folder)
    parts = {"train": [choosing.replace(row, answer="") for row in rows.train], "validation": rows.validation}
    raw = RAW | {"shrink": 1.3}
    del raw["curve_rows"]
    stages, told = pipeline.schedule(loaded, parts, recipe.parse(raw, "test"), lambda: tmp_path)
    assert stages == pipeline.schedule(loaded, parts, recipe.parse(raw | {"sizes_by": "shares"}, "test"))[0]
    assert "sizes by shares, not by importance: trial cuts look at answers" in " ".join(told)
    again, notes = pipeline.schedule(loaded, parts, recipe.parse(raw, "test"), lambda: tmp_path)  # read from the folder
    assert (again, notes) == (stages, told)

    def untried(*_):
        raise UntriedError("text.width cannot be cut alone")

    monkeypatch.setattr(choosing, "curves", untried)
    parts["train"] = rows.train
    assert "not by importance: text.width cannot" in pipeline.schedule(loaded, parts, recipe.parse(raw, "test"))[1][-1]
    with pytest.raises(UntriedError, match=r"text\.width cannot"):
        pipeline.schedule(loaded, parts, recipe.parse(raw | {"sizes_by": "importance"}, "test"))


def test_shares_run_no_model():
    space = plan.space_of(tiny_config("smolvlm"), Grid())
    allowed = budget.by_shrink(space.config, 2, predict_parameters(space.config, {}))

    def ground():
        raise AssertionError("the model was asked for")

    assert choosing.chosen(space, allowed, "shares", ground).sizes == plan.sizes_within(space, allowed)
    fixes = {"text.width": 24, "vision.width": 16}
    space = plan.space_of(space.config, levels=("width",), fixes=fixes)
    allowed = budget.by_shrink(space.config, 1.1, predict_parameters(space.config, {}))
    assert choosing.chosen(space, allowed, "importance", ground).sizes == fixes  # nothing is left to choose


def test_what_cannot_be_done_is_refused(folder, ads, rows, tmp_path):
    with pytest.raises(UserError, match="--by importance tries the model on rows: give --data"):
        planning.plan(str(folder), {"--shrink": 2.0}, by="importance")
    with pytest.raises(UserError, match="'shares', 'importance' or 'search'"):
        planning.plan(str(folder), {"--shrink": 2.0}, by="luck")
    with pytest.raises(UserError, match="search_candidates has no effect with sizes_by: importance"):
        recipe.parse({"sizes_by": "importance", "search_candidates": 3}, "test")
    with pytest.raises(UserError, match="curve_rows has no effect with sizes_by: shares"):
        recipe.parse({"sizes_by": "shares", "curve_rows": 3}, "test")
    bare = [choosing.replace(row, answer="") for row in rows.train]
    settings = recipe.parse({"sizes_by": "importance", "shrink": 2}, "test")
    with pytest.raises(UserError, match="train rows have none before the teacher"):
        pipeline.schedule(checkpoint.load(folder), {"train": bare, "validation": rows.validation}, settings)


def test_a_stopwatch_of_joules_says_so():
    watch = Stopwatch(device=torch.device("cpu"), seconds=lambda *_: [[0.25, 0.5, 0.75]], unit="J", scale=1.0)
    assert watch.timed(tiny_config("smolvlm"), {}).value == 0.5
