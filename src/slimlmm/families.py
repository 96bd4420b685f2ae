"""What probing cannot see, as data: where the towers sit, which names play which role, what goes together.

A `Family` is one top-level model type (``llava``): its towers and how they are joined. A `Backbone` is one
tower's own model type (``llama``, ``dinov2``): its layer list, field names, norms and attention modules.
Sizes, shapes and which parameter moves with which field are never written here: `probing` finds them. To add
a model, add lines here and a tiny builder in the tests; the self-check of `selfcheck` says whether the lines
are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from slimlmm.backbones import BACKBONES, Backbone
from slimlmm.errors import UserError, nearest


def matched(path: str, name: str) -> tuple[str, ...] | None:
    """Return the numbers that the stars of `path` stand for in `name`, None where it does not match."""
    found = re.fullmatch(re.escape(path).replace(r"\*", r"(\d+)"), name)
    return None if found is None else found.groups()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A tower of a family: axis prefix ("text"), sub-config key ("" = top level), and module path in the model.

    `others`: module paths that differ, by the tower's own model type.
    """

    name: str
    config: str
    prefix: str
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interior:
    """An axis sized like a tower's width (or a multiple) that is the inside of a joint, not the stream.

    Module paths; a ``*`` stands for the numbers of several such parts.
    """

    axis: str
    part: str
    produce: tuple[str, ...]
    consume: tuple[str, ...]
    scale: tuple[str, ...] = ()

    def place(self, parameter: str, dim: int) -> str:
        """Return the name of the part whose inner axis this is, "" where it is none."""
        module = parameter.rpartition(".")[0]
        sides = ((self.produce, dim == 0), (self.consume, dim == 1), (self.scale, dim == 0))
        for path in (path for paths, right in sides if right for path in paths):
            if (numbers := matched(path, module)) is not None:
                return self.part + "".join(f"[{number}]" for number in numbers)
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One top-level model type.

    `joint`: module path of what joins vision to text, `parts`: other places of the towers' FFN axes (path -> name).
    `tokens`: rows of the residual stream outside the towers. `layouts`: parameters whose axes their module's class does
    not tell, one letter per dimension: p produces, c consumes, - neither; a capital where the unit varies slowest. `pieces`:
    parameters with a dimension that is several axes in a row: "1" one constant per unit, "q" one per query head of a group, "R"
    the rest, with the unit varying slowest. A ``*`` in a path stands for a number.

    `ties`: axis -> (sub-config, field) pairs that follow it where they equal it or a multiple. `projector`: axis ->
    (sub-config, field) of a free size inside the joint. `raw`: modules that write channels of the text tower which no norm
    reads; `raw_readers`: modules that read the vision tower without a norm; `post_norms`: norms of the joint whose output
    is the stream. `leading`: axis of blocks -> list as long as the number of first blocks that must stay. `feature_layer`:
    (sub-config, field) that picks vision hidden states by number (0 = embeddings, negative from the end). `behind`: fields
    with the number of the vision block behind which patches are merged. `heavier_eps`: axis -> a norm that sees the square of
    what a cut scales the stream by, so that its epsilon weighs more, and the field of the tower that undoes it.
    `query_tokens`: axis -> (sub-config, field) of the number of learned queries, each of which becomes one placeholder, and
    what the processor calls that number. `token_parts`: more sub-configs that hold token ids. `first_position`: token id that
    positions are counted from, so that no token up to it may go. `capped`: whether logits are c tanh(x / c) of what the head
    gives, c being `final_logit_softcapping` of the text configuration. `beside`: whether pictures stand beside the text and are
    looked at by cross-attention, so that no token has a picture's state. `patches`: module path of what reads the pixels, where
    that is no convolution. `refusals`: axis -> why it cannot be cut.
    """

    towers: tuple[Tower, ...]
    joint: str
    tokens: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    projector: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    interiors: tuple[Interior, ...] = ()
    ties: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    raw: tuple[str, ...] = ()
    raw_readers: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()
    leading: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    feature_layer: tuple[str, str] | None = None
    heavier_eps: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    query_tokens: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    behind: tuple[tuple[str, str], ...] = ()
    token_parts: tuple[str, ...] = ()
    first_position: tuple[str, str] | None = None
    capped: bool = False
    beside: bool = False
    patches: str = ""
    refusals: Mapping[str, str] = field(default_factory=dict)

    def interior(self, axis: str, parameter: str, dim: int) -> str:
        """Return the name of the part of a joint whose inner axis this is, "" for the stream itself."""
        found = (interior.place(parameter, dim) for interior in self.interiors if interior.axis == axis)
        return next((part for part in found if part), "")

    def token_data(self, data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Return the parts of a configuration's dictionary that hold token ids, by their keys; "" is the top level."""
        keys = {"", self.tower("text").config, *self.token_parts}
        return {key: data[key] if key else data for key in sorted(keys)}

    def tower(self, name: str) -> Tower:
        """Return the tower that carries the axes ``name.*``."""
        return next(tower for tower in self.towers if tower.name == name)


