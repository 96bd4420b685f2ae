"""Merged heads: against attention written out, against heads that can stand in for each other, and on rows not seen."""

import copy
import functools

import pytest
import torch

from slimlmm import merging, repair, surgery
from slimlmm.anatomy import describe
from slimlmm.calibration import Calibration
from slimlmm.forward import forward
from slimlmm.merging import Merged, NotMergeableError, merge, paths
from slimlmm.prompts import picture_prompt
from slimlmm.selfcheck import random_model
from tiny import tiny, tiny_batch
from zoo import CONFIGS

#: many heads with biases everywhere; groups of queries without any; groups of queries whose values alone have a bias
CASES = [
    ("llava-dinov2-llama", "vision.kv_groups"),
    ("llava-dinov2-llama", "text.kv_groups"),
    ("llava-siglip-qwen2", "text.kv_groups"),
]
QUERIES = [("llava-dinov2-llama", "text.queries"), ("llava-siglip-qwen2", "text.queries")]


def loss(model, batch):
    logits, labels = forward(model, batch).logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])


def batch_of(name, model, n=6, seed=0):
    """A batch in double precision, the first row of which is padded on the left."""
    batch = tiny_batch(name, model, n, seed=seed)
    batch["attention_mask"][0, :3] = 0
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


@functools.cache
def case(name):
    model = tiny(name)[0].double()
    return model, describe(model.config), [batch_of(name, model, 12, seed=seed) for seed in range(6)]


def without_last(axis):
    """Keep-sets without the last unit of each group."""
    return {group.name: torch.arange(group.units - 1) for group in axis.groups}


@torch.no_grad()
def logits(model, batch):
    return forward(model, batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("name", "axis"), CASES + QUERIES)
def test_pooled_components_are_attention_written_out(name, axis, share, monkeypatch):
    """A C v and what they leave, by the weights that eager attention tells, for whatever kernel the model itself uses."""
    monkeypatch.setattr(merging, "SHARE", share)
    model, described, batches = case(name)
    path = next(paths(model, described.axis(axis), without_last(described.axis(axis))))
    with torch.no_grad():
        call = merging._heard(model, path, batches[0], text=axis.startswith("text."))
        components = merging.principal(path, [call])
        found, rest = merging.pooled(path, components, call)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        twin = next(paths(eager, described.axis(axis), without_last(described.axis(axis))))
        weights = []
        handle = twin.attention.register_forward_hook(lambda *called: weights.append(called[-1][1]))
        forward(eager, batches[0])
        handle.remove()
    assert len(components) == path.value.out_features if share == 1.0 else len(components) < path.value.out_features
    kept = weights[0][:, path.kept]
    wanted = torch.einsum("bkts,bsr->btkr", kept, call.values_BTC @ components.T)
    if path.constant:
        wanted = torch.cat((wanted, torch.ones_like(wanted[..., :1])), -1)
    left = (call.values_BTC - call.values_BTC @ components.T @ components).unflatten(-1, (-1, path.dim))[
        ..., path.of, :
    ]
    real = call.mask_BT
    assert torch.allclose(found[real], wanted[real], atol=1e-5)  # eager softmax is single precision
    assert torch.allclose(rest[real], torch.einsum("bkts,bskd->btkd", kept, left)[real], atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), CASES + QUERIES)
def test_the_error_that_moments_tell_is_what_the_written_attention_makes(name, axis, monkeypatch):
    """For other values and reads than the best ones, where components leave half of the values."""
    monkeypatch.setattr(merging, "SHARE", 0.5)
    model, described, batches = case(name)
    model = copy.deepcopy(model)
    path = next(paths(model, described.axis(axis), without_last(described.axis(axis))))
    listening = functools.partial(merging._heard, model, path, text=axis.startswith("text."))
    with torch.no_grad():
        calls = [listening(batch) for batch in batches]
        components = merging.principal(path, calls)
        assert len(components) < path.value.out_features
        moments = merging.listen(path, components, calls)
        before = merging._factors(path, components)
        noise = torch.Generator().manual_seed(0)
        values, reads = (
            part + part.std() * torch.randn(part.shape, generator=noise, dtype=part.dtype)
            for part in (before.values, before.reads)
        )
        after = merging.Factors(values, reads, before.of)
        beside = moments.transformed(merging._beside(path, before))
        change, gram = after.whole() - before.whole(), beside.gram(centred=path.output.bias is not None)
        features = change.shape[1]
        read = torch.cat((-change, torch.eye(len(change), dtype=change.dtype)), 1)
        told = float((read @ gram * read).sum())
        wanted = [path.output(call.heads_BTC)[call.mask_BT] for call in calls]
        merging._write(path, components, beside.mean(), before, after)
        made = [path.output(call.heads_BTC)[call.mask_BT] for call in map(listening, batches)]
    assert features < gram.shape[0]
    error = (torch.cat(made) - torch.cat(wanted)).square().sum(-1).mean()
    assert float(error) == pytest.approx(told, rel=1e-6)
    assert told > 0


