"""One valid random picture prompt for any configuration, as the self-check needs it: the smallest legal picture.

`PICTURES` tells for each model type how its pictures are given and how many placeholders one takes, `EXTRAS` what else
its forward wants beside the tokens. Real prompts come from the model's own processor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimlmm.backbones import BACKBONES
from slimlmm.errors import UserError
from slimlmm.families import family_of, part_of
from slimlmm.token_ids import referenced

Batch = dict[str, Tensor]
Pictures = Callable[..., tuple[Batch, int]]


def picture_prompt(config: Any, seed: int = 0, pixels: int = 0) -> Batch:
    """Return one valid random input for `config`: a picture, its placeholders, and eight text tokens.

    `pixels`: about how many per side the picture has where the model takes any size; 0 for the smallest that tells rows
    from columns.
    """
    rng = torch.Generator().manual_seed(seed)
    if config.model_type not in PICTURES:
        raise UserError(f"no picture prompt is known for model type {config.model_type!r}")
    draw = _any_size if config.vision_config.model_type == "pixtral" else PICTURES[config.model_type]
    pictures, count = draw(config, rng, pixels) if draw in SIZED else draw(config, rng)
    data = config.to_dict()
    parts = family_of(config).token_data(data)
    size = parts[family_of(config).tower("text").config]["vocab_size"]
    image = _placeholder(config)
    special = {image, *referenced(*parts.values())}
    plain = torch.tensor([token for token in range(size) if token not in special])
    words = plain[torch.randint(len(plain), (8,), generator=rng)]
    ids = torch.cat((words[:2], torch.full((count,), image), words[2:])).unsqueeze(0)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    return batch | (EXTRAS[config.model_type](config, ids) if config.model_type in EXTRAS else {})


def _placeholder(config: Any) -> int:
    """Return the id of the picture's token; any id will do where its embedding is replaced whatever it is."""
    for part in (config, config.vision_config):
        for key in ("image_token_id", "image_token_index"):
            if (found := part.to_dict().get(key)) is not None:
                return int(found)
    return int(part_of(config, family_of(config).tower("text")).bos_token_id)


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _patches(config: Any) -> tuple[int, int]:
    """Return pixels per side and patches per side."""
    side = _side(config.vision_config.image_size)
    return side, side // _side(config.vision_config.patch_size)


