"""Pickled weights become safetensors bit by bit; what is more than weights is refused, and nothing of it runs."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from slimlmm import checkpoint, cli, converting
from slimlmm.converting import INDEX_OF_PICKLES, ONE, convert
from slimlmm.errors import UserError
from tiny import tiny

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaVA in half precision with a tied head, as safetensors."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model.half(), processor, folder)
    return folder


@pytest.fixture
def source(plain, tmp_path):
    """The same without weights."""
    folder = shutil.copytree(plain, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def tensors(plain):
    return load_file(plain / "model.safetensors")


def same(folder, tensors):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    bits = {2: torch.int16, 4: torch.int32}
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        kind = bits[tensor.element_size()]
        assert torch.equal(found[key].view(kind), tensor.contiguous().view(kind)), key


def test_one_file_becomes_safetensors_of_the_same_bits_and_keys(source, plain, tensors, tmp_path):
    tensors["language_model.model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors["model.vision_tower.embeddings.cls_token"] = tensors.pop("vision_tower.embeddings.cls_token").float()
    torch.save(tensors, source / ONE)
    found = convert(source, tmp_path / "out")
    same(tmp_path / "out", tensors)
    assert (found.tensors, found.files, found.left_out, found.tied) == (len(tensors), 1, (), ())
    assert found.parameters == tiny("llava-dinov2-llama")[0].num_parameters()
    assert checkpoint.verify(tmp_path / "out").config.model_type == "llava"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in plain.iterdir()}
    assert tf.AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files_with_an_index_and_small_files_again(source, tensors, tmp_path):
    keys = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": keys[::2], "pytorch_model-00002-of-00002.bin": keys[1::2]}
    for name, part in parts.items():
        torch.save({key: tensors[key] for key in part}, source / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (source / INDEX_OF_PICKLES).write_text(json.dumps({"weight_map": weight_map}))
    found = convert(source, tmp_path / "out", max_shard_size="100KB")
    assert found.files > 2
    same(tmp_path / "out", tensors)
    assert checkpoint.load(tmp_path / "out").stored == torch.float16
    torch.save({key: tensors[key] for key in keys[::2]} | {keys[1]: tensors[keys[1]] + 1}, source / next(iter(parts)))
    with pytest.raises(UserError, match="lies in another file too, with other values"):
        convert(source, tmp_path / "two")
    torch.save({}, source / next(iter(parts)))
    with pytest.raises(UserError, match=r"00001-of-00002\.bin: lacks \d+ tensors that .*index\.json says"):
        convert(source, tmp_path / "two")
    (source / next(iter(parts))).unlink()
    with pytest.raises(UserError, match=r"1 of 2 files that .* are missing"):
        convert(source, tmp_path / "two")
    for text, message in (("[]", "is no index"), ('{"weight_map": {}}', "is empty"), ("[" * 100_000, "is no index")):
        (source / INDEX_OF_PICKLES).write_text(text)
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "two")


def test_tied_shared_and_left_over_tensors(source, tensors, tmp_path):
    both = torch.cat((tensors["language_model.model.layers.0.mlp.up_proj.weight"].clone(),) * 2)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] = both[:68]
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] = both[68:]
    tensors["language_model.model.layers.0.mlp.down_proj.weight"] = both[:68].T
    more = {HEAD: tensors[EMBEDDING], "language_model.model.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(tensors | more, source / ONE)
    found = convert(source, tmp_path / "out")
    assert found.tied == (HEAD,)
    assert found.left_out == ("language_model.model.rotary_emb.inv_freq",)
    same(tmp_path / "out", tensors)
    other = tensors[EMBEDDING] + 1
    torch.save(tensors | {HEAD: other}, source / ONE)
    with pytest.raises(UserError, match="both are on disk with different values"):
        convert(source, tmp_path / "two")
    data = json.loads((source / "config.json").read_text())
    data["tie_word_embeddings"] = data["text_config"]["tie_word_embeddings"] = False
    (source / "config.json").write_text(json.dumps(data))
    torch.save(tensors | {HEAD: tensors[EMBEDDING]}, source / ONE)
    assert convert(source, tmp_path / "own").tied == ()
    same(tmp_path / "own", tensors | {HEAD: tensors[EMBEDDING]})


def test_code_and_pickles_stay_behind(source, tensors, tmp_path):
    torch.save(tensors, source / ONE)
    for name in ("modeling_x.py", "tokenizer_x.py", "tokenizer.pkl", "vocab.pickle", "training_args.bin"):
        (source / name).write_bytes(b"\x80")
    (source / "additional").mkdir()
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tool.jinja").write_text("x")
    (source / "chat_templates" / "tool.py").write_text("x")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"auto_map": {"AutoConfig": "modeling_x.C"}}))
    found = convert(source, tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".py", ".pkl", ".pickle", ".bin"))]
    assert "chat_templates/tool.jinja" in names
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    said = "\n".join(found.notes)
    for what in (
        "tokenizer_x.py was not",
        "tokenizer.pkl was not",
        "vocab.pickle was not",
        "tool.py was not",
        "config.json asked",
    ):
        assert what in said
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: is no JSON"):
        convert(source, tmp_path / "two")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO(b""))


def packed(path):
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def cut_short(path):
    torch.save({"x": torch.ones(999)}, path)
    path.write_bytes(path.read_bytes()[:-300])


def damaged(path):
    """Write over the pickle inside of a sound zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"a/data.pkl": b"\x80\x02}(X", "a/version": b"3", "a/byteorder": b"little"}.items():
            archive.writestr(name, data)


