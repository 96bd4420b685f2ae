"""Exports of tiny real models against the models themselves."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="exports need the extra `export`: pip install 'slimlmm[export]'")
pytest.importorskip("onnxscript", reason="exports need the extra `export`: pip install 'slimlmm[export]'")

from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from slimlmm import checkpoint
from slimlmm.cli import app
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import answer, encode, evaluate, generation_settings
from slimlmm.exporting import checks, graphs, reading, runner
from slimlmm.exporting.export import Order, export
from slimlmm.exporting.manifest import Manifest
from slimlmm.exporting.runtimes import RUNTIMES
from slimlmm.progress import reporter
from slimlmm.serving.answering import Answerer, Ask
from tiny import LLAVA, tiny

#: beside ONNX Runtime, of which every test speaks
OTHERS = [
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            find_spec("openvino") is None or find_spec("nncf") is None,
            reason="needs openvino and nncf: pip install 'slimlmm[export]'",
        ),
    )
]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 40, 3), dtype=np.uint8))


def order(out, target="onnx", **more):
    return Order(**{"target": target, "out": out, "rows": 20, "calls": 2, "threads": 1, **more})


def made(model, data, wanted):
    with reporter(True) as tell:
        return export(str(model), data, wanted, tell)


@pytest.fixture(scope="module", params=LLAVA)
def pair(request, tmp_path_factory, ads):
    """A checkpoint and its export to ONNX Runtime, both loaded."""
    folder = tmp_path_factory.mktemp("pairs")
    checkpoint.save(*tiny(request.param), folder / "model")
    made(folder / "model", ads, order(folder / "out"))
    return checkpoint.load(folder / "model"), runner.load(folder / "out", threads=1)


@pytest.fixture(scope="module")
def exported(teacher, ads, tmp_path_factory):
    """The folder of an export to ONNX Runtime."""
    out = tmp_path_factory.mktemp("exports") / "onnx"
    made(teacher, ads, order(out))
    return out


def test_an_export_gives_the_logits_and_answers_of_its_source_alone_and_in_batches(pair, rows):
    source, copy = pair
    for part in (rows.test[:1], rows.test[:7]):
        found = []
        for side in (source, copy):
            settings = generation_settings(side.model, side.processor, 6) | {"eos_token_id": None}
            batch = encode(side.processor, part).to("cpu", dtype=torch.float32)
            found.append(side.model.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True))
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert len(found[1].logits) == 6
        for wanted_BV, found_BV in zip(found[0].logits, found[1].logits, strict=True):
            torch.testing.assert_close(found_BV, wanted_BV, atol=2e-4, rtol=1e-4)


def test_log_probabilities_of_an_engine_are_those_of_the_stock_model(pair):
    source, copy = pair
    asks = [
        Ask(
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            pictures=[picture(number)],
            max_tokens=5,
            top_logprobs=3,
        )
        for number, text in enumerate(("What is it?", "Which of the brands that you know is this one?"))
    ]
    for wanted, found in zip(
        Answerer(source.model, source.processor).answer(asks), runner.answerer(copy.path).answer(asks), strict=True
    ):
        assert (found.text, found.finish, found.prompt_tokens) == (wanted.text, wanted.finish, wanted.prompt_tokens)
        assert [token.text for token in found.tokens] == [token.text for token in wanted.tokens]
        for one, other in zip(found.tokens, wanted.tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-3)


def test_an_export_evaluates_and_answers_files_as_its_source_does(pair, rows):
    source, copy = pair
    assert copy.model.shape.reads_bytes
    first, second = (evaluate(side.model, side.processor, rows.test[:12], max_new_tokens=4) for side in pair)
    assert first.answers == second.answers
    assert answer(copy.model, copy.processor, rows.test[:1], 4) == answer(
        source.model, source.processor, rows.test[:1], 4
    )


def test_text_without_a_picture_is_answered_alike(pair):
    source, copy = pair
    text = "Which brand is advertised?"
    found = []
    for side in (source, copy):
        batch = side.processor.tokenizer([text], return_tensors="pt")
        found.append(side.model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*found)


def test_sampling_follows_torchs_seed_and_stays_within_top_p(exported, rows):
    side = runner.load(exported, threads=1)
    batch = encode(side.processor, rows.test[:1]).to("cpu")
    settings = generation_settings(side.model, side.processor, 8) | {"do_sample": True, "eos_token_id": None}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(side.model.generate(**batch, **settings | {"temperature": 3.0}).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = side.model.generate(**batch, **settings | {"do_sample": False})
    assert torch.equal(side.model.generate(**batch, **settings | {"temperature": 3.0, "top_p": 1e-6}), greedy)
    with pytest.raises(UserError, match="num_beams"):
        side.model.generate(**batch, **settings | {"num_beams": 4})


def test_an_answer_ends_at_its_end_token_and_is_padded_while_others_go_on(exported, rows):
    side = runner.load(exported, threads=1)
    batch = encode(side.processor, rows.test[:4]).to("cpu")
    length = batch["input_ids"].shape[1]
    free = side.model.generate(**batch, max_new_tokens=6, eos_token_id=None, pad_token_id=3)[:, length:]
    end = int(free[0, 1])
    ended = side.model.generate(**batch, max_new_tokens=6, eos_token_id=[end], pad_token_id=3)[:, length:]
    for one, other in zip(ended.tolist(), free.tolist(), strict=True):
        stop = other.index(end) + 1 if end in other else len(other)
        assert one[:stop] == other[: min(stop, len(one))]
        assert set(one[stop:]) <= {3}


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("int8", [False, True])
def test_other_runtimes_give_the_same(target, int8, teacher, ads, tmp_path):
    found = made(teacher, ads, order(tmp_path / "out", target, int8=int8, max_drop=100))
    assert found.check.logits_max <= (0.1 if int8 else 1e-4) * found.check.logits_scale
    assert (found.check.logits_max > 1e-4 * found.check.logits_scale) == int8
    assert set(found.libraries) == set(RUNTIMES[target].libraries)


def test_eight_bits_are_smaller_and_near(teacher, ads, exported, tmp_path):
    whole = Manifest.load(exported / checkpoint.MARKER)
    found = made(teacher, ads, order(tmp_path / "out", int8=True, max_drop=100))
    weights = [sum(path.stat().st_size for path in one.glob("*.data")) for one in (exported, tmp_path / "out")]
    assert weights[1] < 0.6 * weights[0]
    assert whole.check.logits_max <= 1e-4 * whole.check.logits_scale
    assert 1e-4 < found.check.logits_max / found.check.logits_scale < 0.2


def test_what_is_known_of_an_export_lies_beside_it(teacher, ads, exported):
    found = Manifest.load(exported / checkpoint.MARKER)
    assert (found.target, found.int8, found.model_type, found.threads) == ("onnx", False, "llava", 1)
    assert found.check.n == 20
    assert found.check.drop.mean == 0
    assert found.check.agreement == 1
    assert found.check.latency.second.n == 2
    assert found.libraries["onnxruntime"]
    (weights,) = teacher.glob("*.safetensors")
    assert found.source_bytes > weights.stat().st_size
    changed = json.loads((exported / checkpoint.MARKER).read_text()) | {"shape": None}
    assert Manifest.model_validate(changed).shape is None


def test_torchao_writes_safetensors_that_plain_loading_takes(teacher, ads, tmp_path):
    pytest.importorskip("torchao", reason="exports need the extra `export`: pip install 'slimlmm[export]'")
    found = made(teacher, ads, order(tmp_path / "out", "torchao", max_drop=100))
    assert sorted(path.suffix for path in (tmp_path / "out").glob("model*")) == [".safetensors"]
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    weight = plain.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Int8Tensor"
    assert 0 < found.check.logits_max < 0.2 * found.check.logits_scale
    with pytest.raises(UserError, match="which AutoModelForImageTextToText loads"):
        runner.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "blip2-opt"])
def test_a_model_that_the_graphs_cannot_hold_is_refused_by_name(name):
    model, _ = tiny(name)
    with pytest.raises(UserError, match=rf"{model.config.model_type}.*not exported to openvino.*llava"):
        graphs.refuse(model, "here", "openvino")


def test_sliding_attention_is_refused():
    model, _ = tiny("llava-siglip-qwen2")
    model.config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UserError, match=r"qwen2 attends by sliding_attention"):
        graphs.refuse(model, "here", "onnx")


def test_bad_orders_are_refused_before_anything_is_loaded(teacher, ads, tmp_path):
    with pytest.raises(UserError, match=r"--to 'onx'.*Did you mean 'onnx'"):
        made(teacher, ads, order(tmp_path / "out", "onx"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="did not write"):
        made("no/where/at/all", ads, order(tmp_path / "mine"))
    with pytest.raises(UserError, match="--split 'tset'"):
        made("no/where/at/all", ads, order(tmp_path / "out", split="tset"))


def test_an_export_that_is_worse_or_other_leaves_nothing_behind(teacher, ads, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(
        runner.Exported, "_look", lambda self, pixels, places: np.zeros((places, self.shape.width), np.float32)
    )
    with pytest.raises(UserError, match="computes something else"):
        made(teacher, ads, order(tmp_path / "out", max_drop=100))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"points less.*--max-drop allows -200"):
        made(teacher, ads, order(tmp_path / "out", int8=True, max_drop=-200))
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_one_before_it(teacher, ads, tmp_path, monkeypatch):
    out = tmp_path / "out"
    made(teacher, ads, order(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fails(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks, "check", fails)
    with pytest.raises(UserError, match="No space left on device"):
        made(teacher, ads, order(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_export_is_told(exported, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        runner.load(tmp_path)
    (tmp_path / checkpoint.MARKER).write_text("{}")
    with pytest.raises(UserError, match="not a manifest of an export"):
        runner.load(tmp_path)


def test_pictures_of_another_size_and_prompts_without_places_are_refused(exported, rows):
    side = runner.load(exported, threads=1)
    batch = encode(side.processor, rows.test[:1]).to("cpu")
    settings = {"max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(UserError, match=r"came as \(3, 14, 28\)"):
        side.model.generate(**batch | {"pixel_values": batch["pixel_values"][:, :, :14]}, **settings)
    with pytest.raises(UserError, match="0 places"):
        side.model.generate(**batch | {"input_ids": torch.full_like(batch["input_ids"], 9)}, **settings)


def test_the_quick_reader_is_used_only_where_it_gives_what_the_processor_gives():
    _, processor = tiny("llava-clip-llama")
    pixels = reading.pixels_of(processor)
    texts, pictures = ["<image>What?", "a longer <image> question"], [picture(0), picture(1)]
    assert reading.same(reading.Reader(processor, 4), pixels, texts, pictures)
    assert not reading.same(reading.Reader(processor, 5), pixels, texts, pictures)
    other = graphs.Pixels(scale=pixels.scale, mean=(0.5, 0.5, 0.5), std=pixels.std)
    assert not reading.same(reading.Reader(processor, 4), other, texts, pictures)
    processor.image_processor.do_normalize = False
    assert reading.pixels_of(processor) is None


def test_a_processor_that_does_not_normalise_is_used_as_it_is(teacher, ads, rows, tmp_path):
    model, processor = tiny("llava-dinov2-llama")
    processor.image_processor.do_normalize = False
    checkpoint.save(model, processor, tmp_path / "model")
    found = made(tmp_path / "model", ads, order(tmp_path / "out"))
    assert not found.shape.reads_bytes
    side = runner.load(tmp_path / "out", threads=1)
    source = checkpoint.load(tmp_path / "model")
    part = rows.test[:3]
    assert answer(side.model, side.processor, part, 4) == answer(source.model, source.processor, part, 4)


def test_an_export_cannot_be_trained(exported):
    side = runner.load(exported, threads=1)
    assert side.model.eval().train(False) is side.model
    with pytest.raises(UserError, match="cannot be trained"):
        side.model.train()


def test_the_verb_writes_reports_and_refuses(teacher, ads, tmp_path):
    common = ["--data", str(ads), "--rows", "10", "--calls", "2", "--threads", "1", "--quiet"]
    run = CliRunner().invoke(
        app, ["export", str(teacher), "--to", "onnx", "--out", str(tmp_path / "a"), *common, "--json"]
    )
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told == json.loads((tmp_path / "a" / checkpoint.MARKER).read_text())
    run = CliRunner().invoke(app, ["export", str(teacher), "--to", "onnx", "--out", str(tmp_path / "b"), *common])
    assert run.exit_code == 0, run.output
    assert "x faster" in run.stdout
    assert "exact match, 10 test rows" in run.stdout
    run = CliRunner().invoke(app, ["export", str(teacher), "--to", "tflite", "--out", str(tmp_path / "c"), *common])
    assert isinstance(run.exception, UserError)


def test_a_runtime_that_is_not_installed_is_named(teacher, ads, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'slimlmm\[export\]'"):
        made(teacher, ads, order(tmp_path / "out"))


def test_rows_of_bytes_are_answered_like_rows_of_files(exported, rows):
    side = runner.load(exported, threads=1)
    row = rows.test[0]
    same = Row(row.id, row.picture_bytes(), row.question, row.answer, row.task)
    assert answer(side.model, side.processor, [row], 4) == answer(side.model, side.processor, [same], 4)
