"""Sequential tests: exact by enumeration, false alarms by simulation, and power where there is something to find."""

import itertools

import numpy as np
import pytest

from slimlmm.sequential import STAKES, Alarm, Bet


def expected_capital(p, low, high, n):
    """Return E[K_n] over all sequences of two values, by enumeration."""
    total = 0.0
    for draws in itertools.product((0, 1), repeat=n):
        bet = Bet(low)
        [bet.add(high if one else low) for one in draws]
        total += np.exp(bet.log_capital) * p ** sum(draws) * (1 - p) ** (n - sum(draws))
    return total


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.9, 0.1), (-0.05, 0.95)])
def test_the_capital_stays_1_on_average_where_the_mean_is_0_and_falls_below_it(low, high):
    fair = -low / (high - low)
    assert expected_capital(fair, low, high, 8) == pytest.approx(1, rel=1e-9)
    assert expected_capital(fair * 0.8, low, high, 8) < 1


def test_capital_is_the_product_of_its_bets():
    draws = [0.3, -0.5, 0.2, 0.5]
    bet = Bet(-0.5)
    [bet.add(one) for one in draws]
    wanted = np.mean([np.prod([1 + s * x / 0.5 for x in draws]) for s in STAKES])
    assert np.exp(bet.log_capital) == pytest.approx(wanted, rel=1e-12)
    assert bet.n == 4


def test_a_bet_is_rarely_won_by_luck_and_soon_where_it_is_right():
    rng = np.random.default_rng(0)
    won = 0
    for _ in range(200):
        bet = Bet(-1)
        [bet.add(x) for x in rng.choice([-1.0, 1.0], 400)]
        won += bet.p <= 0.05
    assert won <= 16, "P(more than 16 of 200 at 0.05) is below 3 %"
    for _ in range(20):
        bet = Bet(-1)
        [bet.add(x) for x in rng.choice([-1.0, 1.0], 400, p=[0.35, 0.65])]
        assert bet.p <= 0.05


def test_false_alarms_are_at_least_as_far_apart_as_was_asked_and_a_change_is_found_after_good_times():
    rng = np.random.default_rng(1)
    alarm = Alarm(-0.1, every=1000)
    rung = sum(alarm.add(0.9 if bad else -0.1) for bad in rng.random(40_000) < 0.1)
    assert rung <= 55, "40 are expected at most"
    delays = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        alarm = Alarm(-0.1, every=10_000)
        [alarm.add(0.9 if bad else -0.1) for bad in rng.random(2000) < 0.05]
        after = (0.9 if bad else -0.1 for bad in rng.random(2000) < 0.2)
        delays.append(next(n for n, x in enumerate(after, 1) if alarm.add(x)))
    assert np.median(delays) < 250


def test_observations_beyond_the_bound_are_refused():
    with pytest.raises(ValueError, match="below the bound"):
        Bet(-0.5).add(-0.6)
    with pytest.raises(ValueError, match="least"):
        Bet(0)
    with pytest.raises(ValueError, match="every"):
        Alarm(-1, 1)
