import io
import json
from collections import Counter

import pytest
from PIL import Image

from slimlmm import data
from slimlmm.errors import UserError


def png(colour="red", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, records, name="train.jsonl"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.png").write_bytes(png())
    (path / "b.png").write_bytes(png("blue"))
    (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = {"image": "a.png", "question": "What?", "answer": "red"}


def test_short_and_conversational_forms_give_the_same_row(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
        "images": ["a.png"],
    }
    folder_of(tmp_path / "short", [GOOD] * 2)
    folder_of(tmp_path / "chat", [chat] * 2)
    short, long = (data.load(tmp_path / name).train[0] for name in ("short", "chat"))
    assert (short.question, short.answer) == (long.question, long.answer)
    assert short.picture_bytes() == long.picture_bytes()


def test_embedded_bytes_in_parquet(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(), "path": None}] * 3, "question": ["q"] * 3, "answer": ["a"] * 3}
    )
    table.to_parquet(str(tmp_path / "train.parquet"))
    rows = data.load(tmp_path).train
    assert rows[0].open().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**GOOD, "image": "gone.png"}, "missing"),
        ({**GOOD, "image": "broken.png"}, "cannot be decoded"),
        ({**GOOD, "answer": " "}, "empty answer"),
        ({**GOOD, "question": ""}, "empty question"),
        ({**GOOD, "image": "https://example.org/a.png"}, "URL"),
    ],
)
def test_bad_rows_are_counted_named_and_refused_beyond_the_share(tmp_path, record, reason):
    folder_of(tmp_path, [GOOD] * 9 + [record])
    (tmp_path / "broken.png").write_bytes(png(size=(64, 64))[:60])
    with pytest.raises(UserError, match=reason) as caught:
        data.load(tmp_path)
    assert "1 of 10" in str(caught.value)
    splits = data.load(tmp_path, max_bad_share=0.2)
    assert any("skipped 1 of 10" in note for note in splits.notes)


def test_missing_validation_is_split_off_aloud_by_whole_pictures(tmp_path):
    folder_of(tmp_path, [GOOD, {**GOOD, "image": "b.png"}] * 4)
    splits = data.load(tmp_path)
    assert any("split off train" in note for note in splits.notes)
    assert {row.picture_key() for row in splits.train}.isdisjoint(row.picture_key() for row in splits.validation)


def test_an_empty_split_and_a_missing_folder_are_named(tmp_path):
    folder_of(tmp_path, [GOOD])
    with pytest.raises(UserError, match="'test' is empty"):
        data.load(tmp_path).need("test", tmp_path)
    with pytest.raises(UserError, match="no such file"):
        data.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of train"):
        data.load(tmp_path / "empty")


def test_a_file_that_is_no_json_is_one_clear_message(tmp_path):
    (tmp_path / "train.jsonl").write_text("{ not json\n")
    with pytest.raises(UserError, match=r"train\.jsonl: cannot be read"):
        data.load(tmp_path)


def test_spread_takes_so_many_rows_a_picture_and_more_only_where_pictures_run_out(rows):
    pictures = {row.picture_key() for row in rows.train}

    def times(count, each):
        taken = data.spread(rows.train, count, each, seed=1)
        assert len(taken) == len({(row.picture_key(), row.question) for row in taken}) == min(count, len(rows.train))
        return Counter(row.picture_key() for row in taken)

    assert set(times(2 * len(pictures), 2).values()) == {2}
    assert sorted(times(2 * len(pictures) - 1, 2).values()) == [1, *[2] * (len(pictures) - 1)]
    assert set(times(3 * len(pictures), 2).values()) <= {2, 3, 4}
    assert sum(times(10**6, 2).values()) == len(rows.train)
    assert data.spread(rows.train, 7, 2, seed=1) == data.spread(rows.train, 7, 2, seed=1)
    assert data.spread(rows.train, 7, 2, seed=1) != data.spread(rows.train, 7, 2, seed=2)
    assert data.spread([], 7, 2, seed=1) == []


def test_sample_takes_whole_pictures_and_is_seeded(rows):
    some = data.sample(rows.train, 35, seed=1)
    assert len(some) == 35
    assert some == data.sample(rows.train, 35, seed=1)
    assert len({row.picture_key() for row in some}) == 4


def test_by_picture_loses_nothing_and_bounds_groups(rows):
    groups = data.by_picture(rows.train, 4)
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows.train)
    assert max(map(len, groups)) == 4
    assert all(len({row.picture_key() for row in group}) == 1 for group in groups)


