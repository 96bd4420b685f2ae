"""A cut that reads and writes one file at a time leaves what cutting the loaded model leaves, bit for bit."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimlmm import checkpoint, importance, plan, streaming, surgery
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.selfcheck import random_model
from slimlmm.weights import Weights
from zoo import CONFIGS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved random models of the families, each made once: (name, number format) -> folder."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def folder(name, dtype=torch.float32, seed=0):
        path = root / f"{name}-{dtype}-{seed}".replace("torch.", "")
        checkpoint.save(random_model(CONFIGS[name](), seed).to(dtype), None, path)
        return path

    return folder


def halves(config) -> dict[str, int]:
    """One middle size of every axis, vocabulary aside; blocks last, so that no kind of them is gone before its axes."""
    sizes = {}
    for name in sorted(describe(config).axes, key=lambda name: name.endswith(".blocks")):
        axis = describe(config).axes[name]
        smaller = [size for size in axis.choices() if size < axis.size] if not axis.refusal else []
        if smaller and axis.kind != "vocab":
            try:
                sizes[name] = smaller[len(smaller) // 2]
                config = surgery.resized(config, {name: sizes[name]})
            except UserError:
                del sizes[name]
    return sizes


def in_memory(folder, sizes, out, criterion="magnitude", stored=torch.float32, **options):
    """Load the whole, cut it axis by axis, and let transformers write it."""
    student = checkpoint.load(folder).model
    for name, size in sizes.items():
        anatomy = describe(student.config)
        scores = importance.score(student, anatomy, [name], criterion)
        student = surgery.cut(student, anatomy, name, plan.choose(scores, anatomy, name, size))
    checkpoint.as_stored(student, stored).save_pretrained(out, **options)
    return student


def tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def settings(folder, *names):
    return [json.loads((folder / name).read_text()) for name in names if (folder / name).exists()]


def assert_same(one, other):
    """Every key, every bit, the configuration, and where each tensor lies."""
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    assert settings(one, "config.json") == settings(other, "config.json")
    # experts that save_pretrained splits share memory, so that it keeps them in one file whatever its size
    if "glm4v_moe" not in settings(one, "config.json")[0]["model_type"]:
        assert settings(one, "model.safetensors.index.json") == settings(other, "model.safetensors.index.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_cut_of_all_axes_is_the_cut_of_the_loaded_model(name, folders, tmp_path):
    folder = folders(name)
    weights = checkpoint.open_weights(folder)
    sizes = halves(weights.config)
    assert len(sizes) > 1
    found = streaming.cut_folder(weights, sizes, tmp_path / "streamed", max_shard_size="100KB")
    student = in_memory(folder, sizes, tmp_path / "whole", max_shard_size="100KB")
    assert_same(tmp_path / "streamed", tmp_path / "whole")
    assert found.parameters == student.num_parameters()
    assert found.left == ()
