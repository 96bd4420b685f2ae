"""Folders that cannot be cut are refused before anything is read from them, each with what is wrong and what to do."""

import json
import shutil
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from slimlmm import checkpoint, cli, streaming
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.selfcheck import random_model, some_units
from slimlmm.surgery import cut, masked
from tiny import tiny
from zoo import CONFIGS

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A LLaVA in several files, its head tied."""
    folder = tmp_path_factory.mktemp("good") / "model"
    checkpoint.save(*tiny("llava-dinov2-llama"), folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def edit(folder, name="config.json", **changes):
    data = json.loads((folder / name).read_text())
    for path, value in changes.items():
        part, _, key = path.rpartition("__")
        (data[part] if part else data)[key] = value
    (folder / name).write_text(json.dumps(data))


def change(folder, change_tensors):
    """Rewrite the first file with other tensors."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def a_weight(tensors):
    return next(key for key in sorted(tensors) if key.endswith("proj.weight"))


def as_type(dtype):
    def cast(tensors):
        key = a_weight(tensors)
        tensors[key] = tensors[key].to(dtype)

    return lambda folder: change(folder, cast)


def shorter(tensors):
    key = a_weight(tensors)
    tensors[key] = tensors[key][:-1].clone()


def renamed(tensors):
    tensors["strange.weight"] = tensors.pop(a_weight(tensors))


