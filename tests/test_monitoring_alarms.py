"""Alarms: the same as one observation at a time, early where something changed, rare where nothing did, written once."""

import numpy as np
import pytest
from sqlalchemy import func, select

from monitored import BEGIN, drawn, fill
from slimlmm.monitoring import references
from slimlmm.monitoring.alarms import allowed, watches, write, written
from slimlmm.monitoring.detector import Detector
from slimlmm.monitoring.monitor import Shown, asked, monitor
from slimlmm.monitoring.reading import Window
from slimlmm.monitoring.records import Ring
from slimlmm.monitoring.references import Count, Sample
from slimlmm.monitoring.settings import Monitoring
from slimlmm.sequential import Alarm
from slimlmm.serving.store import DAY_S, EVENTS, opened, sweep

SETTINGS = Monitoring(reference_days=10, recent_days=3, every=3000, rest_hours=0)


def detector(least, every, **more):
    return Detector("one", "kind", "what", 0.0, -least, least, 1.0, every=every, **more)


@pytest.mark.parametrize("least", [-0.02, -0.3, -1.0])
@pytest.mark.parametrize("part", [1, 7, 5000])
def test_many_at_once_ring_as_one_by_one(least, part):
    rng = np.random.default_rng(0)
    share = -least * np.where(np.arange(5000) % 1500 > 900, 2.5, 0.9)
    xs = (rng.random(5000) < share) + least
    times = np.arange(5000.0) + 1
    alarm = Alarm(least, 500)
    wanted = [time for time, x in zip(times, xs, strict=True) if alarm.add(x)]
    one = detector(least, 500)
    for begin in range(0, 5000, part):
        one.add(times[begin : begin + part], xs[begin : begin + part])
    assert len(wanted) > 2
    assert [ring.at for ring in one.rings] == wanted
    assert one.value == pytest.approx(alarm.value, rel=1e-9)
    assert one.n == alarm.n


def test_evidence_that_overflows_still_rings():
    one = detector(-1e-6, 1e6)
    one.add(np.arange(600.0) + 1, np.ones(600))
    assert one.rings
    assert np.isfinite([ring.at for ring in one.rings]).all()


def test_after_an_alarm_a_watch_rests_and_begins_anew():
    xs, times = np.full(400, 0.9), np.arange(400.0) + 1
    lively, resting = detector(-0.1, 50), detector(-0.1, 50, rest=100.0)
    lively.add(times, xs)
    resting.add(times, xs)
    first = lively.rings[0].at
    assert [ring.at for ring in resting.rings[:2]] == [first, 2 * first + 100]
    assert len(lively.rings) > 3 * len(resting.rings)
    late = detector(-0.1, 50, begin=200.0)
    late.add(times, xs)
    assert late.rings[0].at == 200 + first


def test_the_time_of_a_change_is_found_again():
    errors = []
    for seed in range(30):
        draws = np.random.default_rng(seed).random(6000)
        xs = (draws < np.where(np.arange(6000) < 4000, 0.05, 0.2)) - 0.06
        one = detector(-0.06, 1e4)
        one.add(np.arange(6000.0), xs)
        ring = one.rings[0]
        assert ring.observations == ring.at - ring.began + 1
        errors.append(ring.began - 4000)
    assert abs(np.median(errors)) < 30


def test_what_is_allowed_covers_the_margin_and_the_chance_of_the_reference():
    assert allowed(Count(count=500, n=10_000), 0.01) == pytest.approx(0.06)
    assert allowed(Count(count=5, n=100), 0.01) > 0.09, "a small reference says little"
    assert 0 < allowed(Count(count=0, n=500), 0.0) < 0.01


def test_ranks_are_mid_ranks():
    values = np.array([1.0, 2.0, 2.0, 3.0])
    sample = Sample.of(values)
    assert sample.ranks(np.array([0.0, 1.0, 2.0, 2.5, 9.0])).tolist() == [0, 0.125, 0.5, 0.75, 1]
    rng = np.random.default_rng(0)
    many = rng.normal(size=9000)
    thin = Sample.of(many)
    assert (thin.n, len(thin.values)) == (9000, references.KEPT)
    at = rng.normal(size=500)
    exact = (many[:, None] <= at).mean(axis=0)
    assert np.abs(thin.ranks(at) - exact).max() < 2 / references.KEPT


@pytest.fixture
def store(tmp_path):
    return opened(str(tmp_path / "store.sqlite"))