def _towers(
    text: str = "model.language_model",
    vision: str = "model.vision_tower",
    *,
    text_config: str = "text_config",
    vision_config: str = "vision_config",
) -> tuple[Tower, ...]:
    return (
        Tower(name="text", config=text_config, prefix=text),
        Tower(name="vision", config=vision_config, prefix=vision),
    )


def _two_layers(
    joint: str, first: str = "linear_1", second: str = "linear_2", part: str = "projector"
) -> tuple[Interior, ...]:
    return (Interior(axis="text.width", part=part, produce=(f"{joint}.{first}",), consume=(f"{joint}.{second}",)),)


def _merger(path: str, first: str, second: str, part: str = "merger") -> Interior:
    """Say that a merger's inside is sized like the patches that it puts together."""
    return Interior(axis="vision.width", part=part, produce=(f"{path}.{first}",), consume=(f"{path}.{second}",))


_PROJECTOR = "model.multi_modal_projector"
_LLAVA = Family(
    towers=_towers(),
    joint=_PROJECTOR,
    interiors=_two_layers(_PROJECTOR),
    raw_readers=(f"{_PROJECTOR}.linear_1",),
    feature_layer=("", "vision_feature_layer"),
)
_TILED = replace(_LLAVA, tokens=("model.image_newline",))
_IDEFICS = Family(towers=_towers("model.text_model", "model.vision_model"), joint="model.connector")
_QWEN = Family(
    towers=_towers(vision="model.visual"),
    joint="model.visual.merger",
    interiors=(_merger("model.visual.merger", "mlp.0", "mlp.2"),),
    ties={"text.width": (("vision_config", "out_hidden_size"),)},
)
_QWEN3 = replace(
    _QWEN,
    leading={"text.blocks": ("vision_config", "deepstack_visual_indexes")},
    interiors=(
        _merger("model.visual.merger", "linear_fc1", "linear_fc2"),
        _merger("model.visual.deepstack_merger_list.*", "linear_fc1", "linear_fc2", part="deepstack"),
    ),
)
_PERCEIVER = "model.connector.perceiver_resampler"
_PHI4 = "model.embed_tokens_extend"
_MERGER = "model.visual.merger"
_GLM = Family(
    towers=_towers(vision="model.visual"),
    joint=_MERGER,
    interiors=(
        Interior(
            axis="text.width",
            part="vision_ffn",
            produce=tuple(f"model.visual.blocks.*.mlp.{name}_proj" for name in ("gate", "up")),
            consume=("model.visual.blocks.*.mlp.down_proj",),
        ),
        Interior(
            axis="text.width", part="downsample", produce=("model.visual.downsample",), consume=(f"{_MERGER}.proj",)
        ),
        Interior(
            axis="text.width",
            part="merger",
            produce=(f"{_MERGER}.proj",),
            consume=(f"{_MERGER}.gate_proj", f"{_MERGER}.up_proj"),
            scale=(f"{_MERGER}.post_projection_norm",),
        ),
    ),
    ties={"text.width": (("vision_config", "out_hidden_size"),)},
    projector={"projector.ffn": ("vision_config", "intermediate_size")},
)
_BLIP = Family(
    towers=(
        Tower(name="text", config="text_config", prefix="language_model.model", others={"t5": "language_model"}),
        Tower(name="vision", config="vision_config", prefix="vision_model"),
        Tower(name="qformer", config="qformer_config", prefix="qformer"),
    ),
    joint="language_projection",
    query_tokens={"qformer.query_tokens": ("", "num_query_tokens", "num_query_tokens")},
    ties={"vision.width": (("qformer_config", "encoder_hidden_size"),)},
)

