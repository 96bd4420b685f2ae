"""Learning from the student's own answers: on policy, judged by the teacher, and nothing else than before where not wanted."""

import copy
import io
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import Trainer

from slimlmm import own
from slimlmm.collate import IGNORE, Collator
from slimlmm.data import Row, by_picture
from slimlmm.distill import DistillTrainer, train
from slimlmm.errors import UserError
from slimlmm.evaluate import answer, answer_limit, encode
from slimlmm.forward import answer_logits
from slimlmm.lessons import collator_for, look
from slimlmm.losses import Seen, combine, cross_entropy, forward_kl, pairwise_margin
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from tiny import tiny

NAME = "llava-dinov2-llama"
LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 1.0}


def settings(**changes):
    small = {"steps": 2, "pictures_per_step": 2, "questions_per_picture": 3, "log_every": 1}
    return Training(**(small | {"losses": LOSSES} | changes))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, rows):
    """A teacher's cache and its processor."""
    model, processor = tiny(NAME)
    return TeacherCache(model, Collator(processor, packed=True), tmp_path_factory.mktemp("cache")), processor


def student_of(cache, noise=0.0):
    student = copy.deepcopy(cache.model)
    torch.manual_seed(1)
    for parameter in student.parameters():
        if noise and parameter.ndim > 1:
            parameter.data.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    return student


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def written(student, processor, groups, temperature=1.0):
    """Groups of rows with answers that the student wrote."""
    torch.manual_seed(3)
    rows = [row for group in groups for row in group]
    answers = iter(own.sampled(student, processor, rows, own.sampling(student, processor, rows, temperature)))
    return [[replace(row, tokens=next(answers)) for row in group] for group in groups]


@pytest.mark.parametrize("setting", [{"no_repeat_ngram_size": 1}, {"min_p": 1.0}, {"typical_p": 0.1}])
def test_nothing_that_the_checkpoint_would_rather_not_say_is_left_out(setting):
    model, processor = tiny("llava-dinov2-llama")
    picture = io.BytesIO()
    Image.new("RGB", (20, 20)).save(picture, "PNG")
    rows = [Row("1", picture.getvalue(), "what?", "yes")]

    def written():
        drawing = own.sampling(model, processor, rows, 1.0) | {"max_new_tokens": 6}
        torch.manual_seed(0)
        return answer(model, processor, rows, 6), [own.sampled(model, processor, rows, drawing) for _ in range(3)]

    before = written()
    model.generation_config.update(**setting)
    assert written() == before


def test_where_no_picture_is_drawn_the_training_is_the_same_to_the_bit(tmp_path, rows, taught, monkeypatch):
    cache, processor = taught
    plain, other = student_of(cache, 0.3), student_of(cache, 0.3)
    accumulated = {"accumulate": 2, "learning_rate": 1e-3}
    train(plain, processor, rows.train[:40], settings(**accumulated), tmp_path, teacher=cache)
    monkeypatch.setattr(own.OwnAnswers, "chosen", lambda self, groups, draw: [])
    train(other, processor, rows.train[:40], settings(own_answers=0.5, **accumulated), tmp_path, teacher=cache)
    assert same(plain, other)
    assert not same(plain, student_of(cache, 0.3))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_own_answers(tmp_path, rows, taught):
    cache, processor = taught
    states = dict.fromkeys(("picture_states", "answer_states", "block_states"), 1.0)
    every = settings(steps=1, own_answers=1.0, losses=LOSSES | states)
    history = train(student_of(cache), processor, rows.train[:40], every, tmp_path, teacher=cache).history
    assert history[0]["loss/forward_kl"] == pytest.approx(0, abs=2e-4)  # fp16 states
    assert (
        history[0]["loss/cross_entropy"] == history[0]["loss/pairwise_margin"] == 0
    )  # its own labels would be no news
    assert all(history[0][f"loss/{name}"] < 0.05 for name in states)


