import pytest
import torch
from torch.nn import functional

from slimlmm.errors import UserError
from slimlmm.losses import (
    NEEDS_TEACHER,
    Seen,
    combine,
    cross_entropy,
    fitted_readout,
    forward_kl,
    pairwise_margin,
    state_match,
)

A, V = 5, 11


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(A, V, dtype=torch.float64), torch.randn(A, V, dtype=torch.float64), torch.randint(0, V, (A,))


def test_forward_kl_of_a_model_with_itself_is_zero(logits):
    student, _, _ = logits
    assert float(forward_kl(student, student)) == pytest.approx(0, abs=1e-12)


def test_forward_kl_equals_its_definition(logits):
    student, teacher, _ = logits
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(forward_kl(student, teacher), (p * (p / q).log()).sum())


def test_forward_kl_differs_from_cross_entropy_by_the_teachers_entropy(logits):
    student, teacher, _ = logits
    p = teacher.softmax(-1)
    soft = -(p * student.log_softmax(-1)).sum()
    entropy = -(p * p.log()).sum()
    assert torch.allclose(forward_kl(student, teacher), soft - entropy)


def test_pairwise_margin_by_hand():
    rows = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5], [1.0, 1.2, 0.0]])
    labels = torch.tensor([0, 0, 0])
    # margins: (3+1)/2 - 3 = -1 -> 0;  (2+1.5)/2 - 0 = 1.75 -> 1.75 * 1;  (1.2+1)/2 - 1 = .1 -> .1 * .1
    assert float(pairwise_margin(rows, labels)) == pytest.approx(1.75 + 0.01, rel=1e-5)


@pytest.mark.parametrize("loss", [cross_entropy, pairwise_margin])
def test_label_losses_have_the_gradient_of_finite_differences(logits, loss):
    student, _, labels = logits
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), student.requires_grad_(), atol=1e-6)


def test_forward_kl_has_the_gradient_of_finite_differences(logits):
    student, teacher, _ = logits
    assert torch.autograd.gradcheck(lambda x: forward_kl(x, teacher), student.requires_grad_(), atol=1e-6)


def test_combine_weights_and_sums(logits):
    student, teacher, labels = logits
    parts = combine({"cross_entropy": 2.0, "forward_kl": 0.5}, Seen(student, labels, teacher))
    expected = 2 * functional.cross_entropy(student, labels, reduction="sum") + 0.5 * forward_kl(student, teacher)
    assert torch.allclose(parts["total"], expected)


def test_unknown_loss_names_the_nearest(logits):
    student, teacher, labels = logits
    with pytest.raises(UserError, match="forward_kl"):
        combine({"forward_k": 1.0}, Seen(student, labels, teacher))


@pytest.mark.parametrize("loss", sorted(NEEDS_TEACHER))
def test_a_loss_that_needs_a_teacher_is_refused_without_one(logits, loss):
    student, _, labels = logits
    with pytest.raises(UserError, match=f"{loss} needs a teacher"):
        combine({loss: 1.0}, Seen(student, labels))


def test_picture_states_weigh_like_a_loss_per_answer_token(logits):
    student, _, labels = logits
    torch.manual_seed(1)
    here, there = torch.randn(30, 4), torch.randn(30, 3)
    seen = Seen(student, labels, student_NS=here, teacher_NH=there, readout=fitted_readout(here, there))
    parts = combine({"picture_states": 0.5}, seen)
    assert torch.allclose(parts["total"], (0.5 * A * state_match(here, there, seen.readout)).double())


def test_states_that_tell_all_match_and_states_that_tell_nothing_do_not():
    torch.manual_seed(1)
    teacher = torch.randn(400, 6) @ torch.randn(6, 9) + 3
    told = teacher @ torch.randn(9, 7)
    assert float(state_match(told, teacher, fitted_readout(told, teacher, ridge=1e-9))) < 1e-6
    nothing = torch.randn(400, 7)
    assert 0.9 < float(state_match(nothing, teacher, fitted_readout(nothing, teacher))) <= 1 + 1e-6


def test_fitted_readout_is_the_least_squares_solution():
    torch.manual_seed(1)
    student, teacher = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    readout = fitted_readout(student, teacher, ridge=0.0)
    design = torch.cat((student, torch.ones(50, 1)), 1)
    expected = torch.linalg.lstsq(design, teacher).solution
    assert torch.allclose(readout.weight.double(), expected[:4].T, atol=1e-6)
    assert torch.allclose(readout.bias.double(), expected[4], atol=1e-6)


def test_state_match_has_the_gradient_of_finite_differences():
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    readout = fitted_readout(torch.randn(6, 3), torch.randn(6, 4)).double()
    assert torch.autograd.gradcheck(lambda x: state_match(x, teacher, readout), student.requires_grad_(), atol=1e-6)
