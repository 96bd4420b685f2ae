"""Data checks with a model: placeholders, label masks, tokens, and a loss of 0 against itself, each also where it is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer

from slimlmm import checkpoint
from slimlmm.checkdata import alignment, answers, pictures, seeing
from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.reading import read
from slimlmm.collate import Collator
from slimlmm.evaluate import encode
from slimlmm.half import has_half
from slimlmm.pictures import MAX_PIXELS
from slimlmm.progress import Quiet
from slimlmm.teacher import TeacherCache
from spoiling import added
from test_collate import templated
from tiny import NAMES, tiny


def loaded_of(name, seed=0):
    model, processor = tiny(name, seed)
    return checkpoint.Loaded(model=model, processor=processor, path=Path("tiny"))


def judged(loaded, ads, count=8):
    """Run the checks of a model on AdReview; return what was found and how the model saw it."""
    pad, reading = Pad(), read(ads, Pad(), Quiet())
    looks = pictures.looked_at(reading, MAX_PIXELS, Quiet())
    seen = seeing.judge(loaded, "tiny", reading, looks, count, 0, pad, Quiet())
    return {one.kind: one for one in pad.findings()}, seen


def off_by_one(monkeypatch, only_packed=False):
    """Let the collator put labels one token too early."""
    whole = Collator.__call__

    def shifted(self, groups):
        batch = whole(self, groups)
        if only_packed and not self.packed:
            return batch
        return batch | {"shift_labels": batch["shift_labels"].roll(-1, 1)}

    monkeypatch.setattr(Collator, "__call__", shifted)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "blip2-opt"])
def test_distilling_a_model_from_itself_starts_at_0(name, rows):
    loaded = loaded_of(name)
    found = alignment.probed(loaded, rows.train[:6])
    assert found.loss < alignment.LIMIT / 10
    assert alignment.probe(loaded, rows.train[:6]) == pytest.approx(found.loss, abs=1e-6)
    assert not loaded.model.training


def test_the_cross_entropy_told_is_the_models_own_loss(rows):
    loaded = loaded_of("llava-dinov2-llama")
    found = alignment.probed(loaded, rows.train[:1])
    batch = encode(loaded.processor, rows.train[:1])
    answer = torch.tensor([Collator(loaded.processor, packed=False).prompter.answer_ids(rows.train[0])])
    ids = torch.cat((batch["input_ids"], answer), 1)
    labels = torch.cat((torch.full_like(batch["input_ids"], -100), answer), 1)
    with torch.no_grad():
        own = loaded.model(input_ids=ids, pixel_values=batch["pixel_values"], labels=labels).loss
    assert found.cross_entropy == pytest.approx(float(own), rel=1e-3 if has_half(loaded.model.device) else 1e-4)
    assert found.tokens == answer.shape[1]


def test_labels_a_token_off_are_misaligned(rows, ads, monkeypatch):
    off_by_one(monkeypatch)
    loaded = loaded_of("llava-dinov2-llama")
    found = alignment.probed(loaded, rows.train[:6])
    assert (
        found.collated < alignment.LIMIT < found.plain
    )  # both sides of a training share the mistake: only the plain run tells
    said, _ = judged(loaded, ads)
    assert said["misaligned"].severity == said["label mask"].severity == "error"
    assert "labels are not the tokens that follow" in said["label mask"].examples[0].note


def test_a_model_of_no_numbers_is_misaligned(ads):
    loaded = loaded_of("llava-dinov2-llama")
    loaded.model.get_output_embeddings().weight.data[3] = torch.nan
    said, _ = judged(loaded, ads)
    assert "inf nats" in said["misaligned"].examples[0].note


def test_packed_labels_are_judged_too(ads, monkeypatch):
    off_by_one(monkeypatch, only_packed=True)
    said, _ = judged(loaded_of("llava-dinov2-llama"), ads)
    assert "packed" in said["label mask"].examples[0].note
    assert "misaligned" not in said  # `can_pack` sees that and the training does not pack


def test_a_sound_model_gets_its_cross_entropy_told_and_nothing_else(ads):
    said, seen = judged(loaded_of("llava-dinov2-llama"), ads)
    assert list(said) == ["cross-entropy"]
    assert said["cross-entropy"].count == seen.record.rows == 8
    assert f"{seen.record.cross_entropy:.4g} nats" in said["cross-entropy"].examples[0].note
    assert len(seen.record.masks) == 4


def test_another_teacher_is_misaligned(rows, tmp_path):
    loaded, other = loaded_of("llava-dinov2-llama"), loaded_of("llava-dinov2-llama", seed=1)
    collator = Collator(loaded.processor, packed=True)
    own = TeacherCache(loaded.model, collator, tmp_path / "own")
    foreign = TeacherCache(other.model, collator, tmp_path / "other")
    assert alignment.probed(loaded, rows.train[:6], own).loss < alignment.LIMIT
    assert alignment.probed(loaded, rows.train[:6], foreign).collated > 10 * alignment.LIMIT


def test_a_mask_that_trains_another_text_is_told(rows):
    processor = tiny("llava-dinov2-llama")[1]
    batch = Collator(processor, packed=False)([[row] for row in rows.train[:2]])
    assert [alignment.wrong_mask(processor, batch, index) for index in (0, 1)] == ["", ""]
    batch["rows"] = [dataclasses.replace(batch["rows"][0], answer="never said"), batch["rows"][1]]
    assert "'never said'" in alignment.wrong_mask(processor, batch, 0)


def test_masks_are_shown_as_text(rows):
    processor = tiny("llava-dinov2-llama")[1]
    batch = Collator(processor, packed=False)([[row] for row in rows.train[:2]])
    for mask, row in zip(alignment.masks(processor, batch), rows.train, strict=False):
        assert mask.trained == f"{row.answer}<|im_end|>"
        assert mask.before.endswith("<|im_start|>assistant\n")
        assert "<image>" not in mask.before
        assert mask.picture_tokens == 4


def test_placeholders_that_are_not_the_towers_tokens_are_told(ads):
    loaded = loaded_of("llava-clip-llama")
    loaded.processor.num_additional_image_tokens += 1
    said, seen = judged(loaded, ads)
    assert "5 placeholders in the prompt, 4 tokens" in said["placeholders"].examples[0].note
    assert said["not run"].severity == "error"
    assert seen.record.self_kl is None


def test_features_are_counted_where_the_class_tells_them(rows):
    loaded = loaded_of("llava-clip-llama")
    batch = Collator(loaded.processor, packed=False)([rows.train[:1]])
    assert alignment.features(loaded, batch) == 4
    untold = checkpoint.Loaded(model=loaded.model.lm_head, processor=loaded.processor, path=Path("tiny"))
    untold.model.device = torch.device("cpu")
    assert alignment.features(untold, batch) is None


def texts_judged(processor, folder, size, room):
    pad = Pad()
    lengths = answers.judge_tokens(read(folder, Pad(), Quiet()), processor, size, room, 30, pad, Quiet())
    return {one.kind: {example.id for example in one.examples} for one in pad.findings()}, lengths


def without_accents(tokenizer, unknown):
    """The tokenizer without the byte that accented letters begin with; in its place a token, or nothing."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"]["Ã"]
    state["model"]["unk_token"] = unknown
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def test_texts_that_the_model_cannot_read_are_told(ads, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ads, folder)
    planted = {"marked": "an <|im_start|> here", "foreign": "zebra", "endless": "word " * 90}
    added(folder, "train", [{"id": name, "answer": text} for name, text in planted.items()])
    processor = tiny("llava-dinov2-llama")[1]
    size = len(processor.tokenizer)
    said, lengths = texts_judged(processor, folder, size, (256, 3))
    assert said == {"special tokens": {"marked"}, "long answer": {"endless"}, "no room": {"endless"}}
    assert lengths.unit == "tokens"
    assert lengths.max > 256 > lengths.p95 > lengths.p50 > 1
    processor.tokenizer.add_tokens(["zebra"])
    assert texts_judged(processor, folder, size, None)[0]["foreign tokens"] == {"foreign"}