def truncated(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def adapter(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/llava"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")


def gguf(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def other_head(folder):
    """Write a head beside the tied embedding, with other values."""
    key = next(key for key in json.loads((folder / INDEX).read_text())["weight_map"] if "embed_tokens" in key)
    head = torch.randn(load_file(folder / json.loads((folder / INDEX).read_text())["weight_map"][key])[key].shape)
    save_file({"lm_head.weight": head}, folder / "head.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / INDEX).write_text(json.dumps(data))


BAD = {
    "missing shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(),
        r"1 of \d+ files .* missing, first model-00001-of-\d+\.safetensors \(\d+ tensors in all\)\. Download",
    ),
    "index names what its file lacks": (
        lambda folder: change(folder, renamed),
        r"names 1 tensors that their files lack, first .*proj\.weight in model-00001",
    ),
    "index is no index": (lambda folder: (folder / INDEX).write_text("[]"), "is no index of weights"),
    "index is empty": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "weight_map is empty"),
    "files without an index": (lambda folder: (folder / INDEX).unlink(), "neither model.safetensors nor"),
    "truncated file": (truncated, r"model-00002-of-\d+\.safetensors: is cut short .*at [\d,]+ bytes"),
    "int8 weights": (as_type(torch.int8), r"1 weights are of a number format .*\(I8, .*not quantised"),
    "fp8 weights": (as_type(torch.float8_e4m3fn), r"number format .*\(F8_E4M3, "),
    "shapes against the config": (lambda folder: change(folder, shorter), r"1 weights are of another shape .*config: "),
    "config of a wider model": (
        lambda folder: edit(folder, text_config__intermediate_size=72),
        r"9 weights are of another shape than its config says: .*\[68, 48\] \(config: \[72, 48\]\)",
    ),
    "heads do not divide the width": (
        lambda folder: edit(folder, text_config__hidden_size=50),
        r"config\.json contradicts itself: text_config: .*hidden size \(50\)",
    ),
    "two parts contradict themselves": (
        lambda folder: edit(folder, text_config__hidden_size=50, vision_config__hidden_size="wide"),
        r"contradicts itself: .*(text_config: .*vision_config|vision_config: .*text_config)",
    ),
    "vision heads do not divide": (
        lambda folder: edit(folder, vision_config__num_attention_heads=5),
        r"21 weights are of another shape than its config says: model\.vision_tower.*\[32, 32\] \(config: \[30, 32\]\)",
    ),
    "parts that are none": (lambda folder: edit(folder, text_config=5), "config.json"),
    "adapter": (adapter, r"is an adapter \(PEFT\) of some/llava.*merge_and_unload"),
    "GGUF": (gguf, r"GGUF weights \(model-Q4_K_M\.gguf\).*original safetensors"),
    "text only": (
        lambda folder: (folder / "config.json").write_text(json.dumps(tf.LlamaConfig().to_dict())),
        "'llama' is no image-text-to-text model .*a language model without pictures",
    ),
    "a head of its own though tied": (other_head, r"ties lm_head\.weight to .*different values.*tie_word_embeddings"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_message_and_exit_code_2(case, good, tmp_path, monkeypatch, capsys):
    spoil, message = BAD[case]
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    spoil(folder)
    for verb in (["cut", "--set", "text.ffn=32", "--out", str(tmp_path / "out")], ["bench"]):
        monkeypatch.setattr(sys, "argv", ["slimlmm", verb[0], str(folder), *verb[1:]])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in error
        with pytest.raises(UserError, match=message):
            raise UserError(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bitsandbytes", {"load_in_4bit": True}),
        ("gptq", {"bits": 4, "group_size": 128}),
        ("awq", {"bits": 4}),
        ("fp8", {"weight_block_size": [128, 128]}),
        ("fbgemm_fp8", {}),
        ("compressed-tensors", {"config_groups": {}}),
        ("torchao", {"quant_type": {"default": {}}}),
    ],
)
@pytest.mark.parametrize("part", ["", "text_config"])
def test_quantised_models_are_refused_by_their_config(method, settings, part, good, tmp_path):
    shutil.copytree(good, tmp_path / "bad")
    edit(tmp_path / "bad", **{f"{part}__quantization_config": {"quant_method": method, **settings}})
    for use in (checkpoint.load, checkpoint.load_config, checkpoint.open_weights):
        with pytest.raises(UserError, match=rf"quantised \({method}\).*original .*or a dequantised folder"):
            use(tmp_path / "bad")


def rewritten(folder, out, tie_top, tie_text, *, head, embedding=True):
    """Save one tied LLaVA as one file with or without its head and embedding, and with these flags."""
    checkpoint.save(*tiny("llava-dinov2-llama"), out)
    edit(out, tie_word_embeddings=tie_top, text_config__tie_word_embeddings=tie_text)
    tensors = load_file(out / "model.safetensors")
    key = next(key for key in tensors if "embed_tokens" in key)
    if head:
        tensors["language_model.lm_head.weight"] = tensors[key].clone()
    if not embedding:
        del tensors[key]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("tie_text", [True, False])
@pytest.mark.parametrize(("head", "embedding"), [(True, True), (True, False), (False, True)])
def test_tied_heads_may_lie_on_disk_once_or_twice(tie_text, head, embedding, good, tmp_path):
    folder = rewritten(good, tmp_path / "in", True, tie_text, head=head, embedding=embedding)
    weights = checkpoint.open_weights(folder)
    model = tiny("llava-dinov2-llama")[0]
    assert torch.equal(weights["model.language_model.embed_tokens.weight"], model.lm_head.weight)
    assert "lm_head.weight" not in weights
    assert torch.equal(checkpoint.load(folder).model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "blip2-opt",
            {"vision_config__num_attention_heads": 5},
            "no 'blip-2' model can be built of it: .*divisible",
        ),
        (
            "llava-clip-llama",
            {"vision_config__num_attention_heads": 5},
            r"contradicts itself: vision_config: .*size \(32\) is not a multiple of .* \(5\)\.$",
        ),
        ("smolvlm", {"text_config__num_attention_heads": 0}, "config.json cannot be understood: ZeroDivision"),
        ("qwen2_5_vl", {"text_config__rope_parameters": {"rope_type": "none"}}, "config.json"),
    ],
)
def test_a_config_that_no_model_can_be_built_of_is_refused(name, changes, message, tmp_path):
    checkpoint.save(*tiny(name), tmp_path / "bad")
    edit(tmp_path / "bad", **changes)
    for use in (checkpoint.load, checkpoint.open_weights):
        with pytest.raises(UserError, match=message):
            use(tmp_path / "bad")


