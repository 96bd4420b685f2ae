"""Pictures one by one: all of them looked at, by several processes where there are many, and what is wrong with each."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from slimlmm.checkdata.kinds import Pad
from slimlmm.checkdata.look import Look, look
from slimlmm.checkdata.reading import Reading
from slimlmm.checkdata.record import Pictures
from slimlmm.errors import UserError
from slimlmm.pictures import USUAL, PictureSettings
from slimlmm.progress import Reporter

#: seconds of work from which on starting processes (a second, and nobody else's cores) pays
PAYS = 4.0
WORKERS = 8
#: pictures that a process takes at a time
BUNDLE = 64
WORK = "looking at pictures"
DEEP = ("I", "F")
PLAIN = "RGB"


def looked_at(reading: Reading, max_pixels: int, tell: Reporter, allowed: PictureSettings = USUAL) -> list[Look]:
    """Look at every different picture, in order."""
    sources = [entry.row.image for entry in reading.pictures]
    looks: list[Look] = []
    for one in _looks(sources, partial(look, root=reading.root, max_pixels=max_pixels, allowed=allowed)):
        looks.append(one)
        if len(looks) % BUNDLE == 0 or len(looks) == len(sources):
            tell.step(WORK, len(looks), len(sources))
    return looks


def _looks(sources: Sequence[Path | bytes], one: partial[Look]) -> Iterator[Look]:
    """Look at the first few here; at the others in several processes where, by the time these took, that pays."""
    began = time.perf_counter()
    for source in sources[:BUNDLE]:
        yield one(source)
    rest = sources[BUNDLE:]
    expected = (time.perf_counter() - began) / BUNDLE * len(rest)
    workers = min(WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if expected < PAYS or workers == 1:
        yield from map(one, rest)
        return
    # spawned: a fork of a process whose threads hold locks (torch, datasets) may never wake
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(one, rest, chunksize=BUNDLE)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that looks at pictures was ended from outside or by a crash of a decoder: free some memory, or "
                "split the data to find the picture."
            ) from error


def judge(reading: Reading, looks: Sequence[Look], pad: Pad) -> Pictures:
    """Put what is wrong with each picture on the pad; return what the pictures are."""
    for entry, one in zip(reading.pictures, looks, strict=True):
        for kind, note in _faults(one):
            pad.add(kind, entry.example(_where(entry.row.image, note)), len(looks))
    decoded = [one for one in looks if not one.fault]
    pixels = [one.width * one.height for one in decoded]
    return Pictures(
        count=len(looks),
        decoded=len(decoded),
        bytes=sum(one.size for one in looks),
        formats=dict(Counter(one.format for one in decoded).most_common()),
        modes=dict(Counter(one.mode for one in decoded).most_common()),
        median_pixels=int(np.median(pixels)) if pixels else 0,
        most_pixels=max(pixels, default=0),
    )


def _where(image: Path | bytes, note: str) -> str:
    name = str(image) if isinstance(image, Path) else "embedded bytes"
    return f"{name}: {note}" if note else name


def _faults(one: Look) -> Iterator[tuple[str, str]]:
    """Yield the kinds of findings that a picture is, with what is particular about it."""
    if one.fault:
        yield one.fault, one.detail
        return
    if one.linked:
        yield "linked picture", ""
    if one.animated:
        yield "animated picture", one.format
    if one.rotation != 1:
        yield "rotated picture", f"orientation {one.rotation}"
    if one.transparent:
        yield "transparent picture", one.mode
    elif one.mode == "CMYK":
        yield "CMYK picture", one.mode
    elif one.mode.startswith(DEEP):
        yield "deep picture", one.mode
    elif one.mode != PLAIN:
        yield "other colours", one.mode
