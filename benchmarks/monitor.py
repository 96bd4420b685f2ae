"""How soon the monitor's alarms ring after a change, and how often without one, on synthetic logs of three months.

    python benchmarks/monitor.py --out benchmarks/results/monitor.json [--seeds 120] [--quiet-seeds 400]

A log has 2,000 requests a day with a daily and a weekly rhythm (also of agreement, seconds and brightness), five tasks, a teacher
that is asked about 5 % of them and agrees with 95 %. From day 60 on one thing is changed. Its watches are those of `slimlmm
monitor` with their defaults; beside them, for comparison, a z-test of each day's agreement against the reference at 5 %. Three
logs also go through a real store and the verb's own function.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy
from numpy.typing import NDArray

from slimlmm import __version__
from slimlmm.monitoring import alarms, monitor
from slimlmm.monitoring.records import Ring
from slimlmm.monitoring.references import Count, Reference, Sample
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import ANSWERS, DAY_S, PAIRS, PICTURES, Store

Values = NDArray[np.float64]
#: a Monday
BEGIN = 1_785_110_400.0
DAYS, CHANGED, REQUESTS, SHADOWED = 90, 60, 2000, 0.05
TASKS = ("price", "slogan", "object", "colour", "match")
MIX = np.array((0.3, 0.25, 0.2, 0.15, 0.1))
#: disagreement with the teacher by task, 5 % over the mix
DISAGREEING = np.array((0.06, 0.06, 0.04, 0.035, 0.0375))
#: of answers over the week and of an hour over the day
WEEK = np.array((1.1, 1.15, 1.15, 1.1, 1.0, 0.75, 0.75))
MEDIAN_S, ERRORS = 0.025, 0.001


@dataclass(frozen=True, slots=True)
class Change:
    """What is changed from day 60 on, and the watch that is meant to tell."""

    name: str
    watch: str = ""
    disagreement: float = 0.0
    brightness: float = 0.0
    slower: float = 1.0
    shadowed: float = SHADOWED


CHANGES = (
    Change("agreement -3 points", "agreement", disagreement=0.03),
    Change("agreement -5 points", "agreement", disagreement=0.05),
    Change("agreement -10 points", "agreement", disagreement=0.10),
    Change("agreement -3 points, 20 % shadowed", "agreement", disagreement=0.03, shadowed=0.2),
    Change("brightness +20 (0.5 SD)", "picture brightness higher", brightness=20.0),
    Change("brightness +40 (1 SD)", "picture brightness higher", brightness=40.0),
    Change("latency doubled", "latency", slower=2.0),
)
QUIET = Change("nothing")


@dataclass(frozen=True, slots=True)
class Log:
    """Answers in the order of time; pairs and pictures are those of the shadowed ones."""

    at: Values
    task: NDArray[np.int64]
    status: Values
    seconds: Values
    confidence: Values
    words: Values
    characters: Values
    shadowed: NDArray[np.bool_]
    disagree: Values
    pictures: Mapping[str, Values]


def log_of(seed: int, change: Change, days: int = DAYS, requests: int = REQUESTS) -> Log:
    """Return a log; logs of one seed differ by the change alone."""
    rng = np.random.default_rng(seed)
    at = _times(rng, days, requests)
    n = len(at)
    hours = 2 * np.pi * ((at - BEGIN) % DAY_S) / DAY_S
    week = 2 * np.pi * ((at - BEGIN) % (7 * DAY_S)) / (7 * DAY_S)
    late = at >= BEGIN + CHANGED * DAY_S
    task = rng.choice(len(TASKS), n, p=MIX)
    rate = DISAGREEING[task] * (1 + 0.1 * np.sin(hours) + 0.1 * np.sin(week)) + change.disagreement * late
    disagree = (rng.random(n) < rate).astype(np.float64)
    words = (3 + rng.poisson(5 + task)).astype(np.float64)
    grey = rng.normal(125 + 4 * np.sin(hours), 40, n) + change.brightness * late
    side = rng.choice((224.0, 336.0, 512.0), n, p=(0.2, 0.6, 0.2))
    return Log(
        at=at,
        task=task,
        status=np.where(rng.random(n) < ERRORS, 503.0, 200.0),
        seconds=MEDIAN_S * np.exp(rng.normal(0.1 * np.sin(hours), 0.4, n)) * np.where(late, change.slower, 1.0),
        confidence=-rng.exponential(np.where(disagree > 0, 0.8, 0.15)),
        words=words,
        characters=(5 * words + rng.integers(0, 10, n)).astype(np.float64),
        shadowed=rng.random(n) < change.shadowed,
        disagree=disagree,
        pictures={
            "brightness": grey.clip(0, 255),
            "contrast": rng.normal(55, 15, n).clip(0),
            "entropy": rng.normal(7, 0.5, n).clip(0, 8),
            "saturation": rng.normal(90, 35, n).clip(0, 255),
            "pixels": side**2,
            "bytes": np.round(side**2 * rng.lognormal(-1.5, 0.3, n)),
        },
    )


def _times(rng: np.random.Generator, days: int, requests: int) -> Values:
    """Return arrivals of a Poisson process with a rhythm, by thinning."""
    drawn = np.sort(rng.random(rng.poisson(days * requests * 2)) * days * DAY_S)
    hours = 2 * np.pi * (drawn % DAY_S) / DAY_S
    rate = WEEK[(drawn // DAY_S).astype(int) % 7] * (1 + 0.6 * np.sin(hours - 2))
    return np.asarray(BEGIN + drawn[rng.random(len(drawn)) < rate / 2 / WEEK.mean()], np.float64)


def reference_of(log: Log, settings: Monitoring) -> Reference:
    """Return the reference of the first days, as `references.made` reads it from a store."""
    end = BEGIN + settings.reference_days * DAY_S
    first = log.at < end
    pairs = first & log.shadowed
    by_task = {name: pairs & (log.task == number) for number, name in enumerate(TASKS)}
    values = {f"picture {name}": found[pairs] for name, found in log.pictures.items()}
    values |= {"question characters": log.characters[first], "question words": log.words[first]}
    return Reference(
        arm=settings.arm,
        begin=BEGIN,
        end=end,
        tasks=TASKS,
        requests={name: int((first & (log.task == number)).sum()) for number, name in enumerate(TASKS)},
        disagreeing={
            name: Count(count=int(log.disagree[inside].sum()), n=int(inside.sum()))
            for name, inside in {"": pairs, **by_task}.items()
        },
        errors=Count(count=int((log.status[first] >= 500).sum()), n=int(first.sum())),
        seconds=Sample.of(log.seconds[first & (log.status < 400)]),
        confidences=Sample.of(log.confidence[first]),
        samples={name: Sample.of(found) for name, found in values.items()},
    )


def rings_of(log: Log, reference: Reference, settings: Monitoring) -> list[Ring]:
    """Return all alarms of all watches."""
    found = alarms.watches(reference, settings)
    answers = {"at": log.at, "status": log.status, "seconds": log.seconds, "confidence": log.confidence}
    own = log.shadowed
    pairs = {"at": log.at[own], "disagree": log.disagree[own], "task": np.array(TASKS)[log.task[own]]}
    questions = {"at": log.at, "question characters": log.characters, "question words": log.words}
    pictures = {"at": log.at[own], **{f"picture {name}": one[own] for name, one in log.pictures.items()}}
    batches: dict[alarms.Source, Sequence[alarms.Batch]] = {
        "pairs": [pairs],
        "answers": [answers],
        "features": [questions, pictures],
    }
    for one in found:
        for batch in batches[one.source]:
            one.detector.add(*one.observed(batch))
    return [ring for one in found for ring in one.detector.rings]


def naive_days(log: Log, reference: Reference, level: float = 1.645) -> list[int]:
    """Return the days on which a one-sided z-test at 5 % calls agreement worse than the reference."""
    usual = reference.disagreeing[""]
    days = ((log.at[log.shadowed] - BEGIN) // DAY_S).astype(int)
    bad = np.bincount(days, log.disagree[log.shadowed], DAYS)
    n = np.bincount(days, minlength=DAYS)
    p = (bad + usual.count) / (n + usual.n)
    z = (bad / np.maximum(n, 1) - usual.count / usual.n) / np.sqrt(p * (1 - p) * (1 / np.maximum(n, 1) + 1 / usual.n))
    first = round(reference.days)
    return [day for day in range(first, DAYS) if z[day] > level]


def quiet(seeds: int, settings: Monitoring) -> dict[str, Any]:
    """Return false alarms in logs without a change; the reference's days hold none by construction."""
    counts: list[int] = []
    naive: list[int] = []
    by_watch: dict[str, int] = {}
    for seed in range(seeds):
        log = log_of(10_000 + seed, QUIET)
        reference = reference_of(log, settings)
        rings = rings_of(log, reference, settings)
        counts.append(len(rings))
        naive.append(len(naive_days(log, reference)))
        for ring in rings:
            by_watch[ring.watch] = by_watch.get(ring.watch, 0) + 1
    watched = DAYS - settings.reference_days
    return {
        "logs": seeds,
        "watched_days_each": watched,
        "false_alarms": {
            "all watches": _spread(counts),
            "logs with any": sum(count > 0 for count in counts) / seeds,
            "by watch": by_watch,
            "promised at most": watched / settings.false_alarm_days,
        },
        "false_alarms_naive_daily_z": {"agreement": _spread(naive), "logs with any": sum(n > 0 for n in naive) / seeds},
    }


