"""Answers: empty, long, unsayable, too long for the model, and the same one nearly always."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.reading import Entry, Reading
from slimlmm.checkdata.record import Example, Lengths, Task
from slimlmm.collate import Prompter
from slimlmm.progress import Reporter

#: a task of fewer rows tells nothing about balance
ENOUGH = 50
#: share of one answer beyond which a task is lopsided
LOPSIDED = 0.8
BUNDLE = 2048
WORK = "counting tokens"


def judge_words(reading: Reading, limit: int, pad: Pad) -> Lengths | None:
    """Put blank and long answers on the pad; return the distribution of their lengths in words."""
    lengths = []
    for entry in _answered(reading, pad):
        lengths.append(len(entry.row.answer.split()))
        if lengths[-1] > limit:
            pad.add("long answer", entry.example(f"{lengths[-1]} words"), len(reading.entries))
    return _lengths(lengths, "words", limit)


def judge_tokens(
    reading: Reading, processor: Any, size: int, room: tuple[int, int] | None, limit: int, pad: Pad, tell: Reporter
) -> Lengths | None:
    """Put blank, long and unsayable answers on the pad; return the distribution of their lengths in tokens.

    Args:
        reading: the rows.
        processor: of the model.
        size: how many tokens the model has embeddings for.
        room: positions of the model, and the most tokens that a picture adds to a prompt; None where either is unknown.
        limit: tokens beyond which an answer is long.
        pad: where findings go.
        tell: progress.
    """
    texts = _Texts(processor)
    entries = _placed(_answered(reading, pad), texts.prompter, pad)
    lengths: list[int] = []
    for start in range(0, len(entries), BUNDLE):
        part = entries[start : start + BUNDLE]
        for entry, asked, answered in zip(part, *texts.ids(part), strict=True):
            lengths.append(len(answered))
            for kind, note in texts.faults(entry, asked, answered, size):
                pad.add(kind, entry.example(note), len(entries))
            if len(answered) > limit:
                pad.add("long answer", entry.example(f"{len(answered)} tokens"), len(entries))
            whole = len(asked) + len(answered) + (room[1] if room else 0)
            if room and whole > room[0]:
                note = f"{whole} tokens, {room[1] + 1} of them for the picture, and room for {room[0]}"
                pad.add("no room", entry.example(note), len(entries))
        tell.step(WORK, len(lengths), len(entries))
    return _lengths(lengths, "tokens", limit)


class _Texts:
    """Prompts and answers of one processor as tokens, each different text once."""

    def __init__(self, processor: Any) -> None:
        self.prompter = Prompter(processor)
        self.tokenizer = processor.tokenizer
        self.unknown = self.tokenizer.unk_token_id
        marks = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        self.special = frozenset((*marks, *self.tokenizer.all_special_ids)) - {self.unknown}
        self._plain: dict[str, list[int]] = {}
        self._back: dict[str, str] = {}

    def ids(self, entries: Sequence[Entry]) -> tuple[list[list[int]], list[list[int]]]:
        """Return prompt ids (one placeholder for the picture) and answer ids, end token included, of rows."""
        rows = [entry.row for entry in entries]
        turns = [self.prompter.turns(row.question, row.answer, row.system) for row in rows]
        asked = self.tokenizer([prompt for prompt, _ in turns])["input_ids"]
        answered = self.tokenizer([answer for _, answer in turns], add_special_tokens=False)["input_ids"]
        plain = sorted({text for row in rows for text in (row.system, row.question, row.answer)})
        self._plain = dict(zip(plain, self.tokenizer(plain, add_special_tokens=False)["input_ids"], strict=True))
        back = self.tokenizer.batch_decode(list(self._plain.values()), skip_special_tokens=True)
        self._back = dict(zip(plain, back, strict=True))
        return asked, answered

    def faults(self, entry: Entry, asked: list[int], answered: list[int], size: int) -> list[tuple[str, str]]:
        """Return what is wrong with the tokens of one row of the last call of `ids`: kinds of findings and notes."""
        found = []
        texts = {"system turn": entry.row.system, "question": entry.row.question, "answer": entry.row.answer}
        unknown = [name for name, text in texts.items() if self.unknown in self._plain[text]]
        if unknown:
            found.append(("unknown tokens", f"{' and '.join(unknown)}: {texts[unknown[0]]!r}"))
        elif (back := self._back[entry.row.answer]).split() != entry.row.answer.split() and not self._marks(
            texts["answer"]
        ):
            found.append(("unknown tokens", f"answer {entry.row.answer!r} reads back as {back!r}"))
        special = [token for text in texts.values() for token in self._marks(text)]
        if special:
            found.append(("special tokens", f"{self.tokenizer.convert_ids_to_tokens(special[0])!r}"))
        if (highest := max((*asked, *answered), default=0)) >= size:
            found.append(("foreign tokens", f"id {highest}, embeddings for {size}"))
        return found

    def _marks(self, text: str) -> list[int]:
        """Return the special tokens that a text spells."""
        return [token for token in self._plain[text] if token in self.special]


def _answered(reading: Reading, pad: Pad) -> list[Entry]:
    """Return the rows with an answer; the others are findings."""
    found = []
    for entry in reading.entries:
        if entry.row.answer.strip():
            found.append(entry)
        else:
            kind = "blank train answer" if entry.split == "train" else "blank answer"
            pad.add(kind, entry.example(entry.row.question), len(reading.entries))
    return found


def _placed(entries: list[Entry], prompter: Prompter, pad: Pad) -> list[Entry]:
    """Return the rows whose turns the chat template has places for; the others are findings."""
    if prompter.system_form:
        return entries
    for entry in (one for one in entries if one.row.system):
        pad.add("no place", entry.example(entry.row.system), len(entries))
    return [entry for entry in entries if not entry.row.system]


def _lengths(lengths: Sequence[int], unit: Any, limit: int) -> Lengths | None:
    if not lengths:
        return None
    p50, p95 = (float(value) for value in np.percentile(lengths, [50, 95]))
    return Lengths(unit=unit, p50=p50, p95=p95, max=max(lengths), limit=limit)


def balance(reading: Reading, pad: Pad) -> tuple[Task, ...]:
    """Return the balance of answers by split and task; lopsided tasks, and tasks that a split lacks, are findings."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    firsts: dict[tuple[str, str], Entry] = {}
    for entry in reading.entries:
        firsts.setdefault((entry.split, entry.row.task), entry)
        if answer := " ".join(entry.row.answer.split()):
            counts[entry.split][entry.row.task][answer] += 1
    found = []
    for split, by_task in counts.items():
        for name, answers in sorted(by_task.items()):
            [(most, times)] = answers.most_common(1)
            rows = answers.total()
            task = Task(
                split=split, task=name, rows=rows, distinct=len(answers), most_frequent=most, share=times / rows
            )
            found.append(task)
            if rows >= ENOUGH and task.share > LOPSIDED:
                note = f"{name or 'all rows'}: {most!r} is {task.share:.0%} of {rows} rows"
                pad.add("lopsided task", firsts[split, name].example(note), sum(map(len, counts.values())))
    _absent({split: {task for where, task in firsts if where == split} for split, _ in firsts}, firsts, pad)
    return tuple(found)


def _absent(tasks: dict[str, set[str]], firsts: dict[tuple[str, str], Entry], pad: Pad) -> None:
    """Tell tasks of a held-out split that are not trained, and trained ones that it does not ask about."""
    trained = tasks.get("train")
    if trained is None:
        return
    for split in sorted(tasks.keys() - {"train"}):
        for name in sorted(tasks[split] - trained):
            pad.add("untrained task", firsts[split, name].example(f"{name!r} in {split}"), len(tasks[split]))
        for name in sorted(trained - tasks[split]):
            note = f"{name!r} in {split}"
            pad.add("unasked task", Example(split=split, file="", line=0, id="", note=note), len(trained))
