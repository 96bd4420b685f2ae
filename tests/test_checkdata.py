"""Data checks before training: a spoilt copy of AdReview has every finding, each planted once and found where it was planted."""

import io
import json
import multiprocessing
import os
import shutil
import signal
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from slimlmm import checkpoint, data
from slimlmm.checkdata import check, duplicates, near, pictures
from slimlmm.checkdata.kinds import KINDS, Pad
from slimlmm.checkdata.look import Look, look
from slimlmm.checkdata.reading import read
from slimlmm.checkdata.record import CheckData
from slimlmm.checkdata.view import view
from slimlmm.errors import UserError
from slimlmm.pictures import MAX_PIXELS
from slimlmm.progress import Quiet
from slimlmm.teacher import weights_fingerprint
from spoiling import (
    NOISE,
    PLANTED,
    added,
    claimed,
    deep,
    encoded,
    moving,
    rows_of,
    spoil_pictures,
    spoil_rows,
    turned,
)
from test_cli import call

DOCS = Path(__file__).parents[1] / "docs" / "check-data.md"
LARGE = 1_000_000
FROM_MODEL = {kind for kind, one in KINDS.items() if one.check == "model"} | {
    *("no room", "no place", "unknown tokens", "special tokens")
}


@pytest.fixture(scope="module")
def spoilt(ads, tmp_path_factory):
    """A copy of AdReview with everything wrong that can be."""
    folder = tmp_path_factory.mktemp("spoilt") / "data"
    shutil.copytree(ads, folder)
    spoil_pictures(folder, folder.parent)
    spoil_rows(folder)
    return folder


@pytest.fixture(scope="module")
def found(spoilt):
    return check.check(spoilt, limits=check.Limits(max_pixels=LARGE, max_answer=30))


def findings(record):
    return {one.kind: one for one in record.findings}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FROM_MODEL])
def test_what_is_planted_is_found_and_nothing_else(found, kind):
    one = findings(found)[kind]
    wanted = PLANTED[kind]
    assert {example.id for example in one.examples} == set(wanted)
    assert one.severity == KINDS[kind].severity
    assert one.count == len(wanted)
    assert one.count < one.of


def test_examples_name_file_and_line(found, spoilt):
    example = findings(found)["identical row"].examples[0]
    text = Path(example.file).read_text().splitlines()[example.line - 1]
    assert example.file == str(spoilt / "train.jsonl")
    assert json.loads(text)["id"] == example.id == "again"
    assert "images" in findings(found)["leak train-test"].examples[0].note


def test_notes_say_what_is_particular(found):
    notes = {example.id: example.note for one in found.findings for example in one.examples}
    assert "SVG" in notes["svg"]
    assert "HTML" in notes["page"]
    assert "empty" in notes["empty"]
    assert "8000x7000" in notes["huge"]
    assert "CMYK" in notes["inks"]
    assert "orientation 6" in notes["turned"]
    assert "ZIP" in notes["archive"]
    assert "PHP" in notes["script"]
    assert "'no'" in notes["other-answer"]
    assert "'yes'" in notes["other-answer"]


def test_what_is_said_about_conversion_and_rotation_is_what_the_loader_does():
    hidden = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    buffer = io.BytesIO()
    hidden.save(buffer, "PNG")
    assert data.Row("a", buffer.getvalue(), "q", "a").open().getpixel((0, 0)) == (200, 10, 10)
    assert data.Row("a", turned(), "q", "a").open().size == (48, 64)
    assert np.asarray(data.Row("a", deep(), "q", "a").open()).max() == 255
    assert np.asarray(data.Row("a", deep(), "q", "a").open())[-1].min() == 255
    first = Image.open(io.BytesIO(moving())).convert("RGB")
    assert np.array_equal(np.asarray(data.Row("a", moving(), "q", "a").open()), np.asarray(first))


def test_the_limit_of_pixels_is_the_one_asked_for(spoilt):
    reading = read(spoilt, Pad(), Quiet())
    big = next(entry.row.image for entry in reading.entries if entry.row.id == "big")
    assert look(big, spoilt, LARGE).fault == "large picture"
    assert (
        look(big, spoilt, MAX_PIXELS).fault == "broken picture"
    )  # it is decoded, and what the header claims is not there


