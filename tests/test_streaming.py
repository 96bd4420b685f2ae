"""A cut that reads and writes one file at a time leaves what cutting the loaded model leaves, bit for bit."""

import functools
import json
import shutil
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from marks import thorough
from slimlmm import checkpoint, cli, commands, importance, plan, streaming, surgery
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.probing import skeleton
from slimlmm.selfcheck import random_model
from tiny import tiny
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


def plain(folder):
    """Return the configuration; that of a part names the number format of the memory, which is not the file's."""
    (config,) = settings(folder, "config.json")
    for part in config.values():
        if isinstance(part, dict):
            part.pop("dtype", None)
    return config


def assert_same(one, other):
    """Every key, every bit, the configuration, and where each tensor lies."""
    first, second = tensors(one), tensors(other)
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    configs = [plain(path) for path in (one, other)]
    assert configs[0] == configs[1]
    # experts that save_pretrained splits share memory, so that it keeps them in one file whatever its size
    if "glm4v_moe" not in settings(one, "config.json")[0]["model_type"]:
        assert settings(one, "model.safetensors.index.json") == settings(other, "model.safetensors.index.json")


def test_a_streamed_cut_of_all_axes_is_the_cut_of_the_loaded_model(sampled_family, folders, tmp_path):
    folder = folders(sampled_family)
    weights = checkpoint.open_weights(folder)
    sizes = halves(weights.config)
    assert len(sizes) > 1
    found = streaming.cut_folder(weights, sizes, tmp_path / "streamed", max_shard_size="100KB")
    student = in_memory(folder, sizes, tmp_path / "whole", max_shard_size="100KB")
    assert_same(tmp_path / "streamed", tmp_path / "whole")
    assert found.parameters == student.num_parameters()
    assert found.left == ()


@pytest.mark.parametrize("name", ["llava-dinov2-llama", "qwen3_vl_moe", thorough("blip-2-t5")])
def test_bfloat16_stays_and_is_rounded_once(name, folders, tmp_path):
    """Widths of both towers meet in the projector: made up for twice in fp32, rounded at the end, as the loaded model is."""
    folder = folders(name, torch.bfloat16)
    weights = checkpoint.open_weights(folder)
    sizes = {axis: size for axis, size in halves(weights.config).items() if axis.endswith(("width", "ffn"))}
    streaming.cut_folder(weights, sizes, tmp_path / "streamed")
    in_memory(folder, sizes, tmp_path / "whole", stored=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(tmp_path / "streamed").values()} == {torch.bfloat16}
    assert settings(tmp_path / "streamed", "config.json")[0]["dtype"] == "bfloat16"
    assert_same(tmp_path / "streamed", tmp_path / "whole")


