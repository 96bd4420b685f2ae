"""Dropped blocks: what the block before them can take over, and when it cannot."""

import copy

import pytest
import torch

from slimlmm import bridging, surgery
from slimlmm.anatomy import describe
from slimlmm.blocks import skipped
from slimlmm.bridging import NoBridgeError, bridge_best, bridged, gaps, greedy_bridged
from slimlmm.calibration import Calibration
from slimlmm.forward import answer_logits
from slimlmm.importance import mean_loss
from slimlmm.losses import cross_entropy
from slimlmm.selfcheck import random_model
from tiny import tiny_batch, tiny_config
from zoo import CONFIGS


def loss(model, batch):
    logits_AV, labels_A, _ = answer_logits(model, batch)
    return cross_entropy(logits_AV, labels_A) / labels_A.numel()


def scaled_model(name):
    """Return a random model whose layer scale is no 1."""
    model = random_model(tiny_config(name))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "layer_scale" in part:
                parameter.uniform_(0.2, 2.0)
    return model


def batches_of(name, model, count=6):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        batch = tiny_batch(name, model, n=4)
        batch["shift_labels"] = batch.pop("labels")
        found.append(batch)
    return found


def outputs(model, path, batches):
    """Return what a block gives out over all batches, and what enters the FFN's last linear of it."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda *call: seen.append(bridging.stream(call[-1]).detach())
    )
    with torch.no_grad():
        for batch in batches:
            answer_logits(model, batch)
    handle.remove()
    return torch.cat([one.flatten(0, -2) for one in seen])


@pytest.fixture(scope="module", params=["text.blocks", "vision.blocks"])
def case(request):
    """The middle one of three blocks of a model whose layer scale is no 1, with calibration rows."""
    axis, name = request.param, "llava-dinov2-llama"
    model = scaled_model(name)
    anatomy = describe(model.config)
    keep = {axis: torch.tensor([0, *range(2, anatomy.axis(axis).size)])}
    return model, anatomy, axis, keep, batches_of(name, model)


def test_the_stream_behind_the_gap_is_nearer_to_what_it_was(case):
    model, anatomy, axis, keep, batches = case
    layers = anatomy.axis(axis).layers
    wanted = outputs(model, f"{layers}.1", batches)
    plain = surgery.cut(model, anatomy, axis, keep)
    trial = copy.deepcopy(model)
    (gap,) = bridged(trial, anatomy, axis, keep, batches)
    assert (gap.first, gap.last) == (1, 1)
    mended = surgery.cut(trial, anatomy, axis, keep)
    before, after = (float((outputs(one, f"{layers}.0", batches) - wanted).square().mean()) for one in (plain, mended))
    assert after < 0.9 * before


def test_the_patch_is_the_ridge_regression_of_what_the_block_added(case, monkeypatch):
    model, anatomy, axis, keep, batches = case
    monkeypatch.setattr(bridging, "RIDGES", (1e-2,))
    layers, trial = anatomy.axis(axis).layers, copy.deepcopy(model)
    (gap,) = bridged(trial, anatomy, axis, keep, batches)
    name = next(name for name, module in trial.named_modules() if module is gap.writer)
    writer = model.get_submodule(name)
    heard = []
    handle = writer.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].detach().flatten(0, -2)))
    start, end = outputs(model, f"{layers}.0", batches), outputs(model, f"{layers}.1", batches)
    handle.remove()
    neurons = torch.cat(heard[: len(heard) // 2]).double()  # the second run heard them again
    added = (end - start).double()
    biased = writer.bias is not None
    if biased:
        means = neurons.mean(0), added.mean(0)
        neurons, added = neurons - means[0], added - means[1]
    gram = neurons.T @ neurons / len(neurons)
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    wanted = torch.linalg.solve(gram + ridge, neurons.T @ added / len(neurons)).T
    scale = next((p for n, p in model.named_parameters() if n.startswith(f"{layers}.0.layer_scale2")), None)
    got = gap.writer.weight.double() - writer.weight.double()
    got = got if scale is None else scale.double()[:, None] * got
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()
    if biased:
        shift = (gap.writer.bias - writer.bias).double() * (1 if scale is None else scale.double())
        assert torch.allclose(shift, means[1] - wanted @ means[0], atol=1e-3 * float(means[1].abs().max()))


def test_the_better_of_both_is_taken_and_the_input_model_stays(case):
    model, anatomy, axis, keep, batches = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student, tries = bridge_best(model, anatomy, axis, keep, Calibration(fit=batches, judge=batches[:1]), loss)
    assert [one.name for one in tries] == ["slice", "bridge"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert float(loss(student, batches[0])) == pytest.approx(min(one.loss for one in tries), rel=1e-5)
    assert student.num_parameters() == surgery.cut(model, anatomy, axis, keep).num_parameters()


def test_the_block_that_goes_is_the_one_that_costs_least_once_bridged(case):
    model, anatomy, axis, _, batches = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = anatomy.axis(axis).size
    costs = []
    for unit in range(size):
        keep = {axis: torch.tensor([other for other in range(size) if other != unit])}
        trial = copy.deepcopy(model)
        bridged(trial, anatomy, axis, keep, batches)
        student = surgery.cut(trial, anatomy, axis, keep)
        costs.append(sum(float(loss(student, batch).detach()) for batch in batches[1:]))
    found = greedy_bridged(model, anatomy, axis, Calibration(fit=batches, judge=batches[1:]), loss, size - 1)
    assert found == [unit for unit in range(size) if unit != costs.index(min(costs))]
    assert len(greedy_bridged(model, anatomy, axis, Calibration(fit=batches, judge=batches), loss, 1)) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_cost_is_that_of_whole_passes(monkeypatch):
    config = tiny_config("llava-dinov2-llama")
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 5
    model = random_model(config)
    batches = batches_of("llava-dinov2-llama", model, count=5)
    calibration = Calibration(fit=batches[:2], judge=batches[2:])
    for axis in ("vision.blocks", "text.blocks"):
        costs = []
        for memory in (bridging.Memory.of, lambda *_: bridging.Memory(())):
            seen = []
            with monkeypatch.context() as patched:
                patched.setattr(bridging.Memory, "of", memory)
                patched.setattr(
                    bridging, "mean_loss", lambda *each, seen=seen: seen.append(mean_loss(*each)) or seen[-1]
                )
                greedy_bridged(model, describe(config), axis, calibration, loss, 2)
            costs.append(seen)
        assert len(costs[0]) == 5 + 4 + 3
        assert costs[0] == pytest.approx(costs[1], abs=1e-6)


@pytest.mark.parametrize("name", ["llava-dinov2-llama", "qwen2_5_vl"])
def test_a_block_left_out_alone_runs_once_and_gives_what_it_is_given(name):
    model = random_model(tiny_config(name))
    batches = batches_of(name, model, count=3)
    block, ran = model.get_submodule(describe(model.config).axis("text.blocks").layers)[1], []
    real = block.forward
    block.forward = lambda *args, **named: ran.append(1) or real(*args, **named)
    found = []
    for alone in (False, True):
        with skipped([block], alone=alone):
            found.append(mean_loss(model, batches, loss))
    assert found[0] == found[1]
    assert len(ran) == 3 + 1
    mean_loss(model, batches[:1], loss)
    assert len(ran) == 3 + 1 + 1


def test_all_kept_or_the_first_ones_dropped_leave_nothing_to_bridge(case):
    model, anatomy, axis, _, batches = case
    size = anatomy.axis(axis).size
    assert not list(gaps(model, anatomy, axis, {axis: torch.arange(size)}))
    keep = {axis: torch.arange(1, size)}
    assert not list(gaps(model, anatomy, axis, keep))
    _, tries = bridge_best(model, anatomy, axis, keep, Calibration(fit=batches, judge=batches), loss)
    assert [one.name for one in tries] == ["slice"]


def test_two_gaps_are_bridged_as_each_alone():
    config = tiny_config("llava-dinov2-llama")
    config.text_config.num_hidden_layers = 5
    model, axis = random_model(config), "text.blocks"
    anatomy, batches = describe(config), batches_of("llava-dinov2-llama", model, count=2)

    def writers(keep):
        trial = copy.deepcopy(model)
        found = bridged(trial, anatomy, axis, {axis: torch.tensor(keep)}, batches)
        return {gap.first: gap.writer.weight for gap in found}

    alone = writers([0, 2, 3, 4]) | writers([0, 1, 2, 4])
    both = writers([0, 2, 4])
    assert both.keys() == alone.keys() == {1, 3}
    assert all(torch.equal(both[first], alone[first]) for first in both)


def test_a_norm_behind_the_ffn_is_no_factor():
    from slimlmm.prompts import picture_prompt

    model = random_model(CONFIGS["gemma3"]())
    anatomy = describe(model.config)
    axis = anatomy.axis("text.blocks")
    keep = {"text.blocks": torch.tensor([unit for unit in range(axis.size) if unit != 1])}
    batch = picture_prompt(model.config)
    (gap,) = gaps(model, anatomy, "text.blocks", keep)
    with pytest.raises(NoBridgeError, match="normed"), torch.no_grad():
        bridging.gain(model, model.get_submodule(f"{axis.layers}.0"), gap.writer, batch)
    assert bridged(model, anatomy, "text.blocks", keep, [batch]) == []


def with_a_dead_block():
    """A model whose projector reads the stream behind the fourth of five vision blocks."""
    config = tiny_config("llava-clip-llama")
    config.vision_config.num_hidden_layers = 5
    model = random_model(config)
    assert config.vision_feature_layer == -2
    return model, describe(config), batches_of("llava-clip-llama", model)


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 1, 2, 4]])
def test_a_gap_ends_where_the_stream_is_read_for_the_last_time(kept):
    model, anatomy, batches = with_a_dead_block()
    axis, layers = "vision.blocks", anatomy.axis("vision.blocks").layers
    (gap,) = gaps(model, anatomy, axis, {axis: torch.tensor(kept)})
    assert (gap.first, gap.last) == (3, 3)
    wanted, trial = outputs(model, f"{layers}.3", batches), copy.deepcopy(model)
    bridged(trial, anatomy, axis, {axis: torch.tensor(kept)}, batches)
    distances = [float((outputs(one, f"{layers}.2", batches) - wanted).square().mean()) for one in (model, trial)]
    assert distances[1] < 0.01 * distances[0]
    assert not list(gaps(model, anatomy, axis, {axis: torch.arange(4)}))


def test_a_block_that_nothing_reads_goes_first():
    model, anatomy, batches = with_a_dead_block()
    with torch.no_grad():
        uncut = {id(batch): answer_logits(model, batch)[0] for batch in batches}

    def apart(student, batch):
        return (answer_logits(student, batch)[0] - uncut[id(batch)]).square().mean()

    calibration = Calibration(fit=batches, judge=batches[1:])
    assert greedy_bridged(model, anatomy, "vision.blocks", calibration, apart, 4) == [0, 1, 2, 3]
