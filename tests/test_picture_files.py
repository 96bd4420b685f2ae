"""Pictures from anywhere: where they may lie, how large and what they may be; all else is a broken row with its reason."""

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from slimlmm import data, pictures, recipe
from slimlmm.checkdata import check
from slimlmm.errors import UserError
from slimlmm.pictures import FORMATS, REASONS, PictureError, PictureSettings, opened, place_of, upright
from spoiling import archive, claimed, encoded, moving
from test_cli import call

GOOD = {"image": "good.png", "question": "What?", "answer": "red"}
SVG = b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\nshowpage\n"


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_text(size):
    """A PNG whose compressed text is so many bytes long."""
    whole = encoded()
    return whole[:33] + chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"x" * size)) + whole[33:]


def zipped():
    """A PNG with a ZIP archive behind its end."""
    return encoded() + archive()[len(encoded(kind="JPEG", seed=14)) :]


def tiff(**options):
    return encoded(kind="TIFF", seed=20, **options)


def saved(kind, mode="RGB"):
    return encoded(mode, kind, seed=21)


#: bytes of a file -> kind of refusal, and what the message says of it
REFUSED = {
    "svg": (SVG, "not a picture", "is SVG: not a raster picture; convert it"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "not a picture", "is PDF"),
    "html": (b"<!doctype html><p>404", "not a picture", "is HTML"),
    "eps": (EPS, "not a picture", "PostScript"),
    "dos-eps": (b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS, "not a picture", "PostScript"),
    "wmf": (b"\xd7\xcd\xc6\x9a" + bytes(60), "not a picture", "WMF"),
    "tga": (saved("TGA"), "not a picture", "none of JPEG, PNG"),
    "ppm": (saved("PPM"), "not a picture", "none of JPEG, PNG"),
    "jpeg2000": (saved("JPEG2000"), "not a picture", "none of JPEG, PNG"),
    "ico": (saved("ICO"), "not a picture", "none of JPEG, PNG"),
    "empty": (b"", "not a picture", "an empty file"),
    "bomb": (claimed(60_000, 60_000), "enormous picture", "3600000000 pixels"),
    "huge": (claimed(8000, 7000), "enormous picture", "56,000,000 pixels, more than 50,000,000"),
    "text-bomb": (with_text(100_000_000), "broken picture", "too large"),
    "zip": (zipped(), "two-faced file", "PNG and ZIP"),
    "jpeg-zip": (archive(), "two-faced file", "JPEG and ZIP"),
    "script": (encoded() + b"<script>alert(1)</script>", "two-faced file", "PNG and script"),
    "cut-tiff": (tiff()[:-4000], "broken picture", ""),
    "cut-header": (tiff()[:20], "", ""),
    "cut-jpeg": (saved("JPEG")[:-300], "broken picture", "truncated"),
    "cut-webp": (saved("WEBP")[:-50], "", ""),
    "no-data": (encoded()[:60], "", ""),
}
TAKEN = {
    **{kind.lower(): saved(kind, "P" if kind == "GIF" else "RGB") for kind in FORMATS},
    "moving": moving(),
    "cmyk": saved("JPEG", "CMYK"),
}


def written(folder, pictures, **more):
    """Write a picture and a row for each name, and nine times as many good rows."""
    folder.mkdir(exist_ok=True)
    (folder / "good.png").write_bytes(encoded(seed=1))
    for name, raw in pictures.items():
        (folder / name).write_bytes(raw)
    rows = [{"id": name, **GOOD, "image": name, **more} for name in pictures]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *[GOOD] * 9 * len(rows)]))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_picture_within_the_limits_is_a_broken_row_with_its_reason(tmp_path, name):
    raw, kind, said = REFUSED[name]
    folder = written(tmp_path / "data", {name: raw})
    with pytest.raises(UserError, match=rf"1 of 10 rows are broken.* \(first: {name} \(") as caught:
        data.load(folder)
    told = str(caught.value)
    assert kind in told
    assert said in told.replace(",000,000,000", "000000000")
    found = [one for one in check.check(folder).findings if one.severity == "error"]
    assert [one.kind for one in found if one.kind in REASONS] == [
        next(kind for kind in REASONS if f"1 x {kind} (" in told)
    ]
    assert found[0].examples[0].id == name


