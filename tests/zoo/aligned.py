"""Tiny configurations of families whose towers are joined by a projector or a merger of patches."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf

from tiny import vit

VOCAB = 320
#: the other special tokens stand from 300 on; what is between is plain
TEXT_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE, VIDEO, START, END, AUDIO = 300, 301, 302, 303, 304
INDICATORS = (310, 311, 312, 313, 314)
PATTERN = ["sliding_attention", "full_attention"]


def _text(model_type: str, tied: bool, **changes) -> dict:
    sizes = {
        "model_type": model_type,
        "hidden_size": 48,
        "intermediate_size": 68,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **TEXT_IDS,
    }
    return sizes | changes


def _llava_pixtral() -> tf.PreTrainedConfig:
    return tf.LlavaConfig(
        vision_config=vit("pixtral", image_size=42),
        text_config=_text("llama", tied=True),
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _llava_next() -> tf.PreTrainedConfig:
    return tf.LlavaNextConfig(
        vision_config=vit("clip_vision_model", projection_dim=16),
        text_config=_text("mistral", tied=False, sliding_window=None, num_key_value_heads=2),
        image_token_index=IMAGE,
        image_seq_length=4,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **TEXT_IDS,
    )


def _granite_vision() -> tf.PreTrainedConfig:
    text = _text(
        "granite",
        tied=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.25,
        residual_multiplier=0.6,
        logits_scaling=2.0,
    )
    return tf.LlavaNextConfig(
        vision_config=vit("siglip_vision_model", num_hidden_layers=4, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=4,
        image_grid_pinpoints=[[28, 56], [56, 28], [28, 84]],
        vision_feature_layer=[-4, -3, -2, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _llava_onevision() -> tf.PreTrainedConfig:
    return tf.LlavaOnevisionConfig(
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        text_config=_text("qwen2", tied=True, num_key_value_heads=2),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _mistral3() -> tf.PreTrainedConfig:
    return tf.Mistral3Config(
        vision_config=vit("pixtral", image_size=42, patch_size=7),
        text_config=_text("mistral", tied=False, sliding_window=None, head_dim=12),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
        **TEXT_IDS,
    )


def _internvl() -> tf.PreTrainedConfig:
    return tf.InternVLConfig(
        vision_config=vit("internvl_vision", image_size=[28, 28], patch_size=[7, 7], attention_bias=True),
        text_config=_text("qwen2", tied=False, num_key_value_heads=2),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **TEXT_IDS,
    )


def _paligemma(text: dict) -> tf.PreTrainedConfig:
    return tf.PaliGemmaConfig(
        vision_config=vit("siglip_vision_model", projection_dim=48, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=48,
        hidden_size=48,
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _paligemma1() -> tf.PreTrainedConfig:
    return _paligemma(_text("gemma", tied=True, head_dim=12, num_key_value_heads=2))


def _paligemma2() -> tf.PreTrainedConfig:
    text = _text(
        "gemma2",
        tied=True,
        num_hidden_layers=4,
        layer_types=PATTERN * 2,
        sliding_window=8,
        query_pre_attn_scalar=16,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    return _paligemma(text)


def _gemma3() -> tf.PreTrainedConfig:
    text = _text(
        "gemma3_text",
        tied=True,
        num_hidden_layers=4,
        layer_types=PATTERN * 2,
        sliding_window=8,
        query_pre_attn_scalar=16,
    )
    return tf.Gemma3Config(
        vision_config=vit("siglip_vision_model", patch_size=7, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _gemma4(text: dict, vision: dict) -> tf.PreTrainedConfig:
    """Heads of 12 in sliding, 20 in full layers; the vision tower has KV heads and a head size of its own."""
    common = {"num_key_value_heads": 2, "head_dim": 12, "pooling_kernel_size": 2, "position_embedding_size": 20}
    vision = vit("gemma4_vision", patch_size=7, **common) | vision
    del vision["image_size"]
    sizes = {"num_hidden_layers": 4, "layer_types": PATTERN * 2, "head_dim": 12, "global_head_dim": 20}
    return tf.Gemma4Config(
        vision_config=vision,
        text_config=_text("gemma4_text", tied=True, sliding_window=8, **sizes) | text,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=AUDIO,
        boa_token_id=305,
        eoa_token_index=306,
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _gemma4_small() -> tf.PreTrainedConfig:
    """As the small releases: embeddings per layer, the last three layers take keys and values of the two before."""
    text = {
        "num_hidden_layers": 6,
        "layer_types": (PATTERN[:1] * 2 + PATTERN[1:]) * 2,
        "hidden_size_per_layer_input": 14,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    }
    return _gemma4(text, {"use_clipped_linears": True})


def _gemma4_dense() -> tf.PreTrainedConfig:
    """As the large dense release: no embeddings per layer, keys are values in full layers, pictures see themselves."""
    text = {
        "hidden_size_per_layer_input": 0,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
    }
    return _gemma4(text, {"standardize": True})


def _gemma4_moe() -> tf.PreTrainedConfig:
    """As the release of experts: a dense FFN and routed experts side by side in each layer."""
    text = {
        "hidden_size_per_layer_input": 0,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    }
    return _gemma4(text, {})


def _aya_vision() -> tf.PreTrainedConfig:
    text = _text(
        "cohere2",
        tied=True,
        num_hidden_layers=4,
        num_key_value_heads=2,
        layer_types=PATTERN * 2,
        sliding_window=8,
        logit_scale=0.5,
        layer_norm_eps=1e-5,
    )
    del text["rms_norm_eps"]
    return tf.AyaVisionConfig(
        vision_config=vit("siglip_vision_model", patch_size=7, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=36,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _ovis2() -> tf.PreTrainedConfig:
    return tf.Ovis2Config(
        vision_config=vit(
            "ovis2_vision", patch_size=7, vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5, qkv_bias=True
        ),
        text_config=_text("qwen2", tied=True, num_key_value_heads=2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        hidden_size=48,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _janus() -> tf.PreTrainedConfig:
    """The picture generator stays at one resolution level; its group norms want channels in multiples of 32."""
    vision = vit("janus_vision_model", mlp_ratio=1.375, projection_dim=48, depth=2, num_image_tokens=4)
    del vision["intermediate_size"]
    generator = {
        "model_type": "janus_vqgan",
        "embed_dim": 8,
        "num_embeddings": 24,
        "latent_channels": 12,
        "base_channels": 64,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "num_patches": 2,
        "projection_dim": 48,
        "image_token_embed_dim": 48,
        "initializer_range": 0.1,
    }
    return tf.JanusConfig(
        vision_config=vision,
        text_config=_text("llama", tied=False),
        vq_config=generator,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        **TEXT_IDS,
    )


def _lfm2_vl() -> tf.PreTrainedConfig:
    text = _text(
        "lfm2",
        tied=True,
        num_hidden_layers=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
        norm_eps=1e-5,
    )
    del text["rms_norm_eps"]
    vision = vit("siglip2_vision_model", patch_size=7, num_patches=16, vision_use_head=False)
    del vision["image_size"]
    return tf.Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=56,
        downsample_factor=2,
        tie_word_embeddings=True,
        **TEXT_IDS,
    )


def _vipllava() -> tf.PreTrainedConfig:
    return tf.VipLlavaConfig(
        vision_config=vit("clip_vision_model", num_hidden_layers=4, projection_dim=16),
        text_config=_text("llama", tied=False),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=[-2, -3, 1],
        tie_word_embeddings=False,
        **TEXT_IDS,
    )


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llava-pixtral": _llava_pixtral,
    "llava_next": _llava_next,
    "granite_vision": _granite_vision,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "paligemma": _paligemma1,
    "paligemma2": _paligemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4_small,
    "gemma4-dense": _gemma4_dense,
    "gemma4-moe": _gemma4_moe,
    "aya_vision": _aya_vision,
    "ovis2": _ovis2,
    "janus": _janus,
    "lfm2_vl": _lfm2_vl,
    "vipllava": _vipllava,
}