def test_fingerprint_sees_answers_and_picture_bytes(tmp_path):
    folder_of(tmp_path, [GOOD])
    before = data.fingerprint(data.load(tmp_path).train)
    (tmp_path / "a.png").write_bytes(png("green"))
    assert data.fingerprint(data.load(tmp_path).train) != before


def test_a_file_without_rows_is_an_empty_split(tmp_path):
    folder_of(tmp_path, [GOOD] * 2)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="'test' is empty"):
        data.load(tmp_path).need("test", tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", "image,question,answer\na.png,q,{}\n"),
        ("train.jsonl", '{{"image": "a.png", "question": "q", "answer": "{}"}}\n'),
        ("train.json", '[{{"image": "a.png", "question": "q", "answer": "{}"}}]'),
    ],
)
@pytest.mark.parametrize("answer", ["None", "NA", "null", "nan", "True", "007", "3", "2024-05-01", "1e3"])
def test_an_answer_is_the_text_that_stands_there(tmp_path, name, text, answer):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text.format(answer))
    assert [row.answer for row in data.load(tmp_path).train] == [answer]


def test_a_whole_number_is_written_out_and_what_has_no_one_form_is_refused(tmp_path):
    assert data.parse({**GOOD, "answer": 3}, 0).answer == "3"
    assert data.parse({**GOOD, "answer": 0}, 0, unlabelled=True).answer == "0"
    assert (data.parse({**GOOD, "id": 0}, 5).id, data.parse({**GOOD, "task": 0}, 5).task) == ("0", "0")
    for answer in (True, 3.0, ["a"], {"text": "a"}):
        for unlabelled in (True, False):
            with pytest.raises(ValueError, match=f"the answer is of type {type(answer).__name__}, not text"):
                data.parse({**GOOD, "answer": answer}, 0, unlabelled=unlabelled)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", [" Be short. ", [{"type": "text", "text": "Be short."}]])
def test_a_system_turn_stands_before_the_question(role, content):
    turns = [
        {"role": role, "content": content},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "red"},
    ]
    wanted = data.parse({**GOOD, "system": "Be short."}, 0)
    assert (wanted.question, wanted.answer, wanted.system) == ("What?", "red", "Be short.")
    assert data.parse({"messages": turns, "images": ["a.png"]}, 0) == wanted
    assert data.parse({"messages": turns[1:], "images": ["a.png"]}, 0) == data.parse(GOOD, 0)
    bare = data.parse({"messages": turns[:2], "images": ["a.png"]}, 0, unlabelled=True)
    assert (bare.answer, bare.system) == ("", "Be short.")


@pytest.mark.parametrize(
    "roles",
    [
        ["system"],
        ["system", "assistant"],
        ["user", "system", "assistant"],
        ["system", "system", "user", "assistant"],
        ["system", "user"],
        ["user", "assistant", "user", "assistant"],
    ],
)
def test_other_turns_are_refused(roles):
    turns = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(ValueError, match="one user and one assistant turn, behind a system turn or none"):
        data.parse({"messages": turns, "images": ["a.png"]}, 0)


def test_what_is_no_text_is_no_system_turn():
    with pytest.raises(ValueError, match="what the system turn says is of type list, not text"):
        data.parse({**GOOD, "system": ["Be short."]}, 0)
    with pytest.raises(ValueError, match="<image> inside of a text"):
        data.parse({**GOOD, "system": "Look at <image>."}, 0)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        data.parse({**GOOD, "system": "\ud800"}, 0)


def test_a_system_turn_beside_messages_is_heard_and_two_are_refused():
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    row = {"messages": turns, "images": ["a.png"], "system": "Be short."}
    assert data.parse(row, 0).system == "Be short."
    first = {"role": "system", "content": "Be kind."}
    with pytest.raises(ValueError, match="two system turns"):
        data.parse({**row, "messages": [first, *turns]}, 0)
    assert data.parse({**row, "system": None, "messages": [first, *turns]}, 0).system == "Be kind."


@pytest.mark.parametrize("content", ["", " ", []])
def test_an_empty_system_turn_is_refused_because_a_template_may_write_one_where_there_is_none(content):
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    turns[0]["content"] = content
    with pytest.raises(ValueError, match="empty system turn"):
        data.parse({"messages": turns, "images": ["a.png"]}, 0)


