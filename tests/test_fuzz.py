"""A few spoilt inputs of every parser, and each that once broke one; `benchmarks/fuzz.py` reads thousands of the same."""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from pydantic import ValidationError

import fuzzing
from fuzzing import TARGETS, HangError, inputs, limited, outcome
from slimlmm import checkpoint, data, journal, recipe, runfolder, saving, studies, tables
from slimlmm.errors import UserError
from slimlmm.results import Results
from slimlmm.serving.settings import Source
from slimlmm.settings import read_yaml

EXAMPLES = 20


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name.replace(" ", "-"))
def test_whatever_is_read_ends_in_a_value_or_a_refusal(target):
    with tempfile.TemporaryDirectory() as folder:
        seeds, read = target.made(Path(folder))
        assert outcome(read, seeds[0]) == ("accepted", "")

        @hypothesis.settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(inputs(seeds, target.codec))
        def check(raw):
            how, said = outcome(read, raw)
            assert how != "found", said

        check()


def test_what_hangs_or_breaks_is_found():
    def wait(_):
        while True:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzzing, "SECONDS", 0.05)
        assert outcome(wait, b"") == ("found", "HangError at test_fuzz.py:wait: more than 0.05 s")
    assert outcome(lambda raw: raw[1], b"")[1].startswith("IndexError")
    with pytest.raises(HangError), limited(0.01):
        wait(b"")


