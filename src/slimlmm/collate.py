"""From rows to batches: prompts, answer masks, and several questions packed behind one picture prefix.

Shape legend: B sequences, T tokens. ``shift_labels`` [B, T] holds at each position the answer token to be predicted *from* it,
-100 elsewhere, so losses need no shift and see answer tokens only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from slimlmm.data import Row, by_system, text_of
from slimlmm.errors import UserError
from slimlmm.families import ANSWER_INPUTS, NOT_ASKED, PLACES, PROMPTS
from slimlmm.probes import begun, said_first, system_form, template_of, turns_before

IGNORE = -100
#: an answer that nothing else in a prompt looks like
MARK = "Answer7Q"
NO_SYSTEM = "put what it says before the question, or give the model's folder a template that writes it."
Batch = dict[str, Any]


def real_tokens(batch: Batch) -> Tensor | None:
    """Return which tokens are not padding [B, T]; None where the batch does not tell.

    Under a packed batch's additive mask all of a sequence sees its first token, padding only itself.
    """
    mask: Tensor | None = batch.get("attention_mask")
    return mask if mask is None else mask[:, 0, :, 0] == 0 if mask.dim() == 4 else mask.bool()


def fitting(mask_BT: Tensor | None, values: Tensor) -> Tensor | None:
    """Return the mask where it tells the tokens of `values` [B, T, N] apart, else None."""
    return mask_BT if mask_BT is not None and mask_BT.shape == values.shape[:-1] else None


@dataclass(frozen=True, slots=True)
class Samples:
    """Which of a tower's tokens count, and which belong to one picture: what is fitted must not be judged on the same picture.

    `mask` [B, T]: tokens of a text tower that are no padding; `pictures`: the key of each of B sequences, where it is known.
    """

    mask: Tensor | None = None
    pictures: tuple[str, ...] = ()

    def of(self, values: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """Return values [B, T, N] with their weights [B, T] and how many of the first of them make one half.

        Tokens of a text tower that come as [B * T, N] (OPT's FFN) are told apart by the mask. Of other [T, N] (all pictures of a
        batch in one) it is not known which are whose, so all are on one side: 0.
        """
        if self.mask is not None and values.dim() == 2 and len(values) == self.mask.numel():
            values = values.unflatten(0, self.mask.shape)
        return values, fitting(self.mask, values), 0 if values.dim() == 2 else self._half(len(values))

    def _half(self, count: int) -> int:
        """Return where to part so many samples, nearest to the middle between two pictures; each picture has as many of them."""
        if not self.pictures:
            return count // 2
        each, odd = divmod(count, len(self.pictures))
        pairs = itertools.pairwise(self.pictures)
        starts = [at for at, (before, here) in enumerate(pairs, 1) if before != here]
        return 0 if odd or not starts else each * min(starts, key=lambda at: abs(2 * at - len(self.pictures)))


def samples_of(batch: Batch, *, text: bool) -> Samples:
    """Return what is known of a batch's samples; padding is that of the `text` tower."""
    heads = tuple(row.picture_key() for row in batch.get("heads", ()))
    return Samples(real_tokens(batch) if text else None, heads)


