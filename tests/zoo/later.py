"""Tiny configurations of families that came later, each with the lines of `families.py` alone."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf

from tiny import vit
from zoo import others
from zoo.others import visual
from zoo.texts import IDS, IMAGE, PATTERN, text


def _cohere2_vision() -> tf.PreTrainedConfig:
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "layer_types": PATTERN * 2, "sliding_window": 8}
    return tf.Cohere2VisionConfig(
        vision_config=vit("siglip_vision_model", patch_size=7, vision_use_head=False),
        text_config=text("cohere2", tied=True, **sizes),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=36,
        tie_word_embeddings=True,
        **IDS,
    )


def _lighton_ocr() -> tf.PreTrainedConfig:
    return tf.LightOnOcrConfig(
        vision_config=vit("pixtral", image_size=42, patch_size=7),
        text_config=text("qwen3", tied=True, head_dim=12),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=True,
        **IDS,
    )


def _paddleocr_vl() -> tf.PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    return tf.PaddleOCRVLConfig(
        vision_config=vit(image_size=56, spatial_merge_size=2),
        text_config=text("paddleocr_vl_text", tied=True, head_dim=12, rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
        tie_word_embeddings=True,
    )


def _llava_next_video() -> tf.PreTrainedConfig:
    return tf.LlavaNextVideoConfig(
        vision_config=vit("clip_vision_model", projection_dim=16),
        text_config=text("llama", head_dim=12),
        image_token_index=IMAGE,
        video_token_index=301,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **IDS,
    )


def _qwen2_5_omni_thinker() -> tf.PreTrainedConfig:
    audio = {
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "d_model": 16,
        "max_source_positions": 20,
        "n_window": 4,
        "output_dim": 48,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    sizes = text("qwen2_5_omni_text", rope_parameters=rope, head_dim=16)
    return tf.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=visual(window_size=56, fullatt_block_indexes=[1]),
        text_config=sizes,
        image_token_index=IMAGE,
        video_token_index=301,
        audio_token_index=302,
        vision_start_token_id=306,
        vision_end_token_id=307,
        audio_start_token_id=303,
        audio_end_token_id=304,
        user_token_id=305,
        tie_word_embeddings=False,
    )


def _glm46v() -> tf.PreTrainedConfig:
    data = others.glm4v().to_dict()
    return tf.Glm46VConfig(**{key: data[key] for key in ("vision_config", "text_config", *others.GLM_IDS)})


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "cohere2_vision": _cohere2_vision,
    "lighton_ocr": _lighton_ocr,
    "paddleocr_vl": _paddleocr_vl,
    "llava_next_video": _llava_next_video,
    "qwen2_5_omni_thinker": _qwen2_5_omni_thinker,
    "glm46v": _glm46v,
}