def test_components_are_few_where_values_say_little(monkeypatch):
    """Values of rank two are held by one head's worth of components, and merged as well as by all of them."""
    model, described, batches = case("llava-dinov2-llama")
    model, keep = copy.deepcopy(model), without_last(described.axis("vision.kv_groups"))
    for path in paths(model, described.axis("vision.kv_groups"), keep):
        weight = path.value.weight.data
        weight.copy_(weight[:, :2] @ torch.randn(2, weight.shape[1], dtype=weight.dtype))
        call = merging._heard(model, path, batches[0], text=False)
        with torch.no_grad():
            assert len(merging.principal(path, [call])) == path.dim
    wanted = merge(copy.deepcopy(model), described, "vision.kv_groups", keep, batches)
    monkeypatch.setattr(merging, "SHARE", 1.0)
    for one, other in zip(merge(model, described, "vision.kv_groups", keep, batches), wanted, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.05)


@pytest.mark.parametrize(("name", "axis"), CASES + QUERIES)
def test_keeping_everything_is_the_identity(name, axis):
    model, described, batches = case(name)
    same = copy.deepcopy(model)
    keep = {group.name: torch.arange(group.units) for group in described.axis(axis).groups}
    assert merge(same, described, axis, keep, batches) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def aligned(model, described, axis, *, half):
    """Give the last head of each block the queries and keys of the first; with `half`, each of the two half of its values."""
    with torch.no_grad():
        for path in paths(model, described.axis(axis), without_last(described.axis(axis))):
            dim, first = path.dim, path.dim // 2
            for name in ("q_proj", "k_proj"):
                for values in path.attention.get_submodule(name).parameters():
                    rows = len(values) // (path.value.out_features // dim)
                    values[-rows:] = values[:rows]
            for values in path.value.parameters():
                if half:
                    values[first:dim], values[-dim : -dim + first] = 0, 0
                else:
                    values[-dim:] = values[:dim]
            if not half:
                path.output.weight[:, -dim:] = path.output.weight[:, :dim] / 2


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_heads_that_attend_alike_are_merged_without_loss(name, axis, half, monkeypatch):
    """Also where their values have nothing in common, but together no more than one head holds; there a refit loses."""
    monkeypatch.setattr(merging, "POOLED_RIDGES", (1e-10,))
    monkeypatch.setattr(merging, "SWEEPS", 40)
    model, described, batches = case(name)
    model = copy.deepcopy(model)
    aligned(model, described, axis, half=half)
    keep, unseen = without_last(described.axis(axis)), batch_of(name, model, seed=9)
    wanted = logits(model, unseen)
    trial = copy.deepcopy(model)
    done = merge(trial, described, axis, keep, batches)
    assert len(done) == 3
    cut = surgery.cut(trial, described, axis, keep)
    left = float((logits(cut, unseen) - wanted).norm())
    assert left < 3e-3 * float(wanted.norm())
    if half:
        statistics = repair.collect(model, described, axis, batches)
        repair.fold(model, described, axis, keep, statistics)
        lost = float((logits(surgery.cut(model, described, axis, keep), unseen) - wanted).norm())
        assert lost > max(1e-2 * float(wanted.norm()), 10 * left)


@pytest.mark.parametrize(("name", "axis"), CASES + QUERIES)
def test_on_rows_not_seen_merging_is_nearer_than_a_refit(name, axis):
    model, described, batches = case(name)
    keep, unseen = without_last(described.axis(axis)), batch_of(name, model, 12, seed=9)
    merged, refitted = copy.deepcopy(model), copy.deepcopy(model)
    done = merge(merged, described, axis, keep, batches)
    assert all(one.error <= one.refit_error for one in done)
    repair.fold(refitted, described, axis, keep, repair.collect(model, described, axis, batches))
    wanted = logits(model, unseen)
    errors = [
        float((logits(surgery.cut(one, described, axis, keep), unseen) - wanted).norm()) for one in (merged, refitted)
    ]
    assert errors[0] < 1.02 * errors[1]
    if axis != "text.queries":  # there each group keeps its values, and little is won
        assert errors[0] < 0.95 * errors[1]
    with surgery.masked(merged, described, axis, keep):
        masked = logits(merged, unseen)
    assert torch.allclose(logits(surgery.cut(merged, described, axis, keep), unseen), masked, atol=1e-9)


