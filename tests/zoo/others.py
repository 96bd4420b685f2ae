"""Tiny configurations of families with other joints: queries, cross-attention, experts, encoders with decoders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf

from tiny import qformer, vit

VOCAB = 320
BOS, EOS, PAD, IMAGE = 0, 2, 3, 4
SPECIAL_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
VISION_IDS = {
    "vision_start_token_id": 316,
    "vision_end_token_id": 317,
    "image_token_id": 318,
    "video_token_id": 319,
}
GLM_IDS = {
    "image_start_token_id": 310,
    "image_end_token_id": 311,
    "video_start_token_id": 312,
    "video_end_token_id": 313,
    "image_token_id": 314,
    "video_token_id": 315,
}


def _text(model_type: str | None = None, **changes) -> dict:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 68,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        **SPECIAL_IDS,
    }
    return sizes | ({"model_type": model_type} if model_type else {}) | changes


def visual(**changes) -> dict:
    """Vision tower of the Qwen and GLM families: flat rows of patches, merged two by two."""
    sizes = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.1,
    }
    return sizes | changes


def _rope(sections: list[int], **changes) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections} | changes


def qwen2_vl() -> tf.PreTrainedConfig:
    vision = visual(embed_dim=32, hidden_size=48, mlp_ratio=2)
    del vision["intermediate_size"], vision["out_hidden_size"]
    return tf.Qwen2VLConfig(
        vision_config=vision,
        text_config=_text(rope_parameters=_rope([2, 1, 1])),
        tie_word_embeddings=True,
        **VISION_IDS,
    )


def qwen3_vl() -> tf.PreTrainedConfig:
    return tf.Qwen3VLConfig(
        vision_config=visual(depth=4, num_position_embeddings=16, deepstack_visual_indexes=[1, 2]),
        text_config=_text(
            num_hidden_layers=4,
            head_dim=12,
            rope_parameters=_rope([2, 2, 2], mrope_interleaved=True),
            tie_word_embeddings=True,
        ),
        tie_word_embeddings=True,
        **VISION_IDS,
    )


def qwen3_vl_moe() -> tf.PreTrainedConfig:
    return tf.Qwen3VLMoeConfig(
        vision_config=visual(depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 2]),
        text_config=_text(
            num_hidden_layers=4,
            head_dim=12,
            rope_parameters=_rope([2, 2, 2], mrope_interleaved=True),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            tie_word_embeddings=False,
        ),
        tie_word_embeddings=False,
        **VISION_IDS,
    )


def qwen3_5() -> tf.PreTrainedConfig:
    return tf.Qwen3_5Config(
        vision_config=visual(depth=3, num_position_embeddings=16),
        text_config=_text(
            num_hidden_layers=4,
            head_dim=32,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_key_head_dim=10,
            linear_value_head_dim=14,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_conv_kernel_dim=4,
            rope_parameters=_rope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=0.5),
            tie_word_embeddings=False,
        ),
        tie_word_embeddings=False,
        **VISION_IDS,
    )


def glm4v() -> tf.PreTrainedConfig:
    return tf.Glm4vConfig(
        vision_config=visual(image_size=56),
        text_config=_text(
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters=_rope([1, 1, 1], partial_rotary_factor=0.5),
        ),
        tie_word_embeddings=False,
        **GLM_IDS,
    )


def glm4v_moe() -> tf.PreTrainedConfig:
    return tf.Glm4vMoeConfig(
        vision_config=visual(image_size=56),
        text_config=_text(
            head_dim=24,
            rope_parameters=_rope([2, 2, 2], partial_rotary_factor=0.5),
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            tie_word_embeddings=False,
        ),
        tie_word_embeddings=False,
        **GLM_IDS,
    )


def mllama() -> tf.PreTrainedConfig:
    """The image token is the first one past the vocabulary, as in the real models: the table has 8 more rows."""
    return tf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 4,
            "intermediate_size": 44,
            "intermediate_layers_indices": [1, 2],
            "vision_output_dim": 32 * 3,
            "image_size": 28,
            "patch_size": 14,
            "initializer_range": 0.1,
        },
        text_config=_text(
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=VOCAB,
    )


def _llama4(**changes) -> tf.PreTrainedConfig:
    text = {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "intermediate_size": 32,
        "intermediate_size_mlp": 68,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return tf.Llama4Config(
        vision_config=vit(
            patch_size=7,
            intermediate_size=32 * 4,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=40,
            projector_output_dim=40,
            vision_output_dim=40,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        text_config=_text(**text, **changes),
        boi_token_index=316,
        eoi_token_index=317,
        image_token_index=318,
        tie_word_embeddings=False,
    )


def llama4() -> tf.PreTrainedConfig:
    return _llama4(moe_layers=[])


def llama4_moe() -> tf.PreTrainedConfig:
    return _llama4(moe_layers=[1, 3])


def kosmos2() -> tf.PreTrainedConfig:
    return tf.Kosmos2Config(
        vision_config=vit(),
        text_config={
            "embed_dim": 48,
            "layers": 3,
            "ffn_dim": 68,
            "attention_heads": 6,
            "vocab_size": VOCAB,
            "max_position_embeddings": 256,
            "init_std": 0.1,
            **SPECIAL_IDS,
        },
        latent_query_num=4,
        tie_word_embeddings=True,
    )


def git() -> tf.PreTrainedConfig:
    text = _text()
    del text["num_key_value_heads"], text["rms_norm_eps"]
    return tf.GitConfig(vision_config=vit(), **text, tie_word_embeddings=False)


def phi4_multimodal() -> tf.PreTrainedConfig:
    """The text model's sizes stand on the top level."""
    vision = vit(patch_size=7, num_hidden_layers=4, crop_size=28, feature_layer=-2, image_token_id=318)
    audio = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 8,
        "input_size": 16,
        "time_reduction": 4,
        "bias_max_distance": 10,
        "audio_token_id": 319,
        "initializer_range": 0.1,
    }
    return tf.Phi4MultimodalConfig(
        vision_config=vision,
        audio_config=audio,
        **_text(head_dim=12, original_max_position_embeddings=256),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
    )


