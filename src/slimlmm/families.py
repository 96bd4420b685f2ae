"""What probing cannot see, as data: where the towers sit, which names play which role, what goes together.

A `Family` is one top-level model type (``llava``): its towers and how they are joined. A `Backbone` is one
tower's own model type (``llama``, ``dinov2``): its layer list, field names, norms and attention modules.
Sizes, shapes and which parameter moves with which field are never written here: `probing` finds them. To add
a model, add lines here and a tiny builder in the tests; the self-check of `selfcheck` says whether the lines
are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slimlmm.errors import UserError, nearest

Inputs = Literal["grid", "idefics", "qwen", "queries"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Modules (names inside a layer, or inside the tower where outside the layers) whose inner axis is heads.

    `produce` have heads in their output rows, `consume` in their input columns; `outer` is 3 where q, k and v
    are stacked in one matrix. `group` is the name that ends the group's name when heads go with the width.
    """

    module: str = "self_attn"
    produce: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    consume: tuple[str, ...] = ("o_proj",)
    outer: int = 1
    group: str = "heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """One tower's own model type. Paths are relative to the tower, field names to its sub-config.

    `ffn_is_ratio`: the field `ffn` holds FFN width / residual width. `ties`: fields that follow `width` where
    they equal it. `norm`, `eps`: kind of norm and the config field of its epsilon ("" = hard-wired).
    `tokens`: vectors that are not scales but rows of the residual stream. `class_tokens`: states that the
    tower puts before those of the patches. `parts`: places outside the layers that hold FFNs. `per_layer`:
    lists with one entry per block; `indexes`: lists of block numbers; `reset`: fields that the config class
    derives from the depth; `period`: field that says every how many blocks one is special. `width_by_heads`:
    the config class insists that the width is a multiple of the number of heads.
    """

    layers: str
    attention: tuple[Attention, ...] = (Attention(),)
    width: str = "hidden_size"
    blocks: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv: str = ""
    ffn: str = "intermediate_size"
    ffn_is_ratio: bool = False
    ties: tuple[str, ...] = ()
    norm: Literal["rms", "layer"] = "layer"
    eps: str = ""
    tokens: tuple[str, ...] = ()
    class_tokens: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    period: str = ""
    width_by_heads: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A tower of a family: axis prefix ("text"), sub-config key, and module path in the model."""

    name: str
    config: str
    prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interior:
    """An axis sized like a tower's width (or a multiple) that is the inside of a joint, not the stream."""

    axis: str
    part: str
    produce: str
    consume: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One top-level model type.

    `joint`: module path of what joins vision to text. `ties`: axis -> (sub-config, field) pairs that follow
    it where they equal it. `feature_layer`: field that picks vision hidden states by number (0 = embeddings,
    negative from the end). `inputs`: how the self-check writes a picture prompt.
    """

    towers: tuple[Tower, ...]
    inputs: Inputs
    joint: str
    interiors: tuple[Interior, ...] = ()
    ties: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    feature_layer: str = ""

    def tower(self, name: str) -> Tower:
        """Return the tower that carries the axes ``name.*``."""
        return next(tower for tower in self.towers if tower.name == name)


_SIGLIP = Attention(consume=("out_proj",))
_LLAMA = Backbone(layers="layers", kv="num_key_value_heads", norm="rms", eps="rms_norm_eps", per_layer=("layer_types",))
_VISION_FUSED = Attention(module="attn", produce=("qkv",), consume=("proj",), outer=3)
_VISION_ENCODER = Backbone(layers="encoder.layers", attention=(_SIGLIP,))

BACKBONES: Mapping[str, Backbone] = {
    "llama": Backbone(layers="layers", kv="num_key_value_heads", norm="rms", eps="rms_norm_eps", width_by_heads=True),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "opt": Backbone(layers="decoder.layers", attention=(_SIGLIP,), ffn="ffn_dim", ties=("word_embed_proj_dim",)),
    "clip_vision_model": Backbone(
        layers="encoder.layers",
        attention=(_SIGLIP,),
        tokens=("embeddings.class_embedding",),
        class_tokens=1,
    ),
    "siglip_vision_model": Backbone(
        layers="encoder.layers",
        attention=(
            _SIGLIP,
            Attention(
                module="head.attention",
                produce=("in_proj_weight", "in_proj_bias"),
                consume=("out_proj",),
                outer=3,
                group="pooler.heads",
            ),
        ),
        parts={"head": "pooler"},
    ),
    "smolvlm_vision": _VISION_ENCODER,
    "idefics3_vision": _VISION_ENCODER,
    "blip_2_vision_model": Backbone(
        layers="encoder.layers",
        attention=(Attention(produce=("qkv",), consume=("projection",), outer=3),),
    ),
    "dinov2": Backbone(
        layers="encoder.layer",
        attention=(Attention(module="attention"),),
        ffn="mlp_ratio",
        ffn_is_ratio=True,
        class_tokens=1,
        reset=("stage_names", "out_features", "out_indices"),
    ),
    "qwen2_5_vl_vision": Backbone(
        layers="blocks",
        attention=(_VISION_FUSED,),
        blocks="depth",
        heads="num_heads",
        norm="rms",
        indexes=("fullatt_block_indexes",),
    ),
    "blip_2_qformer": Backbone(
        layers="encoder.layer",
        attention=(
            Attention(
                module="attention",
                produce=("attention.query", "attention.key", "attention.value"),
                consume=("output.dense",),
            ),
            Attention(
                module="crossattention",
                produce=("attention.query", "attention.key", "attention.value"),
                consume=("output.dense",),
                group="cross_heads",
            ),
        ),
        period="cross_attention_frequency",
    ),
}

_IDEFICS = Family(
    towers=(
        Tower(name="text", config="text_config", prefix="model.text_model"),
        Tower(name="vision", config="vision_config", prefix="model.vision_model"),
    ),
    inputs="idefics",
    joint="model.connector",
)

FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        towers=(
            Tower(name="text", config="text_config", prefix="model.language_model"),
            Tower(name="vision", config="vision_config", prefix="model.vision_tower"),
        ),
        inputs="grid",
        joint="model.multi_modal_projector",
        interiors=(
            Interior(
                axis="text.width",
                part="projector",
                produce="model.multi_modal_projector.linear_1",
                consume="model.multi_modal_projector.linear_2",
            ),
        ),
        feature_layer="vision_feature_layer",
    ),
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
    "qwen2_5_vl": Family(
        towers=(
            Tower(name="text", config="text_config", prefix="model.language_model"),
            Tower(name="vision", config="vision_config", prefix="model.visual"),
        ),
        inputs="qwen",
        joint="model.visual.merger",
        interiors=(
            Interior(
                axis="vision.width",
                part="merger",
                produce="model.visual.merger.mlp.0",
                consume="model.visual.merger.mlp.2",
            ),
        ),
        ties={"text.width": (("vision_config", "out_hidden_size"),)},
    ),
    "blip-2": Family(
        towers=(
            Tower(name="text", config="text_config", prefix="language_model.model"),
            Tower(name="vision", config="vision_config", prefix="vision_model"),
            Tower(name="qformer", config="qformer_config", prefix="qformer"),
        ),
        inputs="queries",
        joint="language_projection",
        ties={"vision.width": (("qformer_config", "encoder_hidden_size"),)},
    ),
}


def family_of(config: Any) -> Family:
    """Return the family of a top-level configuration, or refuse with the nearest known model type."""
    if config.model_type not in FAMILIES:
        hint = nearest(config.model_type, list(FAMILIES))
        raise UserError(f"model type {config.model_type!r} is not supported. {hint}")
    return FAMILIES[config.model_type]


def backbone_of(config: Any, tower: Tower) -> Backbone | None:
    """Return the backbone of one tower, None where its model type is unknown (its axes are then refused)."""
    return BACKBONES.get(getattr(config, tower.config).model_type)


#: prompt of processors with no chat template, by class name; they add the picture's placeholders
PROMPTS: dict[str, str] = {"Blip2Processor": "Question: {question} Answer:"}
