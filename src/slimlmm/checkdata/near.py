"""The nearest of many 64-bit hashes, within a few bits, without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
#: pairs compared at once
CHUNK = 4_000_000
BITS = 64


def nearest(queries_Q: Hashes, base_B: Hashes, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for every query the index of its nearest base hash and their Hamming distance; -1 and 65 beyond `most` bits.

    Two hashes that differ in at most k bits are equal in one of k + 1 bands at least (pigeonhole), so only hashes with a common
    band are compared: they are found by a sort of the base for each band. `queries_Q` [Q] and `base_B` [B] are uint64.
    """
    queries, back_Q = np.unique(queries_Q, return_inverse=True)
    base, first_B = np.unique(base_B, return_index=True)
    best = np.full(len(queries), -1, np.int64)
    distance = np.full(len(queries), BITS + 1, np.int64)
    for left, right in _pairs(queries, base, most):
        apart = np.bitwise_count(queries[left] ^ base[right]).astype(np.int64)
        near = apart <= most
        left, right, apart = left[near], right[near], apart[near]
        order = np.lexsort((right, apart, left))
        left, right, apart = left[order], right[order], apart[order]
        lead = np.flatnonzero(np.r_[True, left[1:] != left[:-1]]) if len(left) else left
        better = apart[lead] < distance[left[lead]]
        at, chosen = left[lead][better], lead[better]
        best[at], distance[at] = first_B[right[chosen]], apart[chosen]
    return best[back_Q], distance[back_Q]


def _pairs(queries: Hashes, base: Hashes, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield indices of pairs (query, base) that share a band of bits, a few million at a time."""
    if not len(queries) or not len(base):
        return
    edges = np.linspace(0, BITS, most + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        mask, shift = np.uint64((1 << (high - low)) - 1), np.uint64(low)
        bands = base >> shift & mask
        order = np.argsort(bands, kind="stable")
        mine, ordered = queries >> shift & mask, bands[order]
        start = np.searchsorted(ordered, mine, "left")
        count = np.searchsorted(ordered, mine, "right") - start
        for part in _chunks(count):
            yield _spread(part, start[part], count[part], order)


def _chunks(count: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield runs of queries whose pairs together are about CHUNK; one query is never split."""
    total = np.cumsum(count)
    at = 0
    while at < len(count):
        done = total[at - 1] if at else 0
        end = max(at + 1, int(np.searchsorted(total, done + CHUNK, "right")))
        yield np.arange(at, end)
        at = end


def _spread(
    part: NDArray[np.int64], start: NDArray[np.int64], count: NDArray[np.int64], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write out the pairs of queries `part`, whose partners are ``order[start : start + count]``."""
    left = np.repeat(part, count)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
    return left, order[np.repeat(start, count) + offset]
