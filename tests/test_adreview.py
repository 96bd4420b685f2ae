"""AdReview: the generator is pure, answers follow from what is shown, held-out pictures stay unseen."""

import hashlib
import json
import platform
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import PIL
import pytest
from PIL import Image

from slimlmm import adreview
from slimlmm.adreview import build, catalogue, facts, pictures
from slimlmm.adreview.answers import answers
from slimlmm.adreview.paint import SIDE, ground_for_text, ink_for, luminance, overlap

# Provenance: write(train=120, val=30, test=57, seed=0), generator version 2, Pillow 13.0.0 on x86-64 Linux.
# The rows are the same everywhere; the pictures follow the FreeType, libwebp and libjpeg inside Pillow.
GOLDEN_ROWS = "12bbcfedb75adbf16edefd7afa03b521b230fa1c1bcba41de179038be4b984f0"
GOLDEN_ALL = "ecd84dba50974b9a6024e2caf07020eb992d8201ec96ab0edb236617143e1750"
GOLDEN_PILLOW = "13.0.0"


def sample(split="train", n=1500, seed=0):
    return [facts.draw(i, split, seed) for i in range(n)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adreview")
    return folder, adreview.write(folder, train=120, val=30, test=57, seed=0)


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_golden_hash(written):
    folder, summary = written
    assert summary.rows_sha256 == GOLDEN_ROWS
    if (PIL.__version__, sys.platform, platform.machine()) == (GOLDEN_PILLOW, "linux", "x86_64"):
        assert summary.sha256 == GOLDEN_ALL
    assert json.loads((folder / "version.json").read_text())["sha256"] == summary.sha256


def test_hash_covers_every_file(written):
    folder, summary = written
    digest = hashlib.sha256()
    for split in facts.SPLITS:
        for picture in sorted((folder / "images" / split).iterdir()):
            digest.update(picture.read_bytes())
        digest.update((folder / f"{split}.jsonl").read_bytes())
    assert digest.hexdigest() == summary.sha256


def test_same_arguments_same_bytes_other_seed_other_bytes(written, tmp_path):
    folder, summary = written
    again = adreview.write(tmp_path / "again", train=120, val=30, test=57, seed=0)
    assert again == summary
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()
    assert adreview.write(tmp_path / "other", train=120, val=30, test=57, seed=1).sha256 != summary.sha256


def test_counts_are_exact_and_rows_complete(written):
    folder, summary = written
    assert summary.rows == {"train": 120, "validation": 30, "test": 57}
    for split, count in summary.rows.items():
        found = read(folder, split)
        assert len(found) == count == len({row["id"] for row in found})
        for row in found:
            with Image.open(folder / row["image"]) as picture:
                assert picture.size == (SIDE, SIDE)
                assert picture.mode == "RGB"
            assert ("held_out" in row) == (split == "test")
            assert row["question"] in catalogue.QUESTIONS[row["task"]]
            assert row["answer"] == row["answer"].lower().strip() != ""
    assert len(list((folder / "images").rglob("*.jpg"))) == sum(summary.creatives.values())


def test_creative_alone_equals_creative_in_the_set(written):
    folder, _ = written
    picture, rows = adreview.creative(3, "test", seed=0)
    assert build.jpeg(picture) == (folder / "images/test/test-000003.jpg").read_bytes()
    stored = [row for row in read(folder, "test") if row["id"].startswith("test-000003")]
    assert [{k: r[k] for k in ("id", "question", "answer", "task")} for r in stored] == rows
    assert sorted(r["task"] for r in rows) == sorted(adreview.TASKS)


def test_held_out_pictures_never_occur_outside_the_test_split():
    seen = {file for split in ("train", "validation") for f in sample(split) for file in (f.picture, *f.clutter)}
    entries = pictures.index()["products"].values()
    held = {entry["files"][entry["held_out"]] for entry in entries}
    assert len(held) == len(facts.CATEGORY_OF)
    assert not seen & held
    test = sample("test")
    assert all(f.held_out == (f.picture in held) for f in test)
    assert 0.31 < sum(f.held_out for f in test) / len(test) < 0.39


def test_held_out_picture_is_a_different_file_with_different_content():
    for entry in pictures.index()["products"].values():
        digests = [
            hashlib.sha256((pictures.ASSETS / "pictures" / f).read_bytes()).digest() for f in entry["files"].values()
        ]
        assert len(set(digests)) == len(digests) >= 4


def test_compositions_of_the_splits_are_disjoint():
    keys = [{f.key for f in sample(split)} for split in facts.SPLITS]
    assert [len(k) for k in keys] == [1500] * 3
    assert len(set.union(*keys)) == 4500


def oracle_verdict(told):
    """Derive the verdict from the other nine answers alone, as a reviewer would."""
    restricted, claim = told["restricted"], told["claim"].split(":")[0]
    adults = re.fullmatch(r"adults only: (\w+)", restricted)
    findings = [
        (told["person"] == "child" and adults is not None, f"reject: minor with {told['category']}"),
        (claim in ("cure", "superlative", "guarantee"), f"reject: {claim} claim"),
        (told["match"] != "yes", "reject: " + told["match"].removeprefix("no: ")),
        (told["brand"] == "none", "revise: no brand"),
        (told["price"] == "none", "revise: no price"),
        (adults is not None, "approve: adults only"),
    ]
    return next((answer for applies, answer in findings if applies), "approve")


def test_verdict_and_match_follow_from_the_other_answers():
    words = {word: category for category, group in catalogue.SLOGAN_WORDS.items() for word in group}
    for f in sample(n=3000):
        told = answers(f)
        assert told["verdict"] == oracle_verdict(told)
        spoken = [words[word] for word in told["slogan"].split() if word in words]
        assert len(spoken) == 1
        assert told["match"] == ("yes" if spoken == [told["category"]] else f"no: slogan says {spoken[0]}")
        assert told["product"] in catalogue.PRODUCTS[told["category"]]


def test_no_constant_answer_gets_far():
    counts = {task: Counter() for task in adreview.TASKS}
    for split in facts.SPLITS:
        for f in sample(split, 2000):
            for task, answer in answers(f).items():
                counts[task][answer] += 1
    for task, found in counts.items():
        assert found.most_common(1)[0][1] / found.total() < 0.38, (task, found.most_common(3))


def test_reading_is_open():
    train, test = sample("train", 1500), sample("test", 300)
    for field, share in (("slogan", 0.9), ("brand", 0.6)):
        seen = {getattr(f, field) for f in train}
        shown = [getattr(f, field) for f in test if getattr(f, field)]
        assert sum(value not in seen for value in shown) / len(shown) > share, field


@pytest.mark.parametrize("split", ["train", "test"])
def test_texts_are_inside_apart_uncovered_and_large(split):
    for i in range(150):
        shown, canvas = build.canvas(i, split)
        expected = (
            {"slogan"}
            | {n for n in ("brand", "price") if getattr(shown, n)}
            | ({"claim"} if shown.claim_text else set())
        )
        assert set(canvas.texts) == expected
        boxes = list(canvas.texts.values())
        for n, (name, box) in enumerate(canvas.texts.items()):
            assert 0 <= box[0] < box[2] <= SIDE, (i, name, box)
            assert 0 <= box[1] < box[3] <= SIDE, (i, name, box)
            assert not any(overlap(box, other) for other in boxes[n + 1 :]), (i, name)
            assert not any(overlap(box, other) > 40 for other in canvas.pictures), (i, name)
            assert canvas.caps[name] >= 8.5, (i, name, canvas.caps[name])
        for box in canvas.pictures:
            assert box[0] >= 0 <= box[1]
            assert max(box[2:]) <= SIDE, (i, box)
        assert max(canvas.pictures[0][2] - canvas.pictures[0][0], canvas.pictures[0][3] - canvas.pictures[0][1]) > 40


def test_ink_stands_out():
    rng = Random(0)
    for _ in range(500):
        ground = ground_for_text(rng, (0.1, 1.0), (0.0, 1.0))
        assert abs(luminance(ground) - luminance(ink_for(ground, rng))) > 120


def test_every_asset_has_a_licence_line_and_all_are_small():
    told = (pictures.ASSETS / "LICENSES.md").read_text()
    notice = (Path(__file__).parents[1] / "NOTICE").read_text()
    files = [p for p in pictures.ASSETS.rglob("*") if p.is_file()]
    for path in files:
        name = path.relative_to(pictures.ASSETS)
        if path.suffix == ".webp":
            assert f"| {name.parent} |" in told, name
        elif path.suffix in (".ttf", ".txt"):
            assert str(name) in told, name
    for author in (
        "Microsoft",
        "Google",
        "Mozilla",
        "Twitter",
        "Inter",
        "Montserrat",
        "Nunito",
        "Fredoka",
        "Roboto Slab",
    ):
        assert author in notice, author
    indexed = {f for e in pictures.index()["products"].values() for f in e["files"].values()}
    indexed |= {f for group in pictures.index()["people"].values() for table in group.values() for f in table}
    assert indexed == {str(p.relative_to(pictures.ASSETS / "pictures")) for p in files if p.suffix == ".webp"}
    assert sum(p.stat().st_size for p in files) < 4_000_000


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        adreview.creative(0, "dev")
