"""LLaVA around each text backbone that slimlmm knows: one line per kind, of what its configuration says beside the sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as tf

from tiny import vit

VOCAB, IMAGE = 320, 300
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATTERN = ["sliding_attention", "full_attention"]
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 68,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    **IDS,
}
_GEMMA2 = {"num_hidden_layers": 4, "layer_types": PATTERN * 2, "sliding_window": 8, "query_pre_attn_scalar": 16}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
_LAYER_NORM = {"layer_norm_eps": 1e-5, "logit_scale": 0.5}
TEXTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "gemma": {},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "granite": _GRANITE,
    "qwen3": {},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere": _LAYER_NORM | {"use_qk_norm": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "glm4": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "head_dim": 12,
    },
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "olmo2": {},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8},
    "cohere2": _LAYER_NORM | {"num_hidden_layers": 4, "layer_types": PATTERN * 2, "sliding_window": 8},
}


def text(model_type: str, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """Return the dictionary of a tiny text backbone."""
    return _SIZES | {"model_type": model_type, "tie_word_embeddings": tied} | TEXTS.get(model_type, {}) | changes


def around(
    model_type: str, vision: dict[str, Any] | None = None, strategy: str = "full", **changes: Any
) -> tf.PreTrainedConfig:
    """Return a tiny LLaVA with this text backbone; `vision` is the dictionary of its tower (SigLIP where none is given)."""
    tied = bool(changes.pop("tie_word_embeddings", False))
    return tf.LlavaConfig(
        vision_config=vision or vit("siglip_vision_model", vision_use_head=False),
        text_config=text(model_type, tied, **changes),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
        **IDS,
    )


#: the backbones that no other tiny configuration has
ALONE = ("qwen3", "phi3", "smollm3", "cohere", "glm4", "ernie4_5", "hunyuan_v1_dense", "olmo2", "exaone4")
CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    f"llava-{model_type}": partial(around, model_type) for model_type in ALONE
}
