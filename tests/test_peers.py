"""The paper's recipe in `benchmarks/peers/paper.py`: importance, ramp, and that the cut leaves what the masks computed."""

import sys
from pathlib import Path

import pytest
import torch

from slimlmm.anatomy import describe
from slimlmm.surgery import cut
from tiny import tiny, tiny_batch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "peers"))
from paper import Ramp, plain

FAMILY = "llava-dinov2-llama"


def started(axis: str, size: int, steps: int):
    model, _ = tiny(FAMILY)
    return model, Ramp(model, describe(model.config).axis(axis), size, steps), tiny_batch(FAMILY, model)


def trained_step(model, batch) -> None:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()


def test_importance_is_the_absolute_sum_of_grad_times_weight_over_steps():
    model, ramp, batch = started("text.ffn", 4, steps=3)
    down = model.get_parameter(f"{ramp.axis.groups[0].slots[-1].parameter}")
    by_hand = torch.zeros(down.shape[1])
    with ramp:
        for _ in range(2):
            trained_step(model, batch)
            by_hand += (down.grad * down.detach()).sum(0)
            with torch.no_grad():
                down.mul_(1.01)
    assert torch.allclose(ramp.sums[ramp.axis.groups[0].name], by_hand, rtol=1e-4, atol=1e-7)


def test_importance_is_the_slope_of_the_loss_in_the_unit_s_mask():
    """Sum over a column of grad x weight = mask x dL/dmask, by a central difference."""
    model, ramp, batch = started("text.ffn", 4, steps=3)
    group = ramp.axis.groups[0]
    losses = []
    with ramp, torch.no_grad():
        for shift in (1e-2, -1e-2):
            ramp.masks[group.name][3] = 1 + shift
            losses.append(
                float(
                    model.double()
                    .eval()(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
                    .loss
                )
            )
    model, ramp, batch = started("text.ffn", 4, steps=3)
    with ramp:
        trained_step(model, batch)
    assert float(ramp.sums[group.name][3]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=1e-6)


def test_the_ramp_chooses_evenly_the_least_important_and_never_takes_back():
    model, ramp, batch = started("text.ffn", 4, steps=5)
    group = ramp.axis.groups[0]
    gone, counts, before = group.units - ramp.kept[group.name], [], torch.zeros(group.units, dtype=torch.bool)
    with ramp:
        for _ in range(5):
            scores = ramp.sums[group.name].abs().clone()
            trained_step(model, batch)
            chosen = ramp.chosen[group.name].clone()
            assert bool(chosen[before].all())
            new, stay = chosen & ~before, ~chosen
            assert not new.any() or scores[new].max() <= scores[stay].min()
            counts.append(int(chosen.sum()))
            before = chosen
    assert counts == [round(gone * step / 4) for step in range(5)]


def test_looks_in_evaluation_mode_move_nothing():
    model, ramp, batch = started("text.ffn", 4, steps=5)
    with ramp:
        model.eval()(**batch).loss.backward()
    assert ramp.step == 0
    assert not any(bool(total.any()) for total in ramp.sums.values())


@pytest.mark.parametrize("axis", ["text.ffn", "text.width", "vision.width", "text.blocks", "vision.blocks"])
def test_a_plain_cut_after_the_ramp_leaves_what_the_masked_model_computed(axis):
    model, _ = tiny(FAMILY)
    found = describe(model.config).axis(axis)
    size = found.choices()[max(0, len(found.choices()) // 2 - 1)]
    ramp, batch = Ramp(model, found, size, steps=4), tiny_batch(FAMILY, model)
    with ramp:
        for _ in range(4):
            trained_step(model, batch)
        with torch.no_grad():
            masked = model.eval()(**batch).logits
    with torch.no_grad():
        whole = model(**batch).logits
        student = cut(model, plain(describe(model.config)), axis, ramp.keep()).eval()
        left = student(**batch).logits
    assert (masked - whole).abs().max() > 1e-3
    assert torch.allclose(masked, left, atol=1e-4 * float(masked.abs().max()))


def test_few_units_fade_and_the_last_blocks_go_first():
    model, ramp, batch = started("vision.blocks", 1, steps=9)
    group = ramp.axis.groups[0]
    with ramp:
        for _ in range(2):
            trained_step(model, batch)
    masks = ramp.masks[group.name]
    assert 0 < float(masks[-1]) < 1
    assert bool((masks[:-1] == 1).all())
    assert ramp.keep()[group.name].tolist() == [0]
    model, ramp, batch = started("text.kv_groups", 1, steps=4)
    group = ramp.axis.groups[0]
    with ramp:
        for _ in range(4):
            trained_step(model, batch)
    faded = ramp.masks[group.name][ramp.chosen[group.name]]
    assert len(faded) == group.units - 1
    assert float(faded.max()) == pytest.approx(0.9)