USER, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": ["What?", "It."]}, "no list of turns"),
        ({"messages": [None]}, "no list of turns"),
        ({"messages": "What?"}, "no list of turns"),
        ({"messages": [{"role": "user"}, SAID]}, "neither text nor a list"),
        ({"messages": [USER, {"role": "assistant", "content": 3.5}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": ["What?"]}, SAID]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, SAID]}, "empty question"),
        ({"messages": [{"role": ["x" * 9999]}]}, r"not \[\['x+$"),
        ({"messages": [USER, SAID], "images": "a.png"}, "images are no list"),
        ({"messages": [USER, SAID], "images": [["a.png"]]}, "no picture"),
    ],
)
def test_turns_of_any_type_are_a_broken_row(changes, reason):
    with pytest.raises(ValueError, match=reason):
        data.parse({"image": "a.png", **changes}, 0)


def test_a_name_that_is_too_long_for_a_file_is_a_missing_picture(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a" * 3000, "question": "q", "answer": "a"}))
    with pytest.raises(UserError, match=r"missing picture.*too long"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize(
    "text", ["null", "\ufeff null\n", '{"a": 1}\nnull\n', '{"a": 1} null', "[1] null", '{"a": 1}null', "1\n\nnull"]
)
def test_a_null_for_a_row_is_refused_before_it_ends_the_process(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"row \d is (null|1), not an object|row 1: Extra data"):
        data.load(tmp_path)


def test_a_null_inside_of_a_row_is_none_of_these(tmp_path):
    rows = [{"image": None, "question": "} null", "answer": "x\nnull", "more": [None, {"a": None}]}] * 2
    for name, text in {"a.jsonl": "\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows, indent=1)}.items():
        (tmp_path / name).write_text(text)
        found = list(tables.records_of(tmp_path / name, tmp_path))
        assert [one["question"] for one in found] == ["} null"] * 2
    (tmp_path / "deep.json").write_text('"x" null' + "[" * 100_000)
    with pytest.raises(UserError):
        list(tables.records_of(tmp_path / "deep.json", tmp_path))


def test_a_row_that_is_no_utf8_is_named(tmp_path):
    good = b'{"image": "a.png", "question": "q", "answer": "a"}\n'
    (tmp_path / "train.jsonl").write_bytes(good * 2 + good.replace(b'"q"', b'"\xc3\xa9\xa9\xa9"'))
    with pytest.raises(UserError, match=r"train\.jsonl: row 3 holds text that is no UTF-8"):
        data.load(tmp_path)


BOMB = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 2020-99-99", "month must be in"),
        ("a: " + "1" * 5000, "4300 digits"),
        ("[" * 5000, "recursion"),
        ('a: "\\ud800"', "surrogates"),
        ("a: &a [*a]", "stand for more than 100,000"),
        (BOMB, "stand for more than 100,000"),
        ("a: \x00", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
    ],
)
def test_yaml_that_python_stumbles_over_is_refused(tmp_path, text, reason):
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8"))
    with limited(10), pytest.raises(UserError, match=reason):
        read_yaml(path, "recipe")
    path.write_text("a: &a {b: 1}\nc: [*a, *a]\nd: {<<: *a}")
    assert read_yaml(path, "recipe") == {"a": {"b": 1}, "c": [{"b": 1}] * 2, "d": {"b": 1}}


def test_groups_of_any_type_are_refused(tmp_path):
    for groups in (7, "x", {"a": 1}, [None]):
        with pytest.raises(UserError, match="groups"):
            studies.parse({"model": "m", "data": "d", "groups": groups}, "s.yaml")


@pytest.mark.parametrize("text", ["null", "[]", "{", "7", "\xff"])
def test_a_generation_config_that_cannot_be_understood_is_refused(teacher, tmp_path, text):
    folder = shutil.copytree(teacher, tmp_path / "model")
    config = checkpoint.load_config(folder)
    (folder / "generation_config.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be"):
        checkpoint.load_processor(folder, config)


def test_results_whose_rounds_contradict_themselves_are_refused(tmp_path):
    told = json.loads(fuzzing._result_seeds()[0])
    told["rounds"][1]["after"]["text.other"] = 3
    (tmp_path / "results.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"rounds\.1: .*text\.other"):
        Results.load(tmp_path / "results.json")


def test_files_of_a_run_that_were_changed_are_named_with_what_to_do(tmp_path):
    run = tmp_path / "run"
    runfolder.claim(run, {"recipe": "a"})
    for text in ("{", "[]", "\x00", "[" * 100_000):
        (run / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json is not what was written there .*remove it"):
            runfolder.claim(run, {"recipe": "a"})
    (run / "parts" / "0").mkdir(parents=True)
    (run / "parts" / "0" / "part.json").write_text('{"cut_score": {}}')
    with pytest.raises(UserError, match=r"cut_score\.n: Field required"):
        journal.Journal(run).taken_up(0)
    (run / "whole.json").write_text("[" * 100_000)
    assert saving._fault(run, "this") == "its whole.json cannot be read"
    assert not journal.is_whole(run / "whole.json", run)


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b"])
def test_names_that_no_file_can_have_are_those_of_missing_files(name, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1 of 1 files that .* names are missing"):
        checkpoint.open_weights(folder)
    with pytest.raises(ValidationError, match=r"has no config\.json"):
        Source(folder=name)


def test_an_index_nested_too_deep_is_refused(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no index of weights"):
        checkpoint.open_weights(folder)


def test_a_part_whose_model_type_is_no_text_is_refused(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    told["vision_config"]["model_type"] = ["a", "b"]
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"model_type|cannot be"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("told", [{"recipe": 7}, {"rounds": True}, {"train": -3}, {"rounds": [["a"]]}])
def test_arms_of_any_type_are_refused(told):
    raw = {"model": "m", "data": "d", "base": {"shrink": 4}, "arms": {"slow": told}}
    with pytest.raises(UserError, match=r"arms\.slow"):
        studies.parse(raw, "s.yaml")


@pytest.mark.parametrize("raw", [b"PK\x03\x04 no archive", b"\x1f\x8b\x08 no archive", b"BZh9 no archive", b"zip"])
def test_a_packed_table_is_not_unpacked(raw, tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(raw)
    if raw == b"zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.csv", "question,answer\na,b\n")
    with pytest.raises(UserError, match=r"is packed \(.*Unpack it"):
        list(tables.records_of(path, tmp_path))


def test_groups_of_arms_that_are_no_names_are_refused():
    raw = {"model": "m", "data": "d", "base": {"shrink": 4}, "arms": {"slow": {"train": {"steps": 2}}}}
    group = {"title": "t", "arms": [[{}], "slow"], "reference": "slow", "x": {"slow": 2}}
    with pytest.raises(UserError, match=r"groups\.0"):
        studies.parse(raw | {"groups": [group]}, "s.yaml")


def test_a_panic_of_the_tokenizers_library_is_a_processor_that_cannot_be_built(teacher, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*_, **__):
        raise PanicException("range end index 14 out of range")

    monkeypatch.setattr(checkpoint._PROCESSORS, "from_pretrained", panics)
    with pytest.raises(UserError, match="PanicException: range end index 14"):
        checkpoint.load_processor(teacher, checkpoint.load_config(teacher))


def test_results_without_a_total_are_refused(tmp_path):
    told = json.loads(fuzzing._result_seeds()[0])
    del told["student"]["parameters"]["total"]
    (tmp_path / "results.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"student\.parameters: .*has no total above 0"):
        Results.load(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("text", "number"), [('[null, {"a": 1}]', 1), ('[{"a": null},\n null]', 2), ("\ufeff [ {}, null]", 2)]
)
def test_a_null_row_in_a_list_is_refused_by_its_number(text, number, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"row {number} is null"):
        list(tables.records_of(path, tmp_path))


@hypothesis.given(st.text(max_size=40))
@hypothesis.settings(deadline=None)
def test_any_short_text_is_a_recipe_or_a_refusal(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(text, encoding="utf-8")
        how, said = outcome(lambda _: recipe.read(path), b"")
        assert how != "found", said
