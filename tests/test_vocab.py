"""Trimming the vocabulary: same pieces, same logits, same ids everywhere; what cannot be is refused."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny as tiny_models
from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.surgery import cut
from slimlmm.token_ids import referenced, renumbered
from slimlmm.vocab import BYTES, closed_tokens, subset_tokenizer, trim
from tiny import CORPUS, NAMES, QWEN_SPECIALS, byte_fallback_tokenizer, tiny, tiny_tokenizer


def prompt(processor) -> tuple[str, Image.Image]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which brand is shown?"}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True), picture


@pytest.mark.parametrize("name", NAMES)
def test_kept_texts_keep_their_pieces_and_logits(name, tmp_path):
    model, processor = tiny(name)
    text, picture = prompt(processor)
    student, trimmed = trim(model, processor, [text, "The brand is Alder"])
    old, new = processor.tokenizer, trimmed.tokenizer
    assert len(new) < len(old)
    assert student.get_input_embeddings().weight.shape[0] == len(new)
    x, y = (p(images=[picture], text=[text], return_tensors="pt") for p in (processor, trimmed))
    assert old.convert_ids_to_tokens(x["input_ids"][0]) == new.convert_ids_to_tokens(y["input_ids"][0])
    ids = old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new))))
    with torch.no_grad():
        assert torch.equal(model(**x).logits[..., ids], student(**y).logits)
    assert student.generation_config.eos_token_id == new.eos_token_id
    checkpoint.save(student, trimmed, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.model(**y).logits, student(**y).logits)
    if loaded.processor is not None:
        again = loaded.processor(images=[picture], text=[text], return_tensors="pt")
        assert torch.equal(again["input_ids"], y["input_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_where_no_token_goes_all_stays_as_it_is(name):
    model, processor = tiny(name)
    texts = [prompt(processor)[0], "The brand is Alder"]
    small, trimmed = trim(model, processor, texts)
    assert small is not model
    again = trim(small, trimmed, texts)
    assert again[0] is small
    assert again[1] is trimmed


def test_ids_are_renumbered_at_every_level_and_nowhere_else():
    model, processor = tiny("qwen2_5_vl")
    model.generation_config.suppress_tokens = [3, 318, 319]
    student, trimmed = trim(model, processor, [CORPUS[0]])
    new = trimmed.tokenizer
    config = student.config
    assert config.image_token_id == new.convert_tokens_to_ids("<|image_pad|>") == trimmed.image_token_id
    assert config.vision_start_token_id == new.convert_tokens_to_ids("<|vision_start|>")
    assert config.text_config.eos_token_id == new.eos_token_id
    assert config.text_config.vocab_size == len(new)
    assert student.generation_config.suppress_tokens[0] == 3
    assert processor.image_token_id == model.config.image_token_id != trimmed.image_token_id
    blip, blip_processor = tiny("blip2-opt")
    assert trim(blip, blip_processor, [])[0].config.qformer_config.vocab_size == 50


TOKENIZERS = {"byte-level": tiny_tokenizer(QWEN_SPECIALS), "byte-fallback": byte_fallback_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(kept=st.lists(st.text(max_size=20), max_size=4), other=st.text(max_size=30))
def test_any_text_survives_and_kept_texts_keep_their_pieces(kind, kept, other):
    tokenizer = TOKENIZERS[kind]
    kept = [*kept, *CORPUS[:2]]
    small = subset_tokenizer(tokenizer, closed_tokens(tokenizer, kept))
    assert len(small) < len(tokenizer)
    for text in kept:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert small.convert_ids_to_tokens(small(text)["input_ids"]) == pieces
    assert small.decode(small(other)["input_ids"]) == tokenizer.decode(tokenizer(other)["input_ids"])


def test_a_model_of_a_byte_fallback_tokenizer_keeps_its_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "tiny_tokenizer", lambda extra=(), image="<image>": byte_fallback_tokenizer(image))
    model, processor = tiny("llava-dinov2-llama")
    text, picture = prompt(processor)
    student, trimmed = trim(model, processor, [text, "The brand is \u00c5lder \u732b"])
    assert trimmed.tokenizer.get_vocab().keys() >= BYTES
    checkpoint.save(student, trimmed, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    x, y = (p(images=[picture], text=[text], return_tensors="pt") for p in (processor, loaded.processor))
    ids = processor.tokenizer.convert_tokens_to_ids(
        trimmed.tokenizer.convert_ids_to_tokens(range(len(trimmed.tokenizer)))
    )
    assert len(ids) < len(processor.tokenizer)
    with torch.no_grad():
        assert torch.equal(model(**x).logits[..., ids], loaded.model(**y).logits)


def test_the_side_of_padding_is_said_where_the_class_had_it_by_default(tmp_path):
    core = json.loads(byte_fallback_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in core["merges"]]
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<pad>"}
    tokenizer = tf.GemmaTokenizer(vocab=core["vocab"], merges=merges, **ends)
    assert (tokenizer.padding_side, tokenizer.init_kwargs.get("padding_side")) == ("left", None)
    subset_tokenizer(tokenizer, closed_tokens(tokenizer, ["the picture"])).save_pretrained(tmp_path)
    assert tf.AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


def test_ids_that_stand_in_pairs_are_renumbered_and_what_stands_beside_them_is_not():
    new, said = (
        {3: 0, 7: 1},
        {"sequence_bias": [[[7, 3], 3.0], [[5], -7.0]], "forced_decoder_ids": [[3, 7], [7, None], [1, 5]]},
    )
    assert sorted(referenced(said)) == [3, 5, 5, 7, 7]
    found = renumbered(said, new, 8)
    assert found == {"sequence_bias": [[[1, 0], 3.0]], "forced_decoder_ids": [[3, 1], [7, None]]}
    assert renumbered({"sequence_bias": {(7,): -1.5}}, new, 8) == {"sequence_bias": {(1,): -1.5}}
    assert renumbered({"sequence_bias": None}, new, 8) == {"sequence_bias": None}


def test_the_earliest_merges_fill_up():
    tokenizer = tiny_tokenizer()
    few = closed_tokens(tokenizer, [])
    assert len(closed_tokens(tokenizer, [], at_least=len(few) + 7)) == len(few) + 7
    assert closed_tokens(tokenizer, [], at_least=10**6) == list(range(len(tokenizer)))


def test_settings_and_special_attributes_come_along():
    core = json.loads(tiny_tokenizer(QWEN_SPECIALS).backend_tokenizer.to_str())
    core["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    core["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|video_pad|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|video_pad|>": {"id": "<|video_pad|>", "ids": [323], "tokens": ["<|video_pad|>"]}},
    }
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        model_max_length=77,
        padding_side="left",
    )
    small = subset_tokenizer(tokenizer, closed_tokens(tokenizer, ["the picture"]))
    assert small.image_token_id == small.convert_tokens_to_ids("<|image_pad|>") < len(small)
    assert small("a")["input_ids"][-1] == small.convert_tokens_to_ids("<|video_pad|>")
    assert (small.model_max_length, small.padding_side) == (77, "left")


def test_what_cannot_be_trimmed_is_refused():
    model, processor = tiny("llava-clip-llama")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    for core, kind in ((plain, "BPE"), (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel")):
        with pytest.raises(UserError, match=f"this one is {kind}"):
            closed_tokens(tf.PreTrainedTokenizerFast(tokenizer_object=core), ["a"])
    with pytest.raises(UserError, match="a fast tokenizer is needed, not CLIPImageProcessorPil"):
        trim(model, processor.image_processor, ["a"])
    anatomy = describe(model.config)
    with pytest.raises(UserError, match="token 2 must stay, it is the eos_token_id"):
        cut(model, anatomy, "vocab", {"vocab": torch.tensor([0, 1, 3, 4, 9])})


def test_ids_that_a_processor_remembers_under_any_name_are_renumbered_and_switches_are_not():
    model, processor = tiny(NAMES[0])
    tokenizer = processor.tokenizer
    texts = [prompt(processor)[0], "The brand is Alder"]
    mark = max(tokenizer(texts[1], add_special_tokens=False)["input_ids"])
    processor.video_start_id, processor.mark_ids, processor.default_use_image_id = mark, [mark], True
    _, trimmed = trim(model, processor, texts)
    new = trimmed.tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(mark))
    assert new < mark
    assert (trimmed.video_start_id, trimmed.mark_ids) == (new, [new])
    assert trimmed.default_use_image_id is True