def test_where_merging_helps_nowhere_it_is_the_refit(monkeypatch):
    monkeypatch.setattr(merging, "_error", lambda *_: 2.0)
    name, axis = CASES[0]
    model, described, batches = case(name)
    keep = without_last(described.axis(axis))
    merged, refitted = copy.deepcopy(model), copy.deepcopy(model)
    assert all(one.ridge is None and isinstance(one, Merged) for one in merge(merged, described, axis, keep, batches))
    repair.fold(refitted, described, axis, keep, repair.collect(model, described, axis, batches))
    first = next(paths(model, described.axis(axis), keep)).name  # the others see what the first one leaves
    for name in (f"{first}.weight", f"{first}.bias"):
        assert torch.allclose(merged.get_parameter(name), refitted.get_parameter(name), atol=1e-9)
        assert not torch.equal(merged.get_parameter(name), model.get_parameter(name))


def test_the_best_way_may_be_to_merge_and_no_other_weight_changes():
    name, axis = CASES[0]
    model, described, batches = case(name)
    before = copy.deepcopy(model)
    keep = without_last(described.axis(axis))
    done = repair.fold_best(model, described, axis, keep, Calibration(fit=batches, judge=batches), loss)
    assert [one.name for one in done.tries] == ["slice", "refit", "merge"]
    assert done.keep == keep
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    trial = copy.deepcopy(model)
    merge(trial, described, axis, keep, batches)
    changed = {n for n, p in trial.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert {n.split(".attention.")[1] for n in changed} == {"v_proj.weight", "o_proj.weight", "o_proj.bias"}


class Bent(torch.nn.Linear):
    """Values that are not linear in the stream."""

    def forward(self, values):
        return super().forward(values).tanh()


def test_values_that_are_bent_are_not_merged_and_the_reason_is_told():
    name, axis = CASES[0]
    model, described, batches = case(name)
    bent = copy.deepcopy(model)
    keep = without_last(described.axis(axis))
    for path in paths(bent, described.axis(axis), keep):
        path.value.__class__ = Bent
    done = repair.fold_best(bent, described, axis, keep, Calibration(fit=batches, judge=batches), loss)
    assert [one.name for one in done.tries] == ["slice", "refit"]
    assert "is not linear in its values" in done.reason


def test_too_many_features_are_refused_with_their_number(monkeypatch):
    model, described, batches = case(CASES[0][0])
    keep = without_last(described.axis(CASES[0][1]))
    monkeypatch.setattr(merging, "MOST_FEATURES", 48)  # two heads' worth of components for each of three heads
    assert {path.most for path in paths(model, described.axis(CASES[0][1]), keep)} == {16}
    assert all(
        one.error <= one.refit_error for one in merge(copy.deepcopy(model), described, CASES[0][1], keep, batches)
    )
    monkeypatch.setattr(merging, "MOST_FEATURES", 23)
    with pytest.raises(NotMergeableError, match="reads 3 heads of 8 numbers, 24 features at least; 23 is the most"):
        merge(model, described, CASES[0][1], keep, batches)


@pytest.mark.parametrize(
    ("name", "axis", "reason"),
    [
        ("llava-phi3", "text.kv_groups", "no matrix of their own"),
        ("gemma4", "text.kv_groups", "read the values of others"),
        ("llava-dinov2-llama", "text.ffn", "has no heads"),
    ],
)
def test_what_cannot_be_merged_says_why(name, axis, reason):
    model = random_model(CONFIGS[name]()) if name in CONFIGS else case(name)[0]
    described = describe(model.config)
    with pytest.raises(NotMergeableError, match=reason):
        list(paths(model, described.axis(axis), without_last(described.axis(axis))))


def test_attention_to_other_tokens_than_it_writes_for_is_refused():
    model = random_model(CONFIGS["blip-2-t5"]())
    described = describe(model.config)
    axis = described.axis("text.kv_groups")
    batch = picture_prompt(model.config)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(NotMergeableError, match="reads the values of other tokens than it writes for"):
        merge(model, described, axis.name, without_last(axis), [batch])