def changed(change: Change, seeds: int, settings: Monitoring) -> dict[str, Any]:
    """Return the delays of the watch that a change is meant for, from the change to its first alarm after it."""
    begin = BEGIN + CHANGED * DAY_S
    hours, observations, estimated, early, naive, any_hours = [], [], [], 0, [], []
    for seed in range(seeds):
        log = log_of(seed, change)
        reference = reference_of(log, settings)
        rings = rings_of(log, reference, settings)
        own = sorted((ring.at, ring) for ring in rings if ring.watch == change.watch)
        early += sum(at < begin for at, _ in own)
        after = [ring for at, ring in own if at >= begin]
        if after:
            hours.append((after[0].at - begin) / 3600)
            seen = log.at[log.shadowed] if change.watch != "latency" else log.at
            observations.append(int(((seen >= begin) & (seen <= after[0].at)).sum()))
            estimated.append((after[0].began - begin) / 3600)
        any_hours += sorted((ring.at - begin) / 3600 for ring in rings if ring.at >= begin)[:1]
        naive += [24.0 * (day + 1 - CHANGED) for day in naive_days(log, reference) if day >= CHANGED][:1]
    return {
        "change": change.name,
        "watch": change.watch,
        "shadowed": change.shadowed,
        "logs": seeds,
        "found_within_30_days": len(hours) / seeds,
        "delay_hours": _quantiles(hours),
        "delay_observations": _quantiles(observations),
        "began_estimate_minus_change_hours": _quantiles(estimated),
        "alarms_of_it_before_the_change": early,
        "first_alarm_of_any_watch_hours": _quantiles(any_hours),
        "naive_daily_z_delay_hours": _quantiles(naive) if change.disagreement else None,
    }


