"""A folder is held against its certificate: each kind of damage is named, and nothing but a UserError comes out of any folder."""

import ast
import contextlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pali import tiny_paligemma
from slimlmm import certificate, checkpoint, probes
from slimlmm.certificate import NAME, certify, digests, verify
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from test_cli import call
from tiny import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    """Ask in this process, without the seconds that a new one takes, where no test is about that."""
    if "new_process" not in request.keywords:
        monkeypatch.setattr(certificate, "afresh", probes.told)


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A certified folder."""
    folder = tmp_path_factory.mktemp("certified") / "model"
    model, processor = tiny("llava-dinov2-llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "afresh", probes.told)
        saved(model, processor, folder)
    return folder


@pytest.fixture
def folder(certified, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(certified, tmp_path / "model")


def saved(model, processor, folder, rows=(), parameters=None, count=4):
    """Save and certify as a run does."""
    parameters = parameters or model.num_parameters()
    prove = lambda partial: certify(partial, model, processor, rows, parameters, count=count)  # noqa: E731
    checkpoint.save(model, processor, folder, prove=prove)


def edit(path, **changes):
    """Write fields of a JSON file, PART__FIELD in a part of it."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (data[part] if part else data)[key] = value
    path.write_text(json.dumps(data))


def change(folder, change_tensors):
    tensors = load_file(folder / WEIGHTS)
    change_tensors(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def hashed_again(folder):
    """Let the certificate hold the hashes of what lies there now, as somebody would who hides a change."""
    files = {name: one.model_dump() for name, one in digests(folder).items()}
    edit(folder / NAME, files=files)


def probes_of(folder, changes, **others):
    """Change the first certified probe."""
    probe, *rest = json.loads((folder / NAME).read_text())["probes"]
    edit(folder / NAME, probes=[{**probe, **changes(probe)}, *rest], **others)


def elsewhere(folder):
    """Let the certificate be of another version of torch."""
    environment = json.loads((folder / NAME).read_text())["environment"]
    edit(folder / NAME, environment={**environment, "versions": {**environment["versions"], "torch": "2.6.0"}})


def failures(folder, **options):
    return "\n".join(verify(folder, **options).failures)


def flip(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1000] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def swap(tensors):
    """Exchange two weights of one shape."""
    one, other = (f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def louder(tensors):
    """Multiply all logits: the best token stays the best."""
    tensors["language_model.model.norm.weight"] *= 1.01


def also(tensors):
    tensors["stray.weight"] = torch.zeros(2)


def without_one(tensors):
    del tensors["multi_modal_projector.linear_1.weight"]


def with_hashes(spoil):
    def spoilt(folder):
        spoil(folder)
        hashed_again(folder)

    return spoilt


DAMAGE = {
    "a flipped bit": (flip, "files: model.safetensors has changed "),
    "a pickle": (
        with_hashes(lambda folder: torch.save({}, folder / "training_args.bin")),
        "safe formats: training_args.bin may run code",
    ),
    "code": (with_hashes(lambda folder: (folder / "modeling.py").touch()), "safe formats: modeling.py may run code"),
    "code by the config": (
        with_hashes(lambda folder: edit(folder / "config.json", auto_map={"AutoConfig": "x.Y"})),
        "safe formats: config.json asks for code of its own",
    ),
    "no file": (lambda folder: os.mkfifo(folder / "pipe"), "safe formats: pipe is neither a file nor a folder"),
    "another file": (lambda folder: (folder / "notes.txt").touch(), "files: notes.txt is not in the certificate"),
    "a file gone": (
        lambda folder: (folder / "generation_config.json").unlink(),
        "files: generation_config.json is missing",
    ),
    "a config value": (
        lambda folder: edit(folder / "config.json", text_config__rms_norm_eps=1e-4),
        "files: config.json has changed ",
    ),
    "a config value, hidden": (
        with_hashes(lambda folder: edit(folder / "config.json", text_config__rms_norm_eps=0.5)),
        "answers: probe 0 gives the ",
    ),
    "swapped weights, hidden": (with_hashes(lambda folder: change(folder, swap)), "answers: probe 0 gives the "),
    "other logits, hidden": (
        with_hashes(lambda folder: change(folder, louder)),
        "answers: probe 0 gives the same token ids by other logits",
    ),
    "a stray key, hidden": (
        with_hashes(lambda folder: change(folder, also)),
        "loading: unexpected keys: stray.weight",
    ),
    "a key gone, hidden": (
        with_hashes(lambda folder: change(folder, without_one)),
        "weights are missing that its config asks for: model.multi_modal_projector.linear_1.weight",
    ),
    "other parameters": (lambda folder: edit(folder / NAME, parameters=7), "parameters: 7 were certified"),
    "another question": (
        lambda folder: probes_of(folder, lambda _: {"question": "Why?"}),
        "answers: probe 0 is not the one that was certified",
    ),
    "another picture": (
        lambda folder: probes_of(folder, lambda _: {"picture": "0" * 64}),
        "answers: probe 0 is not the one that was certified",
    ),
    "a broken certificate": (lambda folder: (folder / NAME).write_text("{"), "is not a certificate of schema"),
    "fewer margins than tokens": (
        lambda folder: probes_of(folder, lambda _: {"margins": []}),
        r"probes\.0: \d+ tokens, 0 margins",
    ),
    "no certificate": (lambda folder: (folder / NAME).unlink(), "there is no certificate.json; --without-certificate"),
}


def test_an_untouched_folder_is_fine_and_loads_as_before(folder):
    found = verify(folder)
    assert found.failures == ()
    assert [check.name for check in found.checks] == [
        *("certificate", "files", "safe formats", "loading", "parameters", "answers"),
    ]
    assert "4 probes, same versions and processor: to the token" in found.checks[-1].said
    checkpoint.verify(folder)
    assert (
        tf.AutoModelForImageTextToText.from_pretrained(folder).num_parameters()
        == tiny("llava-dinov2-llama")[0].num_parameters()
    )


@pytest.mark.parametrize("case", DAMAGE)
def test_every_damage_is_named(case, folder):
    spoil, message = DAMAGE[case]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        raise UserError(failures(folder))


def test_a_model_whose_parts_attend_in_ways_of_their_own_is_certified(tmp_path):
    model, processor = tiny_paligemma()
    ways = {model.config._attn_implementation, model.config.text_config._attn_implementation}
    assert ways == {"sdpa", "eager"}
    saved(model, processor, tmp_path / "model")
    assert verify(tmp_path / "model").failures == ()


def test_hidden_files_of_git_and_downloads_are_no_part_of_the_model(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "model.lock").touch()
    (folder / ".gitattributes").touch()
    assert not failures(folder)


def test_elsewhere_only_tokens_that_were_no_near_tie_count(folder):
    turned = lambda probe: {"tokens": [probe["tokens"][0] ^ 1, *probe["tokens"][1:]]}  # noqa: E731
    tied = lambda probe: {**turned(probe), "margins": [0.0, *probe["margins"][1:]]}  # noqa: E731
    probes_of(folder, tied)
    assert "probe 0 gives the token ids" in failures(folder), "to the token where all versions are the same"
    elsewhere(folder)
    found = verify(folder)
    assert not found.failures
    assert found.checks[-1].said == "4 probes, other versions or processor: 1 near ties"
    far = json.loads((folder / NAME).read_text())["probes"][0]["scale"]
    probes_of(folder, lambda probe: {"margins": [0.01 * far, *probe["margins"][1:]]})
    assert "probe 0 gives the token ids" in failures(folder)


def test_fewer_probes_may_be_asked(folder):
    probes_of(folder, lambda probe: {"tokens": [*probe["tokens"][::-1], 5], "margins": [*probe["margins"], 9.0]})
    first, *rest = json.loads((folder / NAME).read_text())["probes"]
    edit(folder / NAME, probes=[*rest[:1], first, *rest[1:]])
    assert "probe 1" in failures(folder)
    assert verify(folder, count=1).checks[-1].said.startswith("1 probes")


def test_without_a_certificate_the_rest_is_checked(folder):
    (folder / NAME).unlink()
    found = verify(folder, without=True)
    assert not found.failures
    assert not found.certified
    (folder / "model.py").touch()
    assert "model.py may run code" in failures(folder, without=True)


def test_the_verb_prints_a_table_or_json_and_exits_with_2_where_a_check_fails(folder, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "verify", folder)
    assert code == 0
    assert "slimlmm:" not in err
    assert out.count(" ok ") == 6
    assert "FAILED" not in out
    flip(folder)
    (folder / "notes.txt").touch()
    assert "FAILED notes.txt is not in the certificate (and 1 more)" in " ".join(
        call(monkeypatch, capsys, "verify", folder)[1].split()
    )
    (folder / "notes.txt").unlink()
    code, out, err = call(monkeypatch, capsys, "verify", folder, "--json", "--rows", 1)
    assert code == 2
    assert [one["failures"] for one in json.loads(out)["checks"]][1][0].startswith("model.safetensors has changed")
    assert "checks failed" in err
    assert "files: model.safetensors has changed" in err
    assert "Traceback" not in err
    assert call(monkeypatch, capsys, "verify", folder / "nowhere")[0] == 2
    for verb in ("verify", "convert"):
        assert f"Example: slimlmm {verb}" in call(monkeypatch, capsys, verb, "--help")[1].replace("`", "")


@pytest.mark.new_process
def test_a_new_process_of_stock_classes_answers_as_the_model_in_memory(rows, tmp_path, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    half = checkpoint.as_stored(model, torch.float16)
    asked = [rows.test[0], replace(rows.test[1], system="Be short.")]
    saved(half, processor, tmp_path / "half", asked, count=2)
    found = certificate.Certificate.load(tmp_path / "half" / NAME)
    assert (found.rows.compared, found.rows.equal) == (2, 2)
    assert len(found.probes) == 2
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    monkeypatch.setattr(certificate, "afresh", probes.told)
    assert not failures(tmp_path / "half")


@pytest.mark.new_process
def test_a_new_process_that_hangs_is_ended_and_told(folder, monkeypatch):
    monkeypatch.setattr(certificate, "PATIENCE", 0.01)
    assert "loading: the new process did not answer within 0 s and was ended" in verify(folder).failures


@pytest.mark.parametrize("name", ["teacher", "student/model"])
def test_what_is_bundled_is_what_was_certified(name):
    assert verify(bundled(name), count=1).failures == ()


def test_what_runs_in_the_new_process_imports_nothing_of_slimlmm():
    tree = ast.parse(open(probes.__file__).read())  # noqa: SIM115
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imported for alias in node.names} | {
        getattr(node, "module", "") for node in imported
    }
    assert not any(name and name.startswith("slimlmm") for name in names)


def test_probes_are_the_same_for_ever():
    assert (
        probes.pixels_hash(probes.picture(0, 28)) == "5b03e3f2678e1aabfb4f649ede3b58fa65933e47a8970bed6435ec2f06a39fb3"
    )


def test_weights_in_another_format_leave_what_no_file_holds_alone():
    model = checkpoint.as_stored(tiny("llava-dinov2-llama")[0], torch.float16)
    rotary = model.model.language_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, tiny("llava-dinov2-llama")[0].model.language_model.rotary_emb.inv_freq)


def test_a_folder_that_is_not_the_model_in_memory_gets_no_certificate(rows, tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    out = tmp_path / "out"
    checkpoint.save(model, processor, out)
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match=r"it has 120,944 parameters, 5 were planned"):
        saved(model, processor, out, parameters=5)
    other = tiny("llava-dinov2-llama", seed=1)[0]
    with pytest.raises(
        UserError, match=r"probe 0 has the token ids .*row 0 has the token ids .*nothing was put in place"
    ):
        certify(out, other, processor, rows.test[:1], other.num_parameters(), count=1)
    (out / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"cannot be certified: pytorch_model\.bin may run code"):
        certify(out, model, processor, (), 1)
    assert (out / WEIGHTS).read_bytes() == before
    assert not (out / NAME).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"error": "ValueError: no"}, "ValueError: no"),
        ({"parameters": 1, "keys": {"missing": ["a", "b"]}, "answers": []}, "missing keys: a, b"),
    ],
)
def test_what_the_new_process_says_is_told(found, message, folder, monkeypatch):
    model, processor = tiny("llava-dinov2-llama")
    monkeypatch.setattr(probes, "answers", lambda *_: [])
    monkeypatch.setattr(certificate, "afresh", lambda _: found)
    with pytest.raises(UserError, match=message):
        certify(folder, model, processor, (), 1)
    monkeypatch.setattr(certificate, "afresh", lambda _: {"error": "ValueError: no"})
    assert "loading: ValueError: no" in failures(folder)


