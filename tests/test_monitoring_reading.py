"""What is read from the store, against plain sums in Python, on SQLite and, where it is installed, on PostgreSQL."""

import math
import random
from collections import defaultdict
from datetime import UTC, date, datetime

import numpy as np
import pytest
from scipy.stats import norm

from monitored import BEGIN, answer, fill, pair
from slimlmm.errors import UserError
from slimlmm.monitoring import reading
from slimlmm.monitoring.monitor import Shown, database_of, monitor, name_of
from slimlmm.monitoring.reading import OTHERS, UNNAMED, Window, share, window
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import ANSWERS, AUDITS, DAY_S, ENERGY, PAIRS, opened

DAYS = 6
WHOLE = Window(BEGIN, BEGIN + DAYS * DAY_S)


def rows(seed):
    """Return a store's tables with everything that can occur, times at midnight included."""
    rng = random.Random(seed)
    answers, pairs, audits = [], [], []
    for number in range(400):
        at = BEGIN + (rng.randrange(DAYS) * DAY_S if rng.random() < 0.1 else rng.random() * DAYS * DAY_S)
        name, task = f"{number}", rng.choice(["", "a", "b", "c", "d'e"])
        arm = rng.choice(["student", "student", "candidate"])
        route = rng.choice([arm, arm, "teacher"])
        status = rng.choice([200] * 8 + [400, 500, 503])
        sure = rng.choice([None, -rng.random()])
        more = {"task": task, "arm": arm, "route": route, "status": status, "confidence": sure, "seconds": rng.random()}
        answers.append(answer(name, at, **more))
        if rng.random() < 0.5:
            purpose = rng.choice(["shadow", "escalation"])
            pairs.append(pair(name, at + 1, agree=rng.random() < 0.8, purpose=purpose, arm=arm, task=task))
        for auditor in range(rng.choice([0, 0, 1, 2, 3])):
            audits.append(
                {"answer_id": name, "auditor": str(auditor), "at": at, "correct": rng.random() < 0.7, "label": None}
            )
    energy = [
        {
            "at": BEGIN + rng.random() * DAYS * DAY_S,
            "seconds": 1.0,
            "joules": rng.random(),
            "requests": rng.randrange(3),
            "source": s,
        }
        for s in ("rapl", "nvml") * 5
    ]
    return {ANSWERS: answers, PAIRS: pairs, AUDITS: audits, ENERGY: energy}


def day(at):
    return datetime.fromtimestamp(at, UTC).date()


def brute(tables, kept, arm):
    """Return the sums of each day and task in plain Python."""

    def named(task):
        return UNNAMED if task == "" else task if task in kept else OTHERS

    found = defaultdict(lambda: defaultdict(list))
    for row in tables[ANSWERS]:
        one = found[day(row["at"]), named(row["task"])]
        one["status"].append(row["status"])
        if row["status"] < 400:
            one["route"].append(row["route"])
            one["seconds"].append(row["seconds"])
        if row["arm"] == arm and row["confidence"] is not None:
            one["confidence"].append(row["confidence"])
        votes = [audit["correct"] for audit in tables[AUDITS] if audit["answer_id"] == row["id"]]
        if votes and sum(votes) * 2 != len(votes):
            one["audits"].append(sum(votes) * 2 > len(votes))
    for row in tables[PAIRS]:
        if row["arm"] == arm and row["at"] < WHOLE.end:
            found[day(row["at"]), named(row["task"])][row["purpose"]].append(row["agree"])
    return found


