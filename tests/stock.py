"""Tiny models of families whose processors do something of their own, with those very processors."""

from __future__ import annotations

from functools import partial

import torch
import transformers as tf

from slimlmm.selfcheck import random_model
from tiny import special_ids, tiny_tokenizer
from zoo import CONFIGS

SIDE = {"height": 28, "width": 28}


def _named(image: str, **tokens: str):
    """Return a tokenizer that knows these tokens by attribute; `image` stands in its template."""
    tokenizer = tiny_tokenizer(tuple(dict.fromkeys(tokens.values())), image=image)
    named = {"extra_special_tokens": tokens}
    again = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map, **named
    )
    again.chat_template, again.padding_side = tokenizer.chat_template, "left"
    again.model_input_names = ["input_ids", "attention_mask"]
    return again


def _set_up(name: str, tokenizer, **tokens: str):
    """Return the configuration with the tokenizer's ids; `tokens` by key of the configuration."""
    config = CONFIGS[name]()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.update(special_ids(tokenizer))
    for key, token in tokens.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(token))
    return config


def _gemma3(name: str):
    kinds = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _named("<start_of_image>", **kinds)
    ids = {"image_token_index": "image_token", "image_token_id": "image_token", "boi_token_index": "boi_token"}
    ids |= {"eoi_token_index": "eoi_token"}
    config = _set_up(name, tokenizer, **{key: kinds[kind] for key, kind in ids.items()})
    pictures = tf.Gemma3ImageProcessorPil(size=SIDE)
    return config, tf.Gemma3Processor(pictures, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)


def _pixtral(name: str, patch: int, merged: int):
    tokenizer = tiny_tokenizer(("[IMG]", "[IMG_BREAK]", "[IMG_END]"), image="[IMG]")
    pictures = tf.PixtralImageProcessorPil(size={"longest_edge": 42}, patch_size={"height": patch, "width": patch})
    more = {"patch_size": patch, "spatial_merge_size": merged, "chat_template": tokenizer.chat_template}
    return _set_up(name, tokenizer, image_token_index="[IMG]"), tf.PixtralProcessor(pictures, tokenizer, **more)


def _ovis2(name: str):
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = tiny_tokenizer(("<IMG_ATOM>", *marks))
    config = _set_up(name, tokenizer, image_token_id="<IMG_ATOM>")
    config.visual_indicator_token_ids = tokenizer.convert_tokens_to_ids(list(marks))
    pictures = tf.Ovis2ImageProcessorPil(size=SIDE, crop_to_patches=False)
    return config, tf.Ovis2Processor(pictures, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)


def _janus(name: str):
    kinds = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _named("<image_placeholder>", **kinds)
    pictures = tf.JanusImageProcessorPil(size=SIDE, min_size=14)
    more = {"num_image_tokens": 4, "use_default_system_prompt": True, "chat_template": tokenizer.chat_template}
    config = _set_up(name, tokenizer, image_token_id="<image_placeholder>")
    return config, tf.JanusProcessor(pictures, tokenizer, **more)


def _mllama(name: str):
    tokenizer = tiny_tokenizer(("<|python_tag|>", "<|image|>"), image="<|image|>")
    config = _set_up(name, tokenizer, image_token_index="<|image|>", image_token_id="<|image|>")
    config.text_config.vocab_size = len(tokenizer) - 1  # a picture's token is the first behind the vocabulary
    pictures = tf.MllamaImageProcessorPil(size=SIDE, max_image_tiles=4)
    return config, tf.MllamaProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)


def _paligemma(name: str):
    tokenizer = _named("<image>", image_token="<image>")
    pictures = tf.SiglipImageProcessorPil(size=SIDE)
    pictures.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(
        pictures, tokenizer, chat_template=tokenizer.chat_template
    )  # adds places and boxes
    return _set_up(name, processor.tokenizer, image_token_index="<image>", image_token_id="<image>"), processor


BUILDERS = {
    "gemma3": _gemma3,
    "mistral3": partial(_pixtral, patch=7, merged=2),
    "llava-pixtral": partial(_pixtral, patch=14, merged=1),
    "ovis2": _ovis2,
    "janus": _janus,
    "mllama": _mllama,
    "paligemma": _paligemma,
}


def stock(name: str):
    """Return (model, processor)."""
    config, processor = BUILDERS[name](name)
    model = random_model(config).eval()
    ids = special_ids(processor.tokenizer)
    model.generation_config = tf.GenerationConfig(**ids, max_new_tokens=8, do_sample=False)
    return model.to(torch.float32), processor
