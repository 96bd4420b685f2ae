"""Random configurations: the families of the zoo, and llava around every pair of towers, at odd and coinciding sizes.

`configurations` is a hypothesis strategy. Every draw starts from a tiny configuration and rewrites the sizes of its towers:
head counts (plain, grouped, multi-query), head_dim (derived or explicit), widths that equal Q*D, another width or nothing, FFNs
as wide as the stream, the heads or the vocabulary, depths, lists per block, lists of block numbers, biases, ties, experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from slimlmm.backbones import Backbone
from slimlmm.families import Tower, backbone_of, family_of
from slimlmm.probing import Field, edited, get
from slimlmm.views import View, as_list
from tiny import vit
from zoo import CONFIGS
from zoo.others import STAND_IN
from zoo.texts import TEXTS, around

Draw = Callable[[st.SearchStrategy[Any]], Any]
#: vision towers that LLaVA takes: what the configuration of one says beside the common sizes, and what its patches are read as
VISIONS: dict[str, tuple[dict[str, Any], str]] = {
    "clip_vision_model": ({"projection_dim": 16}, "default"),
    "siglip_vision_model": ({"vision_use_head": False}, "full"),
    "dinov2": ({"mlp_ratio": 2}, "default"),
    "pixtral": ({"image_size": 42}, "full"),
}
#: what switches biases and norms on and off, wherever a configuration has such a field
SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qk_norm", "attention_out_bias")
#: encoder-decoders and models of the first days, whose ties and heads are fixed by their classes
FIXED = {"t5", "bart", "opt", "kosmos_2_text_model", "git"}
#: no rotary embedding over heads, so that their size may be odd
ODD_HEADS = {"opt", "git", "clip_vision_model", "siglip_vision_model", "dinov2", "blip_2_vision_model"}
#: towers of two-dimensional positions: a head is four equal parts
QUARTERS = (
    "paddle",
    "pixtral",
    "qwen",
    "glm",
    "llama4_vision",
    "mllama_vision",
    "gemma4_vision",
    "ovis2",
    "video_llama",
)
#: (family or tower, what of it) that stays as in the zoo, because other fields hang on it
HELD = {
    ("gemma4_text", "heads"),
    ("gemma4_text", "blocks"),
    ("gemma4_text", "width"),
    ("gemma4_vision", "heads"),
    ("gemma4_vision", "width"),
    ("llama4_vision_model", "heads"),
    ("llama4_vision_model", "width"),
    ("llama4_vision_model", "ffn"),
    ("minicpmv4_6_vision", "blocks"),
    ("bart", "heads"),
    ("bart", "width"),
    ("mllama_vision_model", "indexes"),
    ("t5", "blocks"),
    ("janus_vision_model", "use_qk_norm"),  # the stock class normalises heads with a norm of the width
}


@st.composite
def configurations(draw: Draw) -> tuple[str, Any]:
    """Return (name of what it started from, configuration)."""
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(set(CONFIGS) - STAND_IN)))
        config = CONFIGS[name]()
    else:
        text, vision = draw(st.sampled_from(sorted(TEXTS))), draw(st.sampled_from(sorted(VISIONS)))
        name, (more, strategy) = f"llava-{vision}-{text}", VISIONS[vision]
        tower = vit(vision, **more)
        if vision == "dinov2":
            del tower["intermediate_size"]
        config = around(text, vision=tower, strategy=strategy)
    for tower in family_of(config).towers:
        config = _tower(draw, config, tower.name)
    return name, _joint(draw, _tied(draw, config))


def _tower(draw: Draw, config: Any, name: str) -> Any:
    """Rewrite the sizes of one tower."""
    family = family_of(config)
    tower = family.tower(name)
    backbone = backbone_of(config, tower)
    if backbone is None or not backbone.layers:
        return config
    view = View(config, family, tower, backbone)
    changes = _heads_and_width(draw, view)
    config = edited(config, changes)
    view = View(config, family, tower, backbone)
    changes = _ffn(draw, view) | _switches(draw, view) | _experts(draw, view)
    changes |= _blocks(draw, view)
    return edited(config, changes)


def _known(config: Any, tower: Tower) -> Backbone:
    found = backbone_of(config, tower)
    assert found is not None
    return found


def _kind(view: View) -> str:
    return str(family_part(view)["model_type"])


def family_part(view: View) -> dict[str, Any]:
    """Return the dictionary of the tower's configuration."""
    data: dict[str, Any] = view.config.to_dict()
    return data[view.tower.config] if view.tower.config else data


