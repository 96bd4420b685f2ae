"""Muon against torch's, singular values, AdamW beside it, and which parameters are whose."""

import copy

import pytest
import torch
from torch import nn

from slimlmm.anatomy import describe
from slimlmm.distill import train
from slimlmm.lessons import Readouts
from slimlmm.muon import MOMENTUM, Muon, orthogonal
from slimlmm.optimizing import optimizers
from slimlmm.trainings import Training
from tiny import tiny

NAMES = ("llava-dinov2-llama", "smolvlm", "qwen2_5_vl", "blip2-opt")
SHAPES = ((24, 24), (8, 40), (40, 8), (1, 16), (16, 1))


def matrices(seed):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def with_gradients(parameters, seed):
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_orthogonal_factor_has_the_directions_of_its_matrix_and_singular_values_towards_one(shape):
    torch.manual_seed(3)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    wanted = sizes / matrix.norm()
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    assert torch.allclose(u @ torch.diag(wanted) @ v, orthogonal(1e-4 * matrix, torch.float64), atol=1e-12)
    large = wanted[sizes > 0.05 * matrix.norm()]
    assert 0.67 < large.min() <= large.max() < 1.21
    single = orthogonal(matrix.float(), torch.float32)
    assert torch.allclose(single.double(), u @ torch.diag(wanted) @ v, atol=1e-5)


def test_it_steps_as_torch_does_up_to_the_rounding_of_bfloat16():
    ours, theirs = matrices(0), matrices(0)
    one = Muon([{"params": ours, "lr": 0.01, "weight_decay": 0.1}], [], torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    full = Muon([{"params": (more := matrices(0)), "lr": 0.01, "weight_decay": 0.1}], [], torch.float32)
    began = copy.deepcopy(ours)
    for step in range(5):
        for optimizer, parameters in ((one, ours), (other, theirs), (full, more)):
            with_gradients(parameters, step)
            optimizer.step()
    for start, mine, reference, exact in zip(began, ours, theirs, more, strict=True):
        way = (reference - start).norm()
        assert (mine - reference).norm() < 1e-3 * way
        assert (exact - reference).norm() < 0.03 * way


def test_a_step_has_the_root_mean_square_of_one_by_adamw():
    for parameter in matrices(1)[:3]:
        before = parameter.detach().clone()
        with_gradients([parameter], 2)
        Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}], [], torch.float32).step()
        size = (parameter - before).square().mean().sqrt()
        assert 0.7 * 0.02 < size < 1.3 * 0.02  # .2 of the rate


def test_the_others_move_as_by_adamw_alone_also_behind_a_state_that_was_taken_up():
    torch.manual_seed(0)
    vector, matrix = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4, 6))
    twin = nn.Parameter(vector.detach().clone())

    def made():
        return Muon(
            [{"params": [matrix], "lr": 0.01, "weight_decay": 0.1}],
            [{"params": [vector], "lr": 0.01}],
            torch.float32,
            fused=True,
        )

    optimizer, alone = made(), torch.optim.AdamW([twin], lr=0.01, fused=True)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = made()
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups + alone.param_groups:  # as a schedule does
            group["lr"] = 0.01 / (1 + step)
        with_gradients([vector, matrix], step)
        twin.grad = vector.grad.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(vector, twin)
    assert set(optimizer.state[matrix]) == {"mean"}


def test_it_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"not parameters of shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "lr": 1.0, "weight_decay": 0.0}], [], torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_linear_maps_are_moved_by_muon_and_everything_trained_is_moved_once(name):
    model, _ = tiny(name)
    settings = Training(steps=1, optimizer="muon", freeze=("patch_embedding",))
    optimizer, _ = optimizers(model, describe(model.config), settings, Readouts({}, ""), None)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    moved = {
        by: [names[id(p)] for g in optimizer.param_groups if g["matrices"] is by for p in g["params"]]
        for by in (True, False)
    }
    assert len(set(moved[True] + moved[False])) == len(moved[True] + moved[False])
    conv = {
        f"{key}.{own}"
        for key, part in model.named_modules()
        if isinstance(part, nn.Conv2d | nn.Conv3d)
        for own, _ in part.named_parameters()
    }
    assert set(names.values()) - set(moved[True] + moved[False]) == conv
    assert not [key for key in moved[True] if "embed" in key or "lm_head" in key]
    linear = {
        f"{key}.weight" for key, part in model.named_modules() if isinstance(part, nn.Linear) and "lm_head" not in key
    }
    assert set(moved[True]) == linear


def test_a_training_by_muon_lowers_the_loss_and_leaves_frozen_parts_alone(tmp_path, rows):
    model, processor = tiny(NAMES[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = Training(
        steps=8,
        pictures_per_step=4,
        log_every=1,
        learning_rate=3e-3,
        optimizer="muon",
        freeze=("vision",),
        losses={"cross_entropy": 1.0},
    )
    found = train(model, processor, rows.train, settings, tmp_path)
    assert found.last_loss < 0.95 * found.first_loss
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert not [key for key in moved if "vision" in key]


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "constant"])
def test_schedules_that_ask_for_the_optimizers_own_rate_find_it(tmp_path, rows, schedule):
    model, processor = tiny("llava-dinov2-llama")
    settings = Training(
        steps=3, schedule=schedule, optimizer="muon", learning_rate=1e-3, warmup=0.0, losses={"cross_entropy": 1.0}
    )
    settings = settings.model_copy(update={"log_every": 1, "pictures_per_step": 2})
    rates = [one["learning_rate"] for one in train(model, processor, rows.train[:60], settings, tmp_path).history]
    assert rates[0] == pytest.approx(1e-3, rel=0.5)
    assert rates == sorted(rates, reverse=True)
