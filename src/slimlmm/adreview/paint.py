"""Painting a creative: bands of text above and below, pictures between them; all numbers are pixels."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from slimlmm.adreview.facts import Facts
from slimlmm.adreview.pictures import FONTS, cut_out, font

SIDE = 168
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Case = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Lettering:
    """How a text is set."""

    face: str
    size: int
    ink: Colour
    halo: Colour | None = None
    """Outline of two pixels around the letters."""


@dataclass
class Canvas:
    """The picture so far and where things stand."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    rng: Random
    texts: dict[str, Box] = field(default_factory=dict)
    pictures: list[Box] = field(default_factory=list)
    shown: dict[str, Box] = field(default_factory=dict)
    """Boxes of the main product and of the person."""
    caps: dict[str, float] = field(default_factory=dict)
    """Height of a capital of each text."""
    letters: list[tuple[str, str, Box]] = field(default_factory=list)
    """Every character written: name of its text, character, box (the height is that of the line)."""


def paint(facts: Facts, rng: Random) -> Canvas:
    """Return the painted creative with the boxes of its texts and pictures."""
    image = background(rng)
    canvas = Canvas(image=image, draw=ImageDraw.Draw(image), rng=rng)
    top, bottom = _bands(canvas, facts)
    _scene(canvas, facts, top, bottom)
    return canvas


