"""What is read from strangers, and how it is made of sound files: targets of `test_fuzz.py` and `benchmarks/fuzz.py`.

A target is a parser with real seeds. Whatever its bytes are, reading them ends in a value or in the parser's refusal (a
UserError, the gateway's RefusedError, a picture's PictureError), within `SECONDS`; anything else is a find.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import functools
import io
import json
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from slimlmm.errors import UserError
from slimlmm.pictures import PictureError
from slimlmm.serving.chat import RefusedError
from spoiling import SPOILT, encoded

#: seconds that one input may take
SECONDS = 10.0
REFUSALS = (UserError, RefusedError, PictureError)
ROOT = Path(__file__).parent.parent
WORDS = (
    *(
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-1",
        b"0",
        b"18446744073709551616",
        b"1" * 5000,
        b'""',
        b"\\ud800",
    ),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"[]",
        b"{}",
        b",",
        b":",
        b'"',
        b"\n",
        b"\r",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
    ),
    *(
        b"&a [*a, *a]",
        b"*a",
        b"<<: *a",
        b"!!python/object/apply:os.system [id]",
        b"!!binary zz",
        b"2020-99-99",
        b"1:61:61",
        b"? [",
    ),
    *(b"../../etc/passwd", b"/dev/zero", b"file:///etc/passwd", b"https://example.org/a.png", b"<image>", b"__class__"),
    *(
        b"\x00\x00\x00\x00\x00\x00\x00\x80",
        b"\xff" * 8,
        b"\x00" * 64,
        b"PK\x05\x06",
        b"PAR1",
        b"IDAT",
        b"IHDR",
        b"II*\x00",
    ),
)


class HangError(BaseException):
    """An input that took too long; no `except Exception` of a parser may swallow it."""


@dataclass(frozen=True)
class Codec:
    """How a file is taken apart into a tree, and what else is in it, and put together again."""

    apart: Callable[[bytes], tuple[Any, bytes]]
    together: Callable[[Any, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A parser: `made` returns seeds, and what reads one input, in an empty folder."""

    name: str
    made: Callable[[Path], tuple[list[bytes], Callable[[bytes], object]]]
    codec: Codec | None = None


def outcome(read: Callable[[bytes], object], raw: bytes) -> tuple[str, str]:
    """Return how reading ended (accepted, refused, found), and of what is found where and what."""
    try:
        with limited(SECONDS):
            read(raw)
    except REFUSALS:
        return "refused", ""
    except (Exception, HangError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "slimlmm" in frame.filename] or [
            one for one in frames if one.name != "late"
        ]
        lines = str(error).splitlines() or [""]
        return "found", f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].name}: {lines[0][:160]}"
    return "accepted", ""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise a HangError where the block takes longer."""

    def late(*_: Any) -> None:
        raise HangError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# inputs: a seed, its bytes or its tree changed a few times

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["", "auto", "../a.png", "a.png", "data:image/png;base64,", "\ud800", "cuda", "x" * 3000, "1e9", "[]"]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def inputs(draw: Any, seeds: list[bytes], codec: Codec | None) -> bytes:
    """Draw an input."""
    rng = random.Random(draw(st.binary(min_size=12, max_size=12)))
    return spoilt(rng, draw(st.lists(VALUES, min_size=3, max_size=3)), seeds, codec)


def spoilt(rng: random.Random, values: list[Any], seeds: list[bytes], codec: Codec | None) -> bytes:
    """Return a seed with its tree, where it has one, or its bytes changed."""
    seed = rng.choice(seeds)
    if codec is not None and rng.random() < 0.6:
        try:
            tree, rest = apart(codec, seed)
            return codec.together(changed(tree, rng, values[: rng.randint(1, 3)]), rest)
        except Exception:  # a tree that this kind of file cannot say; then its bytes are changed
            return scrambled(seed, rng, seeds)
    return scrambled(seed, rng, seeds)


def drawn(count: int, seed: int) -> list[Any]:
    """Return values of all types that hypothesis draws."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(VALUES)
    def draw(value: Any) -> None:
        found.append(value)

    draw()
    return found


@functools.cache
def apart(codec: Codec, seed: bytes) -> tuple[Any, bytes]:
    """Return the tree of a seed, which `changed` copies."""
    return codec.apart(seed)


