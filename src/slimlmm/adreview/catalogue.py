"""The tables of AdReview: products, audience limits, people, words, claims and questions (data only)."""

from __future__ import annotations

VERSION = "2"
"""Generator version; part of every random seed, so a new version is a new set of creatives."""

PRODUCTS: dict[str, dict[str, str]] = {
    "food": {"pizza": "1f355", "burger": "1f354", "doughnut": "1f369", "apple": "1f34e", "tomato": "1f345"},
    "drink": {"milk": "1f95b", "coffee": "2615", "juice box": "1f9c3", "soda": "1f964"},
    "alcohol": {
        "beer": "1f37a",
        "wine": "1f377",
        "cocktail": "1f378",
        "champagne": "1f37e",
        "whiskey": "1f943",
    },
    "tobacco": {"cigarette": "1f6ac"},
    "gambling": {"dice": "1f3b2", "slot machine": "1f3b0", "joker": "1f0cf", "mahjong": "1f004"},
    "medicine": {"pill": "1f48a", "syringe": "1f489", "bandage": "1fa79", "stethoscope": "1fa7a"},
    "weapons": {"dagger": "1f5e1", "swords": "2694", "bow": "1f3f9", "bomb": "1f4a3"},
    "vehicles": {"car": "1f697", "bus": "1f68c", "bicycle": "1f6b2", "scooter": "1f6f5"},
    "toys": {"teddy": "1f9f8", "kite": "1fa81", "balloon": "1f388", "puzzle": "1f9e9", "doll": "1fa86"},
    "beauty": {"lipstick": "1f484", "nail polish": "1f485", "ring": "1f48d", "lotion": "1f9f4"},
    "electronics": {"laptop": "1f4bb", "phone": "1f4f1", "television": "1f4fa", "camera": "1f4f7"},
    "sports": {"soccer ball": "26bd", "basketball": "1f3c0", "tennis": "1f3be", "football": "1f3c8"},
    "clothing": {"shirt": "1f455", "jeans": "1f456", "dress": "1f457", "shoe": "1f45f"},
    "household": {"sofa": "1f6cb", "chair": "1fa91", "bulb": "1f4a1", "knife": "1f52a"},
    "music": {"guitar": "1f3b8", "trumpet": "1f3ba", "violin": "1f3bb"},
}
"""Category -> product name -> Unicode code point of its picture."""

LOOK_ALIKES: tuple[tuple[str, ...], ...] = (
    ("wine", "cocktail", "whiskey", "milk"),
    ("beer", "juice box", "soda", "coffee", "champagne"),
    ("apple", "tomato", "balloon", "basketball", "bomb"),
    ("dagger", "knife", "swords", "syringe"),
    ("pill", "bandage", "lipstick", "lotion", "nail polish"),
    ("dice", "mahjong", "joker", "puzzle", "phone"),
    ("slot machine", "television", "laptop", "camera"),
    ("car", "bus", "sofa", "chair"),
    ("bicycle", "scooter", "stethoscope", "ring"),
    ("tennis", "soccer ball", "football", "doughnut"),
    ("pizza", "burger", "teddy", "doll", "bulb"),
    ("guitar", "violin", "trumpet", "bow", "kite", "cigarette"),
    ("shirt", "dress", "jeans", "shoe"),
)
"""Groups of products that resemble each other: half of the clutter comes from the main product's group."""

LIMITS: dict[str, str] = {
    "alcohol": "adults only",
    "tobacco": "adults only",
    "gambling": "adults only",
    "weapons": "adults only",
    "medicine": "prescription",
    "vehicles": "licence",
    "toys": "parents",
    "beauty": "skin test",
}
"""Category -> limit on who may be addressed; the other categories have none."""

CATEGORY_WEIGHT: dict[str, float] = {"tobacco": 2.8}
"""Weight per product where it is not 1.0 (limited category) or UNLIMITED_WEIGHT."""
UNLIMITED_WEIGHT = 0.66

