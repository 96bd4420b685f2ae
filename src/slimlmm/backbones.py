"""The model types of single towers, as data: their lists of blocks, field names, attention modules, and what goes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from slimlmm.axes import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Modules (names inside a layer, or inside the tower where outside the layers) whose inner axis is heads.

    `produce` have heads in their output rows, `consume` in their input columns; `outer` is 3 where q, k and v
    are stacked in one matrix. `group` is the name that ends the group's name when heads go with the width. `norms`: those of
    queries and of keys, over head_dim. `gated`: behind each query stand as many rows that gate the values it gets.
    """

    module: str = "self_attn"
    produce: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    consume: tuple[str, ...] = ("o_proj",)
    outer: int = 1
    group: str = "heads"
    norms: tuple[str, str] = ("q_norm", "k_norm")
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """One tower's own model type. Paths are relative to the tower, field names to its sub-config.

    `more_layers`: lists of further blocks that share the sizes but not the number of blocks; `more_heads`: their numbers of
    heads, where those are their own; `decoder`: the one that is a decoder of its own number of blocks, and the field that
    holds it. `common_heads`: attention modules whose heads are one choice for a whole list of blocks, because a position bias
    per head stands in the first one. `ffn_is_ratio`: the field `ffn` holds FFN width / residual width. `expert_ffn`: FFN width
    of each expert, `experts`: their number, `experts_per_token`: how many a token takes, `expert_teams`: into how many sets they
    are sorted; `runs_all_experts`: the stock modelling runs all of them on every token. `refusals`: noun -> why the config
    cannot say it. `layouts`, `pieces`: see `Family`, with names inside a block.

    `neighbours`: rotary pairs are dimensions (2p, 2p + 1), not (p, p + half). `mrope`: how three coordinates share the pairs,
    in "sections" one behind the other or "interleaved". `fixed_scale`: scores are not divided by the root of head_dim.

    `ties`: fields that follow `width` where they equal it or a multiple. `root_of_width`: embeddings are multiplied by the
    root of the width. `post_norms`: norms whose output is the residual stream. `final_norm` stands before the head.
    `made_up`: name inside a block -> what a cut of the width has to make up for there (`Slot.norm`), where no norm tells;
    a whole tensor without channels may be among them (the bounds of a clipped output). `query_norm`: norm of the queries
    where its trained weights, not the attention, divide by the root of head_dim.
    `tokens`: vectors that are not scales but rows of the residual stream. `class_tokens`: states that the tower puts
    before those of the patches. `parts`: places outside the blocks that hold FFNs, and those inside that choose for
    themselves. `width_by_heads`: the config class insists that the width is a multiple of the number of heads.

    Blocks: `per_layer`: lists with one entry per block; `essential`: (list, value) of which one block must stay;
    `indexes`: lists of block numbers; `anchors`: those whose blocks must stay; `fixed`: numbers of blocks that must stay
    (negative from the end); `counts`: how many of the first blocks are of another kind; `by_block`: settings by block
    number; `sharing`: how many of the last blocks take keys and values from the last block before them of their kind
    (first of `per_layer`); `reset`: fields that the config class derives from the depth; `period`: field that says every
    how many blocks one is special; `no_fewer_than`: field of a number of blocks that these must not fall below.
    """

    layers: str
    more_layers: tuple[str, ...] = ()
    decoder: tuple[str, str] = ("", "")
    attention: tuple[Attention, ...] = (Attention(),)
    width: str = "hidden_size"
    blocks: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    more_heads: tuple[str, ...] = ()
    common_heads: tuple[str, ...] = ()
    kv: str = ""
    head_dim: str = "head_dim"
    ffn: str = "intermediate_size"
    ffn_is_ratio: bool = False
    expert_ffn: str = ""
    experts: str = ""
    experts_per_token: str = "num_experts_per_tok"
    expert_teams: str = "n_group"
    runs_all_experts: bool = False
    neighbours: bool = False
    mrope: Literal["", "sections", "interleaved"] = ""
    fixed_scale: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    pieces: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    ties: tuple[str, ...] = ()
    root_of_width: bool = False
    post_norms: tuple[str, ...] = ()
    final_norm: str = "norm.weight"
    made_up: Mapping[str, Norm] = field(default_factory=dict)
    query_norm: str = ""
    tokens: tuple[str, ...] = ()
    class_tokens: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    essential: tuple[tuple[str, str], ...] = ()
    anchors: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()
    indexes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    by_block: tuple[str, ...] = ()
    sharing: str = ""
    reset: tuple[str, ...] = ()
    period: str = ""
    no_fewer_than: str = ""
    width_by_heads: bool = False