def colour(rng: Random, value: tuple[float, float], saturation: tuple[float, float]) -> Colour:
    """Draw a colour of any hue within the given ranges of value and saturation (0..1)."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return round(r * 255), round(g * 255), round(b * 255)


def luminance(c: Colour) -> float:
    """Return the perceived brightness, 0..255."""
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


def ground_for_text(rng: Random, value: tuple[float, float], saturation: tuple[float, float]) -> Colour:
    """Draw a colour that is clearly dark or clearly light, so that some ink stands out from it."""
    while True:
        found = colour(rng, value, saturation)
        if not 100 <= luminance(found) <= 165:
            return found


def ink_for(ground: Colour, rng: Random) -> Colour:
    """Return a text colour whose luminance is more than 120 of 255 away from that of `ground`."""
    if luminance(ground) > 132:
        return colour(rng, (0.0, 0.16), (0.0, 1.0))
    return colour(rng, (0.97, 1.0), (0.0, 0.1))


def background(rng: Random) -> Image.Image:
    """Return plain, gradient, striped, dotted or softly noisy ground, mostly light."""
    one = colour(rng, (0.8, 1.0), (0.05, 0.45))
    two = colour(rng, (0.75, 1.0), (0.05, 0.5))
    kind = rng.choice(("plain", "gradient", "stripes", "dots", "noise"))
    image = Image.new("RGB", (SIDE, SIDE), one)
    if kind == "gradient":
        mask = Image.linear_gradient("L").resize((SIDE, SIDE)).rotate(rng.choice((0, 90, 180, 270)))
        image.paste(two, (0, 0, SIDE, SIDE), mask)
    elif kind in ("stripes", "dots"):
        _pattern(image, kind, tuple((3 * a + b) // 4 for a, b in zip(one, two, strict=True)), rng)
    elif kind == "noise":
        grain = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (8, 8), dtype=np.uint8)
        mask = Image.fromarray(grain).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.paste(two, (0, 0, SIDE, SIDE), mask.point([v // 2 for v in range(256)]))
    return image


def _pattern(image: Image.Image, kind: str, shade: tuple[int, ...], rng: Random) -> None:
    draw = ImageDraw.Draw(image)
    step = rng.randrange(14, 30)
    if kind == "stripes":
        slant = rng.choice((0, 0, SIDE // 2, SIDE))
        for x in range(-SIDE, SIDE, step):
            draw.line((x, 0, x + slant, SIDE), fill=shade, width=step // 2)
        return
    radius = step // rng.randrange(3, 6)
    for y in range(0, SIDE, step):
        for x in range(0, SIDE, step):
            draw.ellipse((x, y, x + radius, y + radius), fill=shade)


# ---------------------------------------------------------------- text


def _bands(canvas: Canvas, facts: Facts) -> tuple[int, int]:
    """Set brand, price, slogan and claim in bands at the edges; return the free rows between them."""
    rng = canvas.rng
    bands = ["head", "slogan"] if facts.claim == "none" else ["head", "slogan", "claim"]
    rng.shuffle(bands)
    above = rng.randrange(len(bands) + 1) if len(bands) == 2 else rng.randrange(1, 3)
    top, bottom = rng.randrange(2, 5), SIDE - rng.randrange(2, 5)
    case: Case = rng.choice((str.lower, str.upper, str.title))
    for place, name in enumerate(bands):
        height = {"head": 23, "claim": 19, "slogan": 19 * len(facts.slogan)}[name]
        if name == "head" and not (facts.brand or facts.price):
            continue
        y = top if place < above else bottom - height
        if name == "head":
            _head(canvas, facts, y)
        elif name == "claim":
            _claim(canvas, facts.claim_text, y, case)
        else:
            _slogan(canvas, facts.slogan, y, case)
        if place < above:
            top += height + 1
        else:
            bottom -= height + 1
    return top, bottom


def _fit(text: str, face: str, size: int, width: int) -> tuple[int, int]:
    """Return the largest size not above `size` at which the text is at most `width` wide, and its width."""
    while font(face, size).getlength(text) > width:
        size -= 1
    return size, round(font(face, size).getlength(text))


def _write(canvas: Canvas, name: str, text: str, spot: Box, style: Lettering) -> None:
    """Write the text called `name` centred on `spot`."""
    middle = ((spot[0] + spot[2]) / 2, (spot[1] + spot[3]) / 2)
    letters, edge = font(style.face, style.size), 2 if style.halo else 0
    canvas.caps[name] = -letters.getbbox("H", anchor="ls")[1]
    canvas.draw.text(middle, text, style.ink, letters, anchor="mm", stroke_width=edge, stroke_fill=style.halo)
    left = middle[0] - letters.getlength(text) / 2
    ends = [round(left + letters.getlength(text[:end])) for end in range(len(text) + 1)]
    canvas.letters += [
        (name, character, (ends[at], spot[1], ends[at + 1], spot[3])) for at, character in enumerate(text)
    ]


def _slogan(canvas: Canvas, lines: tuple[str, ...], y: int, case: Case) -> None:
    """Write the slogan large, either outlined on the ground or on a box of its own."""
    rng = canvas.rng
    face = rng.choice(FONTS)
    cased = [case(line) for line in lines]
    fits = [_fit(line, face, 18, SIDE - 14) for line in cased]
    size, width = min(f[0] for f in fits), max(f[1] for f in fits)
    left = rng.randrange(4, SIDE - 4 - width - 4)
    box = (left, y, left + width + 4, y + 19 * len(lines) - 1)
    boxed = rng.random() < 0.5
    dark = boxed and rng.random() < 0.6
    ground = ground_for_text(rng, *(((0.1, 0.45), (0.3, 1.0)) if dark else ((0.93, 1.0), (0.0, 0.25))))
    if boxed:
        canvas.draw.rectangle((box[0] - 2, box[1], box[2] + 2, box[3]), fill=ground)
    ink = ink_for(ground, rng)
    for row, line in enumerate(cased):
        spot = (box[0], y + 19 * row, box[2], y + 19 * row + 18)
        _write(canvas, "slogan", line, spot, Lettering(face, size, ink, None if boxed else ground))
    canvas.texts["slogan"] = box


def _claim(canvas: Canvas, text: str, y: int, case: Case) -> None:
    """Write the claim on a ribbon over the full width."""
    rng = canvas.rng
    face = rng.choice(FONTS)
    ground = (
        colour(rng, (0.35, 0.8), (0.55, 1.0)) if rng.random() < 0.6 else ground_for_text(rng, (0.95, 1.0), (0.3, 0.6))
    )
    canvas.draw.rectangle((0, y, SIDE, y + 17), fill=ground)
    cased = case(text)
    size, width = _fit(cased, face, 16, SIDE - 12)
    left = rng.randrange(4, SIDE - 4 - width)
    box = (left, y, left + width, y + 17)
    _write(canvas, "claim", cased, box, Lettering(face, size, ink_for(ground, rng)))
    canvas.texts["claim"] = box


def _head(canvas: Canvas, facts: Facts, y: int) -> None:
    """Write the brand badge at one side and the price tag at the other."""
    rng = canvas.rng
    brand_left = rng.random() < 0.5
    if facts.brand:
        face, style = rng.choice(FONTS), rng.choice((str.upper, str.title))
        text = style(facts.brand)
        size, width = _fit(text, face, 18, 92)
        box = _side(brand_left, width + 12, y, rng)
        ground = (
            colour(rng, (0.15, 0.6), (0.5, 1.0))
            if rng.random() < 0.6
            else ground_for_text(rng, (0.95, 1.0), (0.0, 0.2))
        )
        ink = ink_for(ground, rng)
        canvas.draw.rounded_rectangle(box, radius=rng.choice((3, 7, 11)), fill=ground, outline=ink)
        _write(canvas, "brand", text, box, Lettering(face, size, ink))
        canvas.texts["brand"] = box
    if facts.price:
        face = rng.choice(FONTS)
        size, width = _fit(facts.price, face, 19, 44)
        box = _side(not brand_left, width + 8, y, rng)
        ground = ground_for_text(rng, (0.85, 1.0), (0.6, 1.0))
        canvas.draw.rectangle(box, fill=ground)
        _write(canvas, "price", facts.price, box, Lettering(face, size, ink_for(ground, rng)))
        canvas.texts["price"] = box


def _side(left: bool, width: int, y: int, rng: Random) -> Box:
    x = rng.randrange(2, 6) if left else SIDE - 3 - rng.randrange(0, 4) - width
    return x, y, x + width, y + 21


# ---------------------------------------------------------------- pictures


def _scene(canvas: Canvas, facts: Facts, top: int, bottom: int) -> None:
    """Place product, person and clutter in the free rows without overlap."""
    rng = canvas.rng
    height = bottom - top
    product = _shaped(facts.picture, rng.randint(58, 90), (104 if facts.person_picture else 120, height), rng)
    person = None
    if facts.person != "none":
        person = _shaped(facts.person_picture, rng.randint(42, 55), (56, height), rng, tilt=5)
    free = SIDE - 4 - product.width - (person.width if person else 0)
    gap = rng.randrange(0, max(1, free + 1))
    product_first = rng.random() < 0.5
    x = 2 + gap
    if person is not None:
        split = rng.randrange(0, max(1, free - gap + 1))
        pair = [("product", product), ("person", person)]
        (one, first), (two, second) = pair if product_first else reversed(pair)
        _place(canvas, first, x, rng.randint(top, max(top, bottom - first.height)))
        canvas.shown[one] = canvas.pictures[-1]
        x += first.width + split
        _place(canvas, second, min(x, SIDE - second.width), rng.randint(top, max(top, bottom - second.height)))
        canvas.shown[two] = canvas.pictures[-1]
    else:
        _place(canvas, product, x, rng.randint(top, max(top, bottom - product.height)))
        canvas.shown["product"] = canvas.pictures[-1]
    for file in facts.clutter:
        _clutter(canvas, file, top, bottom)


def _shaped(file: str, side: int, room: tuple[int, int], rng: Random, tilt: int = 20) -> Image.Image:
    """Return the cut-out flipped, turned, re-coloured slightly and scaled into `room` (width, height)."""
    width, height = room
    picture = cut_out(file)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-tilt, tilt)
    scale = side / max(picture.size)
    picture = picture.resize(
        (max(4, round(picture.width * scale)), max(4, round(picture.height * scale))),
        Image.Resampling.BILINEAR,
    )
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    picture = picture.crop(picture.getchannel("A").getbbox())
    if picture.height > height or picture.width > width:
        shrink = min(height / picture.height, width / picture.width)
        size = (max(4, int(picture.width * shrink)), max(4, int(picture.height * shrink)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return _tinted(picture, rng)


def _tinted(picture: Image.Image, rng: Random) -> Image.Image:
    """Scale the three colour channels by factors near one."""
    light = rng.uniform(0.88, 1.1)
    table: list[int] = []
    for _ in range(3):
        gain = light * rng.uniform(0.95, 1.05)
        table += [min(255, int(v * gain)) for v in range(256)]
    return picture.point(table + list(range(256)))


def _place(canvas: Canvas, picture: Image.Image, x: int, y: int) -> None:
    """Paste a cut-out, sometimes over its own soft shadow."""
    if canvas.rng.random() < 0.35 and picture.width > 40:
        shadow = picture.getchannel("A").filter(ImageFilter.BoxBlur(2)).point([v * 2 // 5 for v in range(256)])
        canvas.image.paste((30, 30, 40), (x + 2, y + 2), shadow)
    canvas.image.paste(picture, (x, y), picture)
    canvas.pictures.append((x, y, x + picture.width, y + picture.height))


def _clutter(canvas: Canvas, file: str, top: int, bottom: int) -> None:
    """Place one small item where it hides nothing; drop it when there is no such place."""
    rng = canvas.rng
    picture = _shaped(file, rng.randint(16, 26), (28, 28), rng)
    for _ in range(24):
        x, y = rng.randrange(0, SIDE - picture.width), rng.randrange(0, SIDE - picture.height)
        box = (x, y, x + picture.width, y + picture.height)
        hidden = sum(overlap(box, other) for other in canvas.pictures)
        if hidden <= 0.12 * picture.width * picture.height and not any(
            overlap(box, text) for text in canvas.texts.values()
        ):
            _place(canvas, picture, x, y)
            return


def overlap(a: Box, b: Box) -> int:
    """Return the shared area of two boxes in pixels."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, wide) * max(0, high)
