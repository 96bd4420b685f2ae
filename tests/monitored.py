"""Small stores for the monitor's tests."""

from __future__ import annotations

import random

from slimlmm.serving.store import ANSWERS, DAY_S, ENERGY, PAIRS, PICTURES

#: 2026-01-01, midnight UTC
BEGIN = 1_767_225_600.0


def answer(name, at, **more):
    row = {"id": name, "at": at, "task": "a", "arm": "student", "model": "m", "route": "student", "status": 200}
    row |= {"question": "what is it?", "answer": "x", "confidence": -0.1, "seconds": 0.02, "arm_seconds": 0.02}
    return row | {"prompt_tokens": 1, "completion_tokens": 1} | more


def pair(name, at, *, agree, purpose="shadow", arm="student", task="a"):
    texts = {"student": "x", "teacher": "x" if agree else "y", "agree": agree, "purpose": purpose}
    times = {"student_seconds": 0.02, "teacher_seconds": 0.3, "student_tokens": None, "teacher_tokens": None}
    return {"answer_id": name, "at": at, "arm": arm, "task": task, **texts, **times}


def picture(name, at, **more):
    looks = {"brightness": 120.0, "contrast": 50.0, "entropy": 7.0, "saturation": 90.0}
    size = {"width": 10, "height": 20, "bytes": 300, "sha256": "0" * 64, "file": None}
    return {"answer_id": name, "number": 0, "at": at, **looks, **size, **more}


def fill(database, tables):
    with database.begin() as connection:
        for table, rows in tables.items():
            if rows:
                connection.execute(table.insert(), rows)


def drawn(
    days, a_day, *, seed=0, shadowed=0.2, disagree=lambda day: 0.05, seconds=lambda day: 0.02, bright=lambda day: 120.0
):
    """Return tables of a store with `a_day` answers on each day, evenly spaced."""
    rng = random.Random(seed)
    answers, pairs, pictures = [], [], []
    for number in range(days * a_day):
        at = BEGIN + (number + 0.5) * DAY_S / a_day
        day, name, task = number // a_day, f"{number:032x}", rng.choice("ab")
        status = 503 if rng.random() < 0.002 else 200
        took, sure = seconds(day) * rng.lognormvariate(0, 0.3), -rng.expovariate(5)
        words = " ".join(["word"] * rng.randint(3, 9))
        answers.append(answer(name, at, task=task, status=status, seconds=took, confidence=sure, question=words))
        if rng.random() < shadowed:
            pairs.append(pair(name, at, agree=rng.random() >= disagree(day), task=task))
            light = rng.gauss(bright(day), 30)
            looks = {"brightness": light, "contrast": rng.gauss(50, 10), "entropy": rng.gauss(7, 0.3)}
            pictures.append(picture(name, at, **looks, saturation=rng.gauss(90, 20), bytes=rng.randint(100, 900)))
    energy = [
        {"at": BEGIN + (day + 0.5) * DAY_S, "seconds": 60.0, "joules": 2.0 * a_day, "requests": a_day, "source": "rapl"}
        for day in range(days)
    ]
    return {ANSWERS: answers, PAIRS: pairs, PICTURES: pictures, ENERGY: energy}
