"""The store: what was acknowledged is there after a kill, one bad row costs no other, what is old goes, PostgreSQL as SQLite."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy

from slimlmm.errors import UserError
from slimlmm.serving.store import ANSWERS, DAY_S, EVENTS, PAIRS, PICTURES, Store, opened, sweep


def answer(name, at=1.0):
    held = {"id": name, "at": at, "task": "t", "arm": "student", "model": "m", "route": "student", "status": 200}
    return {**held, "question": "q", "answer": "a", "seconds": 0.1}


def count(database, table):
    with database.connect() as connection:
        return connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table)).scalar_one()


@pytest.fixture(params=["sqlite", "postgres"])
def where(request, tmp_path):
    return str(tmp_path / "store.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres")


def test_rows_of_all_kinds_are_written_and_a_bad_one_costs_no_other(where):
    store = Store(where)

    async def work():
        good = [store.add(ANSWERS, answer(f"row {number}")) for number in range(50)]
        bad = [store.add(ANSWERS, answer("row 7")), store.add(ANSWERS, answer("no time", at=None))]
        good += [store.add(ANSWERS, answer(f"{name}") | {"question": "a\ud800b\x00c"}) for name in ("odd", "odder")]
        bad += [store.add(ANSWERS, answer("no number") | {"seconds": object()})]
        event = store.add(EVENTS, {"at": 1.0, "kind": "returned", "detail": {"rule": "latency", "p": 0.01}})
        return await asyncio.gather(*good, *bad, event)

    taken = asyncio.run(work())
    assert taken == [True] * 52 + [False, False, False, True]
    assert store.failed == 3
    store.close()
    database = opened(where)
    assert count(database, ANSWERS) == 52
    with database.connect() as connection:
        question = sqlalchemy.select(ANSWERS.c.question).where(ANSWERS.c.id == "odd")
        assert connection.execute(question).scalar_one() == "a?bc"
        assert connection.execute(sqlalchemy.select(EVENTS.c.detail)).scalar_one() == {"rule": "latency", "p": 0.01}
    database.dispose()


def test_who_leaves_while_a_row_is_written_or_waits_does_not_end_the_writer(tmp_path, monkeypatch):
    store, may, insert = Store(str(tmp_path / "store.sqlite")), threading.Event(), Store._insert
    monkeypatch.setattr(Store, "_insert", lambda self, rows: (may.wait(10), insert(self, rows))[1])

    async def work():
        leaving = [asyncio.create_task(store.add(ANSWERS, answer(name))) for name in ("writing", "waiting", "no time")]
        await asyncio.sleep(0.1)  # the first is being written by now
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        may.set()
        return await asyncio.wait_for(store.add(ANSWERS, answer("next")), 10)

    assert asyncio.run(work())
    store.close()
    database = opened(store.where)
    assert count(database, ANSWERS) == 4
    database.dispose()


def test_what_is_older_than_is_kept_goes_and_events_stay(tmp_path):
    where = str(tmp_path / "store.sqlite")
    old = Store(where)
    now = time.time()

    async def work(store, name, at):
        await store.add(ANSWERS, answer(name, at))
        await store.add(EVENTS, {"at": at, "kind": "canary", "detail": {}})

    asyncio.run(work(old, "old", now - 8 * DAY_S))
    asyncio.run(work(old, "new", now - 6 * DAY_S))
    old.close()
    kept = Store(where, retention_days=7)
    asyncio.run(work(kept, "now", now))
    kept.close()
    database = opened(where)
    with database.connect() as connection:
        names = connection.execute(sqlalchemy.select(ANSWERS.c.id)).scalars().all()
    assert sorted(names) == ["new", "now"]
    assert count(database, EVENTS) == 3
    assert sweep(database, now + 1) == 2
    database.dispose()


WRITER = """
import asyncio, sys
sys.path[:0] = [sys.argv[2]]
from test_store import answer
from slimlmm.serving.store import ANSWERS, Store

async def main():
    store = Store(sys.argv[1])
    for number in range(100_000):
        rows = [f"{number}-{one}" for one in range(8)]
        await asyncio.gather(*(store.add(ANSWERS, answer(row)) for row in rows))
        print("\\n".join(rows), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("after", [0.2, 0.5, 0.9])
def test_no_acknowledged_row_is_lost_by_a_kill(tmp_path, after):
    where = tmp_path / "store.sqlite"
    command = [sys.executable, "-c", WRITER, str(where), os.path.dirname(__file__)]
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen(command, stdout=told)
        while not (tmp_path / "told").stat().st_size:
            time.sleep(0.05)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    acknowledged = (tmp_path / "told").read_text().split("\n")[:-1]
    assert len(acknowledged) >= 8
    database = opened(str(where))
    with database.connect() as connection:
        found = set(connection.execute(sqlalchemy.select(ANSWERS.c.id)).scalars())
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    database.dispose()
    assert set(acknowledged) <= found


@pytest.mark.parametrize(
    ("where", "told"),
    [("no/such/folder/a.sqlite", "unable to open"), ("nonsense://x", "nonsense"), ("mysql+pymysql://x/y", "pymysql")],
)
def test_a_store_that_cannot_be_opened_is_refused_with_its_reason(where, told):
    with pytest.raises(UserError, match=told):
        opened(where)


def test_the_last_share_of_a_candidate_is_known_after_a_restart(tmp_path):
    store = Store(str(tmp_path / "store.sqlite"))

    async def told(kind, candidate, weight):
        detail = {"candidate": candidate, "weight": weight}
        await store.add(EVENTS, {"at": 1.0, "kind": kind, "detail": detail})

    assert store.last_weight("new") is None
    asyncio.run(told("canary", "new", 0.5))
    asyncio.run(told("canary", "other", 0.7))
    assert store.last_weight("new") == 0.5
    asyncio.run(told("returned", "new", 0.0))
    asyncio.run(told("alarm", "new", 0.9))
    assert store.last_weight("new") == 0.0
    store.close()


def test_every_table_has_the_time_that_retention_goes_by():
    assert all("at" in table.c for table in (ANSWERS, PAIRS, PICTURES, EVENTS))