@pytest.mark.parametrize(
    ("count", "known"), [(9000, "only 94 tensors on disk, so at most 1,000"), (10**9, "at most 10,000")]
)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_more_blocks_than_tensors_are_refused_before_they_are_built(part, count, known, folder):
    edit(folder / "config.json", **{f"{part}__num_hidden_layers": count})
    message = rf"says {part}\.num_hidden_layers = {count:,}, .*{known} are built"
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)
    with pytest.raises(UserError, match=message):
        raise UserError(failures(folder))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-300, 5000),
    st.integers(-(2**70), -1),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["clip", "llama", "gelu", "float16", "default", "full", "mixtral"]),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.sampled_from(["model_type", "rope_type", "x"]), st.text(max_size=4), max_size=2),
)


def places(data, path=()):
    """Return the path of every value of nested dictionaries."""
    found = []
    for key, value in data.items():
        found += [(*path, key), *(places(value, (*path, key)) if isinstance(value, dict) else [])]
    return found


def spoilt(data, draw):
    """Return nested dictionaries with one to three values changed or gone."""
    for _ in range(draw(st.integers(1, 3))):
        known = places(data)
        if not known:
            break
        *inner, last = draw(st.sampled_from(known))
        part = data
        for key in inner:
            part = part[key]
        if draw(st.integers(0, 4)) == 0:
            del part[last]
        else:
            part[last] = draw(JUNK)
    return data


