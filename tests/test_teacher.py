import pytest
import torch

from instruct import tiny_instructblip
from pali import tiny_paligemma
from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import Row, by_picture
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, first_text_block, states_until
from slimlmm.half import half
from slimlmm.teacher import TeacherCache, identity, weights_fingerprint
from tiny import tiny

NAME = "llava-dinov2-llama"


def test_cached_equals_live_up_to_half_precision(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    cache = TeacherCache(model, collator, tmp_path)
    batch = collator(by_picture(rows.train[:20], 16))
    cache.of(batch)
    cache.flush()
    live, _, _ = answer_logits(model, batch)
    cached = TeacherCache(model, collator, tmp_path).logits(TeacherCache(model, collator, tmp_path).of(batch))
    assert torch.allclose(cached, live, atol=2e-2 * float(live.abs().max()))


def test_capped_logits_come_back_capped(tmp_path, rows):
    model, processor = tiny_paligemma(scale=8.0)
    collator = Collator(processor, packed=False)
    cache, batch = TeacherCache(model, collator, tmp_path), collator(by_picture(rows.train[:20], 3)[:2])
    wanted_AV = answer_logits(model, batch)[0]
    head_AV = model.get_output_embeddings()(cache.of(batch).float())
    assert float((head_AV - wanted_AV).abs().max()) > 0.1 * float(wanted_AV.abs().max())  # the cap is felt
    assert torch.allclose(cache.logits(cache.of(batch)), wanted_AV, atol=2e-2 * float(wanted_AV.abs().max()))


def test_a_teacher_whose_logits_are_not_its_heads_is_refused(tmp_path, rows):
    model, processor = tiny_paligemma(scale=8.0)
    collator = Collator(processor, packed=False)
    cache, batch = TeacherCache(model, collator, tmp_path), collator(by_picture(rows.train[:20], 3)[:2])
    cache._cap = None
    with pytest.raises(UserError, match=r"do not come back from its last hidden states.*this paligemma cannot teach"):
        cache.of(batch)


def test_cached_picture_states_equal_what_enters_the_first_block(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    batch = collator(by_picture(rows.train[:30], 16))
    first = TeacherCache(model, collator, tmp_path)
    seen = model.model.get_image_features(batch["pixel_values"]).pooler_output
    wanted = torch.cat(list(seen))
    assert torch.allclose(first.pictures(batch).float(), wanted, atol=2e-2 * float(wanted.abs().max()))
    first.flush()
    again = TeacherCache(model, collator, tmp_path)
    again.live = None  # a call would fail
    assert torch.equal(again.pictures(batch), first.pictures(batch))
    assert torch.equal(again.of(batch), first.of(batch))


def test_states_of_a_picture_that_is_seen_as_asked_are_those_of_the_question(tmp_path, rows):
    model, processor = tiny_instructblip()
    collator = Collator(processor, packed=False)
    batch = collator([rows.train[:3]])
    assert len({row.picture_key() for row in batch["rows"]}) == 1
    block = first_text_block(model, describe(model.config))
    with torch.inference_mode(), half(model.device):
        wanted = states_until(model, block, batch).float()
    found = TeacherCache(model, collator, tmp_path).pictures(batch).float()
    assert torch.allclose(found, wanted, atol=1e-2 * float(wanted.abs().max()))
    first, second = wanted.chunk(3)[:2]
    assert float((first - second).abs().max()) > 0.05 * float(wanted.abs().max())  # the question is felt


def test_the_teachers_distribution_sums_to_one_where_products_are_coarse(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    cache = TeacherCache(model, collator, tmp_path)
    hidden_AH = cache.of(collator(by_picture(rows.train[:4], 16)))
    with torch.autocast("cpu", torch.bfloat16):
        sums_A = cache.logits(hidden_AH).log_softmax(-1).exp().sum(-1)
    assert torch.allclose(sums_A, torch.ones_like(sums_A), atol=1e-5)


def test_picture_states_alone_do_not_run_the_language_model(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    batch = collator(by_picture(rows.train[:30], 16))
    wanted = TeacherCache(model, collator, tmp_path / "whole").pictures(batch)
    cache = TeacherCache(model, collator, tmp_path / "states")
    live, cache.live = cache.live, None  # a call would fail
    assert torch.equal(cache.pictures(batch, answers=False), wanted)
    cache.live = live
    assert len(cache.of(batch)) == int((batch["shift_labels"] != -100).sum())


def test_a_second_run_reads_from_disk_and_never_runs_the_teacher(tmp_path, rows, monkeypatch):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    batch = collator(by_picture(rows.train[:20], 16))
    first = TeacherCache(model, collator, tmp_path)
    first.of(batch)
    first.flush()
    again = TeacherCache(model, collator, tmp_path)
    monkeypatch.setattr(again, "live", lambda batch: (_ for _ in ()).throw(AssertionError("the teacher ran")))
    assert torch.equal(again.of(batch), first.of(batch))


def test_the_teacher_runs_only_on_the_pictures_that_are_new(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    groups = by_picture(rows.train[:40], 16)[:3]
    cache = TeacherCache(model, collator, tmp_path)
    cache.pictures(collator(groups[:2]))
    ran, live = [], cache.live
    cache.live = lambda batch: ran.extend(batch["rows"]) or live(batch)
    batch = collator(groups)
    assert cache.pictures(batch).shape == (int(batch["picture_tokens"].sum()), model.config.text_config.hidden_size)
    cache.of(batch)
    assert [row.id for row in ran] == [row.id for row in groups[2]]


def test_keys_follow_content(tmp_path, rows):
    model, processor = tiny(NAME)
    cache = TeacherCache(model, Collator(processor, packed=True), tmp_path)
    row = rows.train[0]
    same = Row("other id", row.picture_bytes(), row.question, row.answer, "other task")
    assert cache.key(row) == cache.key(same)
    for other in (
        Row(row.id, row.image, row.question, row.answer + "!"),
        Row(row.id, row.image, row.question + "?", row.answer),
        Row(row.id, rows.test[0].image, row.question, row.answer),
        Row(row.id, row.image, row.question, row.answer, system="Be short."),
    ):
        assert cache.key(other) != cache.key(row)


def test_a_saved_and_reloaded_teacher_is_a_hit(tmp_path, rows):
    model, processor = tiny(NAME)
    processor.tokenizer(["one", "two words"], padding=True)  # a fast tokenizer remembers how it padded last
    checkpoint.save(model, processor, tmp_path / "teacher")
    again = checkpoint.load(tmp_path / "teacher")
    first = TeacherCache(model, Collator(processor, packed=True), tmp_path / "cache")
    second = TeacherCache(again.model, Collator(again.processor, packed=True), tmp_path / "cache")
    assert first.key(rows.train[0]) == second.key(rows.train[0])


def test_another_teacher_is_a_miss(tmp_path, rows):
    model, processor = tiny(NAME)
    collator = Collator(processor, packed=True)
    key = TeacherCache(model, collator, tmp_path).key(rows.train[0])
    before = weights_fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert weights_fingerprint(model) != before
    assert TeacherCache(model, collator, tmp_path).key(rows.train[0]) != key


def test_a_setting_of_the_processor_is_part_of_who_teaches(tmp_path, rows):
    model, processor = tiny(NAME)
    before = identity(model, processor)
    assert identity(model, processor) == before
    processor.num_additional_image_tokens += 1
    assert identity(model, processor) != before
