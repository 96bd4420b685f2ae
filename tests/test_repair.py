"""Closed-form repair against numpy, against exact linear dependence, and against the model without repair."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch

from slimlmm import anatomy, consumers, data, importance, repair, surgery
from slimlmm.calibration import Calibration, calibration_of
from slimlmm.collate import Collator
from slimlmm.errors import UserError
from slimlmm.forward import forward
from slimlmm.importance import score
from slimlmm.moments import Moments, predict
from slimlmm.packing import can_pack
from slimlmm.prompts import picture_prompt
from slimlmm.selfcheck import random_model
from tiny import NAMES, longer, tiny, tiny_batch
from zoo import CONFIGS

MAIN = "llava-dinov2-llama"


def loss(model, batch):
    logits, labels = forward(model, batch).logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])


@functools.cache
def case(name):
    model, _ = tiny(name)
    batches = [tiny_batch(name, model, 4, seed=seed) for seed in range(4)]
    return model, anatomy.describe(model.config), batches


@functools.cache
def calibrated(name, axis):
    model, described, batches = case(name)
    return repair.collect(model, described, axis, batches)


def axes_of(name):
    described = case(name)[1]
    return [a for a in described.axes.values() if a.kind in ("inner", "width") and not a.refusal]


def half(axis, model, described):
    """Keep-sets of the middle legal size, by magnitude."""
    smaller = [size for size in axis.choices() if size < axis.size]
    size = smaller[len(smaller) // 2]
    scores = score(model, described, [axis.name], "magnitude")
    return {g.name: scores[g.name].topk(g.kept(size)).indices.sort().values for g in axis.groups}


@torch.no_grad()
def logits(model, batch):
    return forward(model, batch).logits


def consumer(bias=True, inputs=12, outputs=7, samples=40, noise=0.0):
    """A linear layer, inputs of rank 6 (+ noise) whose first six features span them, and their moments."""
    torch.manual_seed(0)
    values = torch.randn(samples, 10, 6, dtype=torch.float64)
    values = torch.cat([values, values @ torch.randn(6, inputs - 6, dtype=torch.float64) + 0.7], -1)
    values = values + noise * torch.randn_like(values) + torch.arange(inputs) * 0.1
    linear = torch.nn.Linear(inputs, outputs, bias=bias).double()
    moments = Moments(inputs)
    for start in range(0, samples, 10):
        moments.add(values[start : start + 10])
    return linear, values, moments


@pytest.mark.parametrize("bias", [True, False])
def test_refit_is_least_squares_as_the_ridge_vanishes(bias):
    linear, values, moments = consumer(bias, noise=0.3)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    target = linear(values).detach().reshape(-1, 7).numpy()
    inputs = values[..., kept].reshape(-1, 6).numpy()
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], 1) if bias else inputs
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    repair.refit(linear, torch.tensor([1, 4, 5, 6, 9, 10]), moments, ridges=[1e-13])
    assert np.allclose(linear.weight.detach()[:, kept].numpy().T, expected[:6], atol=1e-7)
    if bias:
        assert np.allclose(linear.bias.detach().numpy(), expected[6], atol=1e-7)


def test_dropped_units_that_are_combinations_of_kept_ones_cost_nothing():
    linear, values, moments = consumer()
    before = linear(values).detach()
    repair.refit(linear, torch.arange(6, 12), moments, ridges=[1e-12])
    assert torch.allclose(linear(values), before, atol=1e-5)
    assert not linear.weight[:, 6:].any()


def test_the_ridge_is_chosen_by_error_on_samples_not_seen():
    linear, _, moments = consumer(noise=1.0, samples=4)
    kept, dropped = torch.arange(6), torch.arange(6, 12)
    tried = [predict(moments, kept, dropped, linear.weight, bias=True, ridges=[r]) for r in (1e-9, 1e-1, 1e3)]
    found = predict(moments, kept, dropped, linear.weight, bias=True, ridges=(1e-9, 1e-1, 1e3))
    best = min(tried, key=lambda prediction: prediction.error)
    assert found.ridge == best.ridge
    assert found.error <= found.plain_error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [3, 20])
def test_the_error_is_that_of_the_other_half_of_the_samples(bias, outputs):
    """Against the definition, sample by sample, for consumers with fewer and with more outputs than inputs that go."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 10, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    weight, kept, dropped = rng.normal(size=(outputs, 12)), np.arange(0, 12, 2), np.arange(1, 12, 2)
    moments = Moments(12)
    moments.add(torch.from_numpy(values))
    fit, held = values[4:].reshape(-1, 12), values[:4].reshape(-1, 12)
    mean = fit.mean(0) if bias else 0.0
    gram = (fit - mean).T @ (fit - mean) / len(fit)
    ridge = 0.1 * np.diag(gram)[kept].mean() * np.eye(6)
    change = gram[np.ix_(dropped, kept)] @ np.linalg.inv(gram[np.ix_(kept, kept)] + ridge)
    missing = (held - mean)[:, dropped] - (held - mean)[:, kept] @ change.T
    power = ((held - held.mean(0)) @ weight.T) ** 2
    error = ((missing @ weight[:, dropped].T) ** 2).sum(1).mean() / power.sum(1).mean()
    plain = ((held[:, dropped] @ weight[:, dropped].T) ** 2).sum(1).mean() / power.sum(1).mean()
    torch_of = [torch.from_numpy(one) for one in (kept, dropped, weight)]
    found = predict(moments, *torch_of, bias=bias, ridges=[0.1])
    assert found.error == pytest.approx(error, rel=1e-9)
    assert found.plain_error == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava-siglip-qwen2", "blip2-opt"])
