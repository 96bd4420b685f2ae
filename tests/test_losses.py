import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch.nn import functional

from slimlmm.errors import UserError
from slimlmm.losses import (
    DIVERGENCES,
    LOSSES,
    MATCHES,
    NEEDS_TEACHER,
    Match,
    Seen,
    combine,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    pairwise_margin,
    skew_kl,
    state_match,
    top_k_kl,
)
from slimlmm.readouts import Fit, fitted_readout
from slimlmm.trainings import LossName, Training

A, V = 5, 11
#: every divergence, and those with a knob at another setting; top_k_kl's k = 20 is more than V
ALL = DIVERGENCES | {
    "jensen_shannon, beta .2": partial(jensen_shannon, beta=0.2),
    "skew_kl, alpha .7": partial(skew_kl, alpha=0.7),
    "top_k_kl, k 4": partial(top_k_kl, k=4),
    "top_k_kl, k 1": partial(top_k_kl, k=1),
}
each_divergence = pytest.mark.parametrize("divergence", ALL.values(), ids=ALL)


def kl(p, q):
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def mixed(p, q, share):
    return [share * float(a) + (1 - share) * float(b) for a, b in zip(p, q, strict=True)]


def top_k(p, q, k):
    """KL of p from q over the k likeliest of p and the rest as one, from sorted lists."""
    order = sorted(range(len(p)), key=lambda at: -float(p[at]))
    p, q = ([float(x[at]) for at in order] for x in (p, q))
    p, q = (x[:k] + ([sum(x[k:])] if k < len(x) else []) for x in (p, q))
    return kl(p, q)


def shannon(p, q, beta):
    return beta * kl(p, mixed(p, q, beta)) + (1 - beta) * kl(q, mixed(p, q, beta))


#: the same by plain probabilities p of the teacher and q of the student, one token at a time
BY_HAND = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: shannon(p, q, 0.5),
    "skew_kl": lambda p, q: kl(p, mixed(p, q, 0.1)),
    "top_k_kl": lambda p, q: top_k(p, q, 20),
    "jensen_shannon, beta .2": lambda p, q: shannon(p, q, 0.2),
    "skew_kl, alpha .7": lambda p, q: kl(p, mixed(p, q, 0.7)),
    "top_k_kl, k 4": lambda p, q: top_k(p, q, 4),
    "top_k_kl, k 1": lambda p, q: top_k(p, q, 1),
}


def by_hand(name, student, teacher):
    return sum(BY_HAND[name](p, q) for p, q in zip(teacher.softmax(-1), student.softmax(-1), strict=True))


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(A, V, dtype=torch.float64), torch.randn(A, V, dtype=torch.float64), torch.randint(0, V, (A,))


def test_recipes_and_losses_know_the_same_names():
    assert set(get_args(LossName)) == set(LOSSES)


@each_divergence
def test_a_divergence_is_zero_for_equal_logits_and_else_positive(logits, divergence):
    student, teacher, _ = logits
    assert float(divergence(student, student)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(student, student + 3)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(student, teacher)) > 1e-3
    for scale in (0.1, 5.0):
        for student_1V, teacher_1V in zip(scale * student, scale * teacher, strict=True):
            assert float(divergence(student_1V[None], teacher_1V[None])) >= 0


