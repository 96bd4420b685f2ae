"""Which part of a model a parameter belongs to, from where its family says that towers, joint, blocks and attention stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy
from slimlmm.families import FAMILIES, backbone_of, family_of, matched
from slimlmm.norms import kind_of
from slimlmm.probing import Skeleton, skeleton
from slimlmm.views import View

#: (tower or "projector", "head", "other"; part inside it, "" where there is none)
Part = tuple[str, str]
#: order of the tree
ORDER = ("vision", "projector", "qformer", "text", "head", "other")
INSIDE = ("embeddings", "attention", "ffn", "experts", "norms", "other")
#: axes whose slots tell a part, by the noun that they count
_BY_AXIS = {"ffn": "ffn", "expert_ffn": "experts"}
_EMBEDDINGS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parts_of(config: Any) -> dict[str, Part]:
    """Return the part of every state-dict name, tied aliases included; of an unknown family only head and embeddings.

    "head": the output embedding, tied or not. "projector": the family's joint. Inside a tower: "attention" is what the
    backbone declares as such, "ffn" and "experts" what moves with those axes, "norms" what computes one, "embeddings"
    tables and convolutions outside the blocks, and "other" the rest (routers, layer scales, poolers, linear attention).
    """
    whole = skeleton(config)
    known = config.model_type in FAMILIES
    anatomy = describe(config) if known else None
    views = _views(config) if known else {}
    special = _special(whole)
    by_axis = _by_axis(whole, anatomy) if anatomy else {}
    streams = _streams(anatomy) if anatomy else {}
    untold = {
        tower
        for tower in views
        if anatomy and anatomy.axes[f"{tower}.ffn"].refusal and f"{tower}.expert_ffn" not in anatomy.axes
    }
    joints = _joints(config, whole) if known else set()
    found: dict[str, Part] = {}
    for name in whole.shapes:
        if name in special:
            found[name] = special[name]
            continue
        tower = _tower_of(name, anatomy, streams) if anatomy else "other"
        if tower in views and not views[tower].inside(name)[0] and name.rpartition(".")[0] in joints:
            tower = "projector"
        part = _inside(views[tower], whole, name, by_axis) if tower in views else ""
        if part == "other" and tower in untold and views[tower].inside(name)[0]:
            part = "ffn"  # no axis tells, and all else in a block was told
        found[name] = (tower, part)
    return found


def _views(config: Any) -> dict[str, View]:
    family = family_of(config)
    found = {tower.name: backbone_of(config, tower) for tower in family.towers}
    return {
        tower.name: View(config, family, tower, backbone)
        for tower in family.towers
        if (backbone := found[tower.name]) is not None
    }


def _joints(config: Any, whole: Skeleton) -> set[str]:
    """Return the modules of the joint's insides, which may stand in a tower (mergers of deeper states)."""
    paths = [path for inside in family_of(config).interiors for path in (*inside.produce, *inside.consume)]
    modules = {name.rpartition(".")[0] for name in whole.shapes}
    return {module for module in modules if any(matched(path, module) is not None for path in paths)}


def _special(whole: Skeleton) -> dict[str, Part]:
    """Return the token embedding and the head, as transformers itself names them."""
    model: Any = whole.model
    found: dict[str, Part] = {}
    names = {id(module): name for name, module in model.named_modules()}
    outputs, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    for module, part in ((outputs, ("head", "")), (inputs, ("text", "embeddings"))):
        if module is not None and id(module) in names:
            own = [leaf for leaf, _ in module.named_parameters(remove_duplicate=False)]
            found |= {f"{names[id(module)]}.{leaf}": part for leaf in own}
    return found


def _by_axis(whole: Skeleton, anatomy: Anatomy) -> dict[str, str]:
    """Return module -> "ffn" or "experts" by the axes that its parameters carry."""
    return {
        slot.parameter.rpartition(".")[0]: _BY_AXIS[axis.noun]
        for axis in anatomy.axes.values()
        if axis.noun in _BY_AXIS and not axis.name.startswith("projector.")
        for group in axis.groups
        for slot in group.slots
    }


def _streams(anatomy: Anatomy) -> dict[str, str]:
    """Return parameter -> tower in whose residual stream it writes."""
    widths = {name: axis for name, axis in anatomy.axes.items() if axis.kind == "width"}
    return {
        slot.parameter: name.partition(".")[0]
        for name, axis in widths.items()
        for group in axis.groups
        for slot in group.slots
        if group.name == name and slot.role == "produce"
    }


def _tower_of(name: str, anatomy: Anatomy, streams: Mapping[str, str]) -> str:
    """Return the tower of the longest prefix that fits, else the one in whose stream it writes, else the one it stands beside."""
    fits = [(len(prefix), tower) for tower, prefix in anatomy.towers.items() if name.startswith(prefix)]
    if fits or name in streams:
        return max(fits)[1] if fits else streams[name]
    beside = [
        tower
        for tower, prefix in anatomy.towers.items()
        if prefix.count(".") > 1 and name.startswith(f"{prefix.partition('.')[0]}.")
    ]
    return beside[0] if len(beside) == 1 else "other"


def _inside(view: View, whole: Skeleton, name: str, by_axis: Mapping[str, str]) -> str:
    """Return the part of a tower that a parameter belongs to."""
    module = name.rpartition(".")[0]
    label, inside = view.inside(name)
    if label and any(inside.startswith(f"{one.module}.") for one in view.backbone.attention):
        return "attention"
    if module in by_axis:
        return by_axis[module]
    owner = whole.owner(name)
    if kind_of(owner) in ("layer", "rms", "rms1"):
        return "norms"
    if not label and (isinstance(owner, _EMBEDDINGS) or inside in view.backbone.tokens or len(whole.shapes[name]) > 1):
        return "embeddings"
    return "other"