def test_no_picture_stands_on_both_sides_of_a_fit(name, rows, monkeypatch):
    model, processor = tiny(name)
    collator = Collator(processor, packed=can_pack(model, processor, rows.train))
    fit = calibration_of(data.spread(rows.train, 20, 2, 1), collator, torch.device("cpu")).fit
    assert any(len({row.picture_key() for row in batch["rows"]}) % 2 for batch in fit)  # an odd number has no middle
    sides, real = {}, Moments._add
    first = []

    def heard(self, half, values, times):
        first.append(self)
        if self is first[0]:
            sides.setdefault(half, set()).update(map(tuple, values[times > 0].tolist()))
        real(self, half, values, times)

    monkeypatch.setattr(Moments, "_add", heard)
    repair.collect(model, anatomy.describe(model.config), "vision.ffn", fit)
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_padding_of_tokens_that_come_flat_does_not_count():
    model, _ = tiny("blip2-opt")
    described, batch = anatomy.describe(model.config), tiny_batch("blip2-opt", model, 3)
    more = longer(batch)
    scores, grams = [], []
    for one in (batch, more):
        scores.append(importance.score(model, described, ["text.ffn"], "activation", [one]))
        moments = list(repair.collect(model, described, "text.ffn", [one]).consumers.values())
        assert sorted(moments[0].count_2.tolist()) == [
            int(batch["attention_mask"][at].sum()) for at in (slice(1), slice(1, 3))
        ]
        grams.append(torch.stack([found.gram() for found in moments]))
    assert torch.allclose(*grams, rtol=1e-4, atol=1e-6)
    assert all(torch.allclose(scores[1][name], values, rtol=1e-4) for name, values in scores[0].items())


def test_activations_that_are_no_numbers_end_in_a_refusal():
    moments = Moments(4)
    moments.add(torch.full((2, 3, 4), 1e200, dtype=torch.float64))
    with pytest.raises(UserError, match="not finite"):
        predict(moments, torch.arange(2), torch.arange(2, 4), torch.ones(3, 4), bias=False)


def test_weights_that_would_blow_up_take_a_larger_ridge():
    torch.manual_seed(0)
    values = torch.randn(50, 8, 4, dtype=torch.float64)
    values[..., :2] *= 1e-4
    values[..., 2:] = values[..., :2] * 300 + 1e-6 * values[..., 2:]
    moments = Moments(4)
    moments.add(values)
    weight = torch.randn(3, 4, dtype=torch.float64)
    kept, dropped = torch.arange(2), torch.arange(2, 4)
    wild = predict(moments, kept, dropped, weight, bias=False, ridges=[1e-9, 1e-1, 1e3], growth=1e9)
    tame = predict(moments, kept, dropped, weight, bias=False, ridges=[1e-9, 1e-1, 1e3], growth=3.0)
    assert wild.matrix.norm() > 100 * tame.matrix.norm()


