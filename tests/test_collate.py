from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlavaConfig

import tiny as tiny_models
from pali import tiny_paligemma
from slimlmm import probes
from slimlmm.collate import IGNORE, Collator, Prompter, texts_of
from slimlmm.data import by_picture
from slimlmm.errors import UserError
from slimlmm.evaluate import encode
from slimlmm.families import PROMPTS
from slimlmm.forward import answer_logits, forward
from slimlmm.packing import can_pack
from slimlmm.probes import template_of
from slimlmm.selfcheck import random_model
from slimlmm.serving.answering import Answerer
from slimlmm.serving.asks import Ask
from tiny import NAMES, byte_fallback_tokenizer, tiny, tiny_config

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


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}THOUGHTS{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nBEGUN{% endif %}"
)


@pytest.mark.parametrize(("thoughts", "begun"), [("[no thoughts]\n\n", ""), ("[no thoughts]\n\n", "[no "), ("  ", "")])
def test_what_a_template_writes_before_every_answer_is_prompt_unless_it_is_blank(rows, thoughts, begun):
    model, processor = tiny("llava-dinov2-llama")
    plain = Prompter(processor).prompt("What?")
    processor.chat_template = THINKING.replace("THOUGHTS", thoughts).replace("BEGUN", begun)
    prompter, moved = Prompter(processor), thoughts.strip() != ""
    row = replace(rows.train[0], question="What?", answer="no thoughts")  # an answer that stands in the opening too
    prompt, text = prompter.turns(row.question, row.answer)
    assert prompt == plain + (thoughts if moved else begun)
    assert text == ("" if moved else thoughts) + "no thoughts" + processor.tokenizer.eos_token
    assert prompter.prompt("What?") == prompt
    notes = prompter.notes([row])
    assert [thoughts.removeprefix(begun) for _ in notes] == [prompter.opening for _ in range(moved)]
    assert all(repr(prompter.opening) in note for note in notes)
    asked = encode(processor, [row])["input_ids"][0]
    batch = Collator(processor, packed=False)([[row]])
    assert torch.equal(batch["input_ids"][0, : len(asked)], asked)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    ask = Ask(messages=said, pictures=[], max_tokens=1)
    assert Answerer(model, processor).prompt(ask) == prompt


@pytest.mark.parametrize("packed", [True, False])
def test_what_a_system_turn_says_stands_in_training_judging_serving_and_probes_alike(rows, packed):
    model, processor = tiny("llava-dinov2-llama")
    group = [replace(row, system="Be short.") for row in by_picture(rows.train, 16)[0]]
    row, prompter = group[0], Prompter(processor)
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]},
    ]
    wanted = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert "Be short." in wanted
    assert prompter.prompt(*row.asked) == wanted != prompter.prompt(row.question)
    assert Answerer(model, processor).prompt(Ask(messages=turns, pictures=[], max_tokens=1)) == wanted
    assert probes.prompt(processor, row.question, {}, row.system) == wanted
    assert wanted in texts_of(processor, [row])
    batch = Collator(processor, packed=packed)([group])
    asked = encode(processor, [row])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(asked)], asked)
    labels = batch["shift_labels"]
    spelled = processor.tokenizer.decode(labels[labels != IGNORE].tolist())
    assert spelled == "".join(prompter.turns(one.question, one.answer)[1] for one in group)


@pytest.mark.parametrize("name", PACKING)
def test_questions_behind_different_system_turns_are_packed_as_they_stand_apart(name, rows):
    model, processor = tiny(name)
    said = ("", "Be short.", "Be short, be kind.")
    groups = [
        [replace(row, system=said[number % 3]) for number, row in enumerate(group)]
        for group in by_picture(rows.train, 16)[:3]
    ]
    with torch.inference_mode():
        packed, labels, _ = answer_logits(model.eval(), Collator(processor, packed=True)(groups))
        apart, labels_apart, _ = answer_logits(model, Collator(processor, packed=False)(groups))
    assert torch.equal(labels, labels_apart)
    assert torch.allclose(packed, apart, atol=1e-4)


#: how templates of real families take what a system turn says
SYSTEM = {
    "parts": "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}",
    "text": "{{ m['content'] | trim }}",
    "added": "{{ '' + m['content'] }}",
    "first part": "{{ m['content'][0]['text'] }}",
    "raised": "{{ raise_exception('no system turns') }}",
    "left out": "",
}


def templated(processor, form):
    """Give a processor a template that takes system turns so."""
    rest = THINKING.replace("THOUGHTS", "").replace("BEGUN", "").removeprefix("{% for m in messages %}")
    said = "<|im_start|>system\n" + SYSTEM[form] + "<|im_end|>\n"
    if form in ("raised", "left out"):
        said = SYSTEM[form]
    head = "{% for m in messages %}{% if m['role'] == 'system' %}" + said + "{% continue %}{% endif %}"
    processor.chat_template = head + rest
    return processor


@pytest.mark.parametrize("form", ["parts", "text", "added", "first part"])
@pytest.mark.parametrize("said", ["Be short.", "Don't guess.\nBe short.", "What?", "no"])
def test_system_turns_are_said_in_the_form_that_a_template_takes(rows, form, said):
    model, processor = tiny("llava-dinov2-llama")
    row = replace(rows.train[0], question="What? no", system=said)
    prompter = Prompter(templated(processor, form))
    prompt = prompter.prompt(*row.asked)
    assert prompt == f"<|im_start|>system\n{said}<|im_end|>\n" + prompter.prompt(row.question)
    assert probes.prompt(processor, row.question, {}, said) == prompt
    parts = [{"type": "text", "text": line} for line in (said + " ").split("\n")]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}
    ask = Ask(messages=[{"role": "system", "content": parts}, user], pictures=[], max_tokens=1)
    assert Answerer(model, processor).prompt(ask) == prompt
    (note,) = prompter.notes([row, rows.train[1]])
    assert note.startswith("1 of 2 rows stand behind a system turn")
    assert ("as a plain text" in note) is (form in ("text", "added"))


