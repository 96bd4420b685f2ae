"""Units that fade: both ends of the gate against the model itself, the masked one and the cut one; and whole rounds with it."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainerState

from slimlmm import checkpoint, own, pipeline, recipe, rounds, surgery, sweeps
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.evaluate import score
from slimlmm.fading import Gate, Ramp, check_cut, cut_all, cuts_in_order, fading, ramp
from slimlmm.forward import answer_logits, output_of
from slimlmm.recipe import Round, Stage
from slimlmm.spans import Span
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from test_pipeline import RAW, Recorder
from tiny import tiny

NAME = "llava-dinov2-llama"
AXES = ("text.ffn", "text.kv_groups", "text.queries", "text.blocks", "vision.ffn", "vision.kv_groups", "vision.blocks")


@pytest.fixture(scope="module")
def batch(rows):
    return Collator(tiny(NAME)[1], packed=True)(by_picture(rows.train, 4)[:2])


@functools.cache
def case():
    model, _ = tiny(NAME)
    return model, describe(model.config)


def some(anatomy, axis):
    """All units but the first of each group, where the config can say so; half of FFNs that go in multiples."""
    found = anatomy.axis(axis)
    size = found.choices()[-2]
    return {group.name: torch.arange(group.units)[-group.kept(size) :] for group in found.groups}


@torch.no_grad()
def logits(model, batch):
    return answer_logits(model, batch)[0]


@pytest.mark.parametrize("axis", AXES)
def test_the_open_gate_changes_no_bit_and_the_shut_one_is_the_mask_and_the_cut(axis, batch):
    model, anatomy = case()
    keeps, gate = {axis: some(anatomy, axis)}, Gate()
    whole = logits(model, batch)
    with fading(model, anatomy, keeps, gate):
        assert torch.equal(logits(model, batch), whole)
        gate.value = 0.5
        half = logits(model, batch)
        gate.value = 0.0
        shut = logits(model, batch)
    with surgery.masked(model, anatomy, axis, keeps[axis]):
        assert torch.allclose(shut, logits(model, batch), atol=1e-5)
    assert torch.allclose(shut, logits(cut_all(model, keeps), batch), atol=1e-5)
    assert min(float((half - one).abs().max()) for one in (whole, shut)) > 1e-3
    assert torch.equal(logits(model, batch), whole)


def test_axes_that_fade_together_are_cut_one_after_the_other(batch):
    model, anatomy = case()
    keeps = {axis: some(anatomy, axis) for axis in ("text.blocks", "vision.kv_groups", "vision.blocks", "text.ffn")}
    assert cuts_in_order(anatomy, keeps) == ["vision.kv_groups", "text.ffn", "text.blocks", "vision.blocks"]
    with fading(model, anatomy, keeps, Gate(0.0)):
        shut = logits(model, batch)
    small = cut_all(model, keeps)
    assert describe(small.config).sizes["text.blocks"] == 2
    assert torch.allclose(shut, logits(small, batch), atol=1e-5)


def test_a_gate_scales_what_is_read_and_what_a_block_adds(batch):
    model, anatomy = case()
    keep = some(anatomy, "text.ffn")
    with fading(model, anatomy, {"text.ffn": keep}, Gate(0.3)):
        faded = logits(model, batch)
    scaled, _ = tiny(NAME)
    with torch.no_grad():
        for group in anatomy.axis("text.ffn").groups:
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[keep[group.name]] = False
            scaled.get_parameter(f"model.language_model.layers.{group.layer}.mlp.down_proj.weight")[:, gone] *= 0.3
    assert torch.allclose(faded, logits(scaled, batch), atol=1e-5)

    block = model.model.vision_tower.encoder.layer[0]
    ends = {}
    for value in (0.0, 0.3, 1.0):
        with torch.no_grad(), fading(model, anatomy, {"vision.blocks": some(anatomy, "vision.blocks")}, Gate(value)):
            ends[value] = output_of(model, block, batch)
    assert torch.allclose(ends[0.3], 0.7 * ends[0.0] + 0.3 * ends[1.0], atol=1e-5)


def test_what_fades_is_trained_as_far_as_it_is_seen(batch):
    model, anatomy = case()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    keep = some(anatomy, "text.ffn")
    gone = torch.ones(len(weight), dtype=torch.bool)
    gone[keep["text.ffn[0]"]] = False
    sizes = {}
    for value in (1.0, 0.5, 0.0):
        model.zero_grad()
        with fading(model, anatomy, {"text.ffn": keep}, Gate(value)):
            answer_logits(model, batch)[0].logsumexp(-1).sum().backward()
        sizes[value] = float(weight.grad[gone].norm())
    model.zero_grad()
    assert sizes[1.0] > sizes[0.5] > sizes[0.0] == 0


def test_the_ramp_falls_from_one_to_zero():
    assert [ramp(step, 4) for step in (0, 2, 4, 5)] == pytest.approx([1, 0.5, 0, 0])
    assert ramp(0, 1) == 1.0
    values = [ramp(step, 7) for step in range(8)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"text.width": 24}, "norms take their statistics"),
        ({"text.head_dim": 6}, "not read by linear layers alone"),
        ({"text.queries": 1, "text.kv_groups": 2}, "cannot fade in one round"),
    ],
)
def test_what_cannot_fade_is_refused(sizes, reason):
    with pytest.raises(UserError, match=reason):
        cuts_in_order(case()[1], sizes)


def test_a_reader_that_no_hook_sees_is_found_before_anything_is_trained(batch):
    model, _ = tiny(NAME)
    anatomy, gate = describe(model.config), Gate()
    keeps = {"text.ffn": some(anatomy, "text.ffn")}
    with fading(model, anatomy, keeps, gate):
        check_cut(model, keeps, gate, batch)
        mlp = model.model.language_model.layers[1].mlp
        mlp.forward = lambda x: torch.nn.functional.linear(
            mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
        )
        with pytest.raises(UserError, match="does not compute what the cut model does"):
            check_cut(model, keeps, gate, batch)
    assert gate.value == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": {}}, "needs sizes that are cut"),
        ({"train": []}, "and a training"),
        ({"sizes": {"text.ffn": 32, "text.width": 24}}, "text.width cannot fade, only ffn, kv_groups"),
        ({"fade": 4}, "must be less than the 4 steps"),
        ({"repair": ["refit"]}, "write repair: \\[\\]"),
        ({"train": {"steps": 4, "losses": {"picture_states": 1.0}}}, "put a training of answers first"),
    ],
)
def test_a_round_that_cannot_fade_is_refused_in_the_recipe(changes, reason):
    raw = {"sizes": {"text.ffn": 32}, "fade": 2, "repair": [], "train": {"steps": 4}}
    assert recipe.parse({"stages": [{"name": "a", "rounds": [raw]}]}, "r").stages[0].rounds[0].fade == 2
    with pytest.raises(UserError, match=reason):
        recipe.parse({"stages": [{"name": "a", "rounds": [raw | changes]}]}, "r")


def trained(tmp_path, rows, *spans):
    """Train a tiny model in these parts; return it and the results."""
    model, processor = tiny(NAME)
    settings = Training(steps=4, pictures_per_step=1, log_every=1, warmup=0.5, losses={"cross_entropy": 1.0})
    found = [train(model, processor, rows.train[:20], settings, tmp_path, span=span) for span in spans]
    return model, found


def test_a_training_in_one_span_is_the_training_and_in_two_it_has_the_same_rates(tmp_path, rows):
    plain, (whole,) = trained(tmp_path, rows, None)
    same, _ = trained(tmp_path, rows, Span(first=0, last=4))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    _, (first, second) = trained(tmp_path, rows, Span(first=0, last=1), Span(first=1, last=4))
    assert (first.steps, second.steps) == (1, 3)
    assert first.row_visits + second.row_visits == whole.row_visits
    rates = [one["learning_rate"] for part in (first, second) for one in part.history]
    assert rates == pytest.approx([one["learning_rate"] for one in whole.history])


def test_the_gate_stands_where_the_ramp_says_at_every_step(tmp_path, rows):
    seen = []

    class Watch(Ramp):
        def on_step_end(self, args, state, control, **_):
            seen.append(self.gate.value)
            super().on_step_end(args, state, control)

    trained(tmp_path, rows, Span(first=0, last=3, callbacks=(Watch(Gate(), 3),)))
    assert seen == pytest.approx([1.0, 0.75, 0.25])


def test_own_answers_are_written_at_the_gate_of_their_step(tmp_path, rows, monkeypatch):
    model, processor = tiny(NAME)
    cache = TeacherCache(tiny(NAME)[0], Collator(processor, packed=True), tmp_path)
    gate, seen, sampled = Gate(), [], own.sampled
    monkeypatch.setattr(own, "sampled", lambda *rest: seen.append(gate.value) or sampled(*rest))
    settings = Training(
        steps=4, pictures_per_step=1, own_answers=1.0, losses={"forward_kl": 1.0}, questions_per_picture=2
    )
    span = Span(first=0, last=3, callbacks=(Ramp(gate, 3),))
    train(model, processor, rows.train[:20], settings, tmp_path / "training", teacher=cache, span=span)
    assert seen == pytest.approx([1.0, 0.75, 0.25])


def test_a_part_that_is_taken_up_begins_at_the_gate_of_its_step():
    gate = Gate()
    Ramp(gate, 4).on_train_begin(None, TrainerState(global_step=2), None)
    assert gate.value == pytest.approx(0.5)


LOSSES = {"cross_entropy": 1.0, "forward_kl": 1.0, "block_states": 1.0}
FADE = {"sizes": {"text.ffn": 32, "vision.blocks": 2}, "fade": 2, "repair": [], "train": {"steps": 3, "losses": LOSSES}}
FADING = {**RAW, "bench_calls": 0, "stages": [{"name": "inner", "rounds": [FADE]}]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    checkpoint.save(*tiny(NAME), folder)
    return folder


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_a_round_fades_cuts_and_goes_on_and_an_interrupted_one_begins_anew(teacher, ads, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "_score", lambda *_: score([True], ["picture"]))
    spans, made = [], rounds.train
    monkeypatch.setattr(rounds, "train", lambda *args, **named: spans.append(named["span"]) or made(*args, **named))
    found = pipeline.run(teacher, ads, tmp_path / "run", recipe.parse(FADING, "r"))
    (one,) = found.rounds
    assert [(span.first, span.last) for span in spans] == [(0, 2), (2, 3)]
    assert (one.fade, one.steps, one.trainings) == (2, 3, 1)
    assert one.row_visits == 3 * 12 * 10  # 12 pictures of 10 rows, all of them in every step
    plan = json.loads((tmp_path / "run" / "stages" / "01-inner.1" / "plan-text.ffn.json").read_text())
    assert (plan["before"], plan["after"], plan["repairs_tried"]) == (68, 32, {})
    assert all(
        torch.equal(a, b) for a, b in zip(weights(teacher).values(), tiny(NAME)[0].state_dict().values(), strict=True)
    )
    stop = Recorder("after the cut")
    monkeypatch.setattr(rounds, "_score", lambda job, model, processor, what: stop.say(what))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(teacher, ads, tmp_path / "again", recipe.parse(FADING, "r"), tell=stop)
    monkeypatch.setattr(rounds, "_score", lambda *_: score([True], ["picture"]))
    pipeline.run(teacher, ads, tmp_path / "again", recipe.parse(FADING, "r"))
    whole, resumed = (weights(tmp_path / name / "final") for name in ("run", "again"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_faded_part_is_counted_on_the_whole_model(tmp_path, rows, teacher):
    """Its FLOPs per row are the uncut model's, the rest's those of the cut one."""
    model, processor = tiny(NAME)
    settings = Training(steps=2, pictures_per_step=1, losses={"cross_entropy": 1.0})
    anatomy, gate = describe(model.config), Gate()
    keeps = {"text.ffn": some(anatomy, "text.ffn")}
    plain = train(tiny(NAME)[0], processor, rows.train[:40], settings, tmp_path)
    with fading(model, anatomy, keeps, gate):
        faded = train(model, processor, rows.train[:40], settings, tmp_path, span=Span(first=0, last=1))
    rest = train(cut_all(model, keeps), processor, rows.train[:40], settings, tmp_path, span=Span(first=1, last=2))
    assert faded.flops / faded.row_visits == pytest.approx(plain.flops / plain.row_visits)
    assert rest.flops / rest.row_visits < faded.flops / faded.row_visits


def test_the_sweep_fades_where_it_can_and_differs_in_nothing_else():
    pictures = Training(steps=3, losses={"picture_states": 1.0})
    inner = Round(sizes={"text.ffn": 32}, train=(pictures, Training(steps=8)))
    width = Round(sizes={"text.width": 24}, train=(Training(steps=8),))
    stages = (Stage(name="inner", rounds=(inner,)), Stage(name="width", rounds=(width,)))
    hard, soft = (sweeps.faded(stages, share) for share in (0.0, 0.5))
    (one,), (other,) = hard[0].rounds, soft[0].rounds
    assert (one.fade, other.fade, one.repair) == (0, 4, ())
    assert one.train == other.train == (inner.train[1], pictures)
    assert one.model_copy(update={"fade": 4}) == other
    assert hard[1] == soft[1] == stages[1]
    with pytest.raises(UserError, match="nothing can fade"):
        sweeps.faded(stages[1:], 0.5)
