"""Labels of people: all of a file or nothing, every problem with its line, the same file twice changes nothing."""

import json

import pytest
from sqlalchemy import select

from monitored import BEGIN, answer, fill
from slimlmm.errors import UserError
from slimlmm.monitoring import audits
from slimlmm.monitoring.monitor import Shown, asked, monitor
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import ANSWERS, AUDITS, opened


@pytest.fixture
def store(tmp_path):
    found = opened(str(tmp_path / "store.sqlite"))
    fill(found, {ANSWERS: [answer(str(n), BEGIN + n) for n in range(1200)]})
    return found


def load(store, path):
    with asked(store) as connection:
        return audits.load(path, connection)


def rows(store):
    with store.connect() as connection:
        asked_for = select(AUDITS.c.answer_id, AUDITS.c.auditor, AUDITS.c.correct, AUDITS.c.label)
        return sorted(tuple(row) for row in connection.execute(asked_for))


def test_csv_and_jsonl_say_the_same(store, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text('answer_id,correct,label,auditor\n1,true,"red, or\nblue",ann\n2,No,,ann\n3,1,x,\n')
    assert load(store, path) == audits.Imported(added=3, changed=0)
    wanted = [("1", "ann", True, "red, or\nblue"), ("2", "ann", False, None), ("3", "unnamed", True, "x")]
    assert rows(store) == wanted
    lines = [{"answer_id": "1", "correct": True, "label": "red, or\nblue", "auditor": "ann"}]
    lines += [{"answer_id": 2, "correct": False, "auditor": "ann"}, {"answer_id": "3", "correct": 1, "label": "x"}]
    other = tmp_path / "labels.jsonl"
    other.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert load(store, other) == audits.Imported(added=0, changed=3)
    assert rows(store) == wanted
    other.write_text('{"answer_id": "1", "correct": false, "auditor": "ann"}')
    load(store, other)
    assert rows(store)[0] == ("1", "ann", False, None)


def test_all_problems_are_told_with_their_lines_and_nothing_is_written(store, tmp_path):
    path = tmp_path / "labels.jsonl"
    good = '{"answer_id": "1", "correct": true}'
    path.write_text(
        "\n".join(
            [
                good,
                "{",
                "[]",
                '{"answer_id": "2", "correct": "maybe"}',
                '{"correct": true}',
                good,
                '{"answer_id": "4", "corect": 1}',
            ]
        )
        + '\n{"answer_id": "gone", "correct": true}\n'
    )
    with pytest.raises(UserError) as error:
        load(store, path)
    told = str(error.value)
    for line, why in (
        (2, "is not JSON"),
        (3, "is not an object"),
        (4, "'maybe'; say true or false"),
        (5, "answer_id is missing"),
    ):
        assert f"line {line}: " in told
        assert why in told
    assert "line 6: '1' by 'unnamed' was labelled on line 1" in told
    assert "line 7: unknown corect" in told
    assert "line 8: the store has no answer 'gone'" in told
    assert "7 problem(s)" in told
    assert "1 of 3 answers are not in the store" in told
    assert rows(store) == []


def test_many_unknown_answers_are_counted(store, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("answer_id,correct\n" + "".join(f"{n},yes\n" for n in range(1000, 2400)))
    with pytest.raises(UserError, match="1200 of 1400 answers are not in the store") as error:
        load(store, path)
    assert "and 1180 more" in str(error.value)
    assert "line 202: the store has no answer '1200'" in str(error.value)
    assert rows(store) == []
    path.write_text("answer_id,correct\n" + "".join(f"{n},yes\n" for n in range(1200)))
    assert load(store, path).added == len(rows(store)) == 1200


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("labels.csv", "id,correct\n1,true\n", "names no answer_id"),
        ("labels.csv", "", "names no answer_id and no correct"),
        ("labels.csv", "answer_id,correct\n", "holds no label"),
        ("labels.csv", "answer_id,correct\n1,true,x\n", "line 2: more cells"),
        ("labels.csv", 'answer_id,correct\n1,"true\n', "line"),
        ("labels.jsonl", "\n", "holds no label"),
        ("labels.txt", "1", "neither .csv nor .jsonl"),
    ],
)
def test_files_that_are_none(store, tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        load(store, tmp_path / name)


def test_a_file_that_is_not_there_or_not_text(store, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load(store, tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(store, tmp_path / "bytes.csv")


def test_the_majority_counts_and_a_tie_does_not(store, tmp_path):
    path = tmp_path / "labels.csv"
    votes = [("1", 1, 0, 1), ("2", 0, 0, 1), ("3", 1, 0), ("4", 1)]
    lines = [f"{name},{vote},,auditor {place}" for name, *given in votes for place, vote in enumerate(given)]
    path.write_text("answer_id,correct,label,auditor\n" + "\n".join(lines))
    load(store, path)
    accuracy = monitor(store, Monitoring(), Shown()).total.accuracy
    assert (accuracy.count, accuracy.n) == (2, 3)