def changed(tree: Any, rng: random.Random, values: list[Any]) -> Any:
    """Return a tree of which a few places hold other values, other places' values, nothing, or stand under another key."""
    tree = {"": json_copy(tree)}
    for value in values:
        places = list(walked(tree))
        place, key = rng.choice(places)
        other, other_key = rng.choice(places)
        match rng.randrange(6):
            case 0 if place is not tree:
                del place[key]
            case 1:
                place[key] = json_copy(other[other_key])
            case 2 if isinstance(place, dict) and place is not tree:
                place[rng.choice(["", "type", str(other_key), str(value)[:9]])] = place.pop(key)
            case 3 if isinstance(place[key], str | bytes):
                place[key] = respelt(place[key], rng)
            case 4 if isinstance(place[key], int | float):
                place[key] = rng.choice(
                    [-place[key], place[key] * 10**9, str(place[key]), place[key] + 0.5, [place[key]]]
                )
            case _:
                place[key] = value
    return tree[""]


def respelt(text: Any, rng: random.Random) -> Any:
    """Return a text or bytes changed as files are; of a picture's data URL the picture."""
    if isinstance(text, bytes):
        return scrambled(text, rng, [text])
    head, mark, body = text.partition(";base64,")
    if mark:
        return head + mark + base64.b64encode(scrambled(base64.b64decode(body + "=="), rng, [b""])).decode()
    return scrambled(text.encode("utf-8", "surrogatepass"), rng, [b""]).decode("utf-8", "replace")


def json_copy(tree: Any) -> Any:
    """Return a copy of lists and dictionaries."""
    if isinstance(tree, dict):
        return {key: json_copy(value) for key, value in tree.items()}
    return [json_copy(value) for value in tree] if isinstance(tree, list) else tree


