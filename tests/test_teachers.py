"""Several teachers of one training: their mean, whose states are matched, and which model a round calls its previous one."""

import copy

import pytest
import torch

from slimlmm import checkpoint, losses, pipeline, recipe, rounds, trainings
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits
from slimlmm.losses import DIVERGENCES, MATCHES, Seen, combine
from slimlmm.teacher import TeacherCache, Teachers, weights_fingerprint
from slimlmm.trainings import Training
from test_pipeline import Recorder
from tiny import tiny

NAME = "llava-dinov2-llama"


@pytest.fixture(scope="module")
def both(tmp_path_factory, rows):
    """Caches of two teachers, the second of another width and depth, in one folder; a student; the processor."""
    first, processor = tiny(NAME)
    config = copy.deepcopy(first.config)
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 40, 2
    torch.manual_seed(2)
    second = type(first)(config).eval()
    folder = tmp_path_factory.mktemp("cache")
    return *(TeacherCache(one, Collator(processor, packed=True), folder) for one in (first, second)), processor


def trained(both, rows, out, weights, *, first=0, previous=1, **changes):
    """Return the weights' hash and the first losses of a short training with these weights of the two teachers."""
    processor, student = both[2], tiny(NAME, seed=1)[0]
    small = {"steps": 2, "pictures_per_step": 2, "questions_per_picture": 3, "log_every": 1, "learning_rate": 1e-3}
    settings = Training(**(small | {"teachers": weights} | changes))
    caches = [None if at is None else both[at] for at in (first, previous)]
    done = train(student, processor, rows.train[:40], settings, out, teacher=caches[0], previous=caches[1])
    return weights_fingerprint(student), done.history[0]


def test_a_divergence_is_the_weighted_mean_over_teachers_and_states_are_those_of_the_first(both, rows, tmp_path):
    every = {"losses": dict.fromkeys(("cross_entropy", *DIVERGENCES, *MATCHES), 1.0), "steps": 1, "temperature": 2.0}
    told = [{"first": 1.0}, {"previous": 1.0}, {"first": 1.0, "previous": 3.0}]
    one, other, mean = (trained(both, rows, tmp_path, weights, **every)[1] for weights in told)
    for name in DIVERGENCES:
        parts = one[f"loss/{name}"], other[f"loss/{name}"]
        assert mean[f"loss/{name}"] == pytest.approx((parts[0] + 3 * parts[1]) / 4, rel=1e-5), name
        assert parts[0] != pytest.approx(parts[1], rel=1e-3), name
    assert all(mean[f"loss/{name}"] == one[f"loss/{name}"] != other[f"loss/{name}"] for name in MATCHES)
    assert mean["loss/cross_entropy"] == one["loss/cross_entropy"]


def test_a_mean_by_hand_from_the_two_models_themselves(both, rows):
    batch = both[0].collator(by_picture(rows.train[:20], 16))
    with torch.no_grad():
        student_AV, labels_A, _ = answer_logits(tiny(NAME, seed=1)[0], batch)
        live = [answer_logits(cache.model, batch)[0] for cache in both[:2]]
        cached = [cache.logits(cache.of(batch)) for cache in both[:2]]
        seen = Seen(student_AV, labels_A, cached[0], second_AV=cached[1], second_share=0.75)
        found = combine({"forward_kl": 1.0}, seen)["total"]
        log_s, p = student_AV.log_softmax(-1), [logits.softmax(-1) for logits in live]
        by_hand = sum(w * (q * (q.log() - log_s)).sum() for w, q in zip((0.25, 0.75), p, strict=True))
    assert float(found) == pytest.approx(float(by_hand), rel=5e-3)  # fp16 states


def test_weights_count_relative_to_each_other_and_one_model_is_one_teacher(both):
    first, second, _ = both
    assert Teachers.of({"first": 1.0}, first, second) == Teachers(first)
    assert Teachers.of({"previous": 5.0}, first, second) == Teachers(second)
    assert Teachers.of({"first": 1.0, "previous": 3.0}, first, second) == Teachers(first, second, 0.75)
    assert Teachers.of({"first": 2.0, "previous": 6.0}, first, second) == Teachers(first, second, 0.75)
    assert Teachers.of({"first": 1.0, "previous": 3.0}, first, first) == Teachers(first)


