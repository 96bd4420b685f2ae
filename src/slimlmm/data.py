"""Rows of image-question-answer data: reading them from any usual place, checking them, and naming what is wrong.

A row is the short form ``image, question, answer[, task, id]`` or the conversational form ``messages`` (+ ``images``) of the
transformers and TRL documentation, with one picture, one user turn and one assistant turn; a system turn may stand before them
(in the short form: ``system``).
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from slimlmm import pictures
from slimlmm.errors import UserError
from slimlmm.pictures import USUAL, PictureError, PictureSettings
from slimlmm.tables import records_of, tables_of

VALIDATION_SHARE = 0.1
#: half of a pair, which JSON can spell and no file can hold
SURROGATE = re.compile("[\ud800-\udfff]")
HERE = Path()
#: what many data sets write where the picture goes
PLACEHOLDER = "<image>"
#: row visits of a training step over so many pictures, with at most so many questions about each
StepRows = Callable[[int, int], float]
#: where a picture lies that may be read, by folder of its table, root of the data and its own name: rows share pictures
Places = dict[tuple[Path, Path, str], Path]


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture, with the answer wanted. `image` is a path or the encoded bytes of the file."""

    id: str
    image: Path | bytes
    question: str
    answer: str
    task: str = ""
    system: str = ""
    """what a system turn says before the question"""
    tokens: tuple[int, ...] = ()
    """token ids that a model wrote in place of the answer, end token included where it came to one; none in data"""
    allowed: PictureSettings = USUAL
    """which pictures are decoded"""

    @property
    def asked(self) -> tuple[str, str]:
        """The question, and what a system turn says before it."""
        return self.question, self.system

    def picture_bytes(self) -> bytes:
        """Return the encoded picture file."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()

    def picture_key(self) -> str:
        """Return what rows about the same picture share: its path, or a hash of its bytes."""
        return hashlib.sha256(self.image).hexdigest() if isinstance(self.image, bytes) else str(self.image)

    def allowed_bytes(self) -> bytes:
        """Return the encoded picture file; PictureError where it is not allowed."""
        return self.image if isinstance(self.image, bytes) else pictures.file_bytes(self.image, self.allowed)

    def open(self) -> Image.Image:
        """Decode the picture as RGB, its EXIF rotation applied; PictureError where it is not allowed or cannot be decoded."""
        return pictures.upright(self.allowed_bytes(), self.allowed)


@dataclass(slots=True)
class Splits:
    """Checked rows by split, and what was said about them (`notes`) while reading."""

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def need(self, split: str, source: Path | str) -> list[Row]:
        """Return the rows of a split, or refuse with its name when there are none."""
        rows: list[Row] = getattr(self, split)
        if not rows:
            raise UserError(f"{source}: the split {split!r} is empty. Add {split}.jsonl with image, question, answer.")
        return rows


def load(
    source: Path | str,
    *,
    max_bad_share: float = 0.01,
    unlabelled: bool = False,
    allowed: PictureSettings = USUAL,
) -> Splits:
    """Read all splits of a folder or file, check every row, and split validation off train when it is missing.

    Args:
        source: a folder with ``train/validation/test`` files or sub-folders, a ``datasets`` folder, or one file (= train).
        max_bad_share: the share of rows in [0, 1] that may be skipped as broken before the run is refused.
        unlabelled: whether train rows may lack an answer (it is then empty); those never go to validation.
        allowed: which pictures are read and decoded; a row with another is broken.

    Raises:
        UserError: nothing readable, no rows, or more broken rows than allowed (with the counts and the first of each kind).
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder. DATA is a folder or file of rows, see the README.")
    splits = Splits()
    for split, tables in tables_of(source).items():
        rows = check(
            (record for table in tables for record in records_of(table, root_of(source))),
            name=f"{source}: {split}",
            max_bad_share=max_bad_share,
            notes=splits.notes,
            unlabelled=unlabelled and split == "train",
            allowed=allowed,
        )
        setattr(splits, split, rows)
    if not (splits.train or splits.validation or splits.test):
        raise UserError(f"{source}: no rows found in any split.")
    if splits.train and not splits.validation:
        _split_validation_off(splits)
    return splits


def _split_validation_off(splits: Splits) -> None:
    """Move about a tenth of the train pictures (with all their rows) to validation, and say so.

    Always the same ones, so that no other seed takes for validation what a run has trained on.
    """
    pictures = sorted(
        {row.picture_key() for row in splits.train} - {row.picture_key() for row in splits.train if not row.answer}
    )
    random.Random(0).shuffle(pictures)
    taken = set(pictures[: max(1, int(len(pictures) * VALIDATION_SHARE))]) if len(pictures) > 1 else set()
    splits.validation = [row for row in splits.train if row.picture_key() in taken]
    splits.train = [row for row in splits.train if row.picture_key() not in taken]
    splits.notes.append(
        f"no validation split: {len(splits.validation)} rows ({len(taken)} pictures) were split off train"
    )


def root_of(source: Path) -> Path:
    """Return the folder of a data set, which its pictures may not lie outside of."""
    return source if source.is_dir() else source.parent