def _pixels(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def _square(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 3, side, side]; a placeholder per patch, and one for the class token where the family leaves it in."""
    side, patches = _patches(config)
    count = patches**2 + BACKBONES[config.vision_config.model_type].class_tokens
    count -= config.to_dict().get("vision_feature_select_strategy") == "default"
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, count


def _patches_only(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 3, side, side]; a placeholder per patch, never one for the class token."""
    side, patches = _patches(config)
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, patches**2


def _merged(merge: Callable[[Any, int], int]) -> Pictures:
    """[1, 3, side, side]; ``merge(config, patches per side)`` neighbours in each direction become one placeholder."""

    def pictures(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
        side, patches = _patches(config)
        return {"pixel_values": _pixels(rng, 1, 3, side, side)}, (-(-patches // merge(config, patches))) ** 2

    return pictures


def _listed(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, pictures, 3, side, side]; pixel shuffle by `scale_factor`."""
    side, patches = _patches(config)
    return {"pixel_values": _pixels(rng, 1, 1, 3, side, side)}, patches**2 // config.scale_factor**2


def _tiles(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 1 + tiles, 3, side, side] and image_sizes: the smallest grid allowed, and a picture that just fills it.

    One placeholder per patch of the overview and of the tiles, and one more at the end of each row of the tiles.
    """
    side, patches = _patches(config)
    height, width = min(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    rows, columns = height // side, width // side
    count = patches**2 + rows * patches * (columns * patches + 1)
    pictures = _pixels(rng, 1, 1 + rows * columns, 3, side, side)
    return {"pixel_values": pictures, "image_sizes": torch.tensor([[height, width]])}, count


def _grid(pixels: int, cell: int) -> tuple[int, int]:
    """Return rows and columns of placeholders of `cell` pixels a side: square for a picture of `pixels`, else two by three."""
    side = max(1, round(pixels / cell))
    return (side, side) if pixels else (2, 3)


def _any_size(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """[1, 3, height, width] and image_sizes; a placeholder per cell."""
    cell = _side(config.vision_config.patch_size) * config.to_dict().get("spatial_merge_size", 1)
    rows, columns = _grid(pixels, cell)
    pictures = _pixels(rng, 1, 3, rows * cell, columns * cell)
    return {"pixel_values": pictures, "image_sizes": torch.tensor([[rows * cell, columns * cell]])}, rows * columns


def _patch_rows(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """Rows of flat patches and their grid; two by two placeholders where no size is asked for."""
    vision = config.vision_config
    cells = _grid(pixels, _side(vision.patch_size) * vision.spatial_merge_size)[0]
    side = cells * vision.spatial_merge_size
    length = vision.in_channels * _side(vision.temporal_patch_size) * _side(vision.patch_size) ** 2
    pictures = {"pixel_values": _pixels(rng, side * side, length), "image_grid_thw": torch.tensor([[1, side, side]])}
    return pictures, cells * cells


def _patch_squares(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """[patches, 3, patch, patch] and their grid; two by two placeholders where no size is asked for."""
    vision = config.vision_config
    patch = _side(vision.patch_size)
    cells = _grid(pixels, patch * vision.spatial_merge_size)[0]
    side = cells * vision.spatial_merge_size
    pictures = _pixels(rng, side * side, vision.num_channels, patch, patch)
    return {"pixel_values": pictures, "image_grid_thw": torch.tensor([[1, side, side]])}, cells * cells


def _flat_shapes(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """[1, patches, 3 * patch * patch], the shape of the grid and a mask; a placeholder per merged cell."""
    vision, merge = config.vision_config, config.downsample_factor
    rows, columns = (merge * cells for cells in _grid(pixels, merge * _side(vision.patch_size)))
    batch = {
        "pixel_values": _pixels(rng, 1, rows * columns, vision.num_channels * _side(vision.patch_size) ** 2),
        "spatial_shapes": torch.tensor([[rows, columns]]),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
    }
    return batch, rows * columns // merge**2


def _flat_positions(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """[1, patches, 3 * patch * patch] in 0..1 and (x, y) of each patch; a placeholder per pooled cell."""
    vision = config.vision_config
    pool = vision.pooling_kernel_size
    rows, columns = (pool * cells for cells in _grid(pixels, pool * vision.patch_size))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    pictures = torch.rand(1, rows * columns, 3 * vision.patch_size**2, generator=rng)
    return {"pixel_values": pictures, "image_position_ids": places.unsqueeze(0)}, rows * columns // pool**2


def _queries(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 3, side, side]; as many placeholders as there are learned queries."""
    side, _ = _patches(config)
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, config.num_query_tokens


def _shuffled(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """One square picture; neighbouring patches put together by pixel shuffle."""
    pictures, count = _patches_only(config, rng)
    return pictures, int(count * config.vision_config.pixel_shuffle_ratio**2)


def _strided(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """One square picture; two convolutions of stride 2 over the patches."""
    side = _side(config.vision_config.image_size)
    rows = math.ceil(side // _side(config.vision_config.patch_size) / 4)
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, rows * rows


def _queries_and_question(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """As `_queries`; the queries also read the question, in a vocabulary of their own."""
    pictures, count = _queries(config, rng)
    question = torch.randint(1, config.qformer_config.vocab_size, (1, 5), generator=rng)
    return pictures | {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}, count


def _latents(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """One square picture; as many tokens as there are latent queries."""
    side = _side(config.vision_config.image_size)
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, config.latent_query_num


def _resampled(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 1, 3, side, side]; resampled to a fixed number of tokens."""
    side = _side(config.vision_config.image_size)
    return {"pixel_values": _pixels(rng, 1, 1, 3, side, side)}, config.perceiver_config.resampler_n_latents


def _before_text(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """One square picture that the model itself puts before the text: no placeholder."""
    side, _ = _patches(config)
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, 0


def _padded_tiles(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """One picture of a single tile, padded to the largest number of tiles; read by cross-attention."""
    vision = config.vision_config
    tiles = torch.zeros(1, 1, vision.max_num_tiles, 3, *[_side(vision.image_size)] * 2)
    tiles[:, :, :1] = _pixels(rng, 1, 1, 1, 3, *[_side(vision.image_size)] * 2)
    mask = torch.zeros(1, 1, vision.max_num_tiles, dtype=torch.long)
    mask[..., 0] = 1
    ratio = 1 + [list(pair) for pair in vision.supported_aspect_ratios].index([1, 1])
    pictures = {
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.tensor([[ratio]]),
        "aspect_ratio_mask": mask,
    }
    return pictures, 1


def _crops(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 2, 3, side, side]: an overview and one crop, each with a separator per row, and one separator between them."""
    vision = config.vision_config
    rows = _side(vision.image_size) // _side(vision.patch_size)
    merged = math.ceil(rows / 2)
    pictures = {
        "image_pixel_values": _pixels(rng, 1, 2, 3, *[_side(vision.image_size)] * 2),
        "image_sizes": torch.tensor([[vision.crop_size, vision.crop_size]]),
        "image_attention_mask": torch.ones(1, 2, rows, rows),
    }
    return pictures, 2 * merged * (merged + 1) + 1


def _packed(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """Patches side by side in one strip, with the grid's size; merged in the tower and again behind it."""
    vision = config.vision_config
    inside = 1 if config.downsample_mode == "4x" else _side(vision.window_kernel_size)
    merged, patch = inside * _side(config.merge_kernel_size) ** config.merger_times, _side(vision.patch_size)
    cells = _grid(pixels, merged * patch)[0]
    side = cells * merged
    strip = torch.randn(1, vision.num_channels, patch, side * side * patch, generator=rng)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[side, side]], dtype=torch.int32)}, cells * cells


def _stages(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """One square picture, of a 2 x 2 grid after all stages where no size is asked for, plus their mean as a token."""
    vision = config.vision_config
    side = _grid(pixels, math.prod(vision.patch_stride))[0] * math.prod(vision.patch_stride)
    rows = side
    for size, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        rows = (rows + 2 * padding - size) // stride + 1
    return {"pixel_values": _pixels(rng, 1, 3, side, side)}, 1 + rows * rows


def _pooled(config: Any, rng: torch.Generator) -> tuple[Batch, int]:
    """[1, 1, 3, side, side]; patches averaged in small squares."""
    vision = config.vision_config
    side = _side(vision.model_args["img_size"])
    patch = vision.to_dict().get("patch_size") or re.findall(r"patch(\d+)", vision.architecture)[0]
    rows = side // int(patch) // config.projector_pooling_ratio
    return {"pixel_values": _pixels(rng, 1, 1, 3, side, side)}, rows * rows


def _map(config: Any, rng: torch.Generator, pixels: int = 0) -> tuple[Batch, int]:
    """One square picture that a convolutional tower turns into a map, 2 x 2 by default (FastViT divides sizes by 64)."""
    vision = config.vision_config
    stride = vision.patch_size * 2 ** (len(vision.depths) - 1) if hasattr(vision, "depths") else 64
    cells = _grid(pixels, stride)[0]
    return {"pixel_values": _pixels(rng, 1, 3, cells * stride, cells * stride)}, cells * cells


def _is_picture(key: str) -> Callable[[Any, Tensor], Batch]:
    return lambda config, input_ids: {key: (input_ids == config.image_token_id).long()}


def _prefix(config: Any, input_ids: Tensor) -> Batch:
    """Make the whole prompt a prefix, in which everything sees everything."""
    return {"token_type_ids": torch.zeros_like(input_ids)}


def _cross_mask(config: Any, input_ids: Tensor) -> Batch:
    """Let the picture's token and all after it see the first tile."""
    mask = torch.zeros(*input_ids.shape, 1, config.vision_config.max_num_tiles, dtype=torch.long)
    mask[..., 0, 0] = (input_ids == config.image_token_id).cumsum(1)
    return {"cross_attention_mask": mask}


def _latent_positions(config: Any, input_ids: Tensor) -> Batch:
    return {"image_embeds_position_mask": (input_ids == _placeholder(config)).long()}


def _decoder_ids(config: Any, input_ids: Tensor) -> Batch:
    """Give an encoder-decoder its start token and the prompt's last two tokens."""
    if not config.is_encoder_decoder and not config.text_config.is_encoder_decoder:
        return {}
    start = torch.full_like(input_ids[:, :1], config.text_config.decoder_start_token_id)
    return {"decoder_input_ids": torch.cat((start, input_ids[:, -2:]), dim=1)}


#: by model type: (config, random numbers) -> picture tensors, number of placeholders
PICTURES: Mapping[str, Pictures] = {
    "llava": _square,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "vipllava": _patches_only,
    "smolvlm": _listed,
    "idefics3": _listed,
    "qwen2_vl": _patch_rows,
    "qwen2_5_vl": _patch_rows,
    "qwen3_vl": _patch_rows,
    "qwen3_vl_moe": _patch_rows,
    "qwen3_5": _patch_rows,
    "glm4v": _patch_rows,
    "qwen2_5_omni_thinker": _patch_rows,
    "glm46v": _patch_rows,
    "paddleocr_vl": _patch_squares,
    "glm4v_moe": _patch_rows,
    "mllama": _padded_tiles,
    "llama4": _shuffled,
    "kosmos-2": _latents,
    "git": _before_text,
    "phi4_multimodal": _crops,
    "minicpmv4_6": _packed,
    "instructblip": _queries_and_question,
    "deepseek_vl": _patches_only,
    "idefics2": _resampled,
    "got_ocr2": _strided,
    "florence2": _stages,
    "perception_lm": _pooled,
    "fast_vlm": _map,
    "blip-2": _queries,
    "mistral3": _any_size,
    "lighton_ocr": _any_size,
    "paligemma": _square,
    "gemma3": _merged(lambda config, patches: patches // int(config.mm_tokens_per_image**0.5)),
    "gemma4": _flat_positions,
    "internvl": _merged(lambda config, patches: round(1 / config.downsample_ratio)),
    "aya_vision": _merged(lambda config, patches: config.downsample_factor),
    "cohere2_vision": _merged(lambda config, patches: config.downsample_factor),
    "ovis2": _merged(lambda config, patches: config.vision_config.hidden_stride),
    "janus": _square,
    "lfm2_vl": _flat_shapes,
}

#: those that draw a picture of about so many pixels per side
SIZED: Sequence[Callable[..., tuple[Batch, int]]] = (
    _patch_rows,
    _patch_squares,
    _packed,
    _stages,
    _map,
    _any_size,
    _flat_positions,
    _flat_shapes,
)

#: by model type: (config, input ids) -> what else forward wants
EXTRAS: Mapping[str, Callable[[Any, Tensor], Batch]] = {
    **{
        name: _is_picture("mm_token_type_ids")
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen3_5",
            "glm4v",
            "glm4v_moe",
            "gemma4",
            "paddleocr_vl",
            "glm46v",
        )
    },
    "gemma3": _is_picture("token_type_ids"),
    "paligemma": _prefix,
    "mllama": _cross_mask,
    "kosmos-2": _latent_positions,
    "blip-2": _decoder_ids,
    "florence2": _decoder_ids,
}
