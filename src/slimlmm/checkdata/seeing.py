"""How a model sees a few rows of the data: the checks of `alignment` run, and what they say put on the pad."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from slimlmm.checkdata.alignment import features, limit, masks, probed, shifted, wrong_mask
from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.look import Look
from slimlmm.checkdata.reading import Entry, Reading
from slimlmm.checkdata.record import Mask, Model
from slimlmm.checkpoint import Loaded
from slimlmm.collate import Batch, Collator, Prompter
from slimlmm.data import by_picture, spread
from slimlmm.errors import UserError
from slimlmm.progress import Reporter
from slimlmm.teacher import weights_fingerprint

#: rows whose labels are shown
SHOWN = 4
#: what a model, a processor or a template may raise on rows that they cannot take
FAILURES = (UserError, ValueError, TypeError, RuntimeError, LookupError, AttributeError)


@dataclass(slots=True)
class Seen:
    """How a model sees the rows, and how many tokens a picture adds to a prompt at most (None: it could not be tried)."""

    record: Model
    added: int | None = None


def chosen(reading: Reading, looks: Sequence[Look], count: int, seed: int) -> list[Entry]:
    """Return a few rows with an answer and a sound picture, two of a picture, of train where it has any."""
    sound = [entry for entry in reading.entries if entry.row.answer.strip() and not looks[entry.picture].fault]
    train = [entry for entry in sound if entry.split == "train"] or sound
    places = {id(entry.row): entry for entry in train}
    return [places[id(row)] for row in spread([entry.row for entry in train], count, 2, seed)]


def judge(
    loaded: Loaded, name: str, reading: Reading, looks: Sequence[Look], count: int, seed: int, pad: Pad, tell: Reporter
) -> Seen:
    """Run `count` rows through the model as training would; what is out of line goes on the pad."""
    taken = chosen(reading, looks, count, seed)
    context = loaded.model.config.get_text_config().to_dict().get("max_position_embeddings")
    limited = limit(loaded.model.device)
    said = Model(
        name=name,
        fingerprint=weights_fingerprint(loaded.model),
        context=context,
        picture_tokens=None,
        features=None,
        masks=(),
        self_kl=None,
        limit=limited,
        cross_entropy=None,
        rows=len(taken),
    )
    seen = Seen(said)
    if not taken:
        tell.say("no row has a sound picture and an answer: the model was not run")
        return seen
    try:
        _placeholders(loaded, reading, looks, taken, pad, seen)
        _masks(loaded, taken, pad, seen)
        tell.say("running the model against itself", rows=len(taken))
        _self_distilled(loaded, taken, pad, seen)
    except FAILURES as error:
        text = str(error).splitlines() or [""]
        note = f"{type(error).__name__}: {text[0][:200]}"
        pad.add("not run", taken[0].example(note), len(taken), len(taken))
    return seen


def _placeholders(
    loaded: Loaded, reading: Reading, looks: Sequence[Look], taken: list[Entry], pad: Pad, seen: Seen
) -> None:
    """Count picture tokens of the rows taken, and of the smallest and largest pictures: of the prompt, and of the tower."""
    collator = Collator(loaded.processor, packed=False)
    counts, added = [], []
    for entry in [*taken, *_extremes(reading, looks, random.Random(0))]:
        batch = collator([[entry.row]])
        counts.append(int(batch["picture_tokens"].sum()))
        added.append(batch["input_ids"].shape[1] - len(_text(collator.prompter, entry)))
        if len(counts) == 1 and (found := features(loaded, batch)) is not None:
            seen.record = seen.record.model_copy(update={"features": found})
            if found != counts[0]:
                note = f"{counts[0]} placeholders in the prompt, {found} tokens from the vision tower"
                pad.add("placeholders", entry.example(note), 1)
    seen.added = max(added)
    seen.record = seen.record.model_copy(update={"picture_tokens": (min(counts), max(counts))})


def _text(prompter: Prompter, entry: Entry) -> list[int]:
    prompt = prompter.prompt(*entry.row.asked)
    return [*prompter.ids(prompt, special=True), *prompter.answer_ids(entry.row)]


def _extremes(reading: Reading, looks: Sequence[Look], order: random.Random) -> list[Entry]:
    """Return rows about the pictures of least and most pixels, and of the most unequal sides."""
    sound = [entry for entry in reading.pictures if not looks[entry.picture].fault]
    order.shuffle(sound)

    def pixels(entry: Entry) -> float:
        return looks[entry.picture].width * looks[entry.picture].height

    def sides(entry: Entry) -> float:
        return looks[entry.picture].width / looks[entry.picture].height

    wanted = (min(sound, key=pixels), max(sound, key=pixels), min(sound, key=sides), max(sound, key=sides))
    return list({entry.picture: entry for entry in wanted}.values())


def _masks(loaded: Loaded, taken: list[Entry], pad: Pad, seen: Seen) -> None:
    """Show what a few rows are trained on, and judge the labels of all of them, one by one and packed."""
    groups = by_picture([entry.row for entry in taken], 16)
    places = {id(entry.row): entry for entry in taken}
    batch: Batch = Collator(loaded.processor, packed=False)(groups)
    shown: list[Mask] = masks(loaded.processor, batch)
    for index, row in enumerate(batch["rows"]):
        if note := wrong_mask(loaded.processor, batch, index):
            pad.add("label mask", places[id(row)].example(note), len(taken))
    seen.record = seen.record.model_copy(update={"masks": tuple(shown[:SHOWN])})
    try:
        packed = Collator(loaded.processor, packed=True)(groups)
    except FAILURES:  # a processor whose questions are not packed in training either (`can_pack`)
        return
    for index, head in enumerate(packed["heads"]):
        if shifted(packed, index):
            note = "packed with its picture's other questions, labels are not the tokens that follow"
            pad.add("label mask", places[id(head)].example(note), len(taken))


def _self_distilled(loaded: Loaded, taken: list[Entry], pad: Pad, seen: Seen) -> None:
    """Distil the model from itself, without a step: the loss has to be 0."""
    found = probed(loaded, [entry.row for entry in taken])
    seen.record = seen.record.model_copy(update={"self_kl": found.loss, "cross_entropy": found.cross_entropy})
    if not found.loss < seen.record.limit:
        note = (
            f"{found.loss:.3g} nats an answer token against itself (collated {found.collated:.3g}, each row alone "
            f"{found.plain:.3g}), more than {seen.record.limit:g}"
        )
        pad.add("misaligned", taken[0].example(note), len(taken), len(taken))
    note = f"{found.cross_entropy:.4g} nats over {found.tokens} tokens of {len(taken)} rows"
    pad.add("cross-entropy", taken[0].example(note), len(taken), len(taken))
