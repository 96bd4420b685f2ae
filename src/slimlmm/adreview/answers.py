"""Questions and answers: rules over the facts of a creative, no pictures."""

from __future__ import annotations

from random import Random
from typing import TypedDict

from slimlmm.adreview.catalogue import LIMITS, PROHIBITED, QUESTIONS, TASKS
from slimlmm.adreview.facts import Facts


class Row(TypedDict):
    """One question about one creative."""

    id: str
    question: str
    answer: str
    task: str


def verdict(facts: Facts) -> str:
    """Return the verdict; the first rule that applies wins.

    1. a child with a product for adults   "reject: minor with alcohol"
    2. a prohibited claim                  "reject: cure claim"
    3. slogan about another category       "reject: slogan says drink"
    4. no brand                            "revise: no brand"
    5. no price                            "revise: no price"
    6. otherwise                           "approve: adults only" or "approve"
    """
    limit = LIMITS.get(facts.category, "")
    if facts.person == "child" and limit == "adults only":
        return f"reject: minor with {facts.category}"
    if facts.claim in PROHIBITED:
        return f"reject: {facts.claim} claim"
    if facts.slogan_category != facts.category:
        return f"reject: slogan says {facts.slogan_category}"
    if not facts.brand:
        return "revise: no brand"
    if not facts.price:
        return "revise: no price"
    return "approve: adults only" if limit == "adults only" else "approve"


def answers(facts: Facts) -> dict[str, str]:
    """Return the answer of every task."""
    agree = facts.slogan_category == facts.category
    limit = LIMITS.get(facts.category)
    return {
        "product": facts.product,
        "category": facts.category,
        "slogan": " ".join(facts.slogan),
        "brand": facts.brand or "none",
        "price": facts.price or "none",
        "person": facts.person,
        "match": "yes" if agree else f"no: slogan says {facts.slogan_category}",
        "claim": f"{facts.claim}: {facts.claim_text}" if facts.claim_text else "none",
        "restricted": f"{limit}: {facts.category}" if limit else "none",
        "verdict": verdict(facts),
    }


def rows(facts: Facts, name: str, rng: Random) -> list[Row]:
    """Return one row per task in random order; `name` starts every id."""
    told = answers(facts)
    order = rng.sample(TASKS, len(TASKS))
    return [
        Row(id=f"{name}-{task}", question=rng.choice(QUESTIONS[task]), answer=told[task], task=task) for task in order
    ]