def of(held):
    return lambda path: torch.save(held, path)


WIDE = torch.zeros(1).expand(10**12)
REFUSED = {
    "a function": (
        lambda path: torch.save({"x": print}, path),
        "holds more than weights, .*Unsupported global: GLOBAL",
    ),
    "an object": (lambda path: torch.save(tiny("llava-dinov2-llama")[0], path), "LlavaForConditionalGeneration"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({}, 4)), "a pickle of torch before version 1.6"),
    "a legacy file": (
        lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
        r"a pickle of torch before version 1\.6, not a zip file",
    ),
    "a TAR file": (tarred, r"is a TAR file, torch's format before version 0\.4"),
    "no file of torch": (lambda path: path.write_bytes(b"hello"), "no file of torch.save"),
    "an empty file": (lambda path: path.touch(), "no file of torch.save"),
    "TorchScript": (
        lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
        "is a TorchScript program, which holds code",
    ),
    "a compressed file": (packed, "is a compressed zip file"),
    "a file cut short": (cut_short, r"is cut short or damaged, at [\d,]+ bytes"),
    "a damaged pickle": (damaged, "is damaged or no file of weights"),
    "a list": (of([torch.ones(1)]), "holds a list, not tensors by name"),
    "a training checkpoint": (
        of({"model": {"x": torch.ones(1)}}),
        r"entry 'model' is a dict.*take the model's part out",
    ),
    "numbers for names": (of({3: torch.ones(1)}), "entry 3 is named by a int"),
    "a sparse tensor": (of({"x": torch.eye(3).to_sparse()}), r"a tensor of layout torch\.sparse_coo"),
    "a tensor without memory": (of({"x": torch.ones(3, device="meta")}), "on meta"),
    "complex numbers": (of({"x": torch.ones(3, dtype=torch.complex64)}), r"a tensor of torch\.complex64"),
    "a tensor wider than its storage": (of({"x": WIDE}), "over a storage of 4 bytes"),
    "another model": (of({"x": torch.ones(1)}), r"pickled: none of its 1 tensors belongs to a 'llava' model: x\."),
    "too few weights": (
        of({EMBEDDING: tiny("llava-dinov2-llama")[0].lm_head.weight}),
        r"pickled: \d+ weights are missing that its config asks for",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_weights_is_refused(case, source, tmp_path):
    write, message = REFUSED[case]
    write(source / ONE)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]


def test_nothing_in_a_pickle_runs(source, tensors, tmp_path, monkeypatch, capsys):
    torch.save(tensors | {"x": Runs(tmp_path / "ran")}, source / ONE)
    monkeypatch.setattr(sys, "argv", ["slimlmm", "convert", str(source), str(tmp_path / "out")])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2
    assert "holds more than weights, so it is not converted: Trying to load unsupported GLOBAL posix.system" in said
    assert "Re-running" not in said
    assert not (tmp_path / "ran").exists()


def test_what_is_written_is_compared_with_what_was_read(source, tensors, tmp_path, monkeypatch):
    torch.save(tensors, source / ONE)
    save_file = converting.save_file

    def worse(shard, path, metadata):
        shard["language_model.model.norm.weight"][0] += 1
        save_file(shard, path, metadata=metadata)

    monkeypatch.setattr(converting, "save_file", worse)
    with pytest.raises(UserError, match=r"differs from what was read: language_model\.model\.norm\.weight"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_without_pickles_or_with_more_are_refused(source, plain, tensors, tmp_path):
    with pytest.raises(UserError, match="no such folder; convert takes a local one"):
        convert("some/model", tmp_path / "out")
    with pytest.raises(UserError, match=r"has safetensors already \(model\.safetensors\)"):
        convert(plain, tmp_path / "out")
    with pytest.raises(UserError, match=r"has neither pytorch_model\.bin nor .*There are: chat_template\.jinja, "):
        convert(source, tmp_path / "out")
    torch.save(tensors, source / ONE)
    (source / "mine.txt").touch()
    with pytest.raises(UserError, match="holds files that slimlmm did not write"):
        convert(source, plain.parent)
    with pytest.raises(UserError, match="--max-shard-size 'x'"):
        convert(source, tmp_path / "out", max_shard_size="x")


def test_the_verb_says_what_it_wrote(source, tensors, tmp_path, monkeypatch, capsys):
    torch.save(tensors | {HEAD: tensors[EMBEDDING], "stray": torch.ones(1)}, source / ONE)
    (source / "tokenizer.py").touch()
    monkeypatch.setattr(sys, "argv", ["slimlmm", "convert", str(source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "94 tensors in 1 file(s), " in out
    assert f"tied, so written once: {HEAD}" in out
    assert "the model has no place for them: stray" in out
    assert "tokenizer.py was not copied" in out
