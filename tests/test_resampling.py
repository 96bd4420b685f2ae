"""Intervals and p-values over pictures: exact distributions, textbook bounds, and no certainty from few pictures."""

import itertools

import numpy as np
import pytest
from scipy import stats

from slimlmm.resampling import Pictures

TAILS = (0.025, 0.975)


def lost(pictures, differing, by=1.0):
    """Return sums and sizes of pictures of one row, the first ones of which lost it."""
    sums = np.zeros(pictures)
    sums[:differing] = by
    return sums, np.ones(pictures)


def ends(sums, sizes, level=0.95):
    return Pictures(sums, sizes, 10_000, 0).interval(level)


def test_the_bootstrap_matches_the_exact_distribution_over_all_samples_of_pictures():
    sums, sizes = np.array([1.0, -2.0, 1.0]), np.array([2, 3, 2])
    every = [sums[list(d)].sum() / sizes[list(d)].sum() for d in itertools.product(range(3), repeat=3)]
    found = Pictures(sums, sizes, 20_000, 1).means
    assert np.quantile(found, [0.2, 0.8]) == pytest.approx(np.quantile(every, [0.2, 0.8]))


def test_one_picture_says_nothing():
    assert ends(np.array([1.0]), np.array([10])) is None
    assert Pictures(np.array([1.0]), np.array([10]), 100, 0).p_value() is None


@pytest.mark.parametrize("pictures", [3, 30, 300])
def test_no_difference_seen_leaves_room_for_some_by_the_rule_of_three(pictures):
    low, high = ends(*lost(pictures, 0))
    assert high == pytest.approx(1 - 0.025 ** (1 / pictures), rel=0.05)
    assert low == pytest.approx(-high, rel=0.05)


@pytest.mark.parametrize(("pictures", "differing"), [(12, 1), (60, 4), (400, 9), (20, 20)])
def test_few_losses_are_bounded_as_by_clopper_and_pearson(pictures, differing):
    sums, sizes = lost(pictures, differing)
    exact = stats.beta.ppf(0.975, differing + 1, pictures - differing) if differing < pictures else 1.0
    assert ends(sums, sizes)[1] == pytest.approx(exact, rel=0.03)
    low, high = ends(-sums, sizes)
    assert low == pytest.approx(-exact, rel=0.03)
    assert high > low


def test_rows_of_one_picture_do_not_count_as_pictures():
    few = Pictures(np.zeros(30), np.ones(30), 5000, 0).bounded(TAILS)
    assert Pictures(np.zeros(30), np.full(30, 12), 5000, 0).bounded(TAILS) == pytest.approx(few)


def test_a_drop_beyond_the_margin_is_seldom_called_kept():
    for pictures, true, margin in itertools.product((30, 150, 600), (0.021, 0.04, 0.08), (0.02,)):
        highs = [ends(*lost(pictures, x))[1] for x in range(min(pictures, 30))]
        wrong = sum(stats.binom.pmf(x, pictures, true) for x, high in enumerate(highs) if high <= margin)
        assert wrong < 0.05, (pictures, true)
        assert all(a <= b + 0.006 for a, b in itertools.pairwise(highs)), "more losses, a higher bound"


def test_the_p_value_of_few_pictures_is_mcnemars_exact_one():
    for gained, given in ((0, 5), (1, 7), (3, 3), (2, 0)):
        sums = np.array([-1.0] * gained + [1.0] * given + [0.0] * 40)
        exact = stats.binomtest(gained, gained + given).pvalue
        assert Pictures(sums, np.ones(len(sums)), 100, 0).p_value() == pytest.approx(exact)
    assert Pictures(*lost(3, 0), 100, 0).p_value() == 1.0
    assert Pictures(*lost(2, 2), 10_000, 0).p_value() == 0.5


def test_many_pictures_are_resampled():
    rng = np.random.default_rng(0)
    sums, sizes = rng.integers(-1, 3, 200).astype(float), np.full(200, 3)
    found = Pictures(sums, sizes, 1000, 5)
    assert found.interval(0.9) == tuple(np.quantile(found.means, [0.05, 0.95]))
    fewer = min((found.means <= 0).sum(), (found.means >= 0).sum())
    assert found.p_value() == min(1, 2 * (1 + fewer) / 1001)
