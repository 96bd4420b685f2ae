"""What a creative says, drawn before anything is painted; picture and answers both follow from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from random import Random

from slimlmm.adreview.catalogue import (
    CATEGORY_WEIGHT,
    CLAIMS,
    FILLERS,
    LIMITS,
    LOOK_ALIKES,
    PRODUCTS,
    PROHIBITED,
    SLOGAN_WORDS,
    SYLLABLES,
    UNLIMITED_WEIGHT,
    VERSION,
)
from slimlmm.adreview.pictures import index

CATEGORY_OF: dict[str, str] = {name: category for category, table in PRODUCTS.items() for name in table}
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.35
"""Share of test creatives whose main picture file no training creative uses."""
CLEAN_SHARE = 0.24
"""Share of creatives drawn without any fault; without it approvals would be rare."""
LINE = 14
"""Most characters in one line of a slogan, so that it can be set large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything a question may ask about one creative."""

    product: str
    picture: str
    """File of the main product, below assets/pictures."""
    held_out: bool
    slogan: tuple[str, ...]
    """Lines of one or two words."""
    slogan_category: str
    brand: str
    """Invented name; empty when the creative shows none."""
    price: str
    """'$' and digits; empty when the creative shows none."""
    person: str
    """'none', 'adult' or 'child'."""
    person_picture: str
    claim: str
    """'none' or a kind of claim."""
    claim_text: str
    clutter: tuple[str, ...]
    """Files of the small distractors."""

    @property
    def category(self) -> str:
        """The category of the main product."""
        return CATEGORY_OF[self.product]

    @property
    def key(self) -> str:
        """The composition as text: two creatives with the same key say and show the same things."""
        return repr(self)


def stream(purpose: str, split: str, index: int, seed: int) -> Random:
    """Return the random numbers of one purpose of one creative; nothing else feeds them."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    text = f"adreview {VERSION} {seed} {split} {index} {purpose}"
    return Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def draw(index: int, split: str, seed: int) -> Facts:
    """Draw the facts of one creative, a pure function of its arguments."""
    rng = stream("facts", split, index, seed)
    clean = rng.random() < CLEAN_SHARE
    product = rng.choices(*_product_weights())[0]
    picture, held_out = _main_picture(rng, product, split)
    category = CATEGORY_OF[product]
    agrees = clean or rng.random() < 0.15
    subject = category if agrees else rng.choice([c for c in PRODUCTS if c != category])
    claim, claim_text = _claim(rng, clean)
    person, person_picture = _person(rng, adults=clean and LIMITS.get(category) == "adults only")
    return Facts(
        product=product,
        picture=picture,
        held_out=held_out,
        slogan=_slogan(rng, subject),
        slogan_category=subject,
        brand=_brand(rng) if clean or rng.random() < 0.78 else "",
        price=_price(rng) if clean or rng.random() < 0.74 else "",
        person=person,
        person_picture=person_picture,
        claim=claim,
        claim_text=claim_text,
        clutter=_clutter(rng, product, split),
    )


@cache
def _product_weights() -> tuple[list[str], list[float]]:
    names = list(CATEGORY_OF)
    fallback = {c: (1.0 if c in LIMITS else UNLIMITED_WEIGHT) for c in PRODUCTS}
    weights = fallback | CATEGORY_WEIGHT
    return names, [weights[CATEGORY_OF[name]] for name in names]


def _main_picture(rng: Random, product: str, split: str) -> tuple[str, bool]:
    """Choose the drawing; only the test split may choose the held-out one."""
    entry = index()["products"][product]
    held = rng.random() < HELD_OUT_SHARE and split == "test"
    if held:
        return entry["files"][entry["held_out"]], True
    return rng.choice(_open_pictures(product)), False


@cache
def _open_pictures(product: str) -> list[str]:
    entry = index()["products"][product]
    return [file for style, file in entry["files"].items() if style != entry["held_out"]]


def _slogan(rng: Random, subject: str) -> tuple[str, ...]:
    """Two to four words in one or two lines, exactly one of them about `subject`."""
    while True:
        words = rng.sample(FILLERS, rng.choice((1, 2, 2, 3)))
        words.insert(rng.randrange(len(words) + 1), rng.choice(SLOGAN_WORDS[subject]))
        cut = (len(words) + rng.randrange(2)) // 2
        one, two = " ".join(words[:cut]), " ".join(words[cut:])
        if len(words) == 2 and len(one) + len(two) < LINE:
            return (f"{one} {two}".strip(),)
        if one and two and max(len(one), len(two)) <= LINE:
            return (one, two)


def _brand(rng: Random) -> str:
    """Invent a name of six or nine letters, the longer in two of three cases and without wide letters, to be set large."""
    syllables = rng.choice((2, 3, 3))
    while True:
        name = "".join(rng.choice(SYLLABLES) for _ in range(syllables))
        if len(name) <= 6 or not {"m", "w"} & set(name):
            return name


def _price(rng: Random) -> str:
    return f"${rng.randrange(10, 100) if rng.random() < 0.6 else rng.randrange(100, 1000)}"


def _claim(rng: Random, clean: bool) -> tuple[str, str]:
    """Draw the kind of claim and its words; a clean creative has none or an offer."""
    kind = (
        rng.choice(("none", "offer")) if clean else rng.choices(("none", "offer", *PROHIBITED), (27, 10, 21, 21, 21))[0]
    )
    if kind == "none":
        return kind, ""
    first, second = CLAIMS[kind]
    return kind, f"{rng.choice(first)} {rng.choice(second)}"


def _person(rng: Random, adults: bool) -> tuple[str, str]:
    """Draw nobody, an adult or a child; no child beside a product for adults in a clean creative."""
    kind = rng.choice(("none", "adult") if adults else ("none", "adult", "child"))
    if kind == "none":
        return kind, ""
    table = index()["people"][kind]
    return kind, rng.choice(table[rng.choice(list(table))])


def _clutter(rng: Random, product: str, split: str) -> tuple[str, ...]:
    """Choose small other products, half of them look-alikes; a held-out file only in the test split."""
    files = []
    alike = next(group for group in LOOK_ALIKES if product in group)
    for _ in range(rng.choice((0, 1, 2, 3))):
        pool = [n for n in (alike if rng.random() < 0.5 else CATEGORY_OF) if n != product]
        files.append(_main_picture(rng, rng.choice(pool), split)[0])
    return tuple(files)
