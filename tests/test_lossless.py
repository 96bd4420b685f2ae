"""Cuts that lose nothing: where the vocabulary cannot be trimmed the rest goes on, and a recipe that asks for it is refused."""

import pytest

from slimlmm import checkpoint, lossless, pipeline, planning, recipe, studies, study
from slimlmm.collate import texts_of
from slimlmm.errors import UserError
from test_pipeline import RAW, Recorder
from tiny import tiny, whole_llava

SMALL = {key: value for key, value in RAW.items() if key != "stages"}
REASON = "only byte-level or byte-fallback BPE tokenizers can be trimmed, this one is BPE with no bytes to fall back to"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny LLaVA whose vocabulary cannot be trimmed."""
    place = tmp_path_factory.mktemp("models") / "whole"
    checkpoint.save(*whole_llava(), place)
    return place


def test_sizes_are_those_of_what_is_dropped(rows):
    model, processor = tiny("llava-clip-llama")
    texts = texts_of(processor, rows.train)
    found = lossless.lossless_of(model.config, model.generation_config, processor, texts)
    assert found.drops == ("unused_tokens", "dead_blocks")
    assert found.sizes(["dead_blocks"]) == found.blocks == {"vision.blocks": 2}
    assert found.sizes() == {"vocab": len(found.tokens), "vision.blocks": 2}
    assert found.notes == ()
    model, processor = whole_llava()
    found = lossless.lossless_of(model.config, model.generation_config, processor, texts)
    assert (found.tokens, found.drops, found.sizes()) == (None, (), {})
    assert found.notes == (f"the vocabulary stays whole: {REASON}",)


def test_the_default_schedule_leaves_out_what_cannot_go_and_says_so(whole, ads, tmp_path):
    raw = SMALL | {"shrink": 2.0, "row_visits": 300, "sizes_by": "shares"}
    found = pipeline.run(whole, ads, tmp_path / "run", recipe.parse(raw, "test"), tell=(heard := Recorder()))
    assert found.ratios.parameters >= 2
    assert "lossless" not in {one.stage for one in found.rounds}
    assert found.notes == (f"the vocabulary stays whole: {REASON}",)
    assert found.notes[0] in heard.said
    assert REASON in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_plan_promises_no_trim_that_the_run_refuses(with_rows, whole, ads, tmp_path):
    source = ads if with_rows else None
    found = planning.plan(str(whole), {"--shrink": 2.0}, source=source, out=tmp_path / "r.yaml", by="shares")
    assert f"the vocabulary stays whole: {REASON}" in found["notes"]
    assert not [note for note in found["notes"] if "compress trims" in note]
    assert not any(turn.drop for stage in recipe.read(tmp_path / "r.yaml").stages for turn in stage.rounds)
    (axis,) = (axis for axis in found["axes"] if axis["axis"] == "vocab")
    assert axis["planned"] == axis["now"]


def test_a_recipe_that_drops_tokens_is_refused_before_anything_runs(whole, ads, tmp_path):
    raw = SMALL | {"stages": [RAW["stages"][0], {"name": "x", "rounds": [{"sizes": {"text.ffn": 99}}]}]}
    with pytest.raises(UserError) as caught:
        pipeline.run(whole, ads, tmp_path / "run", recipe.parse(raw, "test"))
    assert f"stages.lossless.rounds.0.drop: unused_tokens: {REASON}; take unused_tokens out" in str(caught.value)
    assert "text.ffn=99" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_study_asks_about_tokens_only_where_an_arm_drops_some(whole, ads):
    inner = {"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}, "train": {"steps": 2}}]}
    arms = {"a": {"rounds": {"repair": []}}, "b": {"recipe": {"stages": [RAW["stages"][0], inner]}}}
    raw = {"model": str(whole), "data": str(ads), "base": {"stages": [inner]}, "seeds": [0], "arms": arms}
    planned = study.plan(studies.parse(raw, "s"))
    assert planned.arms["a"].reason is None
    assert f"unused_tokens: {REASON}" in planned.arms["b"].reason


def test_sizes_are_chosen_by_trying_where_the_vocabulary_stays(whole, ads, tmp_path):
    raw = SMALL | {"shrink": 1.5, "row_visits": 100, "sizes_by": "importance", "curve_rows": 8}
    found = pipeline.run(whole, ads, tmp_path / "run", recipe.parse(raw, "test"))
    assert found.ratios.parameters >= 1.5