def _held(view: View, what: str) -> bool:
    return (_kind(view), what) in HELD


def _rope(view: View) -> dict[str, Any]:
    return view.value("rope_parameters") or {}


def _head_dims(view: View) -> list[int]:
    """Return sizes that a head of this tower may have."""
    kind = _kind(view)
    if "mrope_section" in _rope(view):
        return [12, 24] if _rope(view).get("partial_rotary_factor", 1) < 1 else [6, 8, 12, 20]
    if _rope(view).get("partial_rotary_factor", 1) not in (1, None):
        return [8, 12, 16, 20]
    if kind in ODD_HEADS:
        return [3, 4, 5, 8, 9]
    if any(part in kind for part in QUARTERS) and view.tower.name == "vision":
        return [4, 8, 12]
    return [4, 6, 8, 10, 14]


def _heads_and_width(draw: Draw, view: View) -> dict[Field, Any]:
    """Fields of the heads, of their size where the configuration has it, of the width and of all that is as wide."""
    if _held(view, "heads"):
        return {}
    kv = draw(st.sampled_from([1, 2, 3]))
    heads = kv * draw(st.sampled_from([1, 2, 3])) if view.backbone.kv and view.value(view.backbone.kv) else kv
    size = draw(st.sampled_from(_head_dims(view)))
    inner = heads * size
    width = inner
    explicit = view.free_heads and draw(st.integers(0, 3)) > 0
    if explicit:
        towers = [tower for tower in view.family.towers if backbone_of(view.config, tower) is not None]
        views = [View(view.config, view.family, tower, _known(view.config, tower)) for tower in towers]
        other = {each.value(each.backbone.width) for each in views}
        wide = {inner, inner + heads, *(24, 36, 45, 60, 320), *(value for value in other if value)}
        width = draw(st.sampled_from(sorted(wide)))
    step = heads if view.backbone.width_by_heads else 1
    step *= 8 if view.backbone.expert_ffn and view.value(view.backbone.expert_ffn) else 1
    width = -(-width // step) * step
    changes = {view.field(view.backbone.width): width, view.field(view.backbone.heads): heads}
    if heads != kv or (view.backbone.kv and view.value(view.backbone.kv)):
        changes[view.field(view.backbone.kv)] = kv
    if explicit or width != inner or (view.free_heads and view.value(view.backbone.head_dim)):
        changes[view.field(view.backbone.head_dim)] = size
    elif view.value(view.backbone.head_dim):
        changes[view.field(view.backbone.head_dim)] = size if _kind(view) == "t5" else None
    follow = [view.field(name) for name in view.backbone.ties]
    follow += view.family.ties.get(f"{view.tower.name}.width", ())
    for field in follow:
        old = get(view.config, field)
        if old and old % view.width == 0:
            changes[field] = old // view.width * width
    return changes | _sections(view, size)


def _sections(view: View, size: int) -> dict[Field, Any]:
    """Split half a rotated head into time, height and width."""
    rope = _rope(view)
    if "mrope_section" not in rope:
        return {}
    half = int(size * (rope.get("partial_rotary_factor") or 1)) // 2
    third = half // 3
    return {view.field("rope_parameters"): rope | {"mrope_section": [half - 2 * third, third, third]}}


def _ffn(draw: Draw, view: View) -> dict[Field, Any]:
    """Field of the FFN: as wide as the stream, as all heads, as the vocabulary, or odd."""
    if _held(view, "ffn") or view.value(view.backbone.ffn) is None:
        return {}
    field = view.field(view.backbone.ffn)
    if view.backbone.ffn_is_ratio:
        return {field: draw(st.sampled_from([0.5, 1.0, 1.5, 2.0] if view.free_ratio else [1, 2, 3]))}
    wide = [view.width, 2 * view.width, 7, 20, 33, 320]
    return {field: draw(st.sampled_from(wide))}


def _switches(draw: Draw, view: View) -> dict[Field, Any]:
    part = family_part(view)
    switches = [name for name in SWITCHES if isinstance(part.get(name), bool) and not _held(view, name)]
    return {view.field(name): draw(st.booleans()) for name in switches}


def _experts(draw: Draw, view: View) -> dict[Field, Any]:
    """Odd numbers of experts, of another size."""
    if not view.backbone.expert_ffn or not view.value(view.backbone.expert_ffn):
        return {}
    names = [name for name in ("num_experts", "n_routed_experts", "num_local_experts") if view.value(name)]
    changes = {view.field(name): draw(st.sampled_from([3, 4, 5])) for name in names}
    return changes | {view.field(view.backbone.expert_ffn): draw(st.sampled_from([8, 16, 40]))}


def _blocks(draw: Draw, view: View) -> dict[Field, Any]:
    """Depth, lists per block, numbers of blocks, and the states of the vision tower that are read."""
    if _held(view, "blocks"):
        return {}
    least = max(1, len(view.backbone.essential))
    if view.family.leading.get(f"{view.tower.name}.blocks"):
        least = 2
    count = draw(st.integers(least, 4))
    changes: dict[Field, Any] = {}
    if view.backbone.period:
        period = draw(st.sampled_from([1, 2]))
        count = period * max(1, count // period)
        changes[view.field(view.backbone.period)] = period
    changes[view.field(view.backbone.blocks)] = count
    for name in view.backbone.per_layer:
        if (values := view.value(name)) is not None:
            kinds = sorted(set(values), key=str)
            must = [value for field, value in view.backbone.essential if field == name]
            drawn = draw(st.lists(st.sampled_from(kinds), min_size=count - len(must), max_size=count - len(must)))
            changes[view.field(name)] = draw(st.permutations(must + drawn))
    for name in view.backbone.indexes:
        if (values := view.value(name)) is not None:
            changes[view.field(name)] = _numbers(draw, view, name, len(values), count)
    for name in view.backbone.counts:
        if view.value(name) is not None:
            changes[view.field(name)] = draw(st.integers(0, count))
    changes |= {view.field(name): None for name in view.backbone.reset if view.value(name) is not None}
    if view.tower.name == "vision" and view.family.feature_layer:
        changes[view.family.feature_layer] = _features(draw, get(view.config, view.family.feature_layer), count)
    return changes


def _numbers(draw: Draw, view: View, name: str, before: int, count: int) -> list[int]:
    """Draw numbers of blocks, as many as before where their number is a size of something else."""
    if _held(view, "indexes"):
        return list(range(min(before, count)))
    return sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=max(1, count - 1))))


def _features(draw: Draw, value: Any, count: int) -> Any:
    """Draw which hidden states of `count` blocks are read; a list where there was one."""
    one = st.integers(-count, -1)
    if not isinstance(value, list | tuple):
        return draw(one)
    return draw(st.lists(one, min_size=len(as_list(value)), max_size=len(as_list(value))))


def _tied(draw: Draw, config: Any) -> Any:
    """Tie the head to the embedding, or not, where the classes let one choose."""
    text = family_of(config).tower("text")
    part = getattr(config, text.config) if text.config else config
    if part.model_type in FIXED or "tie_word_embeddings" not in config.to_dict():
        return config
    tied = draw(st.booleans())
    changes: dict[Field, Any] = {("", "tie_word_embeddings"): tied}
    if text.config and "tie_word_embeddings" in part.to_dict():
        changes[text.config, "tie_word_embeddings"] = tied
    return edited(config, changes)


def _joint(draw: Draw, config: Any) -> Any:
    """Give the free sizes of the joint a value of their own."""
    fields = family_of(config).projector.values()
    return edited(config, {field: draw(st.sampled_from([6, 22, 44, 56])) for field in fields})