_SIGLIP = Attention(consume=("out_proj",))
_LLAMA = Backbone(layers="layers", kv="num_key_value_heads", per_layer=("layer_types",))
_EXPERTS = replace(
    _LLAMA,
    expert_ffn="moe_intermediate_size",
    experts="num_local_experts",
    parts={"mlp.shared_experts": "shared"},
    layouts={"mlp.experts.gate_up_proj": "-pc", "mlp.experts.down_proj": "-pc", "mlp.gate.weight": "-c"},
)
_PHI = replace(
    _LLAMA,
    attention=(Attention(produce=("qkv_proj",)),),
    refusals={"head_dim": "the config class wants as many longrope factors as width / heads gives pairs"},
    pieces={"self_attn.qkv_proj.weight": (0, ("q", "1", "1"))},
)
#: OLMo 2 and its like have norms behind attention and FFN, none before
_READ_RAW = "its blocks read the residual stream without a norm"
_GEMMA = replace(_LLAMA, root_of_width=True)
_GEMMA2 = replace(_GEMMA, fixed_scale=True, post_norms=("post_attention_layernorm", "post_feedforward_layernorm"))
_VISION_FUSED = Attention(module="attn", produce=("qkv",), consume=("proj",), outer=3)
_QFORMER = Backbone(
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
)
_CLIP = Backbone(
    layers="encoder.layers",
    attention=(_SIGLIP,),
    tokens=("embeddings.class_embedding",),
    class_tokens=1,
)

_SIGLIP_TOWER = Backbone(
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
)


def _stages(kind: str) -> Backbone:
    """Say that nothing of a tower can be cut, because its config has lists of sizes, one per stage."""
    reason = f"the sizes of a {kind} tower are lists, one entry per stage"
    return Backbone(layers="", refusals=dict.fromkeys(("blocks", "ffn", "kv_groups", "width"), reason))


