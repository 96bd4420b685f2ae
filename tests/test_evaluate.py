"""Evaluation: greedy answers, scores with their errors, paired comparison."""

import io
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from slimlmm import evaluate as ev
from slimlmm.collate import Prompter
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.prompts import picture_prompt
from slimlmm.selfcheck import random_model
from tiny import NAMES, tiny
from zoo import CONFIGS

QUESTIONS = (
    "What is shown?",
    "Read the slogan. Is it fresh?",
    "Is the claim exaggerated? Which brand is advertised?",
)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 36, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows_of(pictures: int = 3, answer: str = "food") -> list[Row]:
    pairs = itertools.product(range(pictures), QUESTIONS)
    rows = [Row(f"r{i}", picture(p), question, answer, f"task {i % 2}") for i, (p, question) in enumerate(pairs)]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_answers_do_not_depend_on_the_batch_size(name):
    model, processor = tiny(name)
    processor.tokenizer.padding_side = "right"
    rows, seen = rows_of(), []
    whole = ev.evaluate(model, processor, rows, progress=lambda done, total: seen.append((done, total)))
    for batch_size in (1, 4):
        assert ev.evaluate(model, processor, rows, batch_size=batch_size).answers == whole.answers
    assert processor.tokenizer.padding_side == "right"
    assert seen == [(9, 9)]
    assert [one.id for one in whole.predictions] == [row.id for row in rows]
    assert whole.summary.overall.pictures == 3
    assert set(whole.summary.tasks) == {"task 0", "task 1"}


@pytest.mark.parametrize("name", NAMES)
def test_one_look_gives_the_same_logits_with_fewer_pictures_computed(name):
    model, processor = tiny(name)
    rows = sorted(rows_of(2), key=lambda row: row.question)
    batch, seen = ev.encode(processor, rows), []
    tower = model.get_encoder(modality="image")
    layer = next(module for module in tower.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        apart = model(**batch).logits
        with ev.one_look(model, [row.picture_key() for row in rows]):
            shared = model(**batch).logits
        model(**batch)
    handle.remove()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(shared[real], apart[real])
    whole = seen[0]
    assert seen == [whole, whole if name == "qwen2_5_vl" else whole // 3, whole]


def test_a_model_that_answers_the_references_scores_one():
    model, processor = tiny("llava-dinov2-llama", seed=3)
    rows = rows_of()
    first = ev.evaluate(model, processor, rows, max_new_tokens=5)
    taught = [Row(r.id, r.image, r.question, f" {a}\n", r.task) for r, a in zip(rows, first.answers, strict=True)]
    again = ev.evaluate(model, processor, taught, max_new_tokens=5)
    assert again.accuracy == again.summary.macro == 1.0
    assert first.accuracy == 0.0
    assert ev.agreement(first, again) == 1.0
    assert ev.drop(again, first, samples=50).mean == 1.0


def test_the_prompt_is_the_one_that_training_uses():
    _, processor = tiny("llava-clip-llama")
    row = rows_of()[0]
    text = processor.tokenizer.decode(ev.encode(processor, [row])["input_ids"][0])
    assert text.replace("<image>" * 4, "<image>") == Prompter(processor).prompt(row.question)


def test_generation_stops_at_the_end_token_and_never_samples():
    model, processor = tiny("llava-clip-llama")
    row = rows_of()[:1]
    long = ev.answer(model, processor, row, 6)[0]
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    model.generation_config.repetition_penalty = 5.0
    assert ev.answer(model, processor, row, 6)[0] == long
    model.generation_config.eos_token_id = [processor.tokenizer(long, add_special_tokens=False)["input_ids"][-1]]
    short = ev.answer(model, processor, row, 6)[0]
    assert long.startswith(short)
    model.generation_config.eos_token_id = list(range(len(processor.tokenizer)))
    assert len(ev.answer(model, processor, row, 6)[0]) <= len(long)
    settings = ev.generation_settings(model, processor, 6)
    assert settings["eos_token_id"] == model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    assert ev.generation_settings(model, processor, 6)["eos_token_id"] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["mistral3", "llava-pixtral", "llava-clip-llama"])
@pytest.mark.parametrize("keys", [["a", "a", "a"], ["a", "b", "a", "b"]])
def test_one_look_leaves_towers_alone_that_give_all_pictures_in_one_sequence(name, keys):
    model = random_model(CONFIGS[name]()).eval()
    few = {key: picture_prompt(model.config, seed=seed)["pixel_values"] for seed, key in enumerate("ab")}
    inputs = {"pixel_values": torch.cat([few[key] for key in keys])}
    if name != "llava-clip-llama":
        inputs["image_sizes"] = torch.tensor([inputs["pixel_values"].shape[-2:]] * len(keys))
    with torch.inference_mode():
        wanted = model.model.get_image_features(**inputs).pooler_output
        for _ in range(2):  # the second time it is known
            with ev.one_look(model, keys):
                found = model.model.get_image_features(**inputs).pooler_output
            assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "said",
    [
        {"exponential_decay_length_penalty": (1, 5.0)},
        {"sequence_bias": [[[60], 50.0]]},
        {"bad_words_ids": [[i] for i in range(5, 200)]},
        {"begin_suppress_tokens": list(range(5, 200))},
        {"forced_eos_token_id": 2},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"no_repeat_ngram_size": 1, "min_length": 40, "guidance_scale": 3.0},
    ],
)
@pytest.mark.parametrize("name", ["llava-dinov2-llama", "blip2-opt"])
def test_nothing_but_token_ids_of_a_generation_config_is_heard(name, said):
    model, processor = tiny(name)
    expected = ev.evaluate(model, processor, rows_of(), max_new_tokens=6).answers
    for part in (model, model.language_model if name == "blip2-opt" else model):
        for key, value in said.items():
            setattr(part.generation_config, key, value)
    assert ev.evaluate(model, processor, rows_of(), max_new_tokens=6).answers == expected
    assert [getattr(model.generation_config, key) for key in said] == list(said.values())


