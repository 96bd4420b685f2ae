"""Whether what comes in is still what came in: recent days against the reference, one feature at a time.

A feature has drifted where chance is an unlikely reason (false discovery rate after Y. Benjamini and Y. Hochberg, JRSS B 57,
1995) and the distance is no trifle: at large n every difference is significant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import chi2_contingency, false_discovery_control, kstwo
from sqlalchemy import Connection

from slimlmm.monitoring.reading import OTHERS, Values, Window, day_of
from slimlmm.monitoring.records import Drift, DriftDay
from slimlmm.monitoring.references import Reference, Sample, features, gathered, requests
from slimlmm.monitoring.settings import Monitoring
from slimlmm.serving.store import DAY_S

TASKS = "tasks"
#: tasks with fewer requests in both windows together are one, for the chi-square test's sake
RARE = 20
#: values of a day or of the recent ones below which a distance is noise
LEAST = 30


def distance(reference: Sample, values: Values) -> float:
    """Return the Kolmogorov-Smirnov distance, max over x of |F_reference(x) - F(x)|."""
    own, other = np.array(reference.values), np.sort(values)
    points = np.concatenate((own, other))
    first = np.searchsorted(own, points, "right") / len(own)
    second = np.searchsorted(other, points, "right") / len(other)
    return float(np.abs(first - second).max())


def compared(
    reference: Reference, recent: Mapping[str, Values], tasks: Mapping[str, int], settings: Monitoring
) -> list[Drift]:
    """Return every feature that both windows have enough values of, the most changed first."""
    found = [
        _numbers(name, reference.samples[name], values)
        for name, values in recent.items()
        if name in reference.samples and reference.samples[name].n >= settings.least_reference and len(values) >= LEAST
    ]
    if sum(reference.requests.values()) >= settings.least_reference and sum(tasks.values()) >= LEAST:
        found += _mix(reference.requests, tasks)
    if not found:
        return []
    adjusted = false_discovery_control([one.p for one in found])
    told = [
        one.model_copy(
            update={"q": float(q), "drifted": bool(q <= settings.drift_level and one.effect >= settings.drift_effect)}
        )
        for one, q in zip(found, adjusted, strict=True)
    ]
    return sorted(told, key=lambda one: -one.effect)


def _numbers(name: str, reference: Sample, values: Values) -> Drift:
    """Return the two-sample test with the exact law of one sample of n m / (n + m), as scipy's asymptotic method has it."""
    n, m = reference.n, len(values)
    effect = distance(reference, values)
    return Drift(
        feature=name,
        test="Kolmogorov-Smirnov",
        reference_n=n,
        recent_n=m,
        reference=float(np.median(reference.values)),
        recent=float(np.median(values)),
        effect=effect,
        p=float(kstwo.sf(effect, round(n * m / (n + m)))),
        q=1.0,
        drifted=False,
    )


def _mix(before: Mapping[str, int], after: Mapping[str, int]) -> list[Drift]:
    """Return the chi-square test of the tasks' shares; its effect is their total variation, sum |p - q| / 2."""
    counts: dict[str, list[int]] = {}
    for name in {*before, *after}:
        pair = [before.get(name, 0), after.get(name, 0)]
        held = counts.setdefault(name if sum(pair) >= RARE else OTHERS, [0, 0])
        held[0] += pair[0]
        held[1] += pair[1]
    if len(counts) < 2:
        return []
    table = np.array(list(counts.values()), np.float64).T
    shares = table / table.sum(axis=1, keepdims=True)
    return [
        Drift(
            feature=TASKS,
            test="chi-square",
            reference_n=int(table[0].sum()),
            recent_n=int(table[1].sum()),
            reference=None,
            recent=None,
            effect=float(np.abs(shares[0] - shares[1]).sum() / 2),
            p=float(chi2_contingency(table, correction=False).pvalue),
            q=1.0,
            drifted=False,
        )
    ]


def recent(connection: Connection, within: Window, tasks: Sequence[str]) -> tuple[dict[str, Values], dict[str, int]]:
    """Return all values of each feature inside a window, without the features that have none, and its requests by task."""
    values = {name: found for name, found in gathered(connection, within).items() if len(found)}
    return values, requests(connection, within, tasks)


def by_day(connection: Connection, within: Window, reference: Reference) -> list[DriftDay]:
    """Return the distance of each day from the reference, by feature; days with few values are left out."""
    held: dict[tuple[int, str], list[Values]] = {}
    for at, values in features(connection, within):
        numbers = (at // DAY_S).astype(int)
        for number in np.unique(numbers):
            for name, found in values.items():
                held.setdefault((int(number), name), []).append(found[numbers == number])
    effects: dict[int, dict[str, float]] = {}
    for (number, name), parts in sorted(held.items()):
        whole = np.concatenate(parts)
        if name in reference.samples and len(whole) >= LEAST:
            effects.setdefault(number, {})[name] = distance(reference.samples[name], whole)
    return [DriftDay(day=day_of(number), effects=found) for number, found in sorted(effects.items())]