def walked(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a tree: what holds it, and by which key."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from walked(value)


def scrambled(seed: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return bytes with a few flips, cuts, repeats, words, and pieces of other seeds."""
    raw = bytearray(seed)
    for _ in range(rng.choice([1, 1, 2, 3, 5, 9])):
        at = rng.randrange(len(raw) + 1)
        span = min(len(raw) - at, rng.choice([1, 2, 4, 8, 64, 1024]))
        match rng.randrange(8):
            case 0 | 1 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(raw):
                raw[at] = rng.randrange(256)
            case 3:
                del raw[at:]
            case 4:
                del raw[at : at + span]
            case 5:
                raw[at:at] = raw[at : at + span] * rng.choice([1, 2, 50])
            case 6:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                raw[at : at + span] = other[start : start + rng.choice([4, 64, 1024])]
            case _:
                raw[at : at + rng.choice([0, span])] = rng.choice(WORDS)
    return bytes(raw)


# kinds of files

JSON = Codec(lambda raw: (json.loads(raw), b""), lambda tree, _: json.dumps(tree).encode())
YAML = Codec(lambda raw: (yaml.safe_load(raw), b""), lambda tree, _: json.dumps(tree).encode())
LINES = Codec(
    lambda raw: ([json.loads(line) for line in raw.splitlines()], b""),
    lambda tree, _: b"".join(json.dumps(one).encode() + b"\n" for one in tree),
)


def _named(codec: Callable[[str], Codec | None]) -> Codec:
    """Return a codec of a file with its name before it."""

    def apart(raw: bytes) -> tuple[Any, bytes]:
        name, _, body = raw.partition(b"\0")
        inner = codec(name.decode())
        if inner is None:
            raise ValueError("no tree")
        tree, rest = inner.apart(body)
        return tree, name + b"\0" + rest

    def together(tree: Any, rest: bytes) -> bytes:
        name, _, body = rest.partition(b"\0")
        inner = codec(name.decode())
        assert inner is not None
        return name + b"\0" + inner.together(tree, body)

    return Codec(apart, together)


def _head_apart(raw: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def _head_together(tree: Any, rest: bytes) -> bytes:
    head = json.dumps(tree).encode()
    return len(head).to_bytes(8, "little") + head + rest


HEADER = Codec(_head_apart, _head_together)


def _csv_together(tree: Any, _: bytes) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in tree for key in row)))
    writer.writeheader()
    writer.writerows(tree)
    return file.getvalue().encode()


CSV = Codec(lambda raw: (list(csv.DictReader(io.StringIO(raw.decode()))), b""), _csv_together)


def _parquet_together(tree: Any, _: bytes) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(tree), file)
    return file.getvalue()


def _parquet_apart(raw: bytes) -> tuple[Any, bytes]:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(raw)).to_pylist(), b""


PARQUET = Codec(_parquet_apart, _parquet_together)
ROWS: list[dict[str, Any]] = [
    {"id": "one", "image": "a.png", "question": "What is it?", "answer": "a cat", "task": "product"},
    {"id": "two", "image": "b.jpg", "question": "<image>\nWhich colour?", "answer": "red", "task": ""},
]
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        ],
        "images": ["a.png"],
    }
]
EMBEDDED = [
    {**ROWS[0], "image": {"bytes": encoded(seed=30), "path": None}},
    {**ROWS[1], "image": {"bytes": None, "path": "a.png"}},
]


def lightly(builder: Any, suffix: str) -> Callable[..., Any]:
    """Return what stands in for `datasets.load_dataset`: the same reader of tables, without folders, locks and caches on disk."""
    import datasets
    import pyarrow as pa

    def load(_: str, *, data_files: str, split: str, **_settings: Any) -> Any:
        told: Any = {"files": [data_files], "row_groups_list": [None]} if suffix == ".parquet" else None
        told = told or {"base_files": [data_files], "files_iterables": [[data_files]]}
        try:
            builder.info.features = None
            tables = [table for _, table in builder._generate_tables(**told)]
            found = datasets.Dataset(pa.concat_tables(tables, promote_options="default")) if tables else None
        except Exception as error:  # as `datasets` does
            raise datasets.exceptions.DatasetGenerationError(
                "An error occurred while generating the dataset"
            ) from error
        return _none() if found is None else found

    return load


def _none() -> Any:
    raise StopIteration


def rows(suffix: str, codec: Codec, *, whole: bool = False) -> Target:
    """Return the target of one kind of table, read as a whole run reads it; unless `whole`, by the bare reader of `datasets`."""

    def made(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        import datasets

        from slimlmm import data, tables

        datasets.disable_progress_bars()
        cache = folder / "cache"
        place = folder / "data"
        place.mkdir()
        (place / "a.png").write_bytes(encoded(seed=31))
        (place / "b.jpg").write_bytes(encoded(kind="JPEG", seed=32))
        trees = [ROWS * 2] + ([CHATS * 2] if suffix in (".jsonl", ".json", ".parquet") else [])
        trees += [EMBEDDED] if suffix == ".parquet" else []
        seeds = [codec.together(tree, b"") for tree in trees]
        table = place / f"train{suffix}"
        table.write_bytes(seeds[0])
        kind = tables.READERS[suffix]
        told = tables.CSV if kind == "csv" else {}
        builder = datasets.load_dataset_builder(kind, data_files=str(table), cache_dir=str(cache), **told)
        light = mock.patch.object(datasets, "load_dataset", lightly(builder, suffix))
        stand_in = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(cache)) if whole else light
        count = [0]

        def read(raw: bytes) -> object:
            table.write_bytes(raw)
            count[0] += 1
            if count[0] % 100 == 0:
                shutil.rmtree(cache, ignore_errors=True)
            with stand_in:
                return data.load(place, max_bad_share=0.9)

        return seeds, read

    return Target(f"{'whole ' if whole else ''}rows {suffix}", made, codec)


def _pictures(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from slimlmm.checkdata.look import look
    from slimlmm.pictures import PictureSettings, upright

    allowed = PictureSettings(
        formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000"), max_pixels=10**6
    )
    kinds = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")
    seeds = [encoded(kind=kind, seed=33) for kind in kinds] + [raw for raw, _ in SPOILT.values()]
    seeds += [
        encoded(kind="TIFF", seed=34, compression=one) for one in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")
    ]

    def read(raw: bytes) -> object:
        look(raw, folder, 10**6, allowed)  # says what is wrong, and raises nothing
        return upright(raw, allowed)

    return seeds, read


def one_file(read: Callable[[Path], object], name: str, seeds: Callable[[], list[bytes]]) -> Any:
    """Return what makes a target whose parser reads a file of this name."""

    def made(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
        def reading(raw: bytes) -> object:
            (folder / name).write_bytes(raw)
            return read(folder / name)

        return seeds(), reading

    return made


def _recipe(path: Path) -> object:
    from slimlmm import recipe

    return recipe.dump(recipe.read(path))


def _recipes() -> list[bytes]:
    told = [
        {
            "shrink": 18,
            "max_drop": 1.0,
            "order": ["inner", "width"],
            "multiples": {"ffn": 32},
            "data": {"train_rows": 100},
        },
        {
            "stages": [
                {
                    "name": "inner",
                    "rounds": [{"sizes": {"text.ffn": 64}, "train": {"steps": 20, "losses": {"top_k_kl": 1}}}],
                }
            ]
        },
        {
            "data": {"pictures": {"folders": ["more"], "formats": ["PNG"], "max_pixels": 1000}, "answers": "filled"},
            "seed": 3,
        },
        {
            "stages": [
                {"name": "a", "rounds": [{"drop": ["unused_tokens"]}, {"sizes": {"vision.blocks": 3}, "repair": []}]}
            ]
        },
    ]
    there = [path.read_bytes() for path in sorted(ROOT.glob("benchmarks/*.yaml"))]
    return [yaml.safe_dump(one).encode() for one in told] * 4 + there[:1]


def _study(path: Path) -> object:
    from slimlmm import studies

    return studies.read(path)


def _studies() -> list[bytes]:
    told = {
        "model": "teacher",
        "data": "ads",
        "base": {"shrink": 4, "row_visits": 1000, "data": {"test_rows": 100}},
        "seeds": [0, 1],
        "arms": {
            "slow": {"train": {"learning_rate": 1e-5}},
            "wide": {"recipe": {"order": ["inner"]}, "rounds": {"repair": ["refit"]}},
        },
        "groups": [{"title": "Rates", "arms": ["base", "slow"], "reference": "base", "x": {"base": 1, "slow": 2}}],
        "sweeps": ["orders"],
    }
    there = [path.read_bytes() for path in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))]
    return [yaml.safe_dump(told).encode()] * 9 + sorted(there, key=len)[:1]


def _model(folder: Path) -> Path:
    from slimlmm import checkpoint
    from tiny import tiny

    checkpoint.save(*tiny("llava-dinov2-llama"), folder / "model", max_shard_size="150KB")
    return folder / "model"


def several(
    folder: Path, names: list[str], read: Callable[[str], object]
) -> tuple[list[bytes], Callable[[bytes], object]]:
    """Return seeds and reader of a folder of which one file at a time is spoilt; `read` gets its name."""
    sound = {name: (folder / name).read_bytes() for name in names}

    def reading(raw: bytes) -> object:
        head, _, body = raw.partition(b"\0")
        name = head.decode("latin1") if head.decode("latin1") in sound else names[len(raw) % len(names)]
        (folder / name).write_bytes(body)
        try:
            return read(name)
        finally:
            (folder / name).write_bytes(sound[name])

    return [name.encode() + b"\0" + raw for name, raw in sound.items()], reading


def _config(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from slimlmm import checkpoint
    from zoo import CONFIGS

    place = _model(folder)
    families = ("llava-dinov2-llama", *list(CONFIGS)[::5])
    seeds = [(place / "config.json").read_bytes()]
    seeds += [CONFIGS[name]().to_json_string(use_diff=False).encode() for name in families if name in CONFIGS]

    count = [0]

    def read(raw: bytes) -> object:
        (place / "config.json").write_bytes(raw)
        count[0] += 1  # building its class takes ten times as long as reading it
        return checkpoint.open_weights(place) if count[0] % 5 == 1 else checkpoint.load_config(place)

    return seeds[:1] * 3 + seeds, read


def _processor(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from slimlmm import checkpoint

    place = _model(folder)
    config = checkpoint.load_config(place)
    names = sorted(path.name for path in place.iterdir() if path.suffix in (".json", ".jinja"))
    names = [name for name in names if name not in ("config.json", "slimlmm.json", "model.safetensors.index.json")]
    return several(place, names, lambda _: checkpoint.load_processor(place, config))


def _safetensors(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from slimlmm import checkpoint
    from slimlmm.shards import Shards

    place = _model(folder)
    names = sorted(path.name for path in place.iterdir() if "safetensors" in path.name)

    count = [0]

    def read(_: str) -> object:
        shards = Shards(place)
        count[0] += 1  # as for configurations
        weights = checkpoint.open_weights(place) if count[0] % 5 == 1 else None
        return weights, [shards.read(key) for key in shards.entries]

    return several(place, names, read)


def _certificate(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    from slimlmm import certificate, checkpoint, probes
    from tiny import tiny

    model, processor = tiny("llava-dinov2-llama")
    place, told = folder / "model", []

    def once(order: Any) -> Any:
        told.append(probes.told(order))
        return told[-1]

    def prove(partial: Path) -> object:
        return certificate.certify(partial, model, processor, [], model.num_parameters(), count=2)

    with mock.patch.object(certificate, "afresh", once):
        checkpoint.save(model, processor, place, prove=prove)
    seed = (place / certificate.NAME).read_bytes()
    sound, config = certificate._weights(place), checkpoint.load_config(place)

    def read(raw: bytes) -> object:
        (place / certificate.NAME).write_bytes(raw)
        with (  # a new process takes seconds, the model's own files are not what is changed
            mock.patch.object(certificate, "afresh", return_value=told[0]),
            mock.patch.object(certificate, "_weights", return_value=sound),
            mock.patch.object(checkpoint, "load_config", return_value=config),
        ):
            return certificate.verify(place)

    return [seed], read


def _results(path: Path) -> object:
    from slimlmm.report import markdown
    from slimlmm.results import Results

    return markdown(Results.load(path))


def _result_seeds() -> list[bytes]:
    return [(ROOT / "src" / "slimlmm" / "bundled" / "student" / "results.json").read_bytes()]


def _study_results(path: Path) -> object:
    from slimlmm.study_page import markdown, terminal
    from slimlmm.study_results import StudyResults

    found = StudyResults.load(path)
    return markdown(found), terminal(found)


def _study_result_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "benchmarks" / "results").glob("study-*.json"))]


IDENTITY = {"model": "0" * 64, "data": "1" * 64, "recipe": "shrink: 2\n"}
GIVEN = {"model": "teacher", "data": "ads", "trust_remote_code": False}


def _run_folder(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    """Make a run folder of small files alone, each read by the function that a resumed run reads it with."""
    from pydantic import TypeAdapter

    from slimlmm import journal, labels, reproducing, runfolder, saving, snapshot
    from slimlmm.files import digests, read_json, write_json
    from slimlmm.results import Round

    run, part, state = folder / "run", folder / "run" / "parts" / "0", folder / "run" / "checkpoint-3"
    runfolder.claim(run, IDENTITY, GIVEN)
    for place in (part / "model", state):
        place.mkdir(parents=True)
        (place / "weights.safetensors").write_bytes(b"weights")
    told = json.loads(_result_seeds()[0])
    metrics, accuracy = told["rounds"][0], told["student"]["accuracy"]
    facts = {"cut_score": metrics["after_cut"], "seconds": 1.0}
    write_json(part / "part.json", facts | {"files": digests(part / "model")})
    write_json(run / "metrics.json", metrics)
    write_json(run / "teacher-answers.json", {"a" * 64: "red", "b" * 64: ""})
    answer = dict.fromkeys(("id", "task", "picture", "question", "expected", "answer"), "it") | {"correct": True}
    write_json(run / "teacher-test.json", {"summary": accuracy, "predictions": [answer] * 2, "seconds": 1.0})
    saving._sign(state, "this")
    owner = {"pid": 1, "host": "here", "since": "2026-11-29"}
    write_json(run / "owner.json", owner)

    def taken(name: str) -> object:
        if name == "run.json":
            return reproducing.signed_of(run), runfolder.claim(run, IDENTITY)
        if name == "owner.json":
            return runfolder._owner(run)
        if name == "metrics.json":
            return read_json(TypeAdapter(Round), run / name)
        if name == "teacher-answers.json":
            return read_json(labels.KNOWN, run / name)
        if name == "teacher-test.json":
            return read_json(snapshot.EVALUATION, run / name)
        if name == "parts/0/part.json":
            return journal.is_whole(part / "part.json", part / "model"), journal.Journal(run).taken_up(0)
        return saving._fault(state, "this")

    names = ["run.json", "owner.json", "metrics.json", "teacher-answers.json", "teacher-test.json", "parts/0/part.json"]
    return several(run, [*names, "checkpoint-3/whole.json"], taken)


class Body:
    """As much of a request as the gateway reads."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.headers = raw, {}

    async def stream(self) -> Any:
        """Yield the body."""
        yield self.raw


def _chat(folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    """Read a request as the gateway does, then as the embedded engine does, pictures decoded."""
    from slimlmm.serving.arms import Arm
    from slimlmm.serving.chat import Bounds, ask_of
    from slimlmm.serving.gateway import Gateway
    from slimlmm.serving.limits import Limits
    from slimlmm.serving.shadow import features

    limits = Limits(pixels=10**6)
    gateway = Gateway(name="it", student=mock.create_autospec(Arm, instance=True), limits=limits)
    loop = asyncio.new_event_loop()
    urls = [
        f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(kind=kind, seed=35)).decode()}"
        for kind in ("PNG", "JPEG", "WEBP")
    ]
    plain = {
        "model": "it",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello?"}],
    }
    more = {
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "logprobs": True,
        "top_logprobs": 3,
        "n": 1,
    }
    shown = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}],
                }
            ]
        }
        for url in urls
    ]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}

    def read(raw: bytes) -> object:
        turn = loop.run_until_complete(gateway._read(Body(raw)))
        for url in turn.chat.pictures:
            features(url, limits.pixels, keep=False)
        return ask_of(turn.chat, Bounds(tokens=16, pixels=limits.pixels)), json.dumps(turn.raw)

    return [json.dumps(one).encode() for one in (plain, plain | more, *shown, shown[0] | streamed | more)], read


