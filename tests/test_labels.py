"""Train rows without answers get the teacher's; those that have one keep it, unless the recipe wants the teacher's for all."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from slimlmm import checkpoint, controls, data, labels, pipeline, recipe
from slimlmm.errors import UserError
from slimlmm.evaluate import evaluate
from slimlmm.labels import labelled
from slimlmm.progress import Quiet
from test_pipeline import RAW, Recorder


@pytest.fixture(scope="module")
def loaded(teacher):
    return checkpoint.load(teacher)


@pytest.fixture
def unlabelled(ads, tmp_path):
    """The AdReview folder with every second train answer taken out, in both forms of rows."""
    folder = tmp_path / "data"
    shutil.copytree(ads / "images", folder / "images")
    for split in ("train", "validation", "test"):
        lines = []
        for number, line in enumerate((ads / f"{split}.jsonl").read_text().splitlines()):
            row = json.loads(line)
            if split == "train" and number % 2:
                del row["answer"]
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def test_only_rows_without_an_answer_are_asked_and_get_what_evaluation_would_say(loaded, rows, tmp_path):
    mixed = [replace(row, answer="") if number % 2 else row for number, row in enumerate(rows.train[:40])]
    found, note = labelled(loaded, mixed, [], tmp_path / "answers.json", Quiet())
    limit = labels.answer_limit(loaded.processor, mixed[::2])
    said, longer = (
        {one.id: one.answer for one in evaluate(loaded.model, loaded.processor, mixed, max_new_tokens=most).predictions}
        for most in (limit, limit + 1)
    )
    wanted = {name: answer for name, answer in said.items() if answer == longer[name]}  # it has ended
    left = {row.id for row in mixed[1::2] if not wanted.get(row.id)}
    assert {row.id for row in mixed} - {row.id for row in found} == left
    assert (f"go on beyond {limit} tokens; their rows are left out" in note) is bool(left)
    for row in found:
        given = next(one.answer for one in mixed if one.id == row.id)
        assert " ".join(row.answer.split()) == (given or wanted[row.id])


def test_an_answer_belongs_to_its_system_turn(loaded, rows, tmp_path, monkeypatch):
    row = replace(rows.train[0], answer="")
    asked = [row, replace(row, system="Be short."), replace(row, question=row.question + "Be short."), rows.train[30]]
    said = []
    answers = labels._answers
    monkeypatch.setattr(
        labels, "_answers", lambda teacher, rows, *rest: said.extend(rows) or answers(teacher, rows, *rest)
    )
    labelled(loaded, asked, [], tmp_path / "answers.json", Quiet())
    assert len(said) == 3


def test_answers_are_asked_once(loaded, rows, tmp_path, monkeypatch):
    bare = [replace(row, answer="") for row in rows.train[:20]]
    first = labelled(loaded, [*bare, rows.train[30]], [], tmp_path / "answers.json", Quiet())
    monkeypatch.setattr(labels, "_answers", lambda *_: pytest.fail("the teacher ran"))
    assert labelled(loaded, [*bare, rows.train[30]], [], tmp_path / "answers.json", Quiet()) == first


def test_answers_may_be_as_long_as_those_of_the_other_splits_and_those_that_go_on_are_left_out(
    loaded, rows, tmp_path, monkeypatch
):
    bare = [replace(row, answer="") for row in rows.train[:6]]
    written = loaded.processor.tokenizer(["one two", "three four five six seven"], add_special_tokens=False).input_ids
    limits, end = [], loaded.processor.tokenizer.eos_token_id

    def generated(_model, _processor, part, settings, _pictures):
        limits.append(settings["max_new_tokens"])
        texts = [[*(written[0] if row is bare[0] else written[1]), end] for row in part]
        whole = [ids + [end] * 99 for ids in texts]
        return torch.tensor([ids[: settings["max_new_tokens"]] for ids in whole])

    monkeypatch.setattr(labels, "generated", generated)
    long = replace(rows.test[0], answer="three four five six seven")
    found, note = labelled(loaded, bare, [long], tmp_path / "a.json", Quiet())
    assert ({one.answer for one in found}, note) == ({"one two", "three four five six seven"}, "")
    short = replace(long, answer="one")
    found, note = labelled(loaded, bare, [short], tmp_path / "b.json", Quiet())
    assert limits == [len(written[1]) + 4, len(loaded.processor.tokenizer("one").input_ids) + 4]
    assert len(written[0]) < limits[1] <= len(written[1])
    assert [one.answer for one in found] == ["one two"]
    assert (
        note == f"0 of 6 answers of the teacher are empty, 5 go on beyond {limits[1]} tokens; their rows are left out"
    )


def test_all_answers_may_come_from_the_teacher(loaded, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_answers", lambda _, part, limit: [f"answer {row.id}" for row in part])
    found, _ = labelled(loaded, rows.train[:8], [], tmp_path / "answers.json", Quiet(), every=True)
    assert [row.answer for row in found] == [f"answer {row.id}" for row in rows.train[:8]]


def test_a_teacher_that_says_nothing_is_refused(loaded, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_answers", lambda _, part, limit: [""] * len(part))
    with pytest.raises(UserError, match="nothing to learn"):
        labelled(
            loaded, [replace(row, answer="") for row in rows.train[:3]], rows.test, tmp_path / "answers.json", Quiet()
        )


def test_rows_without_answers_are_broken_unless_the_recipe_says_who_gives_them(unlabelled):
    with pytest.raises(UserError, match=r"60 of 120 rows are broken.*data.answers: filled"):
        data.load(unlabelled)
    found = data.load(unlabelled, unlabelled=True)
    assert sum(not row.answer for row in found.train) == 60
    (unlabelled / "validation.jsonl").unlink()
    again = data.load(unlabelled, unlabelled=True)
    assert all(row.answer for row in again.validation)


def test_a_conversation_may_end_with_the_question():
    record = {"messages": [{"role": "user", "content": "<image>What?"}], "images": ["a.png"]}
    assert data.parse(record, 0, unlabelled=True).answer == ""
    with pytest.raises(ValueError, match="one user and one assistant turn"):
        data.parse(record, 0)


def test_a_run_on_rows_without_answers_is_taken_up_again(teacher, unlabelled, tmp_path):
    raw = yaml.safe_load(yaml.safe_dump({**RAW, "stages": [RAW["stages"][0], RAW["stages"][2]]}))
    raw["data"]["answers"] = "filled"
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, unlabelled, out, recipe.parse(raw, "test"), tell=Recorder(stop_at="self-check"))
    kept = json.loads((out / "teacher-answers.json").read_text())
    bare = [row for row in data.load(unlabelled, unlabelled=True).train if not row.answer]
    assert len(kept) == len({(row.picture_bytes(), row.question) for row in bare})
    found = pipeline.run(teacher, unlabelled, out, recipe.parse(raw, "test"))
    assert found.data.rows["train"] == 120
    assert found.rounds[-1].row_visits > 0


def test_runs_that_share_a_cache_share_the_answers_and_so_does_a_control(teacher, unlabelled, tmp_path, monkeypatch):
    raw = yaml.safe_load(yaml.safe_dump({**RAW, "stages": [RAW["stages"][0], RAW["stages"][2]]}))
    raw["data"] |= {"answers": "filled", "teacher_rows": 40}
    shared = tmp_path / "cache"
    first = pipeline.run(teacher, unlabelled, tmp_path / "one", recipe.parse(raw, "test"), cache=shared)
    assert len(list(shared.glob("labels-*.json"))) == 1
    monkeypatch.setattr(labels, "_answers", lambda *_: pytest.fail("the teacher was asked again"))
    pipeline.run(teacher, unlabelled, tmp_path / "two", recipe.parse(raw, "test"), cache=shared)
    done = controls.untrained(
        "random-init", tmp_path / "two", teacher, unlabelled, tmp_path / "three", tell=Quiet(), cache=shared
    )
    assert done.row_visits == pytest.approx(first.totals.row_visits, rel=0.5)