def test_products_in_fp32_keep_what_varies_beside_a_large_mean():
    rng = torch.Generator().manual_seed(0)
    calls = [torch.randn(6, 5, 8, generator=rng) + 1000.0 * (torch.arange(8) < 3) for _ in range(3)]
    weight = torch.randint(0, 2, (6, 5), generator=rng)
    exact, quick = Moments(8), Moments(8, products=torch.float32)
    for values in calls:
        exact.add(values, weight)
        quick.add(values, weight)
    turn = torch.randn(4, 8, generator=rng, dtype=torch.float64)
    pairs = [(quick, exact), (quick.transformed(turn), exact.transformed(turn))]
    for half, (quick, exact) in itertools.product((0, 1, None), pairs):
        assert (quick.gram(half, centred=True) - exact.gram(half, centred=True)).abs().max() < 1e-4
        assert torch.allclose(quick.mean(half), exact.mean(half), rtol=1e-6)
        assert (quick.gram(half) - exact.gram(half)).abs().max() < 1e-6 * exact.gram(half).abs().max()


def test_moments_count_only_what_the_mask_lets_through():
    values, mask = torch.randn(5, 3, 2), torch.randint(0, 2, (5, 3))
    moments = Moments(2)
    moments.add(values, mask)
    chosen = values[mask.bool()].double()
    assert torch.allclose(moments.mean(), chosen.mean(0))
    assert torch.allclose(moments.gram(centred=True), torch.cov(chosen.T, correction=0))
    assert int(moments.count_2.sum()) == int(mask.sum())


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_identity(name):
    model, described, batches = case(name)
    for axis in axes_of(name):
        keep = {group.name: torch.arange(group.units) for group in axis.groups}
        same = copy.deepcopy(model)
        assert dict(repair.fold(same, described, axis.name, keep, calibrated(name, axis.name))) == keep
        assert torch.equal(logits(same, batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize("name", NAMES)
def test_cut_equals_masked_after_repair(name):
    model, described, batches = case(name)
    for axis in axes_of(name):
        repaired = copy.deepcopy(model)
        keep = half(axis, model, described)
        keep = repair.fold(repaired, described, axis.name, keep, calibrated(name, axis.name))
        student = surgery.cut(repaired, described, axis.name, keep)
        with surgery.masked(repaired, described, axis.name, keep):
            wanted = logits(repaired, batches[0])
        assert torch.allclose(logits(student, batches[0]), wanted, atol=1e-5), axis.name


@pytest.mark.parametrize("name", NAMES)
def test_repair_brings_the_student_nearer_on_unseen_rows(name):
    model, described, _ = case(name)
    batch = tiny_batch(name, model, 8, seed=77)
    wanted = logits(model, batch)
    for axis in axes_of(name):
        keep = half(axis, model, described)
        repaired = copy.deepcopy(model)
        new = repair.fold(repaired, described, axis.name, keep, calibrated(name, axis.name))
        with_repair = (logits(surgery.cut(repaired, described, axis.name, new), batch) - wanted).norm()
        without = (logits(surgery.cut(model, described, axis.name, keep), batch) - wanted).norm()
        assert with_repair < 1.05 * without, axis.name


def test_inner_repair_leaves_an_uncut_model_that_computes_as_the_cut_one():
    model, described, batches = case(MAIN)
    axis = described.axis("text.ffn")
    repaired = copy.deepcopy(model)
    keep = repair.fold(repaired, described, axis.name, half(axis, model, described), calibrated(MAIN, axis.name))
    student = surgery.cut(repaired, described, axis.name, keep)
    assert torch.allclose(logits(student, batches[0]), logits(repaired, batches[0]), atol=1e-5)


def test_attention_outputs_take_no_small_ridge(monkeypatch):
    tried = []
    monkeypatch.setattr(repair, "refit", lambda linear, goes, moments, ridges: tried.append(list(ridges)))
    for name in ("text.kv_groups", "text.queries", "text.head_dim", "text.ffn"):
        model, described, _ = case(MAIN)
        axis = described.axis(name)
        keep = half(axis, model, described)
        repair.fold(copy.deepcopy(model), described, name, keep, calibrated(MAIN, name), ridges=[1e-9, 1e-3])
        wanted = [1e-9, 1e-3] if name == "text.ffn" else [repair.ATTENTION_RIDGE]
        assert tried, name
        assert all(ridges == wanted for ridges in tried), name
        tried.clear()


@pytest.mark.parametrize("axis_name", ["text.queries", "text.head_dim"])
def test_groups_that_share_a_consumer_are_refitted_together(axis_name):
    """Each of them alone would lean on columns that another one drops: the cut model would lose what was put there."""
    model, described, batches = case(MAIN)
    axis = described.axis(axis_name)
    keep = half(axis, model, described)
    repaired = copy.deepcopy(model)
    kept = repair.fold(repaired, described, axis_name, keep, calibrated(MAIN, axis_name))
    student = surgery.cut(repaired, described, axis_name, kept)
    with surgery.masked(repaired, described, axis_name, kept):
        wanted = logits(repaired, batches[0])
    assert torch.allclose(logits(student, batches[0]), wanted, atol=1e-5)
    for name in {s.parameter for group in axis.groups for s in group.slots if s.role == "consume"}:
        gone = torch.ones(repaired.get_parameter(name).shape[1], dtype=torch.bool)
        for group in axis.groups:
            for slot in (s for s in group.slots if s.parameter == name):
                gone[slot.rows(kept[group.name], group.units)] = False
        assert not repaired.get_parameter(name)[:, gone].any(), name


def test_fold_best_takes_the_way_with_the_least_loss_of_the_cut_model():
    model, described, batches = case(MAIN)
    axis = described.axis("text.width")
    keep = half(axis, model, described)
    before = copy.deepcopy(model)
    done = repair.fold_best(model, described, axis.name, keep, Calibration(fit=batches, judge=batches), loss)
    student, kept, tries = done.model, done.keep, done.tries
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert {name: len(units) for name, units in kept.items()} == {name: len(units) for name, units in keep.items()}
    assert [t.name for t in tries] == ["slice", "refit", "rotate:0", "rotate:0.5", "rotate:1"]
    best = min(t.loss for t in tries)
    assert sum(float(loss(student, b).detach()) for b in batches) / len(batches) == pytest.approx(best, abs=1e-5)


def test_groups_can_be_folded_a_few_at_a_time():
    model, described, batches = case(MAIN)
    axis = described.axis("vision.ffn")
    keep = half(axis, model, described)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    repair.fold(whole, described, axis.name, keep, calibrated(MAIN, axis.name))
    for group in axis.groups:
        few = repair.collect(model, described, axis.name, batches, groups=[group.name])
        assert len(few.consumers) == 1
        repair.fold(parts, described, axis.name, keep, few)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("name", ["text.ffn", "text.kv_groups", "vision.width"])
def test_moments_that_do_not_fit_at_once_are_held_part_by_part(name, monkeypatch):
    model, described, batches = case(MAIN)
    axis, by = described.axis(name), Calibration(fit=batches, judge=batches)
    keep = half(axis, model, described)
    (whole,) = consumers.in_parts(model, axis)
    assert whole == {group.name for group in axis.groups}
    once = repair.fold_best(model, described, name, keep, by, loss)
    monkeypatch.setattr(consumers, "PART_BYTES", 1)
    parts = consumers.in_parts(model, axis)
    assert set.union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)
    held = [set(repair.collect(model, described, name, batches, groups=part).consumers) for part in parts]
    assert sum(map(len, held)) == len(set.union(*held))  # no consumer in two parts
    assert all(len(one) <= 1 for one in held)
    assert len(parts) > 1 or name == "vision.width"
    again = repair.fold_best(model, described, name, keep, by, loss)
    assert [(one.name, one.loss) for one in again.tries] == [(one.name, one.loss) for one in once.tries]


def test_a_consumer_that_is_no_linear_layer_is_told():
    model = random_model(CONFIGS["qwen3_vl_moe"]())
    described = anatomy.describe(model.config)
    found = repair.collect(model, described, "text.expert_ffn", [picture_prompt(model.config)])
    assert not found.consumers
    assert "is read by no linear layer, so nothing is refitted" in found.reason


def test_a_stream_that_cannot_be_turned_says_why():
    model, described, batches = case("blip2-opt")
    statistics = repair.collect(model, described, "qformer.width", batches)
    assert statistics.stream is None
    assert "residual stream" in statistics.reason
    assert repair.tied_powers(statistics) == ()


def test_no_calibration_rows_is_refused():
    model, described, _ = case(MAIN)
    with pytest.raises(UserError, match="calibration rows"):
        repair.collect(model, described, "text.ffn", [])
