"""Drift against scipy's tests, and no cry over trifles."""

from datetime import date

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp

from monitored import BEGIN, drawn, fill
from slimlmm.monitoring import drift, references
from slimlmm.monitoring.monitor import Shown, monitor
from slimlmm.monitoring.reading import Window
from slimlmm.monitoring.references import Count, Reference, Sample
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import DAY_S, opened

RNG = np.random.default_rng(3)


def reference(samples=None, requests=None):
    none = Sample(n=0, values=())
    return Reference(
        arm="student",
        begin=BEGIN,
        end=BEGIN + DAY_S,
        tasks=(),
        requests=requests or {},
        disagreeing={"": Count(count=0, n=0)},
        errors=Count(count=0, n=0),
        seconds=none,
        confidences=none,
        samples={name: Sample.of(values) for name, values in (samples or {}).items()},
    )


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [300, 4000])
def test_distances_and_p_values_are_scipys(shift, n):
    before, after = RNG.normal(size=n), RNG.normal(shift, size=450)
    (told,) = drift.compared(reference({"picture contrast": before}), {"picture contrast": after}, {}, Monitoring())
    wanted = ks_2samp(before, after, method="asymp")
    assert told.effect == pytest.approx(wanted.statistic, abs=1 / references.KEPT if n > references.KEPT else 1e-12)
    if n <= references.KEPT:
        assert told.p == told.q == pytest.approx(wanted.pvalue)
    assert (told.reference_n, told.recent_n) == (n, 450)
    assert told.drifted == (told.q <= 0.05 and told.effect >= 0.1)
    assert told.drifted or shift < 1


def test_the_mix_of_tasks_is_compared_by_chi_square_and_rare_tasks_are_one():
    before, after = {"a": 500, "b": 480, "x": 3, "y": 4}, {"a": 700, "b": 300, "z": 4}
    (told,) = drift.compared(reference(requests=before), {}, after, Monitoring())
    assert told.p == pytest.approx(chi2_contingency([[500, 480, 7], [700, 300, 4]], correction=False).pvalue)
    shares = np.array([500, 480, 7]) / 987, np.array([700, 300, 4]) / 1004
    assert told.effect == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2)
    assert told.drifted
    assert drift.compared(reference(requests={"a": 500}), {}, {"a": 900}, Monitoring()) == []


def test_a_trifle_is_no_drift_at_any_n():
    before, after = RNG.normal(size=200_000), RNG.normal(0.05, size=200_000)
    (told,) = drift.compared(reference({"picture bytes": before}), {"picture bytes": after}, {}, Monitoring())
    assert told.p < 1e-6
    assert not told.drifted


def test_the_rate_of_false_discoveries_is_held_over_the_features():
    names = [f"picture {name}" for name in references.PICTURE_FEATURES]
    ref = reference({name: RNG.normal(size=500) for name in names})
    lively = Monitoring(drift_effect=0.001)
    rung = 0
    for _ in range(150):
        rung += any(
            one.drifted for one in drift.compared(ref, {name: RNG.normal(size=300) for name in names}, {}, lively)
        )
    assert rung < 20, (
        "of 150 at 5 %; P(20 or more) is below 1 in 10,000 for independent ones, and they share one reference"
    )


def test_few_values_are_not_compared():
    before, after = RNG.normal(size=500), RNG.normal(5, size=500)

    def told(n, m):
        return drift.compared(
            reference({"picture bytes": before[:n]}), {"picture bytes": after[:m]}, {"a": 10}, Monitoring()
        )

    assert told(500, 29) == told(199, 500) == []
    assert told(200, 30)[0].drifted


def test_distances_by_day_are_those_of_the_rows(tmp_path):
    store = opened(str(tmp_path / "store.sqlite"))
    tables = drawn(6, 300, bright=lambda day: 120 if day < 4 else 160)
    fill(store, tables)
    with store.connect() as connection:
        ref = references.made(connection, Window(BEGIN, BEGIN + 2 * DAY_S), ["a", "b"], "student")
        days = drift.by_day(connection, Window(BEGIN, BEGIN + 6 * DAY_S), ref)
    assert [one.day for one in days] == [date(2026, 1, 1 + number) for number in range(6)]
    rows = next(rows for table, rows in tables.items() if table.name == "pictures")
    first = [row["brightness"] for row in rows if row["at"] < BEGIN + 2 * DAY_S]
    last = [row["brightness"] for row in rows if row["at"] >= BEGIN + 5 * DAY_S]
    assert days[5].effects["picture brightness"] == pytest.approx(ks_2samp(first, last).statistic)
    assert days[5].effects["question words"] < 0.2 < days[5].effects["picture brightness"]


def test_drift_waits_until_the_recent_days_lie_behind_the_reference(tmp_path):
    store = opened(str(tmp_path / "store.sqlite"))
    fill(store, drawn(10, 200))
    found = monitor(store, Monitoring(reference_days=6, recent_days=5), Shown())
    assert found.drift == ()
    assert any("lie partly in the reference" in note for note in found.notes)
    assert monitor(store, Monitoring(reference_days=5, recent_days=5), Shown()).drift
    begun = monitor(store, Monitoring(reference_days=20), Shown())
    assert any("the reference lasts until 2026-01-20" in note for note in begun.notes)
    assert begun.rings == []