def test_each_weight_keeps_its_own_number_format_and_the_config_its_word(folders, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(folders("llava-clip-llama", torch.bfloat16), folder)
    mixed = load_file(folder / "model.safetensors")
    norms = {key: value.float() for key, value in mixed.items() if "norm" in key}
    save_file(mixed | norms, folder / "model.safetensors", metadata={"format": "pt"})
    streaming.cut_folder(checkpoint.open_weights(folder), {"text.width": 24}, tmp_path / "out")
    kinds = {key: tensor.dtype for key, tensor in tensors(tmp_path / "out").items()}
    assert {kinds[key] for key in norms} == {torch.float32}
    assert {kinds[key] for key in set(kinds) - set(norms)} == {torch.bfloat16}
    assert settings(tmp_path / "out", "config.json")[0]["dtype"] == "bfloat16"


def test_what_no_longer_fits_into_half_precision_is_refused(folders, tmp_path):
    folder = tmp_path / "loud"
    shutil.copytree(folders("llava-clip-llama", torch.float16), folder)
    loud = load_file(folder / "model.safetensors")
    loud["language_model.model.norm.weight"].fill_(60000)
    save_file(loud, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight does not fit into torch\.float16"):
        streaming.cut_folder(checkpoint.open_weights(folder), {"text.width": 12}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["loud"]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("name", ["llava-clip-llama", "glm4v_moe", "phi4_multimodal"])
def test_scores_by_weights_are_those_of_the_loaded_model(name, criterion, folders):
    weights, model = checkpoint.open_weights(folders(name)), checkpoint.load(folders(name)).model
    anatomy = describe(model.config)
    for axis in halves(model.config):
        found = importance.score(skeleton(model.config).model, anatomy, [axis], criterion, weights=weights, seed=3)
        wanted = importance.score(model, anatomy, [axis], criterion, seed=3)
        assert all(torch.equal(found[group], wanted[group]) for group in wanted), axis
    with pytest.raises(UserError, match="runs the model, so it must be in memory"):
        importance.score(model, anatomy, ["text.blocks"], "taylor", [], lambda *_: None, weights=weights)


@pytest.mark.parametrize("name", ["qwen3_vl", thorough("blip2-opt")])
def test_the_order_of_the_axes_is_kept(name, folders, tmp_path):
    """Blocks first, then the width of the layers that stayed."""
    weights = checkpoint.open_weights(folders(name))
    sizes = dict(reversed(halves(weights.config).items()))
    streaming.cut_folder(weights, sizes, tmp_path / "streamed")
    in_memory(folders(name), sizes, tmp_path / "whole")
    assert_same(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.parametrize("name", ["qwen2_vl", "llava-clip-llama", "glm4v_moe", "qwen3_vl_moe", "gemma3"])
def test_names_on_disk_may_be_the_new_ones_or_the_legacy_ones(name, folders, tmp_path):
    """Experts in one matrix or one by one, prefixes of either kind: the same weights, and the same student."""
    model = checkpoint.load(folders(name)).model
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    old, new = (checkpoint.open_weights(path) for path in (folders(name), tmp_path / "new"))
    assert set(old) == set(new)
    for key, tensor in model.state_dict().items():
        if key in old:
            assert torch.equal(old[key], tensor), key
            assert torch.equal(new[key], tensor), key
    for weights, out in ((old, "a"), (new, "b")):
        streaming.cut_folder(weights, {"text.ffn": 32}, tmp_path / out, max_shard_size="50KB")
    assert_same(tmp_path / "a", tmp_path / "b")


def test_only_one_file_of_the_student_is_held(folders, tmp_path, monkeypatch):
    """What is alive while one parameter is made: the file at hand, never the student."""
    alive, most = {}, []
    original = streaming.rounded

    def counting(weights, name):
        tensor = original(weights, name)
        storage = tensor.untyped_storage()
        alive[id(storage)] = storage.nbytes()
        weakref.finalize(storage, alive.pop, id(storage))
        most.append(sum(alive.values()))
        return tensor

    monkeypatch.setattr(streaming, "rounded", counting)
    weights = checkpoint.open_weights(folders("llava-clip-llama"))
    found = streaming.cut_folder(weights, {"text.ffn": 32}, tmp_path / "out", max_shard_size="100KB")
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(most) > 50
    assert max(most) <= 2 * largest < found.bytes / 2


def test_the_command_carries_everything_and_says_what_it_left(tmp_path, ads, capsys, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model.to(torch.bfloat16), processor, tmp_path / "in")
    extra = load_file(tmp_path / "in" / "model.safetensors") | {"mtp.weight": torch.zeros(3)}
    save_file(extra, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    words = ["cut", tmp_path / "in", "--set", "text.ffn=32", "--set", "text.width=24", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["slimlmm", *map(str, words), "--max-shard-size", "30KB"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "(file by file)" in said
    assert "left behind: 1 tensors that the stock class has no place for: mtp.weight" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "slimlmm.json"} <= files
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    loaded = checkpoint.load(tmp_path / "out")
    assert (loaded.stored, loaded.model.config.text_config.hidden_size) == (torch.bfloat16, 24)
    found = commands.cut(str(tmp_path / "in"), tmp_path / "taylor", ["text.ffn=32"], criterion="taylor", source=ads)
    assert "taylor runs the model" in found["way"]
    assert {tensor.dtype for tensor in tensors(tmp_path / "taylor").values()} == {torch.bfloat16}


@pytest.mark.parametrize("size", ["much", "0GB", "5", "-1GB"])
def test_a_size_of_files_that_is_none_is_refused(size, folders, tmp_path):
    with pytest.raises(UserError, match="give a size such as 5GB"):
        commands.cut(str(folders("smolvlm")), tmp_path / "out", ["text.ffn=32"], max_shard_size=size)


def test_data_that_the_criterion_does_not_look_at_is_refused(folders, tmp_path, ads):
    with pytest.raises(UserError, match="'magnitude' looks at no data"):
        commands.cut(str(folders("smolvlm")), tmp_path / "out", ["text.ffn=32"], source=ads)


def test_a_disk_that_is_full_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(UserError, match="No space left on device"):
        streaming.cut_folder(checkpoint.open_weights(folders("smolvlm")), {"text.ffn": 32}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