_QWEN3_VISION = Backbone(
    layers="blocks",
    attention=(_VISION_FUSED,),
    blocks="depth",
    heads="num_heads",
    indexes=("deepstack_visual_indexes",),
    anchors=("deepstack_visual_indexes",),
)
_QWEN25_VISION = Backbone(
    layers="blocks",
    attention=(_VISION_FUSED,),
    blocks="depth",
    heads="num_heads",
    indexes=("fullatt_block_indexes",),
)
_GLM_VISION = Backbone(
    post_norms=("post_conv_layernorm",),
    layers="blocks",
    attention=(_VISION_FUSED,),
    blocks="depth",
    heads="num_heads",
    refusals={"ffn": "the FFN of its blocks is as wide as the text tower (out_hidden_size) and goes with text.width"},
)
_BLIP_VISION = Backbone(
    layers="encoder.layers", attention=(Attention(produce=("qkv",), consume=("projection",), outer=3),)
)
_VISION_ENCODER = Backbone(layers="encoder.layers", attention=(_SIGLIP,))
BACKBONES: Mapping[str, Backbone] = {
    "llama": Backbone(layers="layers", kv="num_key_value_heads", width_by_heads=True),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen2_5_omni_text": replace(_LLAMA, mrope="sections"),
    "qwen3_vl_text": replace(_LLAMA, mrope="interleaved"),
    "granite": replace(_LLAMA, fixed_scale=True),
    "cohere": replace(_LLAMA, neighbours=True, layouts={"self_attn.q_norm.weight": "P-"}),
    "ernie4_5": replace(_LLAMA, neighbours=True),
    "hunyuan_v1_dense": replace(_LLAMA, attention=(Attention(norms=("query_layernorm", "key_layernorm")),)),
    "smollm3": replace(_LLAMA, per_layer=("layer_types", "no_rope_layers")),
    "glm4": replace(_LLAMA, neighbours=True, post_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "phi3": _PHI,
    "exaone4": replace(_LLAMA, refusals={"width": _READ_RAW}),
    "olmo2": replace(_LLAMA, refusals={"width": _READ_RAW}),
    "qwen3_vl_moe_text": replace(_EXPERTS, mrope="interleaved", indexes=("mlp_only_layers",)),
    "qwen3_5_text": replace(
        _LLAMA,
        attention=(Attention(gated=True),),
        mrope="interleaved",
        essential=(("layer_types", "full_attention"), ("layer_types", "linear_attention")),
    ),
    "mllama_text_model": replace(
        _LLAMA,
        attention=(Attention(), Attention(module="cross_attn", group="cross_heads")),
        indexes=("cross_attention_layers",),
    ),
    "t5": Backbone(
        layers="encoder.block",
        more_layers=("decoder.block",),
        decoder=("decoder.block", "num_decoder_layers"),
        no_fewer_than="num_decoder_layers",
        fixed_scale=True,
        attention=tuple(
            Attention(module=module, produce=("q", "k", "v"), consume=("o",), group=group)
            for module, group in (
                ("layer.0.SelfAttention", "heads"),
                ("layer.1.EncDecAttention", "cross_heads"),
            )
        ),
        width="d_model",
        blocks="num_layers",
        heads="num_heads",
        head_dim="d_kv",
        ffn="d_ff",
        fixed=(0,),
        final_norm="decoder.final_layer_norm.weight",
        common_heads=("layer.0.SelfAttention",),
    ),
    "bart": Backbone(
        layers="encoder.layers",
        more_layers=("decoder.layers",),
        decoder=("decoder.layers", "decoder_layers"),
        width="d_model",
        blocks="encoder_layers",
        attention=(_SIGLIP, replace(_SIGLIP, module="encoder_attn", group="cross_heads")),
        heads="encoder_attention_heads",
        more_heads=("decoder_attention_heads",),
        ffn="encoder_ffn_dim",
    ),
    "kosmos_2_text_model": Backbone(
        layers="layers",
        attention=(_SIGLIP,),
        width="embed_dim",
        blocks="layers",
        heads="attention_heads",
        ffn="ffn_dim",
        refusals={
            "width": "its sinusoidal positions are computed from the width, and the embeddings scaled by its root"
        },
    ),
    "git": Backbone(
        layers="encoder.layer",
        attention=(
            Attention(module="attention", produce=("self.query", "self.key", "self.value"), consume=("output.dense",)),
        ),
    ),
    "phi4_multimodal": _PHI,
    "paddleocr_vl_text": replace(_LLAMA, mrope="sections"),
    "paddleocr_vl_vision": _VISION_ENCODER,
    "glm4v_text": replace(_LLAMA, post_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "glm4v_moe_text": replace(
        _EXPERTS, experts="n_routed_experts", mrope="sections", counts=("first_k_dense_replace",)
    ),
    "llama4_text": replace(
        _LLAMA,
        ffn="intermediate_size_mlp",
        expert_ffn="intermediate_size",
        experts="num_local_experts",
        runs_all_experts=True,
        refusals={"head_dim": "queries and keys are divided by norms without weights, which could take up no scale"},
        parts={"feed_forward.shared_expert": "shared"},
        per_layer=("layer_types", "no_rope_layers"),
        indexes=("moe_layers",),
        layouts={"feed_forward.experts.gate_up_proj": "-cp", "feed_forward.experts.down_proj": "-cp"},
    ),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA2, width_by_heads=True),
    "gemma3_text": replace(_GEMMA2, width_by_heads=True),
    "gemma4_text": replace(
        _GEMMA2,
        refusals={"head_dim": "full and sliding blocks each have a head_dim of their own"},
        post_norms=(
            *_GEMMA2.post_norms,
            *(f"post_feedforward_layernorm_{number}" for number in (1, 2)),
            "post_per_layer_input_norm",
        ),
        expert_ffn="moe_intermediate_size",
        experts="num_experts",
        experts_per_token="top_k_experts",
        layouts={"experts.gate_up_proj": "-pc", "experts.down_proj": "-pc"},
        made_up={"per_layer_input_gate.weight": "read"},
        query_norm="self_attn.q_norm",
        fixed=(-1,),
        by_block=("per_layer_config",),
        sharing="num_kv_shared_layers",
    ),
    "gemma4_vision": Backbone(
        layers="encoder.layers",
        attention=(Attention(produce=("q_proj.linear", "k_proj.linear", "v_proj.linear"), consume=("o_proj.linear",)),),
        kv="num_key_value_heads",
        refusals={"head_dim": "each half of its rotary pairs turns by a coordinate of its own"},
        post_norms=_GEMMA2.post_norms,
        query_norm="self_attn.q_norm",
        layouts={"std_bias": "p"},
        # the pooler multiplies by the root of the width, and linears that write the stream may be clipped
        made_up={
            "std_bias": "write2",
            "std_scale": "read",
            "self_attn.o_proj.output_min": "write",
            "self_attn.o_proj.output_max": "write",
            "mlp.down_proj.output_min": "write",
            "mlp.down_proj.output_max": "write",
        },
    ),
    "cohere2": replace(_LLAMA, neighbours=True),
    "lfm2": replace(
        _LLAMA,
        attention=(replace(_SIGLIP, norms=("q_layernorm", "k_layernorm")),),
        essential=(("layer_types", "full_attention"),),
        final_norm="embedding_norm.weight",
    ),
    "opt": Backbone(layers="decoder.layers", attention=(_SIGLIP,), ffn="ffn_dim", ties=("word_embed_proj_dim",)),
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP_TOWER,
    "siglip2_vision_model": _VISION_ENCODER,
    "pixtral": Backbone(
        layers="transformer.layers", attention=(Attention(module="attention"),), post_norms=("ln_pre",)
    ),
    "internvl_vision": Backbone(
        layers="encoder.layer",
        attention=(Attention(module="attention", consume=("projection_layer",)),),
    ),
    "ovis2_vision": Backbone(
        layers="transformer.encoder.layers",
        post_norms=("transformer.embeddings.rms_norm",),
        attention=(Attention(module="attention", consume=("out_proj",)),),
    ),
    "janus_vision_model": Backbone(
        layers="encoder.layers",
        attention=(Attention(consume=("projection_layer",)),),
        ffn="mlp_ratio",
        ffn_is_ratio=True,
    ),
    "smolvlm_vision": _VISION_ENCODER,
    "idefics3_vision": _VISION_ENCODER,
    "blip_2_vision_model": _BLIP_VISION,
    "dinov2": Backbone(
        layers="encoder.layer",
        attention=(Attention(module="attention"),),
        ffn="mlp_ratio",
        ffn_is_ratio=True,
        class_tokens=1,
        reset=("stage_names", "out_features", "out_indices"),
    ),
    "qwen2_vl_vision": Backbone(
        layers="blocks",
        attention=(_VISION_FUSED,),
        blocks="depth",
        heads="num_heads",
        width="embed_dim",
        ffn="mlp_ratio",
        ffn_is_ratio=True,
    ),
    "glm4v_vision": _GLM_VISION,
    "glm4v_moe_vision": _GLM_VISION,
    "idefics2_vision": _VISION_ENCODER,
    "git_vision_model": _CLIP,
    "kosmos_2_vision_model": _CLIP,
    "phi4_multimodal_vision": _SIGLIP_TOWER,
    "florence_vision": _stages("DaViT"),
    "convnext": _stages("ConvNext"),
    "mllama_vision_model": Backbone(
        layers="transformer.layers",
        more_layers=("global_transformer.layers",),
        attention=(Attention(),),
        heads="attention_heads",
        indexes=("intermediate_layers_indices",),
        anchors=("intermediate_layers_indices",),
        tokens=("class_embedding",),
    ),
    "minicpmv4_6_vision": replace(
        _VISION_ENCODER,
        attention=(_SIGLIP, replace(_SIGLIP, module="vit_merger.self_attn", group="merger.heads")),
        parts={"vit_merger": "merger"},
    ),
    "instructblip_vision_model": _BLIP_VISION,
    "got_ocr2_vision": Backbone(
        layers="layers",
        attention=(_VISION_FUSED,),
        ffn="mlp_dim",
        indexes=("global_attn_indexes",),
    ),
    "qwen3_5_vision": replace(_QWEN3_VISION, indexes=(), anchors=()),
    "llama4_vision_model": Backbone(
        layers="layers",
        ties=("intermediate_size",),
        refusals={"ffn": "it has to be width / pixel_shuffle_ratio^2 and goes with vision.width"},
    ),
    "qwen3_vl_vision": _QWEN3_VISION,
    "qwen3_vl_moe_vision": _QWEN3_VISION,
    "qwen2_5_vl_vision": _QWEN25_VISION,
    "qwen2_5_omni_vision_encoder": replace(
        _QWEN25_VISION, attention=(Attention(module="attn", produce=("q", "k", "v"), consume=("proj",)),)
    ),
    "blip_2_qformer": _QFORMER,
    "instructblip_qformer": _QFORMER,
}