def _serving(path: Path) -> object:
    from slimlmm.serving import settings

    return settings.read(path, {"limits.tokens": 9})


def _servings() -> list[bytes]:
    told = {
        "student": {"urls": ["http://127.0.0.1:9001", "http://127.0.0.1:9002"]},
        "teacher": {"urls": ["http://127.0.0.1:9003"], "model": "big"},
        "shadow": {"share": 0.1},
        "candidate": "http://127.0.0.1:9004",
        "canary": {"weight": 0.1},
        "store": {"where": "answers.sqlite", "retention_days": 30},
        "limits": {"pictures": 4, "picture_hosts": ["example.org"], "pixels": 1000000},
        "batching": {"size": 4, "wait_ms": 1.5},
        "port": 8001,
    }
    return [yaml.safe_dump(told).encode(), yaml.safe_dump({"student": "http://127.0.0.1:9001"}).encode()]


def _monitoring(path: Path) -> object:
    from slimlmm.monitoring import settings

    return settings.read(path)


def _monitorings() -> list[bytes]:
    from slimlmm.monitoring.settings import Monitoring

    return [yaml.safe_dump(Monitoring().model_dump(mode="json")).encode()]


def _escalation(path: Path) -> object:
    from slimlmm.serving import escalation

    return escalation.read(path).confidence([-0.1])