@pytest.mark.parametrize("form", ["raised", "left out"])
@pytest.mark.parametrize("said", ["Be short.", "What?", "no", "assistant"])
def test_a_template_without_a_place_for_a_system_turn_is_refused(rows, form, said):
    _, processor = tiny("llava-dinov2-llama")
    collator = Collator(templated(processor, form), packed=False)
    row = replace(rows.train[0], question="What? no", system=said)
    assert collator([[rows.train[0]]])
    assert collator.prompter.notes(rows.train) == []
    for refused in (lambda: collator([[row]]), lambda: collator.prompter.notes([rows.train[0], row])):
        with pytest.raises(UserError, match="no place for a system turn: put what it says before the question"):
            refused()


def test_without_a_template_there_is_no_system_turn(rows, monkeypatch):
    _, processor = tiny("llava-dinov2-llama")
    monkeypatch.setitem(PROMPTS, type(processor).__name__, "Question: {question} Answer:")
    processor.chat_template = processor.tokenizer.chat_template = None
    row = replace(rows.train[0], system="Be short.")
    assert Prompter(processor).prompt(row.question) == f"Question: {row.question} Answer:"
    with pytest.raises(UserError, match="no place for a system turn"):
        Prompter(processor).prompt(*row.asked)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{{ m['content'] | trim }}", "it seems to be one for texts alone"),
        ("{{ '' + m['content'] }}", "does not take a question about a picture and its answer"),
        (
            "{{ raise_exception('texts alone') }}",
            "does not take a question about a picture and its answer: texts alone",
        ),
    ],
)
def test_a_template_for_texts_alone_is_refused_and_that_of_a_tokenizer_not_taken(content, why):
    _, processor = tiny("llava-dinov2-llama")
    begun = "{% if add_generation_prompt %}assistant: {% endif %}"
    processor.chat_template = f"{{% for m in messages %}}{{{{ m['role'] }}}}: {content}\n{{% endfor %}}{begun}"
    with pytest.raises(UserError, match=why):
        Prompter(processor)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert template_of(processor) is None
    with pytest.raises(UserError, match="has no chat template"):
        Prompter(processor).prompt("What?")


@pytest.mark.parametrize("packed", [True, False])
def test_a_template_that_writes_the_token_of_beginning_gets_no_second_one(rows, packed):
    model, processor = tiny("llava-dinov2-llama")
    tokenizer = processor.tokenizer
    first = tokenizer.bos_token
    adds = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    row = rows.train[0]
    group = [replace(row, question=f"{row.question} {n}") for n in range(2)]
    for template, count in ((processor.chat_template, 1), ("{{ bos_token }}" + processor.chat_template, 1)):
        processor.chat_template = template
        content = [{"type": "image", "image": row.open()}, {"type": "text", "text": group[0].question}]
        said = [{"role": "user", "content": content}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        stock = processor.apply_chat_template(said, **how)
        wanted = (
            stock["input_ids"][0] if template.startswith("{{ bos") else encode(processor, group[:1])["input_ids"][0]
        )
        for found in (encode(processor, group[:1]), Collator(processor, packed=packed)([group])):
            ids = found["input_ids"][0]
            assert torch.equal(ids[: len(wanted)], wanted)
            assert int((ids == tokenizer.bos_token_id).sum()) == count
        asked = probes.answer(model, processor, row.open(), Prompter(processor).prompt(group[0].question), 1)
        how = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        logits = model.generate(**encode(processor, group[:1]), **how).logits
        assert asked["scale"] == pytest.approx(float(logits[0].abs().max()), rel=1e-5)


def test_a_tokenizer_without_padding_token_is_trained_with_too(rows):
    _, processor = tiny("llava-dinov2-llama")
    groups = by_picture(rows.train, 2)[:2]
    wanted = Collator(processor, packed=False)(groups)
    processor.tokenizer.pad_token = None
    found = Collator(processor, packed=False)(groups)
    assert torch.equal(found["attention_mask"], wanted["attention_mask"])
    assert torch.equal(found["shift_labels"], wanted["shift_labels"])
    assert processor.tokenizer.pad_token is None


@pytest.mark.parametrize("longest", ["question", "system", "few rows"])
def test_packing_is_tried_on_the_longest_rows_too(rows, longest):
    _, processor = tiny("llava-dinov2-llama")
    config = tiny_config("llava-dinov2-llama").to_dict()
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 60}
    model = random_model(LlavaConfig(**config))
    short = [replace(row, question="Is it a dog? OK", answer="a") for row in rows.train]
    groups = by_picture(short, 16)
    assert can_pack(model, processor, short)
    long = "Say what zebra quizzes jolt by fjord vex dwarf hymn lynx gawk pub mix."
    some = groups[-1][: 2 if longest == "few rows" else None]
    assert longest != "few rows" or len(some) * len(long) < sum(len(row.question) for row in groups[0])
    turns = {"system": long} if longest == "system" else {"question": long}
    rest = [row for group in groups[:-1] for row in group]
    assert not can_pack(model, processor, rest + [replace(row, **turns) for row in some])
