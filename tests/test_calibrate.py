"""`slimlmm calibrate` on a real student and teacher: what it writes against what the threshold does, counted row by row."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from slimlmm import checkpoint, data
from slimlmm import evaluate as evaluation
from slimlmm.errors import UserError
from slimlmm.pictures import PictureSettings
from slimlmm.progress import Quiet
from slimlmm.serving import calibrate, escalation
from slimlmm.serving.answering import Answerer
from slimlmm.teacher import weights_fingerprint
from test_cli import call
from test_collate import templated
from tiny import tiny


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student that answers otherwise than the teacher."""
    folder = tmp_path_factory.mktemp("models") / "student"
    checkpoint.save(*tiny("llava-dinov2-llama", seed=7), folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def as_long():
    """Let answers have six tokens whatever the references: models of random weights never end theirs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, calibrate):
            patch.setattr(module, "answer_limit", lambda *_: 6)
        yield


@pytest.fixture(scope="module")
def source(student, teacher, ads, tmp_path_factory):
    """AdReview with the student's own answers to a third of the rows, and the teacher's to the rest."""
    rows, folder = data.load(ads), tmp_path_factory.mktemp("answered")
    models = [checkpoint.load(one) for one in (student, teacher)]
    for split in ("validation", "test"):
        part = getattr(rows, split)
        said = [evaluation.evaluate(one.model, one.processor, part).answers for one in models]
        lines = [
            {
                "id": row.id,
                "image": str(row.image),
                "question": row.question,
                "answer": said[number % 3 > 0][number] or "none",
            }
            for number, row in enumerate(part)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("asked", [("--share", "0.4"), ("--within", "20", "--kind", "sum")])
def test_what_a_threshold_does_is_what_is_counted_row_by_row(
    asked, student, teacher, source, ads, tmp_path, monkeypatch, capsys
):
    out, words = tmp_path / "new" / "escalation.json", ("--teacher", teacher, "--data", source, "--pictures-from", ads)
    code, printed, err = call(monkeypatch, capsys, "calibrate", student, *words, *asked, "--out", out, "--json")
    assert code == 0, err
    found, told = escalation.read(out), json.loads(printed)
    assert told["escalation"] == found.model_dump()
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    mine, theirs = (checkpoint.load(one) for one in (student, teacher))
    rows = data.load(source, allowed=PictureSettings(folders=(str(ads),)))
    for split, counted in told["splits"].items():
        part = getattr(rows, split)
        answers, logprobs = calibrate.graded(Answerer(mine.model, mine.processor), part, Quiet(), "")
        other = evaluation.evaluate(theirs.model, theirs.processor, part)
        asks = [found.confidence(values) < found.threshold for values in logprobs]
        right = [there if ask else here for ask, here, there in zip(asks, answers.correct, other.correct, strict=True)]
        assert 0 < answers.accuracy < other.accuracy < 1
        assert (counted["rows"], counted["share"]) == (len(part), sum(asks) / len(part))
        assert (counted["student"], counted["teacher"]) == (answers.accuracy, other.accuracy)
        assert counted["together"] == sum(right) / len(right)
        if split == "validation":
            assert (found.share, found.accuracy) == (counted["share"], counted["together"])
            assert found.share <= 0.4 if asked[0] == "--share" else found.accuracy >= other.accuracy - 0.2
            assert found.rows_fingerprint == data.fingerprint(part)
    assert found.student_fingerprint == weights_fingerprint(mine.model)
    assert found.teacher_fingerprint == weights_fingerprint(theirs.model)
    assert found.environment["versions"]["torch"] == version("torch")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((), "give either --share"),
        (("--share", "0.4", "--within", "1"), "give either --share"),
        (("--share", "0.4", "--kind", "most"), "--kind 'most': known: least, mean, sum, first"),
        (("--within", "-90"), "no threshold keeps"),
    ],
)
def test_what_cannot_be_fitted_is_refused(asked, message, student, teacher, source, ads, tmp_path, monkeypatch, capsys):
    words = ("--teacher", teacher, "--data", source, "--pictures-from", ads, "--out", tmp_path / "escalation.json")
    code, _, err = call(monkeypatch, capsys, "calibrate", student, *words, *asked)
    assert code == 2
    assert message in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_system_turns_are_heard_or_refused(ads):
    model, processor = tiny("llava-dinov2-llama")
    part = [replace(row, system="Be short.") for row in data.load(ads).test[:4]]
    said = []
    answerer = Answerer(model, templated(processor, "text"))
    prompt = answerer.prompt
    answerer.prompt = lambda ask: said.append(prompt(ask)) or said[-1]
    calibrate.graded(answerer, part, Quiet(), "student")
    assert sorted(said) == sorted(answerer.prompter.prompt(*row.asked) for row in part)
    with pytest.raises(UserError, match="no place for a system turn"):
        calibrate.graded(Answerer(model, templated(processor, "left out")), part, Quiet(), "student")