_AYA = replace(_LLAVA, interiors=(), projector={"projector.ffn": ("", "alignment_intermediate_size")})
FAMILIES: Mapping[str, Family] = {
    "llava": _LLAVA,
    "llava_next": _TILED,
    "llava_next_video": _TILED,
    "llava_onevision": _TILED,
    "vipllava": _LLAVA,
    "mistral3": replace(
        _LLAVA,
        raw_readers=(),
        interiors=(*_LLAVA.interiors, _merger(_PROJECTOR, "patch_merger.merging_layer", "linear_1")),
        layouts={f"{_PROJECTOR}.patch_merger.merging_layer.weight": "pC"},
    ),
    "lighton_ocr": Family(
        towers=_towers(vision="model.vision_encoder"),
        joint="model.vision_projection",
        interiors=(
            *_two_layers("model.vision_projection"),
            _merger("model.vision_projection", "patch_merger.merging_layer", "linear_1"),
        ),
        layouts={"model.vision_projection.patch_merger.merging_layer.weight": "pC"},
    ),
    "paddleocr_vl": Family(
        towers=_towers(vision="model.visual.vision_model"),
        joint="model.projector",
        interiors=(_merger("model.projector", "linear_1", "linear_2"),),
    ),
    "internvl": _LLAVA,
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
    "qwen2_vl": replace(_QWEN, ties={"text.width": (("vision_config", "hidden_size"),)}),
    "qwen2_5_vl": _QWEN,
    "qwen2_5_omni_thinker": replace(
        _QWEN, ties={"text.width": (("vision_config", "out_hidden_size"), ("audio_config", "output_dim"))}
    ),
    "qwen3_vl": _QWEN3,
    "paligemma": Family(
        towers=_towers(),
        joint=_PROJECTOR,
        ties={"text.width": (("", "hidden_size"), ("", "projection_dim"), ("vision_config", "projection_dim"))},
        capped=True,
    ),
    "gemma3": Family(towers=_towers(), joint=_PROJECTOR, layouts={f"{_PROJECTOR}.mm_input_projection_weight": "cp"}),
    "gemma4": Family(
        towers=_towers(),
        joint="model.embed_vision",
        raw_readers=("model.embed_vision.embedding_projection",),
        heavier_eps={"vision.width": ("model.embed_vision.embedding_pre_projection_norm", "standardize")},
        ties={"vocab": (("text_config", "vocab_size_per_layer_input"),)},
        capped=True,
        patches="model.vision_tower.patch_embedder.input_proj",
    ),
    "aya_vision": _AYA,
    "cohere2_vision": replace(_AYA, feature_layer=None),
    "idefics2": Family(
        towers=_towers("model.text_model", "model.vision_model"),
        joint="model.connector",
        parts={"model.connector.modality_projection": "connector"},
        ties={"text.width": (("perceiver_config", "hidden_size"),)},
        query_tokens={"projector.query_tokens": ("perceiver_config", "resampler_n_latents", "image_seq_len")},
        post_norms=(f"{_PERCEIVER}.norm",),
        interiors=(
            Interior(
                axis="text.width",
                part="perceiver",
                produce=tuple(f"{_PERCEIVER}.layers.*.mlp.{name}_proj" for name in ("gate", "up")),
                consume=(f"{_PERCEIVER}.layers.*.mlp.down_proj",),
            ),
        ),
    ),
    "deepseek_vl": Family(
        towers=_towers(vision="model.vision_model"),
        joint="model.aligner",
        interiors=_two_layers("model.aligner", "linear1", "linear2"),
    ),
    "got_ocr2": Family(
        towers=_towers(),
        joint=_PROJECTOR,
        interiors=_two_layers(_PROJECTOR, "conv_upsampler2", "multimodal_projector"),
    ),
    "perception_lm": replace(
        _LLAVA,
        feature_layer=None,
        refusals={
            "vision.width": "its projector reads the width from the arguments of a timm model (model_args.embed_dim)"
        },
    ),
    "fast_vlm": replace(_LLAVA, feature_layer=None),
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": replace(_QWEN3, leading={}, interiors=_QWEN3.interiors[:1]),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "minicpmv4_6": Family(
        towers=_towers(),
        joint="model.merger",
        interiors=(_merger("model.merger.mlp.*", "linear_1", "linear_2"),),
        behind=(("", "insert_layer_id"), ("vision_config", "insert_layer_id")),
    ),
    "mllama": Family(
        towers=_towers(vision="model.vision_model"),
        joint=_PROJECTOR,
        ties={"vision.width": (("vision_config", "vision_output_dim"),)},
        pieces={f"{_PROJECTOR}.weight": (1, ("1", "R"))},
        raw=(_PROJECTOR,),
        beside=True,
    ),
    "florence2": Family(
        towers=_towers(), joint=_PROJECTOR, ties={"text.width": (("vision_config", "projection_dim"),)}
    ),
    "kosmos-2": Family(
        towers=_towers("text_model.model", "vision_model.model"),
        joint="image_to_text_projection",
        query_tokens={"projector.query_tokens": ("", "latent_query_num", "")},
        first_position=("text_config", "pad_token_id"),
        refusals={
            "projector.query_tokens": "its processor writes 64 placeholders for a picture, whatever the config says"
        },
    ),
    "git": Family(
        towers=_towers("git", "git.image_encoder.vision_model", text_config=""), joint="git.visual_projection"
    ),
    "phi4_multimodal": Family(
        towers=_towers("model", "model.embed_tokens_extend.image_embed.img_processor", text_config=""),
        joint=f"{_PHI4}.image_embed",
        feature_layer=("vision_config", "feature_layer"),
        token_parts=("vision_config", "audio_config"),
        interiors=tuple(
            Interior(axis="text.width", part=part, produce=(f"{_PHI4}.{up}",), consume=(f"{_PHI4}.{down}",))
            for part, up, down in (
                ("projector", "image_embed.img_projection_up", "image_embed.img_projection_down"),
                ("speech", "audio_embed.up_proj_for_speech", "audio_embed.down_proj_for_speech"),
                ("vision_speech", "audio_embed.up_proj_for_vision_speech", "audio_embed.down_proj_for_vision_speech"),
            )
        ),
    ),
    "llama4": Family(
        towers=_towers("language_model.model", "vision_model.model"),
        joint="multi_modal_projector",
        tokens=("vision_model.class_embedding",),
        patches="vision_model.patch_embedding.linear",
    ),
    "ovis2": Family(
        towers=_towers(),
        joint="model.visual_embeddings_table",
        ties={"text.width": (("", "hidden_size"),), "vocab": (("", "vocab_size"),)},
    ),
    "janus": Family(
        towers=_towers(vision="model.vision_model"),
        joint="model.aligner",
        interiors=(
            *_two_layers("model.aligner", "fc1", "hidden_layers.0"),
            *_two_layers("model.generation_aligner", "fc1", "hidden_layers.0", part="generation"),
            *_two_layers("model.generation_head", "proj_out", "vision_head", part="generation_head"),
        ),
        ties={
            "text.width": (
                ("vision_config", "projection_dim"),
                ("vq_config", "projection_dim"),
                ("vq_config", "image_token_embed_dim"),
            )
        },
    ),
    "lfm2_vl": Family(
        towers=_towers(),
        joint=_PROJECTOR,
        interiors=(
            Interior(
                axis="text.width",
                part="conv",
                produce=("model.language_model.layers.*.conv.in_proj",),
                scale=("model.language_model.layers.*.conv.conv",),
                consume=("model.language_model.layers.*.conv.out_proj",),
            ),
        ),
        projector={"projector.ffn": ("", "projector_hidden_size")},
        patches="model.vision_tower.embeddings.patch_embedding",
    ),
    "instructblip": _BLIP,
    "blip-2": _BLIP,
}


