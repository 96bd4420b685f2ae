"""A model answers conversations in batches, with the log-probability of every token; this part of serving knows no HTTP.

Shape legend: B conversations, T tokens written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from slimlmm.collate import Prompter
from slimlmm.decoding import generation_settings, listed, nothing_else
from slimlmm.errors import UserError
from slimlmm.evaluate import encode_texts
from slimlmm.serving.asks import Ask, Finish, Said, Token


class Answerer:
    """A stock model in evaluation mode with its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self.prompter = Prompter(processor)
        self.ends = frozenset(listed(generation_settings(model, processor, 1)["eos_token_id"]))

    def answer(self, asks: Sequence[Ask]) -> list[Said]:
        """Continue all conversations; those of equal sampling and number of pictures go through the model together.

        Raises:
            UserError: the model's prompt has no place for such a conversation.
        """
        alike: dict[tuple[float, float, int], list[int]] = {}
        for number, ask in enumerate(asks):
            alike.setdefault((ask.temperature, ask.top_p, len(ask.pictures)), []).append(number)
        said: dict[int, Said] = {}
        for numbers in alike.values():
            said |= zip(numbers, self._together([asks[number] for number in numbers]), strict=True)
        return [said[number] for number in range(len(asks))]

    def prompt(self, ask: Ask) -> str:
        """Return the text before the answer, with a placeholder for each picture.

        Raises:
            UserError: the chat template takes no such messages; or there is none, and this is not one question about one picture.
        """
        if (template := self.prompter.template) is not None:
            try:
                text: str = self.processor.apply_chat_template(
                    self.prompter.conversation(ask.messages), chat_template=template, add_generation_prompt=True
                )
            except (TypeError, ValueError, TemplateError) as error:
                raise UserError(f"the model's chat template has no place for such messages: {error}") from error
            return text + self.prompter.opening
        parts = [part for turn in ask.messages for part in turn["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if len(ask.messages) != 1 or len(texts) != 1 or len(ask.pictures) != 1:
            raise UserError(
                f"this model has no chat template, so it takes one user message with one picture and one text; "
                f"here are {len(ask.messages)} messages with {len(ask.pictures)} pictures and {len(texts)} texts."
            )
        return self.prompter.prompt(texts[0])

    @torch.inference_mode()
    def _together(self, asks: Sequence[Ask]) -> list[Said]:
        first = asks[0]
        texts = [self.prompt(ask) for ask in asks]
        images = [list(ask.pictures) for ask in asks] if first.pictures else None
        batch = encode_texts(self.processor, texts, images)
        settings = generation_settings(self.model, self.processor, max(ask.max_tokens for ask in asks))
        if first.temperature:
            settings |= {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p}
        settings |= {"return_dict_in_generate": True, "output_logits": True}
        with nothing_else(self.model):
            found = self.model.generate(**batch.to(self.model.device, dtype=self.model.dtype), **settings)
        tokens_BT = found.sequences[:, -len(found.logits) :]
        prompts = batch["attention_mask"].sum(1).tolist()
        return [
            self._said(ask, tokens_BT[row].tolist(), [step[row] for step in found.logits], prompts[row])
            for row, ask in enumerate(asks)
        ]

    def _said(self, ask: Ask, ids: Sequence[int], logits: Sequence[Tensor], prompt_tokens: int) -> Said:
        """Return one row up to its end: an end token, a stop text, or as many tokens as were asked for."""
        written = list(ids[: ask.max_tokens])
        count = next((at for at, one in enumerate(written) if one in self.ends), len(written))
        finish: Finish = "stop" if count < len(written) else "length"
        text = self._text(written[:count])
        if stops := [at for stop in ask.stop if (at := text.find(stop)) >= 0]:
            text, finish = text[: min(stops)], "stop"
            while count and len(self._text(written[:count])) > len(text):
                count -= 1
        tokens = tuple(self._token(written[at], logits[at], ask.top_logprobs) for at in range(count))
        return Said(text=text, tokens=tokens, finish=finish, prompt_tokens=prompt_tokens)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text.lstrip()

    def _token(self, token: int, logits_V: Tensor, top: int) -> Token:
        log_p_V = logits_V.float().log_softmax(-1)
        values, ids = log_p_V.topk(top)
        decode = self.processor.tokenizer.decode
        likeliest = tuple((decode([one]), value) for one, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Token(text=decode([token]), logprob=float(log_p_V[token]), top=likeliest)