@pytest.mark.parametrize("name", TAKEN)
def test_rasters_are_taken_animated_ones_by_their_first_frame(tmp_path, name):
    folder = written(tmp_path / "data", {name: TAKEN[name]})
    splits = data.load(folder)
    row = next(row for row in splits.train + splits.validation if row.id == name)
    first = Image.open(io.BytesIO(TAKEN[name])).convert("RGB")
    assert np.array_equal(np.asarray(row.open()), np.asarray(first))


def test_nothing_is_decoded_of_what_the_header_says_is_too_large(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for raw in (claimed(8000, 7000), claimed(60_000, 60_000)):
        with pytest.raises(PictureError, match="enormous"):
            upright(raw, PictureSettings())


def test_a_text_bomb_takes_no_more_memory_than_pillow_allows():
    raw = with_text(300_000_000)
    tracemalloc.start()
    with pytest.raises(PictureError, match="broken picture"):
        upright(raw, PictureSettings())
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    folder = written(tmp_path / "data", {})
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(10**12)
    (folder / "train.jsonl").write_text(json.dumps({**GOOD, "image": "sparse.png"}) + "\n")
    with pytest.raises(UserError, match="1,000,000,000,000 bytes, more than 100,000,000"):
        data.load(folder)
    with pytest.raises(PictureError, match="more than 100"):
        upright(encoded(), PictureSettings(max_bytes=100))


def test_pipes_and_folders_are_not_opened(tmp_path):
    import os

    folder = written(tmp_path / "data", {})
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    rows = [{**GOOD, "image": name} for name in ("pipe", "folder", "nul\0l.png")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"2 x not a file .*a pipe or device") as caught:
        data.load(folder)
    assert "null" in str(caught.value)


@pytest.fixture
def outside(tmp_path):
    """A data set whose pictures lie elsewhere: above it, by an absolute path, behind a link, behind a linked folder."""
    away = tmp_path / "away"
    away.mkdir()
    (away / "a.png").write_bytes(encoded(seed=2))
    folder = written(tmp_path / "data", {})
    (folder / "link.png").symlink_to(away / "a.png")
    (folder / "linked").symlink_to(away)
    paths = {
        "up": "../away/a.png",
        "absolute": str(away / "a.png"),
        "link": "link.png",
        "linked": "linked/a.png",
        "round": "linked/../data/good.png",  # by the letters in the folder, in truth where the link's parent is
    }
    rows = [{"id": name, **GOOD, "image": path} for name, path in paths.items()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_path_that_leads_out_of_the_data_is_a_broken_row_unless_its_folder_is_allowed(outside, tmp_path):
    with pytest.raises(UserError, match="4 of 5 rows are broken") as caught:
        data.load(outside)
    assert "3 x escaping path (its path leads out of the data folder" in str(caught.value)
    assert "1 x absolute path (lies outside of the data folder. Copy the file in, or allow its folder" in str(
        caught.value
    )
    allowed = PictureSettings(folders=(tmp_path / "away",))
    assert len(data.load(outside, allowed=allowed).train + data.load(outside, allowed=allowed).validation) == 5
    with pytest.raises(UserError, match="4 of 5"):
        data.load(outside, allowed=PictureSettings(folders=(tmp_path / "awa",)))
    found = {one.kind: one for one in check.check(outside).findings}
    assert (found["escaping path"].count, found["absolute path"].count) == (3, 1)
    assert "escaping path" not in {
        one.kind for one in check.check(outside, limits=check.Limits(allowed=allowed)).findings
    }


def test_embedded_paths_are_judged_as_others_are(outside, tmp_path):
    record = {**GOOD, "_folder": outside, "image": {"bytes": None, "path": str(tmp_path / "away" / "a.png")}}
    with pytest.raises(PictureError, match="absolute path"):
        data.parse(record, 0)
    assert data.parse({**record, "_root": tmp_path}, 0).image == tmp_path / "away" / "a.png"


def test_a_table_in_a_folder_of_its_split_may_show_pictures_of_the_whole_data_set(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded())
    (tmp_path / "train" / "part.jsonl").write_text(json.dumps({**GOOD, "image": "../images/a.png"}) + "\n")
    assert len(data.load(tmp_path).train) == 1
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "train" / "part.jsonl")
    with pytest.raises(UserError, match="escaping path"):  # a file alone: its folder is the data set's
        data.load(tmp_path / "train" / "part.jsonl")


def test_a_data_set_behind_a_link_holds_its_own_pictures(tmp_path):
    folder = written(tmp_path / "data", {"a.png": encoded()})
    (tmp_path / "alias").symlink_to(folder)
    assert len(data.load(tmp_path / "alias").train) > 0
    assert place_of(folder / "a.png", tmp_path / "alias") == ""
    assert place_of(tmp_path / "data-more" / "a.png", folder) == "absolute path"


def test_the_recipe_widens_the_limits_and_refuses_unknown_ones():
    raw = yaml.safe_load(
        "data: {pictures: {folders: [../shared], formats: [PNG, PPM], max_pixels: 9, polyglots: true}}"
    )
    used = recipe.parse(raw, "r.yaml").data.pictures
    assert used == PictureSettings(folders=("../shared",), formats=("PNG", "PPM"), max_pixels=9, polyglots=True)
    assert used.folders == (Path("../shared"),)
    assert recipe.parse(yaml.safe_load(recipe.dump(recipe.parse(raw, "r"))), "again").data.pictures == used
    for wrong in ({"formats": ["EPS"]}, {"formats": []}, {"max_pixels": 10**9}, {"max_byte": 1}):
        with pytest.raises(UserError, match=f"data.pictures.{next(iter(wrong))}"):
            recipe.parse({"data": {"pictures": wrong}}, "r.yaml")


def test_what_is_allowed_beyond_the_usual_is_taken():
    assert upright(saved("PPM"), PictureSettings(formats=("PPM",))).size == (64, 48)
    assert upright(archive(), PictureSettings(polyglots=True)).size == (64, 48)
    with pytest.raises(PictureError, match="none of PPM"):
        upright(saved("PNG"), PictureSettings(formats=("PPM",)))
    with pytest.raises(PictureError, match="3,072 pixels, more than 3,000"):
        opened(encoded(), PictureSettings(max_pixels=3000))


@pytest.mark.parametrize(
    "error", [struct.error, IndexError, KeyError, MemoryError, OverflowError, zlib.error, RecursionError]
)
def test_whatever_a_decoder_raises_is_told_as_a_broken_picture(error, monkeypatch, tmp_path):
    folder = written(tmp_path / "data", {"a.png": encoded()})

    def load(self):
        raise error("oh")

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(UserError, match=rf"broken picture .*{error.__name__}: .*oh"):
        data.load(folder)


def test_verbs_take_pictures_from_further_folders(outside, teacher, tmp_path, monkeypatch, capsys):
    words = ("evaluate", teacher, "--data", outside, "--split", "train")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert "--pictures-from" in err
    code, _, err = call(monkeypatch, capsys, *words, "--pictures-from", tmp_path / "away")
    assert code == 0, err
    code, _, err = call(monkeypatch, capsys, *words, "--pictures-from", tmp_path / "away", "--max-picture-pixels", 99)
    assert code == 2
    assert "more than 99" in err
    from slimlmm import commands

    told = commands.settings(None, shrink=None, max_drop=None, seed=None, pictures_from=[tmp_path])
    assert told.data.pictures.folders == (tmp_path,)


def test_rows_of_one_picture_look_up_its_place_once_and_refusals_are_told_for_each(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    looked, plain = [], pictures.place_of
    monkeypatch.setattr(pictures, "place_of", lambda path, *rest: looked.append(path.name) or plain(path, *rest))
    record = {**GOOD, "_folder": tmp_path, "image": "a.png"}
    astray = {**record, "image": "../b.png"}
    notes = []
    rows = data.check([record, record, astray, record, astray], name="it", max_bad_share=0.5, notes=notes)
    assert [row.image for row in rows] == [tmp_path / "a.png"] * 3
    assert looked.count("a.png") == 1
    assert "skipped 2 of 5 rows: 2 x escaping path" in notes[0]
