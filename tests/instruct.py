"""A tiny InstructBLIP, whose Q-Former looks at a picture with the question in mind."""

from __future__ import annotations

import torch
import transformers as tf

from tiny import qformer, special_ids, tiny_tokenizer, vit


def tiny_instructblip():
    """Return (model, processor); the Q-Former's attention to the question is strong, so that it is felt."""
    tokenizer, asked = tiny_tokenizer(image=""), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        "model_type": "opt",
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 68,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "dropout": 0.0,
        **special_ids(tokenizer),
    }
    reads = {"vocab_size": len(asked), "max_position_embeddings": 128, "initializer_range": 0.5}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tf.InstructBlipConfig(
        vision_config=vit(),
        qformer_config=qformer() | reads | still,
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pictures = tf.BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = tf.InstructBlipProcessor(pictures, tokenizer, asked, num_query_tokens=4)
    processor.chat_template = tokenizer.chat_template
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config = tf.GenerationConfig(**special_ids(tokenizer))
    return model, processor