@pytest.mark.parametrize("name", ALL)
def test_a_divergence_equals_its_definition(logits, name):
    student, teacher, _ = logits
    assert float(ALL[name](student, teacher)) == pytest.approx(by_hand(name, student, teacher), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_divides_logits_and_multiplies_the_loss_by_its_square(logits, name, temperature):
    student, teacher, labels = logits
    seen = Seen(student, labels, teacher, temperature=temperature)
    expected = temperature**2 * by_hand(name, student / temperature, teacher / temperature)
    assert float(combine({name: 1.0}, seen)["total"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "law"),
    [
        ({"losses": {"jensen_shannon": 1.0}, "jensen_shannon_beta": 0.2}, "jensen_shannon, beta .2"),
        ({"losses": {"skew_kl": 1.0}, "skew_kl_alpha": 0.7}, "skew_kl, alpha .7"),
        ({"losses": {"top_k_kl": 1.0}, "top_k": 4}, "top_k_kl, k 4"),
    ],
)
def test_a_recipe_shapes_its_divergences(logits, keys, law):
    student, teacher, labels = logits
    training = Training(steps=1, **keys)
    seen = Seen(student, labels, teacher, shapes=training.shapes)
    assert float(combine(training.losses, seen)["total"]) == pytest.approx(by_hand(law, student, teacher), rel=1e-12)
    assert set(Training(steps=1, **keys | {"losses": {"forward_kl": 1.0}}).vain()) == set(keys) - {"losses"}
    assert not training.vain()


def test_temperature_one_changes_no_bit_and_labels_know_no_temperature(logits):
    student, teacher, labels = logits
    student, teacher = 7 * student.float(), 7 * teacher.float()
    assert torch.equal(
        combine({"forward_kl": 1.0}, Seen(student, labels, teacher))["total"], forward_kl(student, teacher)
    )
    hot = combine({"cross_entropy": 1.0, "pairwise_margin": 1.0}, Seen(student, labels, teacher, temperature=4.0))
    assert torch.equal(hot["total"], cross_entropy(student, labels) + pairwise_margin(student, labels))


@each_divergence
def test_a_divergence_has_the_gradient_of_finite_differences(logits, divergence):
    student, teacher, _ = logits
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher), student.requires_grad_(), atol=1e-6)


@each_divergence
def test_a_divergence_does_not_know_the_order_of_tokens(logits, divergence):
    student, teacher, _ = logits
    order = torch.randperm(V)
    assert torch.allclose(divergence(student[:, order], teacher[:, order]), divergence(student, teacher), rtol=1e-12)


@each_divergence
def test_extreme_logits_give_finite_losses_and_gradients(divergence):
    student = torch.full((2, V), -1e4)
    student[:, 0] = 1e4
    teacher = student.roll(1, -1)
    teacher[1] = student[1]
    for dtype in (torch.float32, torch.float64):
        for here, there in ((student, teacher), (teacher, student), (student, torch.zeros(2, V))):
            leaf = here.to(dtype, copy=True).requires_grad_()
            loss = divergence(leaf, there.to(dtype))
            loss.backward()
            assert loss.isfinite()
            assert loss >= 0
            assert leaf.grad.isfinite().all()


def test_nearly_sure_teachers_leave_a_divergence_exact_in_single_precision(logits):
    """Probabilities of 1 - 1e-9 round to 1; what they leave must not."""
    student, teacher, labels = logits
    teacher = teacher + 22 * functional.one_hot(labels, V)
    for name, divergence in ALL.items():
        expected = by_hand(name, student, teacher)
        assert float(divergence(student.float(), teacher.float())) == pytest.approx(expected, rel=1e-5), name
        expected = by_hand(name, teacher, student)
        assert float(divergence(teacher.float(), student.float())) == pytest.approx(expected, rel=1e-5), name