def test_the_previous_model_alone_teaches_as_if_it_were_the_first(both, rows, tmp_path):
    alone = trained(both, rows, tmp_path, {"previous": 5.0}, losses=dict.fromkeys(("forward_kl", *MATCHES), 1.0))
    first = {"first": 1, "previous": None, "losses": dict.fromkeys(("forward_kl", *MATCHES), 1.0)}
    assert alone == trained(both, rows, tmp_path, {"first": 1.0}, **first)


def test_what_would_change_nothing_or_is_not_there_is_refused(both, rows, tmp_path):
    for wrong, why in (
        ({"teachers": {"first": 0}}, "weights are above 0, not first: 0"),
        (
            {"losses": {"cross_entropy": -1.0, "forward_kl": 0.0}},
            "weights are above 0, not cross_entropy: -1.0, forward_kl: 0.0",
        ),
        ({"teachers": {}}, "at least 1 item"),
        ({"teachers": {"last": 1}}, "'first' or 'previous'"),
        ({"teachers": {"previous": 1}, "losses": {"cross_entropy": 1}}, "no effect on losses of labels alone"),
        (
            {"teachers": {"first": 1, "previous": 1}, "losses": {"picture_states": 1}},
            "a second one needs one of forward",
        ),
    ):
        with pytest.raises(UserError, match=why):
            recipe.parse_trainings([{"steps": 1, **wrong}], "r.yaml")
    for teachers in ({"first": None, "previous": None}, {"previous": None}):
        with pytest.raises(UserError, match="previous is the model that a round of a run began with"):
            trained(both, rows, tmp_path, {"previous": 1.0}, **teachers)
    assert set(losses.DIVERGENCES) == trainings.DIVERGENCES


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny(NAME), folder)
    return folder


TRAIN = {
    "steps": 1,
    "pictures_per_step": 2,
    "warmup": 0.0,
    "schedule": "constant",
    "teachers": {"first": 1, "previous": 1},
}
#: the first round cuts nothing: what it trains is a copy of both its teachers
STAGES = [
    {"name": "still", "rounds": [{"train": TRAIN | {"own_answers": 0.5, "teachers": {"previous": 1}}}]},
    {"name": "last", "rounds": [{"sizes": {"text.ffn": 8}, "repair": [], "train": TRAIN | {"own_answers": 1}}]},
]
DATA = {"calibration_rows": 10, "validation_rows": 10, "test_rows": 10, "train_rows": 20}


def _stop(*_):
    """Leave out test answers, page and plots."""
    raise KeyboardInterrupt


def test_a_run_asks_the_model_that_each_round_began_with_also_when_rolled_back_and_resumed(
    teacher, ads, tmp_path, monkeypatch
):
    asked, plain, out = [], rounds._train, tmp_path / "run"
    settings = recipe.parse({"bench_calls": 0, "data": DATA, "stages": STAGES, "max_drop": 1, "patience": 0}, "test")

    def recorded(job, model, processor, settings, *rest):
        teachers = [job.cache.model, job.previous.model]
        before = [weights_fingerprint(one) for one in teachers]
        result = plain(job, model, processor, settings, *rest)
        assert before == [weights_fingerprint(one) for one in teachers], "a teacher was trained"
        asked.append((rest[0][0].name, *before))
        return result

    monkeypatch.setattr(rounds, "_train", recorded)
    monkeypatch.setattr(rounds, "_promise", lambda job, score: len(asked) != 2)  # only the second training misses it
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, out, settings, tell=Recorder(stop_at="half of it is tried"))
    assert list((out / "previous").iterdir())
    monkeypatch.setattr(pipeline, "_finish", _stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, out, settings)
    folders = sorted((out / "stages").iterdir())
    left = {one.name[3:]: weights_fingerprint(checkpoint.load(one / "model").model) for one in folders}
    first = weights_fingerprint(checkpoint.load(teacher).model)
    assert asked == [
        ("still.1", first, first),
        ("last.1", first, left["still.1"]),
        ("last.1-half", first, left["still.1"]),
    ]
    assert len({first, *left.values()}) == 4
    assert not (out / "previous").exists()