#: model types that hold a model of a family, and how to take it out
HOLDS: dict[str, str] = {
    "qwen2_5_omni": "The part of it that sees and writes is: save_pretrained "
    "Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(MODEL) and Qwen2_5OmniProcessor.from_pretrained(MODEL) "
    "of transformers into one folder, and name that.",
}


def stock_class(config: Any) -> Any:
    """Return the Auto class of transformers that builds and loads this configuration."""
    only = set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return AutoModelForMultimodalLM if config.model_type in only else AutoModelForImageTextToText


def part_of(config: Any, tower: Tower) -> Any:
    """Return the sub-configuration of a tower, the whole one where its sizes stand on the top level."""
    return getattr(config, tower.config) if tower.config else config


def family_of(config: Any) -> Family:
    """Return the family of a top-level configuration, or refuse with the nearest known model type."""
    if config.model_type not in FAMILIES:
        hint = HOLDS.get(config.model_type) or nearest(config.model_type, list(FAMILIES))
        raise UserError(f"model type {config.model_type!r} is not supported. {hint}")
    family = FAMILIES[config.model_type]
    towers = []
    for tower in family.towers:
        prefix = tower.others.get(part_of(config, tower).model_type, tower.prefix)
        towers.append(replace(tower, prefix=prefix))
    return replace(family, towers=tuple(towers))