def test_skew_kl_becomes_forward_kl_without_a_share_of_the_teacher_and_is_bounded_with_one(logits):
    student, teacher, _ = logits
    gaps = [float(forward_kl(student, teacher) - skew_kl(student, teacher, alpha)) for alpha in (1e-2, 1e-4, 1e-8)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 1e-6
    opposed = torch.tensor([[100.0, 0.0]])
    assert float(skew_kl(opposed, -opposed)) == pytest.approx(-math.log(0.1), rel=1e-6)


def test_jensen_shannon_is_symmetric_and_at_most_log_2_a_token(logits):
    student, teacher, _ = logits
    assert torch.allclose(jensen_shannon(student, teacher), jensen_shannon(teacher, student), rtol=1e-12)
    assert float(jensen_shannon(50 * student, 50 * teacher)) <= A * math.log(2)
    opposed = torch.tensor([[100.0, 0.0]])
    assert float(jensen_shannon(opposed, -opposed)) == pytest.approx(math.log(2), rel=1e-6)


def test_top_k_kl_grows_with_k_up_to_forward_kl(logits):
    student, teacher, _ = logits
    losses = [float(top_k_kl(student, teacher, k)) for k in range(1, V + 2)]
    assert losses[:-2] == sorted(losses[:-2])  # the last three are one number, but for rounding
    assert losses[-3:] == pytest.approx([float(forward_kl(student, teacher))] * 3, rel=1e-12)  # k = V - 1, V, V + 1
    assert losses[3] < 0.99 * losses[-1]


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


@pytest.mark.parametrize("name", MATCHES)
def test_a_match_of_states_weighs_like_a_loss_per_answer_token(logits, name):
    student, _, labels = logits
    torch.manual_seed(1)
    here, there = torch.randn(30, 4), torch.randn(30, 3)
    readout = fitted_readout(here, there)
    parts = combine({name: 0.5}, Seen(student, labels, matches={name: Match(here, there, readout)}))
    assert torch.allclose(parts["total"], (0.5 * A * state_match(here, there, readout)).double())


def test_states_that_tell_all_match_and_states_that_tell_nothing_do_not():
    torch.manual_seed(1)
    teacher = torch.randn(400, 6) @ torch.randn(6, 9) + 3
    told = teacher @ torch.randn(9, 7)
    assert state_match(told, teacher, fitted_readout(told, teacher, ridge=1e-9)).item() < 1e-6
    nothing = torch.randn(400, 7)
    assert 0.9 < state_match(nothing, teacher, fitted_readout(nothing, teacher)).item() <= 1 + 1e-6


def test_a_match_weighs_each_token_the_same_in_whatever_batch_it_comes():
    torch.manual_seed(1)
    student, teacher = torch.randn(40, 5), torch.randn(40, 3)
    readout = fitted_readout(student, teacher)
    whole = state_match(student, teacher, readout) * 40
    parts = [(0, 1), (1, 2), (2, 7), (7, 40)]  # of a single token too, whose own spread is 0
    apart = sum(state_match(student[a:b], teacher[a:b], readout) * (b - a) for a, b in parts)
    assert torch.allclose(whole, apart)


def test_states_that_are_all_the_same_are_nothing_to_match():
    with pytest.raises(UserError, match=r"states at 8 token\(s\) .* are all the same"):
        fitted_readout(torch.randn(8, 3), torch.ones(8, 4))


def test_fitted_readout_is_the_least_squares_solution():
    torch.manual_seed(1)
    student, teacher = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    readout = fitted_readout(student, teacher, ridge=0.0)
    design = torch.cat((student, torch.ones(50, 1)), 1)
    expected = torch.linalg.lstsq(design, teacher).solution
    assert torch.allclose(readout.weight.double(), expected[:4].T, atol=1e-6)
    assert torch.allclose(readout.bias.double(), expected[4], atol=1e-6)


def test_a_map_is_the_same_in_however_many_batches_its_tokens_come():
    torch.manual_seed(2)
    student, teacher = torch.randn(50, 4) + 30, torch.randn(50, 3) - 20
    for same in (False, True):
        fits = [Fit(same=same) for _ in range(2)]
        fits[0].add(student, teacher)
        for a, b in ((0, 1), (1, 20), (20, 50)):
            fits[1].add(student[a:b], teacher[a:b])
        one, other = (fit.map() for fit in fits)
        spread = (teacher - teacher.mean(0)).square().sum(1).mean()
        assert float(one.spread) == pytest.approx(float(spread), rel=1e-5)
        assert all(
            torch.allclose(value, other.state_dict()[name], rtol=1e-5) for name, value in one.state_dict().items()
        )


def test_state_match_has_the_gradient_of_finite_differences():
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    readout = fitted_readout(torch.randn(6, 3), torch.randn(6, 4)).double()
    assert torch.autograd.gradcheck(lambda x: state_match(x, teacher, readout), student.requires_grad_(), atol=1e-6)
