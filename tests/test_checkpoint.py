"""Folders: whole or not at all, safetensors only, all comes along; bad ones are refused with one message."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.selfcheck import some_units
from slimlmm.surgery import cut
from tiny import NAMES, tiny, tiny_batch


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    checkpoint.save(*tiny("llava-dinov2-llama"), folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_model_saves_and_reloads_with_everything(name, tmp_path):
    model, processor = tiny(name)
    anatomy = describe(model.config)
    axis = anatomy.axis("vision.width")
    student = cut(model, anatomy, axis.name, some_units(axis, axis.choices()[len(axis.choices()) // 2]))
    checkpoint.save(student, processor, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    batch = tiny_batch(name, model)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, student(**batch).logits)
    assert loaded.model.generation_config.max_new_tokens == 8
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "slimlmm.json",
    } <= names
    if name == "qwen2_5_vl":
        assert loaded.processor is None
        assert "pip install torchvision" in loaded.note
    else:
        assert loaded.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dtype_is_kept_on_disk_and_float32_in_memory(tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model.to(torch.float16), processor, tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert checkpoint.load(tmp_path / "half").model.dtype == torch.float32
    assert checkpoint.load(tmp_path / "half", dtype=torch.float16).model.dtype == torch.float16


def test_without_a_processor_its_files_are_copied_from_the_source(good, tmp_path):
    loaded = checkpoint.load(good)
    checkpoint.save(loaded.model, None, tmp_path / "a")
    anatomy = describe(loaded.model.config)
    student = cut(loaded.model, anatomy, "text.blocks", {"text.blocks": torch.tensor([0, 2])})
    checkpoint.save(student, None, tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert tf.AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == loaded.processor.tokenizer.get_vocab()
        assert (folder / "chat_template.jinja").read_text() == (good / "chat_template.jinja").read_text()


def test_only_own_folders_are_replaced(good, tmp_path):
    model, processor = tiny("llava-dinov2-llama", seed=1)
    mine, other = tmp_path / "mine", tmp_path / "other"
    checkpoint.save(*tiny("llava-dinov2-llama"), mine)
    checkpoint.save(model, processor, mine)
    assert torch.equal(checkpoint.load(mine).model.lm_head.weight, model.lm_head.weight)
    other.mkdir()
    checkpoint.save(model, processor, other)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="did not write"):
        checkpoint.save(model, processor, foreign)
    with pytest.raises(UserError, match="no folder"):
        checkpoint.save(model, processor, foreign / "thesis.txt")
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("failing", ["_flush", "verify", "_write"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(failing, tmp_path, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model, processor, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(tiny("llava-dinov2-llama", seed=1)[0], processor, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _edit_json(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


BAD = {
    r"only pickled weights .pytorch_model.bin., .*`slimlmm convert \S+ OUT` writes them as safetensors": _pickle,
    "no .*safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "not a valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "model type `lava`": lambda folder: _edit_json(folder, model_type="lava"),
    "'llama' is no image-text-to-text": lambda folder: _edit_json(folder, model_type="llama"),
    "weights are missing": _drop_a_weight,
    "is cut short or no safetensors file, at 10 bytes": lambda folder: (folder / "model.safetensors").write_bytes(
        b"1234567890"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_folders_are_refused(message, good, tmp_path):
    shutil.copytree(good, tmp_path / "bad")
    BAD[message](tmp_path / "bad")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "bad")


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.load("./nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, not a model folder"):
        checkpoint.load(tmp_path / "file")


def test_weights_go_back_into_the_format_of_their_files_or_are_refused(tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model.half(), processor, tmp_path / "half")
    loaded = checkpoint.load(tmp_path / "half")
    assert (loaded.stored, loaded.model.dtype) == (torch.float16, torch.float32)
    checkpoint.save(checkpoint.as_stored(loaded.model, loaded.stored), loaded.processor, tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("half", "again")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    loaded = checkpoint.load(tmp_path / "half")
    loaded.model.get_input_embeddings().weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"do not fit into torch.float16, first .*embed_tokens"):
        checkpoint.as_stored(loaded.model, loaded.stored)


def test_weights_can_be_read_by_whom_the_config_can(good):
    modes = {path.name: path.stat().st_mode for path in good.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_weights_have_the_values_of_their_files_for_a_while():
    model, _ = tiny("llava-dinov2-llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stored = checkpoint.as_stored(copy.deepcopy(model), torch.bfloat16).float().state_dict()
    with checkpoint.valued_as_stored(model, torch.bfloat16):
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