@pytest.mark.parametrize(("unknown", "note"), [(None, "reads back as"), ("<|endoftext|>", "answer: 'café'")])
def test_texts_that_the_tokenizer_cannot_spell_are_told(unknown, note, ads, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ads, folder)
    added(folder, "train", [{"id": "accent", "answer": "café"}])
    processor = tiny("llava-dinov2-llama")[1]
    template = processor.tokenizer.chat_template
    processor.tokenizer = without_accents(processor.tokenizer, unknown)
    processor.tokenizer.chat_template = template
    pad = Pad()
    answers.judge_tokens(read(folder, Pad(), Quiet()), processor, 10**6, None, 30, pad, Quiet())
    [one] = pad.findings()
    assert one.kind == "unknown tokens"
    assert one.examples[0].id == "accent"
    assert note in one.examples[0].note


def test_a_row_fits_by_its_own_tokens_and_its_picture(ads):
    loaded = loaded_of("llava-dinov2-llama")
    _, seen = judged(loaded, ads)
    assert seen.record.context == 256
    row = read(ads, Pad(), Quiet()).entries[0].row
    batch = Collator(loaded.processor, packed=False)([[row]])
    whole = batch["input_ids"].shape[1]
    pad = Pad()
    one = read(ads, Pad(), Quiet())
    one.entries = one.entries[:1]
    answers.judge_tokens(one, loaded.processor, 10**6, (whole, seen.added), 99, pad, Quiet())
    assert pad.findings() == ()
    answers.judge_tokens(one, loaded.processor, 10**6, (whole - 1, seen.added), 99, pad, Quiet())
    assert [one.kind for one in pad.findings()] == ["no room"]


def test_rows_behind_a_system_turn_without_a_place_are_told_and_the_others_judged(ads, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ads, folder)
    planted = {"told": {"system": "Be short.", "answer": "word " * 90}, "plain": {"answer": "word " * 90}}
    for name, row in planted.items():
        added(folder, "train", [{"id": name, **row}])
    _, processor = tiny("llava-dinov2-llama")
    size = len(processor.tokenizer)
    assert texts_judged(processor, folder, size, None)[0] == {"long answer": {"told", "plain"}}
    said, _ = texts_judged(templated(processor, "left out"), folder, size, None)
    assert said == {"no place": {"told"}, "long answer": {"plain"}}