class Prompter:
    """Texts of one processor: the prompt that generation sees, and the answer (with its end token) that follows it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if reason := NOT_ASKED.get(type(processor).__name__):
            raise UserError(
                f"{type(processor).__name__}: {reason}, so rows cannot be asked of its models, for training or judging; inspect, "
                "plan without --data, and cut work."
            )
        if self.tokenizer.eos_token is None:
            raise UserError("the tokenizer has no end-of-sequence token, so answers cannot end.")
        self.template = template_of(processor)
        self.opening = self._opening()
        self.turns = lru_cache(maxsize=100_000)(self._turns)
        self.ids = lru_cache(maxsize=100_000)(self._ids)
        self.answers = lru_cache(maxsize=100_000)(self._answer)

    def prompt(self, question: str, system: str = "") -> str:
        """Return the text before the answer, the picture's placeholder included; `system`: what a system turn says first."""
        return self.turns(question, "x", system)[0]

    @cached_property
    def system_form(self) -> str:
        """How the template takes what a system turn says (`probes.system_form`)."""
        return system_form(self.processor, self.template)

    def refuse_unplaced(self, systems: Iterable[str]) -> None:
        """Raise a UserError where one of these is said by a system turn, and the template has no place for that."""
        if any(systems) and not self.system_form:
            raise UserError(f"the chat template has no place for a system turn: {NO_SYSTEM}")

    def conversation(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return turns of parts with what system turns say as rows of data say it, in the form that the template takes."""
        found = []
        for turn in turns:
            parts: Any = turn["content"]
            if turn["role"] == "system" and all(part["type"] == "text" for part in parts):
                parts = said_first(text_of(parts).strip(), self.system_form)
            found.append({**turn, "content": parts})
        return found

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """Return what users of stock code have to know.

        Raises:
            UserError: rows stand behind a system turn that the template has no place for.
        """
        notes = []
        if self.opening:
            notes.append(
                f"the chat template writes {self.opening!r} before every answer, but not as a generation prompt; it is part "
                "of the prompt here, so stock code has to append it (many templates do with enable_thinking=False)"
            )
        said = [row.system for row in rows if row.system]
        self.refuse_unplaced(said)
        if said:
            plain = "as a plain text, " * (self.system_form == "text")
            notes.append(
                f"{len(said)} of {len(rows)} rows stand behind a system turn; who uses the model has to put it before questions "
                f"too, {plain}as {min(said)[:80]!r}"
            )
        return notes

    def answer_ids(self, row: Row) -> list[int]:
        """Return the token ids of a row's answer, end token included; where a model wrote it, the very tokens that it wrote."""
        return list(row.tokens) or self.answers(row.question, row.answer, row.system)

    def _answer(self, question: str, answer: str, system: str = "") -> list[int]:
        """Return the token ids of an answer as they stand behind its prompt, which is what a model writes there.

        By themselves they may be others: Llama 2's tokenizer puts a space before a text. Where a token would span both, those by
        themselves are all that can follow the prompt.
        """
        prompt, text = self.turns(question, answer, system)
        before, whole = self.ids(prompt), self._ids(prompt + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.ids(text)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; `special` lets the tokenizer add what it puts around a prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _turns(self, question: str, answer: str, system: str = "") -> tuple[str, str]:
        """Return (prompt, answer text up to and including the end token); what a template writes before any answer is prompt."""
        self.refuse_unplaced([system])
        if self.template is None:
            plain = PROMPTS.get(type(self.processor).__name__)
            if plain is None:
                raise UserError(
                    f"{type(self.processor).__name__} has no chat template; add one (chat_template.jinja) to the model's folder."
                )
            return plain.format(question=question), f" {answer}{self.tokenizer.eos_token}"
        prompt, text = self._rendered(question, answer, system)
        if not text.startswith(self.opening):
            raise UserError(
                f"the chat template begins answers in two ways, {self.opening!r} and {text[: len(self.opening)]!r}, so answer "
                "tokens cannot be told apart."
            )
        prompt, text = prompt + self.opening, text[len(self.opening) :]
        end = self.tokenizer.eos_token
        return prompt, text[: text.index(end) + len(end)] if end in text else text.rstrip() + end

    def _rendered(self, question: str, answer: str, system: str = "") -> tuple[str, str]:
        """Return what the template writes for a question, and what it writes behind that where there is an answer."""
        asked = turns_before(question, system, self.system_form if system else "")
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt: str = self.processor.apply_chat_template(asked, chat_template=self.template, add_generation_prompt=True)
        whole: str = self.processor.apply_chat_template([*asked, reply], chat_template=self.template)
        if not whole.startswith(prompt):
            raise UserError(
                "the chat template does not extend its own generation prompt (the text with an answer does not start with the "
                "text without), so answer tokens cannot be told apart."
            )
        return prompt, whole[len(prompt) :]

    def _opening(self) -> str:
        """Return what the template writes before every answer but not as a generation prompt, such as an empty block of thoughts.

        A model that was taught to write it would be wrong wherever answers are compared, so it is part of the prompt.
        Blanks alone are not: they are no answer, and often part of its first token.

        Raises:
            UserError: the template does not write answers as they are.
        """
        if self.template is None:
            return ""
        try:
            _, text = self._rendered("x", MARK)
        except (TypeError, ValueError, TemplateError) as error:
            raise UserError(
                f"the chat template does not take a question about a picture and its answer: {error}"
            ) from error
        before, found, _ = text.partition(MARK)
        if not found or "'type'" in before:
            raise UserError(
                f"the chat template writes the answer {MARK!r} as {text[:80]!r}; it seems to be one for texts alone, give the "
                "model's folder one that takes lists of parts (chat_template.jinja)."
            )
        return before if before.strip() else ""


@contextmanager
def padding(tokenizer: Any, side: str | None = None) -> Iterator[None]:
    """Let the tokenizer pad on a side, with the end token if it has no padding token; then restore it."""
    before, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = side or before
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = before
        if pad is None:
            tokenizer.pad_token = None


def texts_of(processor: Any, rows: Sequence[Row]) -> list[str]:
    """Return every prompt and answer of the rows as the model sees them, once; in one where an answer is another by itself."""
    prompter, found = Prompter(processor), set()
    for turns in {(row.question, row.answer, row.system) for row in rows}:
        prompt, answer = prompter.turns(*turns)
        found |= {prompt, answer}
        if prompter.answers(*turns) != prompter.ids(answer):
            found.add(prompt + answer)
    return sorted(found | {_around(processor, prompter, row) for row in rows[:1]})


def _around(processor: Any, prompter: Prompter, row: Row) -> str:
    """Return a prompt as the processor itself writes it: some put a system prompt before it (Janus), which is tokens too."""
    prompt = prompter.prompt(*row.asked)
    inputs = processor(text=[prompt], images=[[row.open()]], return_tensors="pt", **begun(processor, prompt))
    text: str = processor.tokenizer.decode(inputs["input_ids"][0])
    return text


def picture_token(processor: Any) -> int:
    """Return the id of the token that stands where a picture's tokens go."""
    place = PLACES.get(type(processor).__name__)
    if place is not None:
        return int(processor.tokenizer.convert_tokens_to_ids(place(processor)))
    return int(processor.image_token_id)


@dataclass(slots=True)
class _Encoded:
    """One row as tokens: prompt ids (picture placeholders expanded), answer ids, and the prompt's other per-token tensors."""

    prompt: Tensor
    answer: Tensor
    per_token: dict[str, Tensor]


class Collator:
    """Turn groups of rows (each group about one picture) into one batch for training or scoring.

    Packed, rows of a group behind the same system turn become one sequence ``prefix | question answer | question answer ...``:
    every question sees the shared prefix (with the picture) and itself, under a 4-D additive mask and its own positions, so the
    result equals separate rows while the picture's tokens are paid once. Unpacked, every row is a sequence of its own.
    """

    def __init__(self, processor: Any, *, packed: bool) -> None:
        self.processor = processor
        self.prompter = Prompter(processor)
        self.packed = packed
        self.picture_token = picture_token(processor)
        self.at_answers = ANSWER_INPUTS.get(type(processor).__name__, {})
        tokenizer = self.prompter.tokenizer
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, groups: Sequence[Sequence[Row]]) -> Batch:
        """Return model inputs, ``shift_labels`` and ``picture_tokens`` [B, T], ``rows`` (in label order), ``heads``."""
        groups = [part for group in groups for part in by_system(group)]
        if not self.packed:
            groups = [[row] for group in groups for row in group]
        flat, heads = [row for group in groups for row in group], [group[0] for group in groups]
        encoded, batch = self._encode(flat, heads)
        if self.packed:
            batch |= self._pack(groups, encoded)
        else:
            batch |= self._pad([torch.cat((one.prompt, one.answer)) for one in encoded], encoded)
        batch["picture_tokens"] = batch["input_ids"] == self.picture_token
        batch["rows"], batch["heads"] = flat, heads
        return batch

    def _encode(self, flat: Sequence[Row], heads: Sequence[Row]) -> tuple[list[_Encoded], Batch]:
        """Tokenise all rows; return them with the picture tensors of one row a group."""
        pictures: dict[str, Any] = {}
        for row in flat:
            if row.picture_key() not in pictures:
                pictures[row.picture_key()] = row.open()
        first = self._process(heads, pictures)
        keys = [key for key in first if key not in ("input_ids", "attention_mask")]
        shape = first["input_ids"].shape
        per_token = [key for key in keys if first[key].shape == shape or key in self.at_answers]
        whole = first if len(heads) == len(flat) else self._tokens_only(flat, heads, first, per_token)
        encoded = []
        for index, row in enumerate(flat):
            mask = whole["attention_mask"][index].bool()
            ids = torch.tensor(self.prompter.answer_ids(row))
            extras = {key: whole[key][index][mask] for key in per_token}
            encoded.append(_Encoded(whole["input_ids"][index][mask], ids, extras))
        return encoded, {key: first[key] for key in keys if key not in per_token}

    def _process(self, rows: Sequence[Row], pictures: dict[str, Any]) -> Any:
        texts = [self.prompter.prompt(*row.asked) for row in rows]
        images = [[pictures[row.picture_key()]] for row in rows]
        with padding(self.prompter.tokenizer):
            return self.processor(
                text=texts, images=images, padding=True, return_tensors="pt", **begun(self.processor, texts[0])
            )

    def _tokens_only(self, flat: Sequence[Row], heads: Sequence[Row], first: Any, per_token: list[str]) -> Batch:
        """Tokenise every row, with the picture's placeholders expanded as the processor did for its group's first row."""
        if per_token:
            raise UserError(f"packing does not support processors with per-token inputs {per_token}.")
        expanded = {
            head.picture_key(): first["input_ids"][index][first["attention_mask"][index].bool()]
            for index, head in enumerate(heads)
        }
        ids = []
        for row in flat:
            prompt = self.prompter.prompt(*row.asked)
            plain = torch.tensor(self.prompter.ids(prompt, special=not begun(self.processor, prompt)))
            ids.append(_expand(plain, expanded[row.picture_key()], self.picture_token))
        return self._pad(ids, [])

    def _pad(self, sequences: list[Tensor], encoded: list[_Encoded]) -> Batch:
        """Right-pad sequences; with `encoded`, add labels and the other per-token tensors, at answers as `ANSWER_INPUTS` says."""
        length = max(len(ids) for ids in sequences)
        count = len(sequences)
        batch: Batch = {
            "input_ids": torch.full((count, length), self.pad),
            "attention_mask": torch.zeros((count, length), dtype=torch.long),
        }
        for index, ids in enumerate(sequences):
            batch["input_ids"][index, : len(ids)] = ids
            batch["attention_mask"][index, : len(ids)] = 1
        if encoded:
            batch["shift_labels"] = torch.full((count, length), IGNORE)
        for index, one in enumerate(encoded):
            start = len(one.prompt) - 1
            batch["shift_labels"][index, start : start + len(one.answer)] = one.answer
            for key, values in one.per_token.items():
                filled = batch.setdefault(key, values.new_zeros((count, length, *values.shape[1:])))
                filled[index, : len(values)] = values
                there = self.at_answers.get(key, 0)
                filled[index, len(values) : len(values) + len(one.answer)] = values[-1] if there is None else there
        return batch

    def _pack(self, groups: Sequence[Sequence[Row]], encoded: list[_Encoded]) -> Batch:
        """Lay each group out as prefix + suffixes; additive mask [B, 1, T, T], 0 = may attend."""
        parts, start = [], 0
        for group in groups:
            members = encoded[start : start + len(group)]
            start += len(group)
            parts.append((_common_prefix([one.prompt for one in members]), members))
        length = max(prefix + sum(len(m.prompt) - prefix + len(m.answer) for m in members) for prefix, members in parts)
        count = len(parts)
        ids = torch.full((count, length), self.pad)
        labels = torch.full((count, length), IGNORE)
        positions = torch.zeros((count, length), dtype=torch.long)
        mask = torch.full((count, 1, length, length), torch.finfo(torch.float32).min)
        causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        for index, (prefix, members) in enumerate(parts):
            ids[index, :prefix] = members[0].prompt[:prefix]
            positions[index, :prefix] = torch.arange(prefix)
            mask[index, 0, :prefix, :prefix] = causal[:prefix, :prefix]
            at = prefix
            for one in members:
                suffix = torch.cat((one.prompt[prefix:], one.answer))
                end = at + len(suffix)
                ids[index, at:end] = suffix
                positions[index, at:end] = torch.arange(prefix, prefix + len(suffix))
                first = at + len(one.prompt) - prefix - 1
                labels[index, first : first + len(one.answer)] = one.answer
                mask[index, 0, at:end, :prefix] = 0
                mask[index, 0, at:end, at:end] = causal[: len(suffix), : len(suffix)]
                at = end
            rest = torch.arange(at, length)
            mask[index, 0, rest, rest] = 0
        return {"input_ids": ids, "shift_labels": labels, "position_ids": positions, "attention_mask": mask}


def _common_prefix(sequences: list[Tensor]) -> int:
    """Return the length of the longest common prefix, leaving every sequence at least its last token."""
    shortest = min(len(ids) for ids in sequences) - 1
    stacked = torch.stack([ids[:shortest] for ids in sequences])
    same = (stacked == stacked[0]).all(0)
    return int(same.long().cumprod(0).sum())


def _expand(plain: Tensor, expanded: Tensor, image_token: int) -> Tensor:
    """Replace the placeholders in `plain` by the (consecutive) run of placeholders found in `expanded`."""
    here = (plain == image_token).nonzero().flatten()
    there = int((expanded == image_token).sum())
    if len(here) != 1:
        raise UserError(f"packing needs exactly one picture placeholder in a prompt, found {len(here)}.")
    at = int(here[0])
    run = torch.full((there,), image_token)
    return torch.cat((plain[:at], run, plain[at + 1 :]))
