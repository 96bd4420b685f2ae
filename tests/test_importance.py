"""Scores against oracles: finite differences of gates, brute force, permutation, really cut blocks."""

import dataclasses
import functools

import pytest
import torch

from slimlmm import anatomy, consumers, elimination, importance, repair, surgery
from slimlmm.errors import UserError
from slimlmm.importance import (
    CRITERIA,
    evaluating,
    forward,
    mean_loss,
    normalise,
    score,
)
from slimlmm.prompts import picture_prompt
from slimlmm.ranking import greedy_blocks, rank_blocks
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
    batches = [tiny_batch(name, model, 2, seed=seed) for seed in range(2)]
    return model, anatomy.describe(model.config), batches


def cuttable(described, kinds=("inner", "width")):
    return [axis.name for axis in described.axes.values() if axis.kind in kinds and not axis.refusal]


@pytest.mark.parametrize("name", NAMES)
def test_taylor_is_the_derivative_of_a_gate_on_all_that_a_unit_owns(name):
    model, described, batches = case(name)
    axes = cuttable(described)
    scores = score(model, described, axes, "taylor", batches, loss)
    model64 = tiny(name)[0].double()
    batches64 = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    for axis in axes:
        for group in described.axis(axis).groups[:1]:
            unit = group.units // 2
            change = finite_difference(model64, group, unit, batches64)
            assert scores[group.name][unit] == pytest.approx(abs(change), rel=1e-2, abs=3e-4), group.name


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_a_norm_that_holds_its_factor_less_one_is_scored_by_the_factor(name):
    model = random_model(CONFIGS[name]()).double()
    described, prompts = anatomy.describe(model.config), [picture_prompt(model.config, seed=seed) for seed in range(2)]
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in prompts]
    for batch in batches:
        batch["labels"] = batch["input_ids"]
    group = described.axis("text.width").groups[0]
    less_one = {
        slot.parameter for slot in group.slots if slot.role == "affine" and "norm" in slot.parameter.rpartition(".")[0]
    }
    assert less_one
    scores = score(model, described, ["text.width"], "taylor", batches, loss)
    for unit in (1, group.units // 2):
        change = finite_difference(model, group, unit, batches, step=5e-3, less_one=less_one)
        assert scores[group.name][unit] == pytest.approx(abs(change), rel=3e-3, abs=1e-5)  # norms compute in float32
    named = dict(model.named_parameters(remove_duplicate=False))
    wanted = torch.zeros(group.units, dtype=torch.float64)
    for slot in group.slots:
        if slot.parameter in named:
            values = named[slot.parameter].detach() + (slot.parameter in less_one)
            wanted += importance.per_unit(importance.square_sums(values, slot.dim), slot, group.units).sum((0, 2))
    found = score(model, described, ["text.width"], "magnitude")[group.name]
    assert torch.allclose(found, wanted.sqrt(), rtol=1e-5)


def finite_difference(model, group, unit, batches, step=2e-3, less_one=()):
    """(L(1 + step) - L(1 - step)) / 2 step for a factor on all that `unit` owns, summed over batches.

    Of parameters in `less_one` it is a factor on what they hold and one more.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    values = []
    for gate in (1 + step, 1 - step):
        before = {slot.parameter: named[slot.parameter].detach().clone() for slot in group.slots}
        with torch.no_grad():
            for slot in group.slots:
                rows = slot.rows(torch.tensor([unit]), group.units)
                parameter = named[slot.parameter]
                more = int(slot.parameter in less_one)
                values_here = before[slot.parameter].index_select(slot.dim, rows)
                parameter.index_copy_(slot.dim, rows, (values_here + more) * gate - more)
        values.append(sum(float(loss(model, batch).detach()) for batch in batches))
        with torch.no_grad():
            for parameter, value in before.items():
                named[parameter].copy_(value)
    return (values[0] - values[1]) / (2 * step)


def test_taylor_of_a_block_covers_all_its_parameters():
    model, described, batches = case(MAIN)
    scores = score(model, described, ["text.blocks"], "taylor", batches, loss)["text.blocks"]
    model.zero_grad()
    sum(loss(model, batch) for batch in batches).backward()
    layers = model.get_submodule(described.axis("text.blocks").layers)
    expected = [abs(sum(float((p.grad * p.detach()).sum()) for p in layer.parameters())) for layer in layers]
    model.zero_grad()
    assert scores.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_taylor_keeps_one_gradient_alive_and_restores_the_model(monkeypatch):
    model, _ = tiny(MAIN)
    described = anatomy.describe(model.config)
    batch = tiny_batch(MAIN, model)
    frozen = model.model.vision_tower.embeddings.cls_token.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alive = []
    original = importance.row_sums

    def counting(values, dim):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return original(values, dim)

    monkeypatch.setattr(importance, "row_sums", counting)
    score(model, described, ["text.ffn", "vision.width"], "taylor", [batch], loss)
    assert len(alive) > 50
    assert max(alive) == 0  # the one gradient at hand is detached from its parameter already
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not frozen.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_by_brute_force(name):
    model, described, _ = case(name)
    state = model.state_dict()
    for axis in cuttable(described):
        scores = score(model, described, [axis], "magnitude")
        for group in described.axis(axis).groups:
            unit = group.units - 1
            squares = sum(
                state[slot.parameter]
                .index_select(slot.dim, slot.rows(torch.tensor([unit]), group.units))
                .square()
                .sum()
                for slot in group.slots
            )
            assert scores[group.name][unit] == pytest.approx(float(squares.sqrt()), rel=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "activation", "magnitude"])
def test_permuting_units_permutes_scores(criterion):
    model, described, batches = case(MAIN)
    for axis in ("text.ffn", "text.width", "vision.width"):
        group = described.axis(axis).groups[0]
        order = torch.randperm(group.units, generator=torch.Generator().manual_seed(1))
        moved, _ = tiny(MAIN)
        named = dict(moved.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for slot in group.slots:
                everything = slot.rows(torch.arange(group.units), group.units)
                values = named[slot.parameter].index_select(slot.dim, slot.rows(order, group.units))
                named[slot.parameter].index_copy_(slot.dim, everything, values)
        before = score(model, described, [axis], criterion, batches, loss)[group.name]
        after = score(moved, described, [axis], criterion, batches, loss)[group.name]
        assert torch.allclose(after, before[order], rtol=2e-3, atol=1e-4), axis


def test_random_is_seeded_by_seed_and_group():
    model, described, _ = case(MAIN)
    one, again = (score(model, described, ["text.ffn"], "random", seed=3) for _ in range(2))
    other = score(model, described, ["text.ffn"], "random", seed=4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["text.ffn[0]"], other["text.ffn[0]"])
    assert not torch.equal(one["text.ffn[0]"], one["text.ffn[1]"])


def test_activation_by_hand_and_behind_a_mask():
    model, described, batches = case(MAIN)
    batch = dict(batches[0])
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][0, :3] = 0
    seen = []
    linear = model.model.language_model.layers[1].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    found = score(model, described, ["text.ffn"], "activation", [batch])["text.ffn[1]"]
    handle.remove()
    means = [seen[0][i][batch["attention_mask"][i].bool()].abs().mean(0) for i in range(2)]
    assert torch.allclose(found.float(), torch.stack(means).norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_scores_every_unit_of_every_axis(name):
    model, described, batches = case(name)
    for criterion in set(CRITERIA) - {"ablation"}:
        axes = cuttable(described, ("inner", "width", "blocks"))
        if criterion in ("activation", "obs"):  # no layer reads the dimensions of queries and keys
            axes = [axis for axis in axes if not axis.endswith(".head_dim")]
        if criterion == "obs":  # nor whole blocks, and all of them a width
            axes = [axis for axis in axes if described.axis(axis).kind == "inner"]
        scores = score(model, described, axes, criterion, batches[:1], loss)
        groups = [group for axis in axes for group in described.axis(axis).groups]
        assert {g.name: g.units for g in groups} == {name: len(values) for name, values in scores.items()}
        assert all(torch.isfinite(values).all() and (values >= 0).all() for values in scores.values())


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_squares_are_summed_some_rows_at_a_time(monkeypatch, dim):
    values = torch.randn(5, 7, 3, dtype=torch.bfloat16)
    others = [d for d in range(3) if dim is None or d != dim % 3]
    wanted = values.double().square().sum(others)
    for at_once in (1, 20, 1 << 24):
        monkeypatch.setattr(importance, "SQUARED_AT_ONCE", at_once)
        assert torch.allclose(importance.square_sums(values, dim).double(), wanted, rtol=1e-6)


def test_what_is_no_number_is_refused_and_never_chosen():
    model, described, batches = tiny(MAIN)[0], *case(MAIN)[1:]
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    for criterion in ("taylor", "activation", "magnitude"):
        with pytest.raises(UserError, match="scores that are no numbers"):
            score(model, described, ["text.ffn", "text.width"], criterion, batches, loss)
    with pytest.raises(UserError, match="activations of the calibration rows are not finite"):
        score(model, described, ["text.ffn"], "obs", batches)
    assert mean_loss(model, batches, loss) == float("inf")
    with pytest.raises(UserError, match="without any one of 3 blocks the loss is no number"):
        greedy_blocks(model, described, "vision.blocks", batches, loss, keep=2)
    assert greedy_blocks(model, described, "text.blocks", batches, loss, keep=2) == [0, 2]


def test_activation_of_blocks_is_a_mean_over_tokens_that_are_no_padding():
    model, described, batches = case(MAIN)
    apart = [{key: value[at : at + 1] for key, value in batches[0].items()} for at in range(2)]
    whole = score(model, described, ["text.blocks"], "activation", batches[:1])["text.blocks"]
    assert torch.allclose(score(model, described, ["text.blocks"], "activation", apart)["text.blocks"], whole)
    padded = score(model, described, ["text.blocks"], "activation", [longer(batches[0])])["text.blocks"]
    assert torch.allclose(padded, whole, rtol=1e-4)


def test_normalise_makes_groups_or_towers_comparable():
    model, described, batches = case(MAIN)
    scores = score(model, described, ["text.ffn", "vision.ffn"], "taylor", batches, loss)
    blocks = normalise(scores, described)
    assert all(float(values.mean()) == pytest.approx(1) for values in blocks.values())
    towers = normalise(scores, described, per="modality")
    text = torch.cat([values for name, values in towers.items() if name.startswith("text")])
    assert float(text.mean()) == pytest.approx(1)
    ratio = towers["text.ffn[0]"] / scores["text.ffn[0]"]
    assert torch.allclose(ratio, (towers["text.ffn[1]"] / scores["text.ffn[1]"])[:1])
    signed = {"text.ffn[0]": torch.tensor([-3.0, 1.0, 0.5], dtype=torch.float64)}
    assert normalise(signed, described)["text.ffn[0]"].tolist() == pytest.approx([-2.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", ["text.blocks", "vision.blocks"])
def test_ablation_agrees_with_the_cut_model(name, axis):
    model, described, batches = case(name)
    if described.axes[axis].refusal:
        pytest.skip(described.axes[axis].refusal)
    group = described.axis(axis).groups[0]
    growth = rank_blocks(model, described, axis, batches, loss)
    assert growth.shape == (group.units,)
    uncut = mean_loss(model, batches, loss)
    keep = {group.name: torch.tensor([i for i in range(group.units) if i != 1])}
    student = surgery.cut(model, described, axis, keep)
    assert mean_loss(student, batches, loss) - uncut == pytest.approx(float(growth[1]), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axis", ["text.kv_groups", "vision.kv_groups"])
def test_ablation_of_a_group_agrees_with_the_cut_model(name, axis):
    model, described, batches = case(name)
    found = described.axes[axis]
    if found.refusal or found.size == 1 or found.choices()[-2:] != (found.size - 1, found.size):
        pytest.skip(found.refusal or f"{axis} has no next smaller size")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = score(model, described, [axis], "ablation", batches, loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    uncut = mean_loss(model, batches, loss)
    for group in found.groups:
        alone = dataclasses.replace(described, axes={axis: dataclasses.replace(found, groups=(group,))})
        for unit in range(group.units):
            keep = {group.name: torch.tensor([other for other in range(group.units) if other != unit])}
            with surgery.masked(model, alone, axis, keep):
                growth = mean_loss(model, batches, loss) - uncut
            assert float(scores[group.name][unit]) == pytest.approx(growth, abs=1e-5)


def test_ablation_of_many_units_takes_the_first_batches_and_of_too_many_none(monkeypatch):
    model, described, batches = case(MAIN)
    assert len(batches) >= 2
    units = sum(group.units for group in described.axis("text.kv_groups").groups)

    def scores(batches):
        found = score(model, described, ["text.kv_groups"], "ablation", batches, loss)
        return torch.cat([found[name] for name in sorted(found)])

    whole, first = scores(batches), scores(batches[:1])
    assert not torch.equal(whole, first)
    monkeypatch.setattr(importance, "ABLATED_ON_ALL", units)
    assert torch.equal(scores(batches), whole)
    monkeypatch.setattr(importance, "ABLATED_ON_ALL", units // len(batches))
    assert torch.equal(scores(batches), first)
    monkeypatch.setattr(importance, "ABLATED_ON_ALL", 1)
    assert torch.equal(scores(batches), first)
    monkeypatch.setattr(importance, "MOST_ABLATED", units - 1)
    with pytest.raises(UserError, match=f"there are {units}; up to {units - 1} it may"):
        scores(batches)


def test_greedy_drops_first_what_costs_least_and_then_measures_again():
    model, described, batches = case(MAIN)
    growth = rank_blocks(model, described, "text.blocks", batches, loss)
    first = greedy_blocks(model, described, "text.blocks", batches, loss, keep=2)
    assert set(range(3)) - set(first) == {int(growth.argmin())}
    name = described.axis("text.blocks").groups[0].name
    costs = {}
    for block in first:
        student = surgery.cut(model, described, "text.blocks", {name: torch.tensor([block])})
        costs[block] = mean_loss(student, batches, loss)
    assert greedy_blocks(model, described, "text.blocks", batches, loss, keep=1) == [min(costs, key=costs.get)]
    assert greedy_blocks(model, described, "text.blocks", batches, loss, keep=3) == [0, 1, 2]
    assert greedy_blocks(model, described, "text.blocks", batches, loss, keep=1, stays=first) == [
        min(costs, key=costs.get)
    ]
    (other,) = set(range(3)) - set(first)
    assert other in greedy_blocks(model, described, "text.blocks", batches, loss, keep=2, stays=[other, first[0]])


def test_refusals_name_what_is_missing():
    model, described, batches = case(MAIN)
    with pytest.raises(UserError, match="Did you mean 'taylor'"):
        score(model, described, ["text.ffn"], "tailor")
    with pytest.raises(UserError, match=r"what some matrix reads, not text\.width"):
        score(model, described, ["text.width"], "ablation", batches, loss)
    with pytest.raises(UserError, match=r"what some matrix reads, not text\.head_dim\.pairs"):
        score(model, described, ["text.head_dim"], "ablation", batches, loss)
    with pytest.raises(UserError, match=r"text\.head_dim\.pairs: no linear layer reads it"):
        score(model, described, ["text.head_dim"], "activation", batches)
    with pytest.raises(UserError, match="needs a loss"):
        score(model, described, ["text.ffn"], "taylor", batches)
    with pytest.raises(UserError, match="calibration rows"):
        score(model, described, ["text.ffn"], "taylor", [], loss)
    with pytest.raises(UserError, match="calibration rows"):
        rank_blocks(model, described, "text.blocks", [], loss)
    with pytest.raises(UserError, match="cannot keep 4 blocks of 3"):
        greedy_blocks(model, described, "text.blocks", batches, loss, keep=4)


def test_evaluating_restores_each_module():
    model, _ = tiny(MAIN)
    model.train()
    model.model.vision_tower.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.vision_tower.training
    assert model.model.language_model.training


@pytest.mark.parametrize(("name", "axis"), [(MAIN, "text.ffn"), ("llava-clip-llama", "vision.ffn")])
def test_obs_orders_neurons_by_the_inputs_and_the_matrix_of_what_reads_them(name, axis, monkeypatch):
    """Against moments written out, padding left out and a bias taken by the mean; all groups at once or one by one."""
    model, described, batches = case(name)
    batches = [batch | {"attention_mask": batch["attention_mask"].clone()} for batch in batches]
    batches[0]["attention_mask"][0, :3] = 0
    group = described.axis(axis).groups[1]
    (slot,) = consumers.linear_consumers(dict(model.named_modules()), group)
    linear = model.get_submodule(slot.parameter.removesuffix(".weight"))
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    found = score(model, described, [axis], "obs", batches)
    handle.remove()
    masks = [batch["attention_mask"].bool() if axis.startswith("text.") else ... for batch in batches]
    inputs = torch.cat([one[mask].flatten(0, -2) for one, mask in zip(seen, masks, strict=True)]).double()
    if linear.bias is not None:
        inputs = inputs - inputs.mean(0)
    reader = elimination.Reader(
        weight=linear.weight, gram=inputs.T @ inputs / len(inputs), columns=torch.arange(group.units)[:, None]
    )
    assert torch.equal(found[group.name], elimination.order([reader]))
    assert sorted(found[group.name].tolist()) == list(range(group.units))
    known = repair.collect(model, described, axis, batches).consumers
    with monkeypatch.context() as patched:
        patched.setattr(importance, "heard", None)  # nothing runs where all is known
        for key, values in score(model, described, [axis], "obs", batches, moments=known).items():
            assert torch.equal(values, found[key])
    monkeypatch.setattr(consumers, "PART_BYTES", 1)
    assert all(torch.equal(score(model, described, [axis], "obs", batches)[key], found[key]) for key in found)


def test_obs_refuses_what_no_linear_layer_reads():
    model, described, batches = case(MAIN)
    for axis in ("text.blocks", "text.width", "text.head_dim", "vision.blocks"):
        with pytest.raises(UserError, match="'obs' measures what linear layers alone read, not"):
            score(model, described, [axis], "obs", batches)