def _escalations() -> list[bytes]:
    told = {"kind": "least", "threshold": -0.3, "rows": 9, "share": 0.1}
    return [json.dumps(told | dict.fromkeys(("accuracy", "student_accuracy", "teacher_accuracy"), 0.9)).encode()]


TARGETS = (
    Target("pictures", _pictures),
    Target("chat request", _chat, JSON),
    Target("escalation.json", one_file(_escalation, "escalation.json", _escalations), JSON),
    Target("certificate.json", _certificate, JSON),
    Target("run folder", _run_folder, _named(lambda _: JSON)),
    Target("safetensors", _safetensors, _named(lambda name: JSON if name.endswith(".json") else HEADER)),
    Target("results.json", one_file(_results, "results.json", _result_seeds), JSON),
    Target("study.json", one_file(_study_results, "study.json", _study_result_seeds), JSON),
    Target("monitoring settings", one_file(_monitoring, "monitor.yaml", _monitorings), YAML),
    Target("study", one_file(_study, "study.yaml", _studies), YAML),
    Target("recipe", one_file(_recipe, "recipe.yaml", _recipes), YAML),
    Target("serving settings", one_file(_serving, "serve.yaml", _servings), YAML),
    rows(".jsonl", LINES),
    rows(".json", JSON),
    rows(".parquet", PARQUET),
    Target("config.json", _config, JSON),
    Target("processor", _processor, _named(lambda name: JSON if name.endswith(".json") else None)),
    rows(".csv", CSV),
    *(
        rows(suffix, codec, whole=True)
        for suffix, codec in ((".jsonl", LINES), (".json", JSON), (".csv", CSV), (".parquet", PARQUET))
    ),
)
