"""The shipped pictures and fonts, read once per process."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

ASSETS = Path(__file__).parent / "assets"
FONTS: tuple[str, ...] = ("inter-800", "montserrat-700", "nunito-800", "fredoka-600", "roboto-slab-700")


@cache
def index() -> dict[str, Any]:
    """Return which files show which product or person, and each product's held-out style."""
    found: dict[str, Any] = json.loads((ASSETS / "pictures.json").read_text())
    return found


@cache
def cut_out(file: str) -> Image.Image:
    """Return one decoded RGBA picture; callers must not change it."""
    with Image.open(ASSETS / "pictures" / file) as picture:
        return picture.convert("RGBA")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return one font at one size in pixels."""
    return ImageFont.truetype(ASSETS / "fonts" / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)
