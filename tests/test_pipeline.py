import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import stay_in_this_process
from slimlmm import pipeline, recipe, rounds, staging
from slimlmm.errors import UserError
from tiny import tiny_config

RAW = {
    "bench_calls": 0,
    "data": {"calibration_rows": 20, "validation_rows": 20, "test_rows": 20},
    "stages": [
        {"name": "lossless", "rounds": [{"drop": ["unused_tokens", "dead_blocks"]}]},
        {
            "name": "blocks",
            "rounds": [
                {"sizes": {"vision.blocks": 2, "text.blocks": 2}, "train": {"steps": 2, "pictures_per_step": 4}}
            ],
        },
        {
            "name": "inner",
            "rounds": [{"sizes": {"text.ffn": 32, "vision.ffn": 64}, "train": {"steps": 2, "pictures_per_step": 4}}],
        },
        {"name": "heads", "rounds": [{"sizes": {"text.queries": 1, "text.head_dim": 6, "vision.head_dim": 5}}]},
        {
            "name": "width",
            "rounds": [
                {"sizes": {"text.width": 36, "vision.width": 24}, "train": {"steps": 2, "pictures_per_step": 4}}
            ],
        },
    ],
}


TIMED = {**RAW, "bench_calls": 3}


class Recorder:
    """A reporter that can interrupt the run when it hears a text."""

    def __init__(self, stop_at="\0"):
        self.stop_at, self.said = stop_at, []

    def say(self, text, **facts):
        self.said.append(text)
        if self.stop_at in text:
            raise KeyboardInterrupt

    def step(self, what, done, total, **facts):
        pass


