"""Answers of the embedded engine against the model itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import answer, encode
from slimlmm.serving.answering import Answerer
from slimlmm.serving.asks import Ask
from slimlmm.serving.chat import Bounds, ask_of, parsed
from tiny import tiny

NAMES = ("llava-dinov2-llama", "qwen2_5_vl", "smolvlm")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def ask(question="What is it?", pictures=1, **more):
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    turn = {"role": "user", "content": content}
    return Ask(messages=[turn], pictures=[picture(n) for n in range(pictures)], **{"max_tokens": 5, **more})


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_that_of_the_evaluation_and_its_tokens_have_the_models_log_probabilities(name):
    model, processor = tiny(name)
    said = Answerer(model, processor)
    said.ends = frozenset()
    one = said.answer([ask(top_logprobs=3)])[0]
    row = Row("a", b"", "What is it?", "x", "t")
    assert one.text == answer(model, processor, [row], 5, [picture()])[0].lstrip()
    assert len(one.tokens) == 5
    assert one.finish == "length"
    inputs = encode(processor, [row], [picture()])
    whole = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    start = inputs["input_ids"].shape[1]
    extra = whole.shape[1] - start
    forced = dict(inputs) | {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if "mm_token_type_ids" in forced:
        forced["mm_token_type_ids"] = torch.nn.functional.pad(forced["mm_token_type_ids"], (0, extra))
    with torch.no_grad():
        log_p = model(**forced).logits[0, start - 1 : -1].float().log_softmax(-1)
    wanted = log_p[range(extra), whole[0, start:]]
    assert [token.logprob for token in one.tokens] == pytest.approx(wanted.tolist(), abs=1e-4)
    for token, row_V in zip(one.tokens, log_p, strict=True):
        assert [value for _, value in token.top] == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_says_what_each_says_alone(name):
    said = Answerer(*tiny(name))
    asks = [ask("Who?", max_tokens=3), ask("What is it, in as many words as you like?"), ask("Why?", temperature=0.0)]
    together, alone = said.answer(asks), [said.answer([one])[0] for one in asks]
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert one.finish == other.finish
        assert one.prompt_tokens == other.prompt_tokens
        assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in other.tokens], abs=1e-4)


def test_conversations_of_two_pictures_and_of_none_go_beside_those_of_one():
    said = Answerer(*tiny("smolvlm"))
    asks = [ask(pictures=2), ask(pictures=0), ask(pictures=1)]
    assert [one.text for one in said.answer(asks)] == [said.answer([one])[0].text for one in asks]


def test_an_answer_ends_at_the_end_token_at_a_stop_text_and_at_the_limit():
    model, processor = tiny("llava-dinov2-llama")
    said = Answerer(model, processor)
    said.ends = frozenset()
    free = said.answer([ask(max_tokens=6)])[0]
    ids = answer_ids(model, processor, 6)
    said.ends = frozenset({ids[3]})
    ended = said.answer([ask(max_tokens=6)])[0]
    first = ids.index(ids[3])
    assert ended.finish == "stop"
    assert [t.text for t in ended.tokens] == [t.text for t in free.tokens[:first]]
    said.ends = frozenset()
    stop = free.text[2:4]
    stopped = said.answer([ask(max_tokens=6, stop=(stop,))])[0]
    assert stopped.finish == "stop"
    assert stopped.text == free.text[: free.text.find(stop)]
    assert len(stopped.tokens) < len(free.tokens)


def answer_ids(model, processor, count):
    inputs = encode(processor, [Row("a", b"", "What is it?", "x", "t")], [picture()])
    whole = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return whole[0, -count:].tolist()


def test_sampling_follows_the_seed_and_keeps_the_models_own_log_probabilities():
    said = Answerer(*tiny("llava-dinov2-llama"))
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(said.answer([ask(temperature=1.5, max_tokens=8)])[0].text)
    assert texts[0] == texts[1] != texts[2]


def test_without_a_chat_template_a_longer_conversation_is_refused():
    model, processor = tiny("llava-dinov2-llama")
    processor.chat_template = processor.tokenizer.chat_template = None
    two = Ask(messages=[*ask().messages, *ask().messages], pictures=[picture(), picture()], max_tokens=2)
    with pytest.raises(UserError, match=r"here are 2 messages with 2 pictures"):
        Answerer(model, processor).answer([two])


def test_a_template_that_stands_in_the_tokenizer_alone_is_read():
    model, processor = tiny("llava-dinov2-llama")
    said = [{"role": "assistant", "content": [{"type": "text", "text": "A car."}]}]
    turns = [*ask().messages, *said, *ask("Whose?", pictures=0).messages]
    long = Ask(messages=turns, pictures=[picture()], max_tokens=4)
    known = Answerer(model, processor).prompt(long)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    found = Answerer(model, processor)
    assert found.prompt(long) == known
    assert found.answer([long])[0].tokens


def test_a_temperature_beside_zero_is_greedy():
    def asked(temperature):
        raw = {"messages": [{"role": "user", "content": "x"}], "temperature": temperature}
        return ask_of(parsed(raw), Bounds(tokens=1, pixels=1)).temperature

    assert [asked(one) for one in (1e-300, 9e-5, 0.5, None)] == [0, 0, 0.5, 0]


def test_messages_that_the_chat_template_has_no_place_for_are_refused():
    model, processor = tiny("llava-dinov2-llama")
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }} {% endfor %}"
    said = Answerer(model, processor)
    with pytest.raises(UserError, match="has no place for such messages"):
        said.answer([Ask(messages=[{"role": "user", "content": []}], pictures=[], max_tokens=1)])
