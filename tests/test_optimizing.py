"""Which part of a model a parameter belongs to, in every family: what is frozen, what moves slower, what moves by Muon."""

import pytest
import torch

from slimlmm.anatomy import describe
from slimlmm.families import family_of, stock_class
from slimlmm.lessons import Readouts
from slimlmm.optimizing import frozen, optimizers, parts_in
from slimlmm.trainings import Training
from tiny import tiny
from zoo import CONFIGS


def on_meta(name):
    config = CONFIGS[name]()
    with torch.device("meta"):
        return stock_class(config).from_config(config)


def test_every_parameter_has_its_part_and_pixels_are_read_once(sampled_family):
    model = on_meta(sampled_family)
    parts, family = parts_in(model), family_of(model.config)
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= parts.keys()
    joint, towers = f"{family.joint}.", {tower.name: f"{tower.prefix}." for tower in family.towers}
    within = tuple(place for place in towers.values() if place.startswith(joint))
    joins = [one for one in parameters if one.startswith(joint) and not one.startswith(within)]
    assert all(parts[one] == {"projector"} for one in joins)
    head = {id(one) for one in model.get_output_embeddings().parameters()}
    assert all(parts[one] == {"text"} for one, value in parameters.items() if id(value) in head)
    inside = [one for one in parameters if one.startswith(towers["vision"])]
    assert all(parts[one] & {"vision", "projector"} for one in inside)  # mergers of deeper states stand in the tower
    (reads,) = [value for one, value in parameters.items() if "patch_embedding" in parts[one] and value.ndim > 1]
    pixels = reads.shape[1:].numel()
    assert pixels % 3 == 0
    assert reads.shape[1] == 3 or reads.ndim == 2  # a convolution over three channels, or a map of whole patches


def moved_by_muon(model, **keys):
    settings = Training(steps=1, optimizer="muon", freeze=(), learning_rate=1.0, **keys)
    optimizer, _ = optimizers(model, describe(model.config), settings, Readouts({}, None), None)
    return {id(one): group for group in optimizer.param_groups for one in group["params"]}


@pytest.mark.parametrize("name", ["gemma4", "lfm2_vl", "llama4"])
def test_a_linear_map_of_pixels_is_frozen_as_a_convolution_is_and_does_not_move_by_muon(name):
    model = on_meta(name)
    path = family_of(model.config).patches
    weight = model.get_submodule(path).weight
    assert [id(one) for one in frozen(model, ("patch_embedding",)).parameters if one.ndim > 1] == [id(weight)]
    assert not moved_by_muon(model)[id(weight)]["matrices"]


def test_a_merger_within_the_tower_is_the_projector():
    model, _ = tiny("qwen2_5_vl")
    merger = {name: one for name, one in model.named_parameters() if ".merger." in name}
    held = {id(one) for one in frozen(model, ("projector",)).parameters}
    assert held == {id(one) for one in merger.values()}
    assert not {id(one) for one in frozen(model, ("vision",)).parameters} & held
    groups = moved_by_muon(model, vision_rate=0.1)
    assert {groups[id(one)]["lr"] for one in merger.values()} == {1.0}
    blocks = [one for name, one in model.named_parameters() if "visual.blocks" in name]
    assert max(groups[id(one)]["lr"] for one in blocks) == pytest.approx(0.1)