def minicpmv4_6() -> tf.PreTrainedConfig:
    text = qwen3_5().text_config.to_dict() | {"tie_word_embeddings": True}
    return tf.MiniCPMV4_6Config(
        vision_config=vit(num_hidden_layers=4, patch_size=7, image_size=56),
        text_config=text,
        insert_layer_id=1,
        image_size=56,
        image_token_id=318,
        video_token_id=319,
        tie_word_embeddings=True,
    )


def blip2_t5() -> tf.PreTrainedConfig:
    text = {
        "model_type": "t5",
        "d_model": 48,
        "d_kv": 10,
        "d_ff": 68,
        "num_heads": 6,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": PAD,
        "vocab_size": VOCAB,
        **SPECIAL_IDS,
    }
    return tf.Blip2Config(
        vision_config=vit(),
        qformer_config=qformer(),
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def instructblip() -> tf.PreTrainedConfig:
    return tf.InstructBlipConfig(
        vision_config=vit(),
        qformer_config=qformer(),
        text_config=_text("llama", head_dim=12, tie_word_embeddings=False),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def deepseek_vl() -> tf.PreTrainedConfig:
    return tf.DeepseekVLConfig(
        vision_config=vit("siglip_vision_model"),
        text_config=_text("llama", head_dim=12, tie_word_embeddings=True),
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )


def idefics2() -> tf.PreTrainedConfig:
    return tf.Idefics2Config(
        vision_config=vit(),
        perceiver_config={
            "hidden_size": 48,
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
        },
        text_config=_text("mistral", head_dim=12, tie_word_embeddings=False),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def got_ocr2() -> tf.PreTrainedConfig:
    vision = vit(image_size=56, patch_size=7, mlp_dim=44, output_channels=20, window_size=3, global_attn_indexes=[1])
    del vision["intermediate_size"]
    return tf.GotOcr2Config(
        vision_config=vision,
        text_config=_text("qwen2", head_dim=12, tie_word_embeddings=True),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=True,
    )


def florence2() -> tf.PreTrainedConfig:
    vision = {
        "depths": [1, 1, 2],
        "patch_size": [7, 3, 3],
        "patch_stride": [4, 2, 2],
        "patch_padding": [3, 1, 1],
        "patch_prenorm": [False, True, True],
        "embed_dim": [16, 24, 32],
        "num_heads": [2, 3, 4],
        "num_groups": [2, 3, 4],
        "window_size": 3,
        "mlp_ratio": 2.5,
        "projection_dim": 48,
        "initializer_range": 0.1,
    }
    text = {
        "model_type": "bart",
        "d_model": 48,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 68,
        "decoder_ffn_dim": 60,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "init_std": 0.1,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": EOS,
        **SPECIAL_IDS,
    }
    return tf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE, **SPECIAL_IDS)


def perception_lm() -> tf.PreTrainedConfig:
    """The real vision tower is a timm model; a CLIP tower with the same output (class token first) stands in."""
    return tf.PerceptionLMConfig(
        vision_config=vit("clip_vision_model", patch_size=7, model_args={"embed_dim": 32, "img_size": [28, 28]}),
        text_config=_text("llama", head_dim=12, tie_word_embeddings=True),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=318,
        video_token_id=319,
        tie_word_embeddings=True,
    )


def fast_vlm() -> tf.PreTrainedConfig:
    """The real vision tower is a timm model; a ConvNext with the same output (a map of features) stands in."""
    vision = {
        "model_type": "convnext",
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 2, 1],
        "hidden_size": 32,
        "initializer_range": 0.1,
    }
    return tf.FastVlmConfig(
        vision_config=vision,
        text_config=_text("qwen2", head_dim=12, tie_word_embeddings=False),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "mllama": mllama,
    "llama4": llama4,
    "llama4_moe": llama4_moe,
    "kosmos-2": kosmos2,
    "git": git,
    "phi4_multimodal": phi4_multimodal,
    "minicpmv4_6": minicpmv4_6,
    "blip-2-t5": blip2_t5,
    "instructblip": instructblip,
    "deepseek_vl": deepseek_vl,
    "idefics2": idefics2,
    "got_ocr2": got_ocr2,
    "florence2": florence2,
    "perception_lm": perception_lm,
    "fast_vlm": fast_vlm,
}
#: families whose real vision tower is a timm model: here it is another one, so only the text part is the real thing
STAND_IN = frozenset({"perception_lm", "fast_vlm"})