def logit_cap(config: Any) -> float | None:
    """Return c where the model's logits are c tanh(x / c) of what its head gives, None where they are just that."""
    family = family_of(config)
    if not family.capped:
        return None
    text = part_of(config, family.tower("text")).to_dict()
    cap: float | None = text.get("final_logit_softcapping")  # PaliGemma 1 has none
    return cap


def backbone_of(config: Any, tower: Tower) -> Backbone | None:
    """Return the backbone of one tower, None where its model type is unknown (its axes are then refused)."""
    return BACKBONES.get(part_of(config, tower).model_type)


#: prompt of processors with no chat template, by class name; they add the picture's placeholders
PROMPTS: dict[str, str] = {"Blip2Processor": "Question: {question} Answer:"}
#: text of the token that stands where a picture's states go, by class name, where the processor's `image_token_id` is not its id
PLACES: dict[str, Callable[[Any], str]] = {
    "Blip2Processor": lambda processor: str(processor.image_token),
    "Gemma3Processor": lambda processor: str(processor.tokenizer.image_token),
    "InstructBlipProcessor": lambda processor: str(processor.image_token),
    "JanusProcessor": lambda processor: str(processor.image_token),
    "Llama4Processor": lambda processor: str(processor.img_patch_token),
    "Ovis2Processor": lambda _: "<IMG_ATOM>",
}
#: processors whose rows cannot be made into batches, by class name, and why
NOT_ASKED: dict[str, str] = {
    "GitProcessor": "no token stands where a picture goes",
    "GotOcr2Processor": "it writes its own prompts",
    "Kosmos2Processor": "every place of a picture has a token of its own",
}
#: processors whose models look at a picture with the question in mind (a Q-Former that reads it), by class name
SEEN_AS_ASKED = ("InstructBlipProcessor",)
#: what a processor's other per-token inputs are at tokens of an answer, by class name, where not 0: as generation appends them.
#: PaliGemma's type 0 is the prompt, whose tokens see each other whole. None: as at the prompt's last token (Mllama's see tiles).
ANSWER_INPUTS: dict[str, dict[str, int | None]] = {
    "MllamaProcessor": {"cross_attention_mask": None},
    "PaliGemmaProcessor": {"token_type_ids": 1},
}