@pytest.fixture(scope="module")
def finished(teacher, ads, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_in_this_process(monkeypatch)
        return out, pipeline.run(teacher, ads, out, recipe.parse(TIMED, "test"))


def test_a_run_leaves_a_stock_checkpoint_of_the_planned_size(finished):
    out, found = finished
    model, info = AutoModelForImageTextToText.from_pretrained(out / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == found.student.parameters["total"] == found.rounds[-1].parameters
    assert model.config.text_config.hidden_size == 36
    assert model.config.vision_config.hidden_size == 24
    assert (model.config.vision_config.head_dim, model.config.text_config.head_dim) == (5, 6)
    assert model.config.text_config.rope_parameters["rope_type"] == "longrope"
    assert model.config.text_config.num_attention_heads == model.config.text_config.num_key_value_heads == 3
    assert AutoProcessor.from_pretrained(out / "final").chat_template


def test_every_round_is_written_down(finished):
    out, found = finished
    assert [one.stage for one in found.rounds] == ["lossless", "blocks", "inner", "heads", "width"]
    for one in (one for one in found.rounds[1:] if one.stage != "heads"):
        assert one.after_cut is not None
        assert one.after_recovery is not None
        assert one.row_visits > 0
        assert one.flops > 0
        assert one.parameters < one.parameters_before
    page = (out / "README.md").read_text()
    assert "text.width 48→36" in page
    assert (out / "rounds.png").stat().st_size > 1000
    plan = json.loads((out / "stages" / "03-inner.1" / "plan-text.ffn.json").read_text())
    assert len(plan["keep"]["text.ffn[0]"]) == 32
    assert set(plan["repairs_tried"]) == {"slice", "refit"}


@pytest.mark.thorough
def test_an_interrupted_run_resumes_at_the_last_finished_round_to_the_same_weights(teacher, ads, finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=Recorder(stop_at="round 3/5"))
    assert not (out / "final").exists()
    heard = Recorder()
    pipeline.run(teacher, ads, out, recipe.parse(RAW, "test"), tell=heard)
    assert [text for text in heard.said if "was done" in text] == [
        "round 1/5 lossless.1 was done",
        "round 2/5 blocks.1 was done",
    ]
    whole = AutoModelForImageTextToText.from_pretrained(finished[0] / "final").state_dict()
    again = AutoModelForImageTextToText.from_pretrained(out / "final").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_folder_of_another_run_or_of_something_else_is_refused(teacher, ads, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    with pytest.raises(UserError, match=r"belongs to another run .*recipe"):
        pipeline.run(teacher, ads, out, recipe.parse({**TIMED, "seed": 1}, "test"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and is no slimlmm run"):
        pipeline.run(teacher, ads, tmp_path / "mine", recipe.parse(RAW, "test"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_impossible_sizes_are_all_named_before_anything_runs(teacher, ads, tmp_path):
    raw = yaml.safe_load(yaml.safe_dump(RAW))
    raw["stages"][1]["rounds"][0]["sizes"] = {"text.block": 2, "vision.blocks": 99}
    with pytest.raises(UserError) as caught:
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw, "test"))
    assert "Did you mean 'text.blocks'" in str(caught.value)
    assert "vision.blocks=99" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_sizes_that_the_config_cannot_say_are_named_before_anything_runs(teacher, ads, tmp_path):
    raw = yaml.safe_load(yaml.safe_dump(RAW))
    raw["stages"][2]["rounds"] += [
        {"sizes": {"text.ffn": 33, "vision.ffn": 33}}
    ]  # grows again; no multiple of the width
    raw["stages"][4]["rounds"][0]["sizes"]["text.width"] = 37
    with pytest.raises(UserError) as caught:
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw, "test"))
    assert str(caught.value).count("stages.") == 3
    for part in (
        "text.ffn=33: must be between 1 and its present size 32",
        "vision.ffn=33",
        "text.width=37 cannot be said",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_refused_all_at_once_but_a_run_that_was_begun_goes_on(teacher, ads, finished, tmp_path):
    vain = {"shrink": 4.0, "order": ["width"], "row_visits": 9, "multiples": 8, "patience": 3, "spared_tasks": ["typo"]}
    settings = recipe.parse(RAW | vain, "test")
    with pytest.raises(UserError) as caught:
        pipeline.run(teacher, ads, tmp_path / "run", settings)
    for key in ("shrink: 4.0", "order: ", "row_visits: 9", "multiples: ", "patience: 3", "spared_tasks: ('typo',)"):
        assert f"{key}" in str(caught.value)
    assert "no row has the task typo. Known: " in str(caught.value)
    assert "sizes_by" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert recipe.read(finished[0] / "recipe.yaml").unheard() == []
    (tmp_path / "run").mkdir()
    shutil.copy(finished[0] / "run.json", tmp_path / "run")
    with pytest.raises(UserError, match="belongs to another run"):
        pipeline.run(teacher, ads, tmp_path / "run", settings)


def test_lossless_cuts_come_first_and_alone(teacher, ads, tmp_path):
    both = {"drop": ["dead_blocks"], "sizes": {"text.ffn": 32}}
    stages = [{"name": "a", "rounds": [both, {"sizes": {"text.ffn": 24}}]}, {**RAW["stages"][0], "name": "b"}]
    with pytest.raises(UserError) as caught:
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse({**RAW, "stages": stages}, "test"))
    for place in ("stages.a.rounds.0: drop comes before", "stages.b.rounds.0: drop comes before"):
        assert place in str(caught.value)
    assert str(caught.value).count("stages.") == 2
    assert not (tmp_path / "run").exists()


def test_a_model_that_loses_nothing_is_not_judged_again(finished, ads, tmp_path, monkeypatch):
    stages = [RAW["stages"][0], {"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}}]}]
    left = finished[0] / "stages" / "01-lossless.1" / "model"
    judged = []
    whole = rounds.evaluate
    monkeypatch.setattr(rounds, "evaluate", lambda *args, **more: judged.append(1) or whole(*args, **more))
    found = pipeline.run(left, ads, tmp_path / "run", recipe.parse({**RAW, "stages": stages}, "test"))
    assert len(judged) == 1
    first = found.rounds[0]
    assert not first.after
    known = json.loads((tmp_path / "run" / "teacher-validation.json").read_text())["summary"]["overall"]
    assert first.after_cut.model_dump() == known
    assert (left / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "stages" / "01-lossless.1" / "model" / "model.safetensors"
    ).read_bytes()


def test_blocks_are_counted_without_the_dead_ones_that_go_first():
    config, lossless = tiny_config("llava-clip-llama"), {"name": "l", "rounds": [{"drop": ["dead_blocks"]}]}
    stages = [lossless, {"name": "b", "rounds": [{"sizes": {"vision.blocks": 3, "text.blocks": 2}}]}]
    with pytest.raises(UserError, match=r"vision.blocks=3: the axis has 2 by then; give 1 to 2") as caught:
        staging.check_stages(config, recipe.parse({"stages": stages}, "test").stages)
    assert str(caught.value).count("stages.") == 1
    staging.check_stages(config, recipe.parse({"stages": stages[1:]}, "test").stages)


def test_shrink_alone_makes_a_schedule_that_reaches_it(teacher, ads, tmp_path):
    raw = {key: value for key, value in RAW.items() if key != "stages"} | {"shrink": 2.0, "row_visits": 300}
    found = pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw | {"curve_rows": 8}, "test"))
    assert found.ratios.parameters >= 2.0
    told = json.loads((tmp_path / "run" / "sizes.json").read_text())
    assert told["by"] == "importance"
    assert not (tmp_path / "run" / "sizes").exists()


def test_a_shrink_that_cannot_be_leaves_no_folder(teacher, ads, tmp_path):
    raw = {key: value for key, value in RAW.items() if key != "stages"} | {"shrink": 1e6}
    with pytest.raises(UserError, match="the smallest shape"):
        pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw, "test"))
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_asked_about_as_many_rows_as_the_recipe_says(teacher, ads, tmp_path):
    raw = {**RAW, "data": {**RAW["data"], "teacher_rows": 20}, "stages": [RAW["stages"][0], RAW["stages"][2]]}
    pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(raw, "test"))
    keys = [key for path in (tmp_path / "run" / "cache").glob("*.safetensors") for key in load_file(path)]
    assert len(keys) == 20


def test_a_run_goes_on_by_the_schedule_that_it_began_with(teacher, ads, tmp_path, monkeypatch):
    raw = {name: value for name, value in RAW.items() if name != "stages"}
    asked = recipe.parse({**raw, "shrink": 2, "sizes_by": "shares", "row_visits": 200}, "test")
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, out, asked, tell=Recorder(stop_at="round 3/"))
    planned = (out / "recipe.yaml").read_text()
    monkeypatch.setattr(staging, "FIRST_RATE", 5e-5)
    found = pipeline.run(teacher, ads, out, asked)
    assert (out / "recipe.yaml").read_text() == planned
    assert "which this version would plan otherwise" in " ".join(found.notes)