def check(
    raw: Iterable[Mapping[str, Any]],
    *,
    name: str,
    max_bad_share: float = 0.01,
    notes: list[str] | None = None,
    unlabelled: bool = False,
    allowed: PictureSettings = USUAL,
) -> list[Row]:
    """Turn raw records into rows, decoding every picture once; broken ones are counted, named and skipped.

    Raises:
        UserError: more than `max_bad_share` of the records are broken; the message gives each kind with its first record.
    """
    problems: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows: list[Row] = []
    places: Places = {}
    total = 0

    def bad(error: ValueError, where: str) -> None:
        kind, detail = str(error), ""
        if isinstance(error, PictureError):  # one kind, whatever is particular about each
            kind, detail = f"{error.kind} ({pictures.REASONS[error.kind]})", error.detail
        problems[kind] += 1
        first.setdefault(kind, f"{where}: {detail}" if detail else where)

    for total, record in enumerate(raw, 1):
        try:
            rows.append(parse(record, total - 1, unlabelled=unlabelled, allowed=allowed, places=places))
        except ValueError as error:
            bad(error, str(record.get("id") or f"row {total}"))
    broken, twins = _looked_at(rows)
    for row in rows:
        if row.picture_key() in broken:
            where = row.image if isinstance(row.image, Path) else "embedded bytes"
            bad(broken[row.picture_key()], f"{row.id} ({where})")
    kept = [_told_by(row, twins) for row in rows if row.picture_key() not in broken]
    if skipped := sum(problems.values()):
        listing = "; ".join(f"{count} x {kind} (first: {first[kind]})" for kind, count in problems.most_common())
        if skipped > max_bad_share * total:
            raise UserError(
                f"{name}: {skipped} of {total} rows are broken, more than the allowed {max_bad_share:.0%}: {listing}. "
                "Mend them, or raise data.max_bad_share in the recipe."
            )
        if notes is not None:
            notes.append(f"{name}: skipped {skipped} of {total} rows: {listing}")
    return kept


def _looked_at(rows: Sequence[Row]) -> tuple[dict[str, PictureError], dict[str, Path | bytes]]:
    """Decode every picture once; return what is wrong by picture key, and the first of equal ones by those of the others."""
    distinct = {row.picture_key(): row for row in rows}

    def attempt(row: Row) -> PictureError | bytes:
        try:
            raw = row.allowed_bytes()
            pictures.upright(raw, row.allowed)
        except PictureError as error:
            return error
        return hashlib.sha256(raw).digest()

    with ThreadPoolExecutor(4) as pool:
        verdicts = dict(zip(distinct, pool.map(attempt, distinct.values()), strict=True))
    first: dict[bytes, str] = {}
    twins: dict[str, Path | bytes] = {}
    for key, found in verdicts.items():
        if isinstance(found, bytes) and (one := first.setdefault(found, key)) != key:
            twins[key] = distinct[one].image
    return {key: found for key, found in verdicts.items() if isinstance(found, PictureError)}, twins


def _told_by(row: Row, twins: Mapping[str, Path | bytes]) -> Row:
    """Return the row with the first of several files of equal bytes: they are one picture, and rows of it are not independent."""
    return replace(row, image=twins[key]) if twins and (key := row.picture_key()) in twins else row


def parse(
    record: Mapping[str, Any],
    number: int,
    *,
    unlabelled: bool = False,
    allowed: PictureSettings = USUAL,
    places: Places | None = None,
) -> Row:
    """Turn one raw record (short or conversational form) into a row; ValueError says what is missing or not allowed.

    With `unlabelled` an answer may be missing, and is then empty. Pictures whose place is in `places` are not looked up again.
    """
    question: Any
    answer: Any
    system: Any
    if record.get("messages"):
        system, question, answer = _turns(record["messages"], unlabelled)
        if system and _instruction(record.get("system")):
            raise ValueError("two system turns, in messages and beside them")
        system = system or record.get("system")
        images = record.get("images") or [record.get("image")]
        if not isinstance(images, list):
            raise ValueError("images are no list")
        if len(images) != 1:
            raise ValueError(f"{len(images)} pictures in one row (one is supported)")
        image = images[0]
    else:
        system, question, answer, image = (record.get(key) for key in ("system", "question", "answer", "image"))
    if not isinstance(question, str) or not (question := _asked(question)):
        raise ValueError("empty question")
    answer, system = _written(answer), _instruction(system)
    if any(PLACEHOLDER in text for text in (system, question, answer)):
        raise ValueError(
            f"{PLACEHOLDER} inside of a text (one picture is supported, which stands before or behind the question)"
        )
    if not answer.strip() and not unlabelled:
        raise ValueError("empty answer (of train rows the teacher can give them: data.answers: filled in the recipe)")
    told = record.get("id")
    identity = f"row-{number + 1}" if told is None or told == "" else str(told)
    folder = record.get("_folder") or HERE
    picture = _picture(image, folder, record.get("_root") or folder, allowed, {} if places is None else places)
    task = "" if record.get("task") is None else str(record["task"])
    if any(map(SURROGATE.search, (identity, system, question, answer, task))):
        raise ValueError("half of a surrogate pair, which is no character, in a text")
    return Row(identity, picture, question, answer.strip(), task, system, allowed=allowed)


