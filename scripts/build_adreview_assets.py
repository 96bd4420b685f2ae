"""Rebuild `src/slimlmm/adreview/assets` (pictures, fonts, picture index) from npm packages.

For maintainers: nothing here runs at install or test time.
Needs node, and `pip install resvg-py fonttools brotli`.

    mkdir parts && cd parts && npm init -y && npm install --ignore-scripts \
        @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/noto@1.2.9 \
        @iconify-json/noto-v1@1.2.5 @iconify-json/fxemoji@1.2.2 @iconify-json/twemoji@1.2.5 \
        @fontsource/inter@5.3.0 @fontsource/montserrat@5.3.0 @fontsource/nunito@5.3.0 \
        @fontsource/fredoka@5.3.0 @fontsource/roboto-slab@5.3.0
    python scripts/build_adreview_assets.py parts
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimlmm.adreview.catalogue import PEOPLE, PRODUCTS, SKIN_TONES

ASSETS = Path(__file__).parents[1] / "src" / "slimlmm" / "adreview" / "assets"
STYLES = ("fluent-3d", "fluent-flat", "noto", "noto-v1", "fxemoji", "twemoji")
HOLDABLE = ("fluent-3d", "fluent-flat", "noto", "twemoji")  # full-colour styles that every product has
FONTS = {"inter": 800, "montserrat": 700, "nunito": 800, "fredoka": 600, "roboto-slab": 700}
WRONG = {("dice", "fxemoji"), ("nail polish", "fxemoji"), ("laptop", "noto-v1")}  # domino, bare hand, desktop
PRODUCT_SIDE, PERSON_SIDE = 104, 60
SAME = 0.035  # mean absolute difference (0..1) under which two pictures count as the same drawing


class Source:
    """The unpacked npm packages, asked for one picture by code point and style."""

    def __init__(self, parts: Path) -> None:
        """Read the icon sets below `parts/node_modules`."""
        self.modules = parts / "node_modules"
        self.fluent3d = {
            p.stem.replace("-fe0f", ""): p for p in (self.modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp")
        }
        self.sets: dict[str, Any] = {}
        self.chars: dict[str, dict[str, str]] = {}
        for style in STYLES[1:]:
            folder = self.modules / "@iconify-json" / style.replace("fluent-flat", "fluent-emoji-flat")
            self.sets[style] = json.loads((folder / "icons.json").read_text())
            table = json.loads((folder / "chars.json").read_text())
            self.chars[style] = {k.replace("-fe0f", ""): v for k, v in table.items()}

    def picture(self, style: str, code: str) -> Image.Image | None:
        """Return the drawing as RGBA cropped to its content, or None where the set lacks it."""
        if style == "fluent-3d":
            path = self.fluent3d.get(code)
            return trimmed(Image.open(path).convert("RGBA")) if path else None
        name = self.chars[style].get(code) or self._by_name(style, code)
        icons = self.sets[style]
        if name is None or name not in icons["icons"]:
            return None
        icon = icons["icons"][name]
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        view = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}" width="256" height="256">{icon["body"]}</svg>'
        )
        resvg = importlib.import_module("resvg_py")
        return trimmed(Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg)))).convert("RGBA"))

    def _by_name(self, style: str, code: str) -> str | None:
        """Return the icon name in a set without code points: that of Noto, for fxemoji without hyphens."""
        name = self.chars["noto"].get(code)
        if name is None or self.chars[style]:
            return None
        return name.replace("-", "") if style == "fxemoji" else name


def trimmed(picture: Image.Image) -> Image.Image:
    box = picture.getchannel("A").getbbox()
    return picture.crop(box) if box else picture


def fitted(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures on white at 32x32, in 0..1."""

    def flat(picture: Image.Image) -> Any:
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        white.alpha_composite(picture)
        return np.asarray(white.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=float) / 255

    return float(np.abs(flat(a) - flat(b)).mean())


def save(picture: Image.Image, style: str, name: str) -> str:
    path = ASSETS / "pictures" / style / f"{name}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=86, alpha_quality=90, method=6)
    return f"{style}/{name}.webp"


def product(source: Source, name: str, code: str) -> dict[str, Any]:
    """Save every distinct drawing of one product; choose the style that only the test split may use."""
    found: dict[str, Image.Image] = {}
    for style in STYLES:
        picture = None if (name, style) in WRONG else source.picture(style, code)
        if picture is None:
            continue
        small = fitted(picture, PRODUCT_SIDE)
        if all(distance(small, other) > SAME for other in found.values()):
            found[style] = small
    files = {style: save(picture, style, name.replace(" ", "-")) for style, picture in found.items()}
    choices = [style for style in HOLDABLE if style in files]
    pick = int(hashlib.sha256(f"adreview held out {name}".encode()).hexdigest(), 16) % len(choices)
    return {"files": files, "held_out": choices[pick]}


def person(source: Source, name: str, code: str) -> list[str]:
    """Save every drawing of one person in every skin tone."""
    files = []
    for tone, suffix in {"": "", **SKIN_TONES}.items():
        for style in ("fluent-3d", "fluent-flat", "noto", "twemoji"):
            picture = source.picture(style, f"{code}-{suffix}" if suffix else code)
            if picture is not None:
                label = "-".join(filter(None, (name.replace(" ", "-"), tone)))
                files.append(save(fitted(picture, PERSON_SIDE), style, label))
    return files


def build_fonts(source: Source) -> None:
    """Turn the web fonts into small printable-ASCII TrueType files."""
    subset = importlib.import_module("fontTools.subset")
    target = ASSETS / "fonts"
    target.mkdir(parents=True, exist_ok=True)
    for name, weight in FONTS.items():
        folder = source.modules / "@fontsource" / name
        options = subset.Options(hinting=False, layout_features=["kern"], flavor=None)
        font = subset.load_font(str(folder / "files" / f"{name}-latin-{weight}-normal.woff2"), options)
        font.flavor = None
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=range(0x20, 0x7F))
        subsetter.subset(font)
        font.save(str(target / f"{name}-{weight}.ttf"), reorderTables=None)
        shutil.copy(folder / "LICENSE", target / f"{name}.LICENSE.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder in which npm installed the packages")
    source = Source(parser.parse_args().parts)
    shutil.rmtree(ASSETS / "pictures", ignore_errors=True)
    products = {n: product(source, n, c) for table in PRODUCTS.values() for n, c in table.items()}
    people = {
        kind: {name: person(source, name, code) for name, code in table.items()} for kind, table in PEOPLE.items()
    }
    index = {"products": products, "people": people}
    (ASSETS / "pictures.json").write_text(json.dumps(index, indent=1) + "\n")
    build_fonts(source)


if __name__ == "__main__":
    main()