def test_a_tokenizer_without_padding_token_is_left_as_it_was():
    model, processor = tiny("llava-dinov2-llama")
    expected = ev.evaluate(model, processor, rows_of()).answers
    processor.tokenizer.pad_token = None
    assert ev.evaluate(model, processor, rows_of()).answers == expected
    assert processor.tokenizer.pad_token is None


def test_the_mode_of_the_model_is_restored():
    model, _ = tiny("llava-clip-llama")
    for training in (True, False):
        model.train(training)
        with ev.evaluating(model):
            assert not model.training
        assert model.training is training


def test_no_rows_is_refused():
    with pytest.raises(UserError, match="empty"):
        ev.evaluate(None, None, [])


def test_answer_limit_is_the_longest_reference_and_four_more():
    _, processor = tiny("llava-clip-llama")
    rows = [*rows_of(1, "a"), *rows_of(1, "zebra?!")]
    ids = processor.tokenizer("zebra?!", add_special_tokens=False)["input_ids"]
    assert ev.answer_limit(processor, rows) == len(ids) + 4


def test_normalise_forgives_whitespace_only():
    assert ev.normalise("  two\n small\tdogs ") == "two small dogs"
    assert ev.normalise("Two") != ev.normalise("two")


def test_score_of_single_row_pictures_is_the_textbook_error():
    correct = np.array([1, 0, 1, 1, 0, 1, 1, 1])
    score = ev.score(correct, [str(i) for i in range(8)])
    assert (score.n, score.correct, score.accuracy, score.pictures) == (8, 6, 0.75, 8)
    assert score.se == pytest.approx(np.sqrt(0.75 * 0.25 / 8))
    assert score.clustered_se == pytest.approx(correct.std(ddof=1) / np.sqrt(8))


def test_repeating_every_row_of_a_picture_does_not_shrink_the_clustered_error():
    correct, clusters = np.array([1, 0, 1, 1, 0]), list("abcde")
    once = ev.score(correct, clusters)
    often = ev.score(np.repeat(correct, 7), [key for key in clusters for _ in range(7)])
    assert often.clustered_se == pytest.approx(once.clustered_se)
    assert often.se < once.se
    assert ev.score([1, 0, 1], ["a"] * 3).clustered_se is None


def test_one_picture_has_no_interval_and_no_p_value():
    interval, p = ev.paired_test([1] * 6 + [0] * 4, [1] * 5 + [0] * 5, ["a"] * 10)
    assert (interval.mean, interval.low, interval.high, p) == (pytest.approx(0.1), None, None, None)
    assert interval.points() == "+10.00 [-]"
    assert interval.ends == (-1, 1)


def test_an_interval_in_points_and_the_other_way_round():
    found = ev.Interval(mean=0.0042, low=-0.001, high=0.0095)
    assert found.points() == "+0.42 [-0.10, +0.95]"
    assert (-found).points(1) == "-0.4 [-0.9, +0.1]"
    assert ev.paired_bootstrap([1, 0], [1, 0], ["a", "b"]).ends[1] > 0.5, "no difference in two rows proves nothing"


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.95, rng.random(4000) < 0.9
    difference = a.astype(float) - b
    half = 1.96 * difference.std() / np.sqrt(4000)
    interval = ev.paired_bootstrap(a, b, [str(i) for i in range(4000)], samples=4000)
    assert interval.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_bootstrap_is_seeded_antisymmetric_and_draws_pictures():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    clusters = [str(i // 3) for i in range(60)]
    one, same = (ev.paired_bootstrap(a, b, clusters, samples=500, seed=4) for _ in range(2))
    assert one == same
    other = ev.paired_bootstrap(b, a, clusters, samples=500, seed=4)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    twice = ev.paired_bootstrap(np.repeat(a, 2), np.repeat(b, 2), np.repeat(clusters, 2), samples=500, seed=4)
    assert (twice.low, twice.high) == pytest.approx((one.low, one.high))
    with pytest.raises(ValueError, match="one cluster per row"):
        ev.paired_bootstrap(a, b, clusters[1:])


def test_evaluations_of_different_rows_are_not_compared():
    rows = rows_of(2)
    one = ev.grade(rows, ["food"] * 6, ["k"] * 6, max_new_tokens=4)
    two = ev.grade(rows[1:], ["food"] * 5, ["k"] * 5, max_new_tokens=4)
    with pytest.raises(UserError, match="different rows"):
        ev.agreement(one, two)
    assert one.only("task 0").summary.overall == one.summary.tasks["task 0"]


def test_what_is_no_torch_model_is_asked_as_it_is():
    model, processor = tiny("llava-clip-llama")
    export = SimpleNamespace(
        generation_config=model.generation_config, generate=model.generate, device=model.device, dtype=model.dtype
    )
    assert ev.answer(export, processor, rows_of()[:2], 4) == ev.answer(model, processor, rows_of()[:2], 4)


def test_composed_and_decomposed_letters_are_one_answer():
    rows = [Row("a", b"x", "q", "cafe\u0301"), Row("b", b"x", "q", "caf\xe9"), Row("c", b"x", "q", "cafe")]
    found = ev.grade(rows, ["caf\xe9", "cafe\u0301", "caf\xe9"], ["x"] * 3, max_new_tokens=5)
    assert found.correct.tolist() == [True, True, False]