def spoil_weights(path, draw):
    """Change the head of a safetensors file, or bytes anywhere in it, or its length."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    how = draw(st.sampled_from(["head", "bytes", "cut", "size", "text"]))
    if how == "head":
        head = json.dumps(spoilt(json.loads(raw[8 : 8 + size]), draw)).encode()
        raw = len(head).to_bytes(8, "little") + head + raw[8 + size :]
    elif how == "bytes":
        at = draw(st.integers(0, size + 100))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=8)) + raw[at + 8 :]
    elif how == "cut":
        raw = raw[: draw(st.integers(0, size + 100))]
    elif how == "size":
        raw = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
    else:
        raw = draw(st.binary(max_size=60))
    path.write_bytes(raw)


NO_CONFIGS = ("[]", "null", "1", '"a"', "{}", "[" * 100_000, '{"a":' * 100_000, '{"a":' * 900 + "1" + "}" * 900)


def spoil_json(path, draw):
    """Change values of a JSON file, or make it something else."""
    how = draw(st.integers(0, 9))
    if how == 0:
        path.write_bytes(draw(st.binary(max_size=40)))
    elif how == 1:
        path.write_text(draw(st.sampled_from(NO_CONFIGS)))
    else:
        path.write_text(json.dumps(spoilt(json.loads(path.read_text()), draw)))


def only_user_errors(folder, draw):
    """Spoil one file of a folder; let nothing but a UserError come out of verifying and loading it."""
    name = draw(st.sampled_from([WEIGHTS, "config.json", "config.json", NAME, "processor_config.json"]))
    kept = (folder / name).read_bytes()
    try:
        (spoil_weights if name == WEIGHTS else spoil_json)(folder / name, draw)
        for use in (verify, checkpoint.load) if name != NAME else (verify,):
            with contextlib.suppress(UserError):
                use(folder)
    finally:
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_what_is_no_configuration_is_refused(text, folder, monkeypatch):
    (folder / "config.json").write_text(text)
    (folder / NAME).write_text(text)
    assert len(verify(folder).failures) > 1
    with pytest.raises(UserError):
        checkpoint.load(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_only_user_errors_come_out_of_spoilt_folders(data, certified):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "afresh", lambda _: {"error": "not asked here"})
        only_user_errors(certified, data.draw)