PEOPLE: dict[str, dict[str, str]] = {
    "adult": {
        "man": "1f468",
        "woman": "1f469",
        "old man": "1f474",
        "old woman": "1f475",
        "bearded": "1f9d4",
        "blond": "1f471",
    },
    "child": {"boy": "1f466", "girl": "1f467", "baby": "1f476", "child": "1f9d2"},
}
"""Answer to the person question -> name -> code point."""
SKIN_TONES: dict[str, str] = {"light": "1f3fb", "medium": "1f3fd", "dark": "1f3ff"}

SLOGAN_WORDS: dict[str, tuple[str, ...]] = {
    "food": ("tasty", "yummy", "snack"),
    "drink": ("sip", "thirst", "drink"),
    "alcohol": ("toast", "pub", "liquor"),
    "tobacco": ("smoke", "puff", "tobacco"),
    "gambling": ("bet", "lottery", "casino"),
    "medicine": ("doctor", "dose", "clinic"),
    "weapons": ("attack", "hunt", "armed"),
    "vehicles": ("drive", "road", "ride"),
    "toys": ("toy", "play", "kids"),
    "beauty": ("beauty", "glow", "makeup"),
    "electronics": ("digital", "tech", "gadget"),
    "sports": ("goal", "team", "sport"),
    "clothing": ("wear", "outfit", "fashion"),
    "household": ("home", "room", "house"),
    "music": ("song", "melody", "tune"),
}
"""Words that tell the category a slogan speaks about; every slogan holds exactly one."""

_FILLERS = """
act again ahead alive always aware big bold brave bright calm clever come cool daily dare days deep
dream early easy enjoy epic every fair feel find first flow fly fresh gentle go golden good grand great
happy hello honest ideal instant just keen kind light live lovely magic meet modern more move my neat
nice noble now once open our perfect plain pure quick ready real rise royal share simple smart soft
spark start still strong sunny super sweet swift time today true try unique urban vivid warm we wild
wise with wonder yes your
"""
FILLERS: tuple[str, ...] = tuple(_FILLERS.split())
"""Slogan words that say nothing about a category."""

_SYLLABLES = "bel cor fam fox gel hex jet lav lex lim lux max mel nex pix pol rem ros sem vel ven vor wax zen"
SYLLABLES: tuple[str, ...] = tuple(_SYLLABLES.split())
"""Brands are built from these; byte-level BPE keeps them whole, so a brand is read syllable by syllable."""

CLAIMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cure": (("heals", "cures", "ends", "stops"), ("pain", "cough", "stress", "fever")),
    "superlative": (("best", "top", "finest", "greatest"), ("ever", "on earth", "of all", "in town")),
    "guarantee": (("proven", "sure", "certain", "total"), ("results", "success", "profit", "effect")),
    "offer": (("free", "extra", "bonus", "half"), ("gift", "sample", "price", "pack")),
}
"""Kind of claim -> first part, second part. An offer is allowed; the other three are prohibited."""
PROHIBITED: tuple[str, ...] = ("cure", "superlative", "guarantee")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "product": ("What product is shown?", "Name the main product."),
    "category": ("What category is the product?", "Which category is advertised?"),
    "slogan": ("What does the slogan say?", "Read the slogan."),
    "brand": ("What is the brand name?", "Read the brand."),
    "price": ("What is the price?", "Read the price."),
    "person": ("Is a person shown?", "Who appears in the picture?"),
    "match": ("Does the slogan match the product?", "Do slogan and product agree?"),
    "claim": ("What claim is made?", "Read and classify the claim."),
    "restricted": ("Is the audience restricted?", "Which audience limit applies?"),
    "verdict": ("What is the verdict?", "Approve or reject this ad?"),
}
"""Task -> its wordings; every creative carries one question of each task."""
TASKS: tuple[str, ...] = tuple(QUESTIONS)