def test_a_picture_in_a_system_turn_is_refused_and_no_number_is_none():
    turns = [
        {"role": role, "content": [{"type": "image"}, {"type": "text", "text": "x"}]} for role in ("system", "user")
    ]
    with pytest.raises(ValueError, match="a picture in the system turn"):
        data.parse({"messages": [*turns, {"role": "assistant", "content": "red"}], "images": ["a.png"]}, 0)
    assert data.parse({**GOOD, "system": float("nan")}, 0) == data.parse(GOOD, 0)


def test_hashes_hear_a_system_turn_and_those_without_one_stay_what_they_were(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    plain, told = (data.parse({**GOOD, "_folder": tmp_path, **more}, 0) for more in ({}, {"system": "Be short."}))
    assert data.told(plain) == b"row-1\x1fWhat?\x1fred\x1f"
    assert data.fingerprint([plain]) != data.fingerprint([told])


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "question": "q\ud800"}))
    with pytest.raises(UserError, match="half of a surrogate pair"):
        data.load(tmp_path)


def test_files_of_equal_bytes_are_one_picture(tmp_path):
    records = [{"image": f"{n}.png", "question": "What?", "answer": "red", "id": str(n)} for n in range(12)]
    folder = folder_of(tmp_path, records)
    for n in range(12):
        (folder / f"{n}.png").write_bytes(png((n % 3, 0, 0)))
    splits = data.load(folder)
    rows = [*splits.train, *splits.validation]
    assert {row.id: row.image for row in rows} == {str(n): folder / f"{n % 3}.png" for n in range(12)}
    assert {row.picture_key() for row in splits.train}.isdisjoint(row.picture_key() for row in splits.validation)
    assert "4 rows (1 pictures) were split off train" in splits.notes[0]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", " <image> What? "])
def test_the_placeholder_of_the_picture_is_no_part_of_the_question(question):
    told = [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}, told[1]]
    for record in (
        {"image": "a.png", "question": question, "answer": "red"},
        {"images": ["a.png"], "messages": told},
        {"images": ["a.png"], "messages": parts},
    ):
        assert data.parse(record, 0).question == "What?"


@pytest.mark.parametrize(
    "record", [{"question": "Is <image> red?"}, {"answer": "the <image>"}, {"question": "<image><image> Same?"}]
)
def test_a_placeholder_inside_of_a_text_is_a_broken_row(record):
    with pytest.raises(ValueError, match="<image> inside of a text"):
        data.parse(GOOD | record, 0)
    with pytest.raises(ValueError, match="empty question"):
        data.parse(GOOD | {"question": "<image>"}, 0)


COLOURS = ("red", "blue", "red")


@pytest.mark.parametrize("layout", ["splits", "one", "train"])
def test_folders_that_datasets_saved_are_read(tmp_path, layout):
    import datasets

    pictures = [Image.new("RGB", (9, 9), colour) for colour in COLOURS]
    table = datasets.Dataset.from_dict({"image": pictures, "question": ["q"] * 3, "answer": COLOURS})
    if layout == "splits":
        datasets.DatasetDict({"train": table, "validation": table, "test": table}).save_to_disk(str(tmp_path / "d"))
    else:
        table.save_to_disk(str(tmp_path / "d" / ("train" if layout == "train" else "")))
    splits = data.load(tmp_path / "d")
    rows = [*splits.train, *(splits.validation if layout != "splits" else [])]
    assert Counter(row.answer for row in rows) == {"red": 2, "blue": 1}
    assert {row.answer: row.open().getpixel((0, 0)) for row in rows} == {"red": (255, 0, 0), "blue": (0, 0, 255)}
    assert len(splits.test) == (3 if layout == "splits" else 0)


def test_pictures_in_lists_are_read(tmp_path):
    import datasets

    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    pictures = [[Image.new("RGB", (9, 9), colour)] for colour in COLOURS]
    table = datasets.Dataset.from_dict({"images": pictures, "messages": [turns] * 3})
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(str(tmp_path / "train.parquet"))
    table.save_to_disk(str(tmp_path / "saved" / "train"))
    for folder in (tmp_path, tmp_path / "saved"):
        splits = data.load(folder)
        assert {row.open().getpixel((0, 0)) for row in (*splits.train, *splits.validation)} == {
            (255, 0, 0),
            (0, 0, 255),
        }


def test_system_turns_of_a_csv_are_what_stands_there(tmp_path):
    folder_of(tmp_path, [])
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.csv").write_text("image,question,answer,system\na.png,q,a,007\nb.png,q,a,\n")
    splits = data.load(tmp_path)
    assert {row.image.name: row.system for row in (*splits.train, *splits.validation)} == {"a.png": "007", "b.png": ""}