def test_a_head_tied_in_the_text_config_alone_is_what_the_class_makes_of_it(tmp_path):
    """LLaVA ties it, SmolVLM does not: then it must be on disk."""
    checkpoint.save(*tiny("llava-dinov2-llama"), tmp_path / "llava")
    edit(tmp_path / "llava", tie_word_embeddings=False)
    assert "lm_head.weight" not in checkpoint.open_weights(tmp_path / "llava")
    checkpoint.save(*tiny("smolvlm"), tmp_path / "smolvlm")
    edit(tmp_path / "smolvlm", tie_word_embeddings=False)
    message = r"1 weights are missing .*: lm_head\.weight\. .*is false on the top level and true in the text part"
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "smolvlm")
    tensors = load_file(tmp_path / "smolvlm" / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.text_model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "smolvlm" / "model.safetensors", metadata={"format": "pt"})
    weights = checkpoint.open_weights(tmp_path / "smolvlm")
    assert torch.equal(weights["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(checkpoint.load(tmp_path / "smolvlm").model.lm_head.weight, tensors["lm_head.weight"])


def test_hub_ids_are_downloaded_without_pickles_and_then_a_folder(good, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(good)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert checkpoint.load("some/model").path == good
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["some/model"])


def test_a_hub_id_that_is_nowhere_is_refused():
    with pytest.raises(UserError, match="There is no folder of that name, and as a hub id"):
        checkpoint.load("nobody/nothing")


def test_audio_weights_follow_the_width_of_the_text(tmp_path):
    """Speech goes through the projector into the narrower stream, as in the masked model."""
    model = random_model(CONFIGS["phi4_multimodal"]())
    audio = model.config.audio_config
    ids = torch.full((1, 10), 7)
    ids[0, 2:6] = audio.audio_token_id
    rng = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": ids,
        "audio_input_features": torch.randn(1, 16, audio.input_size, generator=rng),
        "audio_embed_sizes": torch.tensor([4]),
    }
    anatomy = describe(model.config)
    axis = anatomy.axis("text.width")
    keep = some_units(axis, axis.choices()[len(axis.choices()) // 2])
    with torch.no_grad():
        before = model(**batch).logits
        with masked(model, anatomy, axis.name, keep):
            wanted = model(**batch).logits
        got = cut(model, anatomy, axis.name, keep)(**batch).logits
        silent = model(**batch | {"audio_input_features": torch.zeros(1, 16, audio.input_size)}).logits
    assert (before - silent).abs().max() > 1e-2, "a vacuous test: nobody listens"
    assert (wanted - before).abs().max() > 1e-2
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_audio_of_gemma4_follows_the_width_and_nothing_else(tmp_path):
    """What its audio tower writes into the stream is scaled like all that does; other cuts leave every audio weight as it was."""
    data = CONFIGS["gemma4-dense"]().to_dict()
    del data["transformers_version"]
    audio = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 20}
    data["audio_config"] = {"model_type": "gemma4_audio", "subsampling_conv_channels": [8, 4], **audio}
    config = tf.Gemma4Config.from_dict(data)
    model = random_model(config)
    checkpoint.save(model, None, tmp_path / "in")
    before = checkpoint.open_weights(tmp_path / "in")
    streaming.cut_folder(before, {"text.ffn": 32, "vision.ffn": 22}, tmp_path / "out")
    after = checkpoint.open_weights(tmp_path / "out")
    heard = [name for name in before if "audio" in name]
    assert len(heard) > 20
    assert all(torch.equal(before[name], after[name]) for name in heard)
    assert len(after["model.language_model.layers.0.mlp.up_proj.weight"]) == 32
    anatomy = describe(config)
    keep = some_units(anatomy.axis("text.width"), 24)
    student = cut(model, anatomy, "text.width", keep)
    states = torch.randn(1, 5, 20)
    wanted = model.model.embed_audio(states)[..., keep["text.width"]] * (24 / 48) ** 0.5
    assert torch.allclose(student.model.embed_audio(states), wanted, atol=1e-5)