def _spread(counts: Sequence[int]) -> dict[str, float | None]:
    mean = statistics.fmean(counts)
    error = statistics.stdev(counts) / len(counts) ** 0.5 if len(counts) > 1 else None
    return {"mean per log": mean, "standard error": error, "most": max(counts)}


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    told = np.percentile(values, (10, 50, 90))
    return {"n": len(values), "p10": told[0], "median": told[1], "p90": told[2], "mean": statistics.fmean(values)}


def rows_of(log: Log) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the rows that a gateway would have written."""
    names, answers = list(log.pictures), ("no", "yes")
    for number, at in enumerate(log.at.tolist()):
        name, task = f"{number:032x}", TASKS[log.task[number]]
        words = int(log.words[number])
        text = " ".join(["w" * max(1, int(log.characters[number]) // words - 1)] * words)
        common = {"at": at, "task": task, "arm": "student"}
        status = int(log.status[number])
        yield (
            ANSWERS,
            common
            | {
                "id": name,
                "model": "synthetic",
                "route": "student",
                "status": status,
                "question": text,
                "answer": "yes" if status == 200 else None,
                "confidence": float(log.confidence[number]),
                "seconds": float(log.seconds[number]),
                "arm_seconds": None,
                "prompt_tokens": None,
                "completion_tokens": None,
            },
        )
        if not log.shadowed[number]:
            continue
        bad = bool(log.disagree[number])
        texts = {"student": "yes", "teacher": answers[not bad], "agree": not bad, "purpose": "shadow"}
        tokens = {"student_tokens": None, "teacher_tokens": None, "student_seconds": 0.02, "teacher_seconds": 0.3}
        yield PAIRS, common | texts | tokens | {"answer_id": name}
        look = {one: float(log.pictures[one][number]) for one in names}
        side = round(look.pop("pixels") ** 0.5)
        size = {"width": side, "height": side, "bytes": int(look.pop("bytes")), "sha256": "0" * 64, "file": None}
        yield PICTURES, {"answer_id": name, "number": 0, "at": at, **look, **size}


async def _written(store: Store, log: Log) -> int:
    waiting: list[Any] = []
    n = 0
    for table, row in rows_of(log):
        waiting.append(store.add(table, row))
        n += 1
        if len(waiting) == 5000:
            assert all(await asyncio.gather(*waiting))
            waiting = []
    assert all(await asyncio.gather(*waiting))
    return n


def through_a_store(change: Change, seed: int, requests: int, settings: Monitoring) -> dict[str, Any]:
    """Write a log with `Store.add`, read it with the verb's own function, twice with `write`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.sqlite"
        log = log_of(seed, change, requests=requests)
        began = time.perf_counter()
        store = Store(str(path))
        rows = asyncio.run(_written(store, log))
        store.close()
        wrote = time.perf_counter() - began
        database = monitor.database_of(str(path))
        began = time.perf_counter()
        found = monitor.monitor(database, settings, monitor.Shown(), write=True)
        read = time.perf_counter() - began
        again = monitor.monitor(database, settings, monitor.Shown(), write=True)
        with monitor.asked(database) as connection:
            events = len([one for ring in alarms.written(connection, settings.arm).values() for one in ring])
        size = path.stat().st_size
        database.dispose()
    arrays = rings_of(log, reference_of(log, settings), settings)
    begin = BEGIN + CHANGED * DAY_S
    own = [ring for ring in found.rings if ring.watch == change.watch]
    first = next(ring for ring in own if ring.at >= begin)
    assert own == [ring for ring in arrays if ring.watch == change.watch], "the store's alarms are those of the arrays"
    assert events == len(found.rings) == len(again.rings), "no alarm is written twice"
    return {
        "change": change.name,
        "requests_a_day": requests,
        "rows": rows,
        "bytes": size,
        "store_seconds": wrote,
        "monitor_seconds": read,
        "delay_hours": (first.at - begin) / 3600,
        "began_estimate_minus_change_hours": (first.began - begin) / 3600,
        "alarms_by_watch": {watch.name: len(watch.rings) for watch in found.watches if watch.rings},
        "alarms_before_the_change": sum(ring.at < begin for ring in found.rings),
        "drifted_features": [one.feature for one in found.drift if one.drifted],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=120, help="logs of each change")
    parser.add_argument("--quiet-seeds", type=int, default=400, help="logs without a change")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = Monitoring()
    began = time.perf_counter()
    found: dict[str, Any] = {
        "versions": {"slimlmm": __version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "machine": {"python": platform.python_version(), "cores": psutil.cpu_count(), "workers": options.workers},
        "log": {"days": DAYS, "changed_on_day": CHANGED, "requests_a_day": REQUESTS, "shadowed": SHADOWED},
        "settings": settings.model_dump(mode="json"),
    }
    with ProcessPoolExecutor(options.workers) as pool:
        told = pool.submit(quiet, options.quiet_seeds, settings)
        changes = [pool.submit(changed, change, options.seeds, settings) for change in CHANGES]
        stores = [
            pool.submit(through_a_store, change, 0, REQUESTS // 2, settings)
            for change in (CHANGES[2], CHANGES[5], CHANGES[6])
        ]
        for one in as_completed([told, *changes, *stores]):
            print(json.dumps(one.result()), flush=True)
        found |= {"quiet": told.result(), "changes": [one.result() for one in changes]}
        found["through_a_store"] = [one.result() for one in stores]
    found["seconds"] = time.perf_counter() - began
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