def test_a_change_of_each_kind_rings_its_own_watch_soon(store):
    change = {"disagree": lambda day: 0.05 if day < 20 else 0.35, "seconds": lambda day: 0.02 if day < 20 else 0.05}
    fill(store, drawn(30, 200, **change, bright=lambda day: 120.0 if day < 20 else 170.0))
    found = monitor(store, SETTINGS, Shown())
    rung = {}
    for ring in found.rings:
        rung.setdefault(ring.watch, (ring.at - BEGIN) / DAY_S)
    assert set(rung) >= {"agreement", "latency", "picture brightness higher"}
    assert set(rung) <= {"agreement", "agreement of a", "agreement of b", "latency", "picture brightness higher"}
    assert all(20 < day < 22.5 for name, day in rung.items() if " of " not in name)
    began = next(ring.began for ring in found.rings if ring.watch == "agreement")
    assert abs(began - (BEGIN + 20 * DAY_S)) < 1.5 * DAY_S
    assert [one.feature for one in found.drift if one.drifted] == ["picture brightness"]


def test_nothing_rings_while_nothing_changes(store):
    fill(store, drawn(40, 200))
    found = monitor(store, SETTINGS, Shown())
    assert found.rings == []
    assert not any(one.drifted for one in found.drift)
    assert all(0 <= watch.level < 1 for watch in found.watches)


def test_alarms_are_in_the_store_only_when_asked_and_once_whatever_is_deleted(store):
    tables = drawn(30, 200, disagree=lambda day: 0.05 if day < 18 else 0.3)
    early, late = (
        {table: [row for row in rows if (row["at"] < BEGIN + 22 * DAY_S) == first] for table, rows in tables.items()}
        for first in (True, False)
    )
    fill(store, early)

    def events(kind):
        with store.connect() as connection:
            return connection.scalar(select(func.count()).select_from(EVENTS).where(EVENTS.c.kind == kind))

    seen = monitor(store, SETTINGS, Shown()).rings
    assert seen
    assert events("alarm") == events("reference") == 0
    assert monitor(store, SETTINGS, Shown(), write=True).rings == seen
    assert (events("alarm"), events("reference")) == (len(seen), 1)
    monitor(store, SETTINGS, Shown(), write=True)
    assert (events("alarm"), events("reference")) == (len(seen), 1)
    fill(store, late)
    before = monitor(store, SETTINGS, Shown())
    sweep(store, BEGIN + 21.5 * DAY_S)
    after = monitor(store, SETTINGS, Shown(), write=True)
    agreement = [[ring for ring in one.rings if ring.watch == "agreement"] for one in (before, after)]
    assert len(agreement[0]) > sum(ring.watch == "agreement" for ring in seen)
    assert [ring for ring in agreement[0] if ring.at >= BEGIN + 21 * DAY_S] == agreement[1]
    assert after.reference_since == before.reference_since, "the reference outlives its rows"
    assert events("alarm") == len(monitor(store, SETTINGS, Shown()).rings) + sum(
        ring.at < BEGIN + 21 * DAY_S for ring in seen
    )


def test_two_that_write_the_same_alarm_write_it_once(store):
    ring = Ring(watch="agreement", at=5.0, began=1.0, observations=9)
    with asked(store) as connection:
        assert write(connection, [ring], "student") == 1
        assert write(connection, [ring, ring.model_copy(update={"at": 4.0})], "student") == 0
        assert write(connection, [ring], "candidate") == 1
        assert written(connection, "student", 0, 9) == {"agreement": [ring]}


def test_false_alarms_are_shared_out_and_small_references_keep_no_watch(store):
    fill(store, drawn(10, 200))
    settings = Monitoring(reference_days=10, false_alarm_days=100, least_reference=300)
    with store.connect() as connection:
        reference = references.made(connection, Window(BEGIN, BEGIN + 10 * DAY_S), ["a", "b"], "student")
    found = [one.detector for one in watches(reference, settings)]
    assert sum(one.rate / one.every for one in found) == pytest.approx(1 / 100)
    assert {one.name for one in found} == {
        *("agreement", "errors", "latency", "confidence", "question words higher", "question words lower"),
        *("question characters higher", "question characters lower"),
        *(
            f"picture {name} {word}"
            for name in ("brightness", "contrast", "entropy", "saturation", "bytes")
            for word in ("higher", "lower")
        ),
    }, "some 200 pairs of each task are too few, or all pictures have one size"
    assert watches(reference, Monitoring(least_reference=10_000)) == []
