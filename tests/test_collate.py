from functools import partial

import pytest
import torch

import tiny as tiny_models
from pali import tiny_paligemma
from slimlmm.collate import IGNORE, Collator, Prompter, texts_of
from slimlmm.data import by_picture
from slimlmm.distill import can_pack
from slimlmm.forward import answer_logits, forward
from tiny import NAMES, byte_fallback_tokenizer, tiny

PACKING = ("llava-clip-llama", "llava-siglip-qwen2", "llava-dinov2-llama")


@pytest.mark.parametrize("name", PACKING)
def test_packed_questions_give_the_logits_of_separate_rows(name, rows):
    model, processor = tiny(name)
    groups = by_picture(rows.train, 16)[:3]
    with torch.inference_mode():
        packed, labels, hidden = answer_logits(model.eval(), Collator(processor, packed=True)(groups))
        apart, labels_apart, hidden_apart = answer_logits(model, Collator(processor, packed=False)(groups))
    assert torch.equal(labels, labels_apart)
    assert torch.allclose(packed, apart, atol=1e-4)
    assert torch.allclose(hidden, hidden_apart, atol=1e-4)
    assert can_pack(model, processor, rows.train)


def test_per_token_inputs_are_not_packed(rows):
    model, processor = tiny("qwen2_5_vl")
    assert not can_pack(model, processor, rows.train)


@pytest.mark.parametrize("name", ["smolvlm", *PACKING])
def test_packing_is_tried_on_pictures_with_several_rows(name, rows):
    model, processor = tiny(name)
    one, other, *rest = by_picture(rows.train, 16)
    first_ones_alone = [one[0], other[0], *(row for group in rest for row in group)]
    assert can_pack(model, processor, first_ones_alone) is can_pack(model, processor, rows.train) is (name in PACKING)
    assert not can_pack(model, processor, [one[0], other[0]])


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_paligemma, *(partial(tiny, name) for name in NAMES)])
def test_a_token_of_an_answer_is_seen_by_none_before_it(make, rows):
    model, processor = make()
    batch = Collator(processor, packed=False)(by_picture(rows.train, 4)[:1])
    answer = (batch["shift_labels"][0] != IGNORE).nonzero().flatten()
    wanted_TV = forward(model, batch).logits[0]
    batch["input_ids"][0, answer[-1]] = processor.tokenizer.convert_tokens_to_ids("a")
    changed_TV = forward(model, batch).logits[0]
    assert torch.allclose(changed_TV[: answer[-1]], wanted_TV[: answer[-1]], atol=1e-5)
    assert not torch.allclose(changed_TV[answer[-1]], wanted_TV[answer[-1]], atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_labels_spell_the_answers_and_nothing_else(packed, rows):
    _, processor = tiny("llava-dinov2-llama")
    groups = by_picture(rows.train, 16)[:2]
    collator = Collator(processor, packed=packed)
    batch = collator(groups)
    labels = batch["shift_labels"]
    spelled = processor.tokenizer.decode(labels[labels != IGNORE].tolist())
    texts = [collator.prompter.turns(row.question, row.answer)[1] for row in batch["rows"]]
    assert spelled == "".join(texts)
    assert all(text.endswith(processor.tokenizer.eos_token) for text in texts)


def test_head_sees_answer_positions_only(rows):
    model, processor = tiny("llava-dinov2-llama")
    batch = Collator(processor, packed=True)(by_picture(rows.train, 16)[:2])
    logits, labels, hidden = answer_logits(model, batch)
    assert logits.shape[0] == labels.shape[0] == hidden.shape[0] == int((batch["shift_labels"] != IGNORE).sum())
    assert torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("packed", [True, False])
def test_labels_are_the_tokens_that_stand_behind_the_prompt(packed, rows, monkeypatch):
    """Llama 2's kind of tokenizer begins a text with a space that is not there in the middle of one."""
    monkeypatch.setattr(tiny_models, "tiny_tokenizer", lambda extra=(), image="<image>": byte_fallback_tokenizer(image))
    _, processor = tiny("llava-dinov2-llama")
    collator = Collator(processor, packed=packed)
    group, prompter, tokenizer = rows.train[:2], collator.prompter, processor.tokenizer
    labels = collator([group])["shift_labels"]
    wanted, alone = [], []
    for row in group:
        prompt, answer = prompter.turns(row.question, row.answer)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer, answer)]
        assert ids[1][: len(ids[0])] == ids[0]
        wanted += ids[1][len(ids[0]) :]
        alone += ids[2]
    assert labels[labels != IGNORE].tolist() == wanted != alone
    assert prompt + answer in texts_of(processor, group)


def test_prompt_is_a_prefix_of_prompt_and_answer():
    _, processor = tiny("llava-dinov2-llama")
    prompt, answer = Prompter(processor).turns("What?", "a dog")
    whole = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        ]
    )
    assert whole.startswith(prompt + answer)