def test_nor_where_every_question_has_a_sequence_of_its_own(tmp_path, rows):
    model, processor = tiny("qwen2_5_vl")
    cache = TeacherCache(model, Collator(processor, packed=False), tmp_path / "cache")
    every = settings(steps=1, own_answers=1.0, losses={"forward_kl": 1.0})
    history = train(copy.deepcopy(model), processor, rows.train[:40], every, tmp_path, teacher=cache).history
    assert history[0]["loss/forward_kl"] == pytest.approx(0, abs=2e-4)


def test_the_loss_of_a_packed_batch_is_that_of_separate_rows_token_by_token(tmp_path, rows, taught):
    """Of three pictures one is answered by the student: its rows count in the divergence alone, the others in all losses."""
    cache, processor = taught
    student = student_of(cache, 0.5)
    groups = [group[:3] for group in by_picture(rows.train[:60], 16)[:3]]
    groups[1:2] = written(student, processor, groups[1:2])
    batch = collator_for(processor, packed=True, teacher=cache, losses=LOSSES, taught=None)(groups)
    with torch.no_grad():
        logits_AV, labels_A, _ = look(student, batch, None, stop=False)
        teacher_AV = cache.logits(batch["teacher_hidden"])
        parts = combine(LOSSES, Seen(logits_AV, labels_A, teacher_AV, given_A=batch["given_answers"]))
        by_hand = dict.fromkeys(LOSSES, 0.0)
        for row in (row for group in groups for row in group):
            prompt = encode(processor, [row])
            ids = torch.tensor([Collator(processor, packed=False).prompter.answer_ids(row)])
            whole = prompt | {"input_ids": torch.cat((prompt["input_ids"], ids), 1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            mine, theirs = (model(**whole).logits[0, -ids.shape[1] - 1 : -1] for model in (student, cache.model))
            by_hand["forward_kl"] += float(forward_kl(mine, theirs))
            if not row.tokens:
                by_hand["cross_entropy"] += float(cross_entropy(mine, ids[0]))
                by_hand["pairwise_margin"] += float(pairwise_margin(mine, ids[0]))
    for name, value in by_hand.items():
        assert float(parts[name]) == pytest.approx(value, rel=5e-3), name  # fp16 states
        assert value > 1


def test_what_is_learnt_is_what_was_written_token_by_token(rows, taught):
    cache, processor = taught
    groups = [group[:4] for group in by_picture(rows.train[:40], 16)[:2]]
    own_groups = written(student_of(cache, 1.0), processor, groups, temperature=3.0)
    batch = Collator(processor, packed=True)(own_groups)
    labels = batch["shift_labels"][batch["shift_labels"] != IGNORE].tolist()
    assert labels == [token for group in own_groups for row in group for token in row.tokens]
    spelled = [processor.tokenizer.decode(row.tokens) for group in own_groups for row in group]
    again = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in spelled]
    assert again != [list(row.tokens) for group in own_groups for row in group]  # spelling would lose the segmentation


def test_what_the_teacher_says_of_own_answers_is_not_kept(tmp_path, rows, taught):
    _, processor = taught
    model = tiny(NAME)[0]
    cache = TeacherCache(model, Collator(processor, packed=True), tmp_path)
    groups = by_picture(rows.train[:40], 16)[:2]
    mixed = [groups[0], *written(model, processor, groups[1:])]
    losses = ("forward_kl", "picture_states")
    batch = collator_for(processor, packed=True, teacher=cache, losses=losses, taught=None)(mixed)
    cache.flush()
    known = {cache.key(row) for row in groups[0]} | {cache.picture_key(group[0]) for group in groups}
    assert set(cache._where) == known
    live = answer_logits(model, Collator(processor, packed=True)(mixed))[2]
    assert torch.allclose(batch["teacher_hidden"].float(), live, atol=2e-2 * float(live.abs().max()))


def test_answers_are_written_by_the_weights_of_their_step(tmp_path, rows, taught, monkeypatch):
    cache, processor = taught
    then, now = [], []

    def weight(model):
        return float(model.get_output_embeddings().weight.detach().double().sum())

    plain, loss = own.sampled, Trainer.training_step
    monkeypatch.setattr(own, "sampled", lambda model, *rest: then.append(weight(model)) or plain(model, *rest))
    monkeypatch.setattr(
        DistillTrainer, "training_step", lambda self, *rest: now.append(weight(self.model)) or loss(self, *rest)
    )
    train(
        student_of(cache, 0.3), processor, rows.train[:40], settings(steps=3, own_answers=1.0), tmp_path, teacher=cache
    )
    assert then == now
    assert len(set(now)) == 3


def test_one_seed_one_training(tmp_path, rows, taught):
    cache, processor = taught
    found = []
    for seed in (5, 5):
        student = student_of(cache, 0.3)
        half = settings(own_answers=0.5, learning_rate=1e-3)
        train(student, processor, rows.train[:40], half, tmp_path, teacher=cache, seed=seed)
        found.append(student)
    assert same(*found)


def test_learning_from_own_answers_lowers_the_divergence_there(tmp_path, rows, taught):
    cache, processor = taught
    alone = settings(steps=6, own_answers=1.0, learning_rate=1e-2, losses={"reverse_kl": 1.0})
    result = train(student_of(cache, 1.0), processor, rows.train[:40], alone, tmp_path, teacher=cache)
    assert 0 < result.last_loss < 0.8 * result.first_loss


def test_the_likeliest_tokens_are_those_of_an_evaluation(rows, taught):
    cache, processor = taught
    student, some = student_of(cache, 0.3), rows.train[:20]
    found = own.sampled(student, processor, some, own.sampling(student, processor, some, 0.0))
    texts = answer(student, processor, some, answer_limit(processor, some))
    for tokens, text in zip(found, texts, strict=True):
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert processor.tokenizer.eos_token_id not in tokens[:-1]


def test_answers_are_drawn_from_the_students_own_distribution(rows, taught):
    cache, processor = taught
    temperature = 0.5
    student, row = student_of(cache, 0.3), rows.train[0]
    settings = own.sampling(student, processor, [row], temperature) | {"max_new_tokens": 1}
    torch.manual_seed(0)
    first = [tokens[0] for tokens in own.sampled(student, processor, [row] * 600, settings)]
    with torch.no_grad():
        logits_V = student(**encode(processor, [row])).logits[0, -1]
    logits_V[settings["suppress_tokens"]] = -torch.inf
    wanted_V = (logits_V / temperature).softmax(-1)
    seen_V = torch.bincount(torch.tensor(first), minlength=len(wanted_V)) / len(first)
    error = (wanted_V * (1 - wanted_V) / len(first)).sqrt()
    assert bool(((seen_V - wanted_V).abs() <= 5 * error + 1e-3).all())
    assert processor.image_token_id not in first


@pytest.mark.parametrize(("share", "counts"), [(1.0, {5}), (0.5, {2, 3}), (0.2, {1})])
def test_a_share_is_one_of_the_pictures_that_the_teacher_is_asked_about(rows, taught, share, counts):
    groups = by_picture(rows.train, 16)[:8]
    asked = {group[0].picture_key() for group in groups[2:7]}
    processor = taught[1]
    drawn = own.own_answers(
        taught[0].model, processor, rows.train[:40], settings(own_answers=share), lambda groups: {}, asked, 0
    )
    found = [drawn.chosen(groups, random.Random(step)) for step in range(400)]
    assert {len(one) for one in found} == counts
    assert sum(map(len, found)) == pytest.approx(400 * 5 * share, rel=0.05)
    assert {at for one in found for at in one} == {2, 3, 4, 5, 6}


def test_own_answers_without_a_judge_are_refused(tmp_path, rows, taught):
    with pytest.raises(UserError, match=r"train.own_answers=0.5 needs a teacher"):
        train(*tiny(NAME), rows.train, settings(own_answers=0.5), tmp_path)
    with pytest.raises(ValueError, match=r"own_answers=0.5 needs one of forward_kl"):
        settings(own_answers=0.5, losses={"cross_entropy": 1.0, "picture_states": 1.0})
