"""Everything that can be wrong with data, planted in a copy of AdReview; `PLANTED` says where each finding is to be made."""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def encoded(mode="RGB", kind="PNG", seed=None, **options):
    """A picture of noise, different for each seed."""
    pixels = NOISE if seed is None else np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def see_through(seed):
    picture = Image.open(io.BytesIO(encoded(seed=seed))).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def palette(seed):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded(seed=seed))).quantize(16).save(buffer, "PNG", transparency=3)
    return buffer.getvalue()


def deep():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def moving():
    frames = [Image.open(io.BytesIO(encoded(seed=seed))) for seed in (11, 12)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(kind="JPEG", seed=13, exif=exif)


def claimed(width, height):
    """A PNG whose header claims a size; nothing behind it would fill that."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def archive():
    buffer = io.BytesIO(picture := encoded(kind="JPEG", seed=14))
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("payload.txt", "hello")
    assert buffer.getvalue().startswith(picture)
    return buffer.getvalue()


#: id of the planted row -> (bytes of its picture, kind of finding)
SPOILT = {
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "page": (b"<!DOCTYPE html><p>404", "not a picture"),
    "empty": (b"", "not a picture"),
    "cut-short": (encoded(kind="JPEG", seed=1)[:-300], "broken picture"),
    "bomb": (claimed(60_000, 60_000), "enormous picture"),
    "huge": (claimed(8000, 7000), "enormous picture"),
    "big": (claimed(1100, 1000), "large picture"),
    "moving": (moving(), "animated picture"),
    "see-through": (see_through(2), "transparent picture"),
    "palette": (palette(3), "transparent picture"),
    "opaque": (encoded("RGBA", seed=4), "other colours"),
    "grey": (encoded("L", seed=5), "other colours"),
    "inks": (encoded("CMYK", "JPEG", seed=6), "CMYK picture"),
    "deep": (deep(), "deep picture"),
    "turned": (turned(), "rotated picture"),
    "archive": (archive(), "two-faced file"),
    "script": (encoded(seed=7) + b"<?php system($_GET[0]); ?>", "two-faced file"),
}
#: kind of finding -> ids of the rows where it is planted, beside those of SPOILT
PLANTED = {
    "unreadable row": ["no-question", "by-url"],
    "missing picture": ["missing", "dangling"],
    "not a file": ["folder", "pipe"],
    "escaping path": ["upwards", "link-out"],
    "absolute path": ["absolute"],
    "linked picture": ["link-in"],
    "leak train-test": ["leak-test"],
    "leak train-validation": ["leak-validation"],
    "leak validation-test": ["leak-both"],
    "near train-test": ["near-test"],
    "near train-validation": ["near-validation"],
    "near validation-test": ["near-both"],
    "repeated picture": ["twin"],
    "contradiction": ["other-answer"],
    "identical row": ["again"],
    "blank answer": ["blank-test"],
    "blank train answer": ["blank-train"],
    "long answer": ["long"],
    "lopsided task": ["constant-0"],
    "untrained task": ["odd"],
    "unasked task": ["", ""],  # constant, in two splits
} | {kind: [] for _, kind in SPOILT.values()}
for _name, (_, _kind) in SPOILT.items():
    PLANTED[_kind] = [*PLANTED[_kind], _name]
PLANTED["other colours"] += ["moving"]  # a GIF has a palette


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines() if line.strip()]


def added(folder, split, records):
    """Append rows of a known task to a split; a blank line stands before them."""
    known = rows_of(folder, split)[0]
    lines = [json.dumps({**known, "question": f"What of {one['id']}?", **one}) for one in records]
    with (folder / f"{split}.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")


def redone(path, out):
    """The same picture, smaller and compressed anew."""
    with Image.open(path) as picture:
        picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)).save(out, "JPEG", quality=60)


def spoil_pictures(folder, outside):
    images = folder / "images"
    for name, (raw, _) in SPOILT.items():
        (images / name).write_bytes(raw)
    (outside / "away.png").write_bytes(encoded(seed=8))
    (outside / "above.png").write_bytes(encoded(seed=10))
    (images / "folder").mkdir()
    os.mkfifo(images / "pipe")
    (images / "dangling").symlink_to(images / "nowhere")
    (images / "link-out").symlink_to(outside / "away.png")
    (images / "plain.png").write_bytes(encoded(seed=15))
    (images / "link-in").symlink_to(images / "plain.png")
    (outside / "absolute.png").write_bytes(encoded(seed=9))
    names = [*SPOILT, "missing", "dangling", "folder", "pipe", "link-out", "link-in"]
    special = [
        {"id": "upwards", "image": os.path.relpath(outside / "above.png", folder)},
        {"id": "absolute", "image": str(outside / "absolute.png")},
        {"id": "no-question", "question": " "},
        {"id": "by-url", "image": "https://example.org/a.png"},
    ]
    added(folder, "train", [{"id": name, "image": f"images/{name}"} for name in names] + special)


def spoil_rows(folder):
    images = folder / "images"
    train, validation = (
        list(dict.fromkeys(row["image"] for row in rows_of(folder, split) if "/" in row["image"]))
        for split in ("train", "validation")
    )
    train = [name for name in train if name.startswith("images/train/")]
    for name, source in {"leak-test": train[0], "leak-validation": train[1], "leak-both": validation[0]}.items():
        shutil.copy(folder / source, images / name)
    shutil.copy(folder / train[2], images / "twin")
    for name, source in {"near-test": train[3], "near-validation": train[4], "near-both": validation[1]}.items():
        redone(folder / source, images / name)

    def shown(*names):
        return [{"id": name, "image": f"images/{name}"} for name in names]

    constant = [
        {"id": f"constant-{n}", "image": train[5], "question": f"Is it {n}?", "answer": "no" if n < 5 else "yes"}
        for n in range(60)
    ]
    first = {"image": train[6], "question": "Is it so?", "answer": "yes"}
    others = [
        {"id": "said", **first},
        {"id": "again", **first},
        {"id": "other-answer", **first, "answer": "no"},
        {"id": "blank-train", "answer": " "},
        {"id": "long", "answer": "word " * 40},
    ]
    added(folder, "train", [*shown("twin"), *others, *({**one, "task": "constant"} for one in constant)])
    added(folder, "validation", shown("leak-validation", "near-validation"))
    odd = {"id": "odd", "task": "odd"}
    added(
        folder,
        "test",
        [*shown("leak-test", "leak-both", "near-test", "near-both"), odd, {"id": "blank-test", "answer": ""}],
    )