def test_clean_data_has_no_errors_and_no_warnings(ads):
    record = check.check(ads)
    assert (record.errors, record.warnings) == (0, 0), record.findings
    assert record.splits == {"train": 120, "validation": 40, "test": 40}
    assert record.pictures.count == record.pictures.decoded == 20
    splits = data.load(ads)
    assert record.fingerprint == data.fingerprint([*splits.train, *splits.validation, *splits.test])
    assert record.lengths.unit == "words"


def test_embedded_pictures_and_single_files_are_checked_alike(tmp_path):
    import datasets

    kinds = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    raw = [encoded(seed=1), encoded(seed=2)[:-60], encoded(seed=1)]
    records = {"image": [{"bytes": one, "path": None} for one in raw], "question": ["q"] * 3, "answer": ["a", "b", "c"]}
    datasets.Dataset.from_dict(records, features=kinds).to_parquet(tmp_path / "train.parquet")
    record = check.check(tmp_path / "train.parquet")
    assert record.pictures.count == 2
    assert findings(record)["broken picture"].examples[0].line == 2
    assert findings(record)["contradiction"].examples[0].line == 3


def test_several_processes_see_what_one_sees(ads, spoilt, monkeypatch):
    paths = [entry.row.image for entry in read(spoilt, Pad(), Quiet()).pictures] * 3
    one = partial(look, root=spoilt, max_pixels=LARGE)
    alone = list(pictures._looks(paths, one))
    monkeypatch.setattr(pictures, "PAYS", -1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert list(pictures._looks(paths, one)) == alone


def dies(source):
    """Look at a picture, unless this is not the first process."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return look(source, Path(), LARGE)


def test_a_worker_that_dies_is_told_and_nothing_waits_for_it(monkeypatch):
    monkeypatch.setattr(pictures, "PAYS", -1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UserError, match="a process that looks at pictures was ended from outside"):
        list(pictures._looks([encoded(seed=1)] * (2 * pictures.BUNDLE), dies))


def test_the_hash_forgives_scaling_and_compression_but_not_another_picture():
    def hashed(raw):
        return look(raw, Path(), MAX_PIXELS).hash

    smooth = Image.fromarray(NOISE).resize((9, 8)).resize((640, 480), Image.Resampling.BICUBIC)
    versions = []
    for size, quality in (((640, 480), 95), ((320, 240), 60)):
        buffer = io.BytesIO()
        smooth.resize(size).save(buffer, "JPEG", quality=quality)
        versions.append(hashed(buffer.getvalue()))
    assert (versions[0] ^ versions[1]).bit_count() <= 2
    assert (versions[0] ^ hashed(encoded(seed=2))).bit_count() > 10
    assert hashed(claimed(3, 1)) is None  # one colour: nothing to tell it by


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("chunk", [50, 4_000_000])
def test_nearest_hashes_are_those_of_brute_force(most, chunk, monkeypatch):
    monkeypatch.setattr(near, "CHUNK", chunk)
    rng = np.random.default_rng(most)
    roots = rng.integers(0, 2**64, 12, dtype=np.uint64)

    def drawn(count):
        hashes = roots[rng.integers(0, len(roots), count)]
        for _ in range(4):
            flip = np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
            hashes = np.where(rng.random(count) < 0.5, hashes ^ flip, hashes)
        return hashes

    queries, base = drawn(300), drawn(500)
    best, apart = near.nearest(queries, base, most)
    table = np.bitwise_count(queries[:, None] ^ base[None]).astype(int)
    wanted = np.where(table.min(1) <= most, table.min(1), 65)
    assert 0 < (wanted <= most).sum() < (300 if most < 5 else 301)
    assert np.array_equal(apart, wanted)
    hit = best >= 0
    assert np.array_equal(hit, wanted <= most)
    assert np.array_equal(table[np.flatnonzero(hit), best[hit]], wanted[hit])
    nothing = np.array([], dtype=np.uint64)
    assert near.nearest(queries, nothing, most)[0].tolist() == [-1] * 300
    assert len(near.nearest(nothing, base, most)[0]) == 0


def test_rows_are_compared_by_content_across_paths_and_splits(ads, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ads, folder)
    picture = rows_of(folder, "train")[0]["image"]
    shutil.copy(folder / picture, folder / "images" / "twin")
    first = {"id": "first", "image": picture, "question": "Is it  so?", "answer": "a  b"}
    second = {"id": "second", "image": "images/twin", "question": "Is it so?", "answer": "a b"}
    added(folder, "train", [first, second])
    added(folder, "train", [{**second, "id": "told otherwise", "system": "Be rude.", "answer": "d"}])
    added(folder, "test", [{**second, "id": "elsewhere"}, {**second, "id": "against", "answer": "c"}])
    record = findings(check.check(folder))
    assert [example.id for example in record["identical row"].examples] == ["second"]
    assert [example.id for example in record["contradiction"].examples] == ["against"]


def test_near_is_a_setting_and_equal_files_are_told_once(ads):
    reading = read(ads, Pad(), Quiet())
    looks = [Look(sha=bytes([number]), hash=None) for number in range(len(reading.pictures))]
    reading.entries = [entry for entry in reading.entries if entry.row.id.endswith("0-product")]
    first = {entry.split: entry.picture for entry in reversed(reading.entries)}
    looks[first["train"]] = Look(sha=b"one", hash=0b1111)
    looks[first["test"]] = Look(sha=b"two", hash=0b1000)

    def told(most):
        pad = Pad()
        duplicates.judge(reading, looks, most, pad, Quiet())
        return {one.kind: one.count for one in pad.findings()}

    assert told(2) == {}
    assert told(3) == {"near train-test": 1}
    looks[first["test"]] = Look(sha=b"one", hash=0b1111)
    equal = told(3)
    assert equal["leak train-test"] == 1
    assert "near train-test" not in equal


def test_the_verb_prints_the_whole_record_and_ends_with_0_on_clean_data(ads, teacher, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "check-data", ads, "--model", teacher, "--json", "--rows", "4")
    record = CheckData.model_validate_json(out)
    assert code == 0
    assert record.model.picture_tokens == (4, 4)
    assert record.model.fingerprint == weights_fingerprint(checkpoint.load(teacher).model)
    assert (record.seed, record.environment.versions["torch"]) == (0, version("torch"))
    assert record.model.features == 4
    assert record.model.self_kl < record.model.limit
    assert [one.kind for one in record.findings if one.severity != "info"] == []
    assert "looking at pictures" in err


def test_the_verb_ends_with_2_on_errors(spoilt, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "check-data", spoilt, "--max-pixels", LARGE, "--quiet")
    assert code == 2
    assert err == ""
    assert "leak train-test" in out
    assert "kinds of errors" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such file"),
        (["ADS", "--model", "./nowhere"], "no such folder"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, ads, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "check-data", *[ads if word == "ADS" else word for word in words])
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_help_has_an_example(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "check-data", "--help")
    assert code == 0
    assert "Example:" in out
    assert "slimlmm check-data" in out


def test_data_of_which_no_row_can_be_read_is_refused_with_the_first(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "question": "", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"line 1: empty question"):
        check.check(tmp_path)


def test_the_view_emphasises_what_is_trained_and_cannot_move_the_cursor(ads, teacher, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ads, folder)
    added(folder, "test", [{"id": "\x1b[2J[red]row[/red]", "image": "images/none"}])
    record = check.check(folder, str(teacher), check.Limits(rows=2))
    console = Console(width=200, force_terminal=True, file=io.StringIO(), color_system="standard")
    console.print(view(record), highlight=False)
    text = console.file.getvalue()
    assert "\\x1b[2J[red]row[/red]" in text
    assert "\x1b[2J" not in text
    trained = record.model.masks[0].trained
    assert f"\x1b[1;7m[{trained}]" in text.replace("\x1b[1;7m\x1b", "\x1b")


def test_the_page_names_every_finding_with_its_severity():
    text = DOCS.read_text()
    for name, kind in KINDS.items():
        assert f"| {kind.severity} | {name} |" in text