def _asked(question: str) -> str:
    """Return a question without the placeholder of its picture, which many data sets write before or behind it."""
    return question.strip().removeprefix(PLACEHOLDER).removesuffix(PLACEHOLDER).strip()


def _instruction(system: object) -> str:
    """Return what a system turn says, "" for none."""
    if system is None or (isinstance(system, float) and math.isnan(system)):  # how a column of numbers has none
        return ""
    if not isinstance(system, str):
        raise ValueError(f"what the system turn says is of type {type(system).__name__}, not text")
    return system.strip()


def _written(answer: object) -> str:
    """Return an answer as text, "" for none; whole numbers are written out, of others the form is not known any more."""
    if answer is None or isinstance(answer, str):
        return answer or ""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    raise ValueError(f"the answer is of type {type(answer).__name__}, not text (quote it, as it is to be said)")


def _picture(image: object, folder: Path, root: Path, allowed: PictureSettings, places: Places) -> Path | bytes:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise ValueError("no picture")
    if "://" in image:
        raise ValueError("picture is a URL (only local files and bytes are read)")
    if known := places.get((folder, root, image)):
        return known
    path = folder / image
    if place := pictures.place_of(path, root, allowed.folders):
        raise PictureError(place, image)
    places[folder, root, image] = path
    return path


def _turns(messages: object, unlabelled: bool) -> tuple[str, str, str]:
    """Return what the system, the user and the assistant say, "" for one without a turn."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("messages are no list of turns")
    roles = [message.get("role") for message in messages]
    before = roles[:1] in (["system"], ["developer"])
    if roles[before:] != ["user", "assistant"] and not (unlabelled and roles[before:] == ["user"]):
        raise ValueError(
            f"messages must be one user and one assistant turn, behind a system turn or none, not {str(roles)[:100]}"
        )
    said = [text_of(message.get("content")) for message in messages]
    system = _first(messages[0], said.pop(0)) if before else ""
    return system, said[0], said[1] if len(said) > 1 else ""


def _first(message: Mapping[str, Any], said: str) -> str:
    """Return what a system turn says; one that says nothing is not none: templates may have something to say then."""
    parts = message.get("content")
    if isinstance(parts, list) and any(part.get("type") != "text" for part in parts):
        raise ValueError("a picture in the system turn (one is supported, in the user's turn)")
    if not said.strip():
        raise ValueError("empty system turn (say something, or leave the turn out)")
    return said


def text_of(content: object) -> str:
    """Return what a turn says: a text, or those of its parts, one a line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError("the content of a turn is neither text nor a list of parts")
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def rows_a_step(rows: Sequence[Row]) -> StepRows:
    """Return how many of these rows steps visit in the mean; epochs end in a part, which counts where pictures are few."""
    each = Counter(row.picture_key() for row in rows).values()

    def visited(pictures: int, questions: int) -> float:
        groups = sum(math.ceil(count / questions) for count in each)
        return len(rows) / math.ceil(groups / pictures)

    return visited


def by_picture(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Group rows that share a picture, at most `most` rows a group, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.picture_key(), []).append(row)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def by_system(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows behind the same system turn, in order of first appearance: it stands before the picture in their prompts."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.system, []).append(row)
    return list(groups.values())


def sample(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Return `count` rows (all when None), whole pictures at a time, in a seeded order."""
    if count is None or count >= len(rows):
        return list(rows)
    groups = by_picture(rows, len(rows))
    random.Random(seed).shuffle(groups)
    taken: list[Row] = []
    for group in groups:
        taken += group[: count - len(taken)]
        if len(taken) == count:
            break
    return taken


def spread(rows: Sequence[Row], count: int, each: int, seed: int) -> list[Row]:
    """Return `count` rows, `each` a picture in a seeded order, and more of them where the pictures run out."""
    groups = by_picture(rows, len(rows) or 1)
    order = random.Random(seed)
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    taken: list[Row] = []
    while len(taken) < min(count, len(rows)):
        taken += [row for group in groups for row in group[:each]]
        groups = [group[each:] for group in groups]
    return taken[:count]


def fingerprint(rows: Sequence[Row]) -> str:
    """Return a hash over all rows: question, answer, task, and the bytes of every distinct picture."""
    digest = hashlib.sha256()
    seen: dict[str, bytes] = {}
    for row in rows:
        key = row.picture_key()
        if key not in seen:
            seen[key] = hashlib.sha256(row.picture_bytes()).digest()
        digest.update(told(row) + seen[key])
    return digest.hexdigest()


def told(row: Row) -> bytes:
    """Return all of a row but its picture, as a hash takes it."""
    system = (row.system,) if row.system else ()  # hashes of data without system turns stay what they were
    return "\x1f".join((row.id, row.question, row.answer, row.task, *system)).encode()
