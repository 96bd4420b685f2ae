"""A tiny PaliGemma 2, whose prompt sees itself whole and whose logits are capped."""

from __future__ import annotations

import torch
import transformers as tf

from tiny import special_ids, tiny_tokenizer
from zoo import CONFIGS


def tiny_paligemma(seed: int = 0, scale: float = 1.0):
    """Return (model, processor) ; `scale` multiplies the head's weights, so that the cap is felt."""
    tokenizer = tiny_tokenizer(("<loc0000>",))
    pictures = tf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    config = CONFIGS["paligemma2"]()
    config.image_token_index = config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(processor.tokenizer) + 64
    config.text_config.update(special_ids(processor.tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForImageTextToText.from_config(config).eval()
    model.get_output_embeddings().weight.data *= scale
    model.generation_config = tf.GenerationConfig(**special_ids(processor.tokenizer), max_new_tokens=8, do_sample=False)
    return model, processor