def same(told, one):
    """Assert that a record is what the lists say."""

    def counted(share, values):
        assert (share is None) == (not values)
        if values:
            assert (share.count, share.n) == (sum(values), len(values))

    assert told.requests == len(one["status"])
    counted(told.errors, [status >= 500 for status in one["status"]])
    assert told.statuses == {
        kind: n
        for kind in ("2xx", "4xx", "5xx")
        if (n := sum(status // 100 == int(kind[0]) for status in one["status"]))
    }
    assert told.routes == {name: one["route"].count(name) for name in set(one["route"])}
    counted(told.escalated, [route == "teacher" for route in one["route"]])
    counted(told.agreement, one["shadow"])
    counted(told.escalation_agreement, one["escalation"])
    counted(told.accuracy, one["audits"])
    if one["confidence"]:
        assert told.confidence == pytest.approx(np.mean(one["confidence"]))
    if one["seconds"]:
        wanted = np.percentile(one["seconds"], (50, 95, 99))
        assert (told.seconds.p50, told.seconds.p95, told.seconds.p99) == pytest.approx(tuple(wanted))
    else:
        assert told.seconds is None


def check(database, seed):
    tables = rows(seed)
    fill(database, tables)
    kept = ["", "a", "d'e"]
    with database.connect() as connection:
        sums = reading.tallies(connection, WHOLE, kept, "student")
        energy = reading.energy(connection, WHOLE, by_day=True)
    wanted = brute(tables, kept, "student")
    cells = reading.summed(sums, by_day=True, by_task=True, confidence=0.95)
    assert {(row.day, row.task) for row in cells} == set(wanted)
    for row in cells:
        same(row, wanted[row.day, row.task])
    for flags in (
        {"by_day": True, "by_task": False},
        {"by_day": False, "by_task": True},
        {"by_day": False, "by_task": False},
    ):
        for row in reading.summed(sums, **flags, confidence=0.95):
            inside = [one for (at, task), one in wanted.items() if row.day in (None, at) and row.task in ("", task)]
            keys = {key for one in inside for key in one}
            merged = defaultdict(list, {key: [value for one in inside for value in one[key]] for key in keys})
            same(row, merged)
    for one in energy:
        own = [row for row in tables[ENERGY] if day(row["at"]) == one.day and row["source"] == one.source]
        assert one.joules == pytest.approx(sum(row["joules"] for row in own))
        assert one.requests == sum(row["requests"] for row in own)
        assert (one.joules_per_request is None) == (one.requests == 0)
    assert sum(one.joules for one in energy) == pytest.approx(sum(row["joules"] for row in tables[ENERGY]))


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_plain_python(tmp_path, seed):
    check(opened(str(tmp_path / "store.sqlite")), seed)


def test_postgresql_says_the_same(postgres):
    database = opened(postgres)
    try:
        check(database, 7)
        found = monitor(database, Monitoring(reference_days=2, least_reference=5, recent_days=2), Shown(), write=True)
        again = monitor(database, Monitoring(reference_days=2, least_reference=5, recent_days=2), Shown(), write=True)
        assert found.rings == again.rings
        assert {one.name for one in found.watches} >= {"agreement", "errors", "latency", "confidence"}
    finally:
        database.dispose()


@pytest.mark.parametrize(("count", "n"), [(0, 7), (3, 7), (7, 7), (95, 100), (1, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_are_wilsons(count, n, confidence):
    told, z = share(count, n, confidence), norm.ppf((1 + confidence) / 2)
    middle = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    assert (told.low, told.high) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-12)
    assert share(0, 0, confidence) is None


def test_days_shown(tmp_path):
    whole = window(date(2026, 1, 1), date(2026, 1, 10))
    assert Shown().window(whole) == whole
    assert Shown(days=3).window(whole) == window(date(2026, 1, 8), date(2026, 1, 10))
    assert Shown(until=date(2026, 1, 5), days=2).window(whole) == window(date(2026, 1, 4), date(2026, 1, 5))
    assert Shown(since=date(2020, 1, 1)).window(whole) == whole
    with pytest.raises(UserError, match="2026-01-01 to 2026-01-10"):
        Shown(since=date(2026, 2, 1)).window(whole)
    with pytest.raises(UserError, match="--since and --days"):
        Shown(since=date(2026, 1, 1), days=3).window(whole)


def test_midnight_begins_a_day(tmp_path):
    database = opened(str(tmp_path / "store.sqlite"))
    fill(database, {ANSWERS: [answer("1", BEGIN + DAY_S - 0.001), answer("2", BEGIN + DAY_S)]})
    found = monitor(database, Monitoring(), Shown())
    assert [(row.day, row.requests) for row in found.days] == [(date(2026, 1, 1), 1), (date(2026, 1, 2), 1)]
    assert monitor(database, Monitoring(), Shown(until=date(2026, 1, 1))).total.requests == 1


def test_days_without_answers_between_others_are_told(tmp_path):
    database = opened(str(tmp_path / "store.sqlite"))
    fill(database, {ANSWERS: [answer("1", BEGIN + 7.0), answer("2", BEGIN + 5 * DAY_S)]})
    with pytest.raises(UserError, match="no answer from 2026-01-03 to 2026-01-04"):
        monitor(database, Monitoring(), Shown(since=date(2026, 1, 3), until=date(2026, 1, 4)))
    assert monitor(database, Monitoring(), Shown(until=date(2026, 1, 3))).newest == BEGIN + 7


def test_a_store_that_is_not_there_or_empty_is_told(tmp_path):
    for scheme in ("", "sqlite:///"):
        with pytest.raises(UserError, match="no such store"):
            database_of(f"{scheme}{tmp_path / 'none.sqlite'}")
    assert not (tmp_path / "none.sqlite").exists()
    (tmp_path / "text").write_text("no database, but a text that is long enough to be taken for one " * 20)
    with pytest.raises(UserError, match="not a database"):
        database_of(str(tmp_path / "text"))
    with pytest.raises(UserError, match="no answers yet"):
        monitor(opened(str(tmp_path / "store.sqlite")), Monitoring(), Shown())


def test_a_store_without_pairs_says_so(tmp_path):
    database = opened(str(tmp_path / "store.sqlite"))
    fill(database, {ANSWERS: [answer(str(n), BEGIN + n * DAY_S / 10, confidence=None) for n in range(300)]})
    found = monitor(database, Monitoring(), Shown())
    assert found.total.agreement is None
    assert found.total.confidence is None
    assert found.total.accuracy is None
    assert found.energy == ()
    assert any("no shadow pair" in note for note in found.notes)
    assert any("no picture" in note for note in found.notes)


def test_passwords_are_not_told():
    import sqlalchemy

    database = sqlalchemy.create_engine("postgresql+psycopg://me:secret@host/base")
    assert "secret" not in name_of(database)
    assert "host/base" in name_of(database)
