"""Near-identical texts, found exactly: every pair at or above a similarity, none below."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+")

Shingles = npt.NDArray[np.uint64]


class Groups:
    """Disjoint sets over ``0 .. n-1`` (union-find with path halving).

    >>> groups = Groups(3)
    >>> groups.join(0, 2)
    >>> [groups.find(i) for i in range(3)]
    [0, 1, 0]
    """

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, i: int) -> int:
        """Smallest member of the set that holds ``i``."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        """Make one set of two."""
        a, b = self.find(i), self.find(j)
        self._parent[max(a, b)] = min(a, b)


def near_identical(
    texts: Sequence[str], *, threshold: float = 0.8, width: int = 5
) -> list[tuple[int, int]]:
    """Pairs of texts that share most of their word sequences.

    Two texts are near-identical when the Jaccard similarity of their sets of ``width``-word
    shingles (case and punctuation ignored) is at least ``threshold``. Candidates come from a
    prefix filter: ordered from rare to common, two sets that similar share one of their first
    ``(1 - threshold) n + 1`` shingles (Chaudhuri et al. 2006; Bayardo et al. 2007).

    Parameters
    ----------
    texts
        What to compare.
    threshold
        Least similarity, in (0, 1]; 0.8 by default.
    width
        Words in a shingle; a shorter text is one shingle.

    Returns
    -------
    list of (int, int)
        Positions, the smaller first, sorted. Equal texts are linked in a chain.

    Examples
    --------
    >>> near_identical(["Sort an array, in place.", "sort an array in-place", "Invert a matrix"])
    [(0, 1)]
    """
    first: dict[tuple[str, ...], int] = {}
    pairs: list[tuple[int, int]] = []
    rows: list[int] = []
    for row, text in enumerate(texts):
        words = tuple(_WORD.findall(text.lower()))
        same = first.setdefault(words, row)
        if same == row:
            rows.append(row)
        else:
            pairs.append((same, row))
    sets = _shingles(list(first), width)
    for a, b in _candidates(sets, threshold):
        shared = np.intersect1d(sets[a], sets[b], assume_unique=True).size
        if shared >= threshold * (sets[a].size + sets[b].size - shared):
            pairs.append((rows[a], rows[b]))
    return sorted(pairs)


def _shingles(texts: Sequence[Sequence[str]], width: int) -> list[Shingles]:
    """For each text the hashes of its runs of ``width`` words, unique and sorted."""
    vocabulary: dict[str, int] = {}
    ids = np.array(
        [vocabulary.setdefault(w, len(vocabulary) + 1) for t in texts for w in t], np.uint64
    )
    # Zeros after every text: a short one still has its run, and none reaches into the next.
    lengths = np.array([len(t) for t in texts], np.int64)
    starts = np.cumsum(lengths + width) - lengths - width
    flat = np.zeros(int((lengths + width).sum()), np.uint64)
    flat[np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(ids.size)] = ids
    hashes = np.zeros_like(flat)
    for offset in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + np.roll(flat, -offset)
        hashes ^= hashes >> np.uint64(29)
    runs = np.maximum(lengths - width + 1, 1)
    return [
        np.unique(hashes[s : s + n]) for s, n in zip(starts.tolist(), runs.tolist(), strict=True)
    ]


def _candidates(sets: Sequence[Shingles], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs of sets that may reach the threshold: similar in size, one rare shingle in common."""
    sizes = np.array([s.size for s in sets])
    if not sizes.sum():
        return
    flat = np.concatenate(sets)
    owner = np.repeat(np.arange(len(sets)), sizes)
    _, shingle, counts = np.unique(flat, return_inverse=True, return_counts=True)
    order = np.lexsort((shingle, counts[shingle], owner))
    position = np.arange(flat.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    prefix = np.floor((1 - threshold) * sizes + 1e-9).astype(np.int64) + 1
    kept = order[position < np.repeat(prefix, sizes)]
    holders: dict[int, list[int]] = defaultdict(list)
    for key, row in zip(shingle[kept].tolist(), owner[kept].tolist(), strict=True):
        holders[key].append(row)
    seen: set[tuple[int, int]] = set()
    for members in holders.values():
        for a, b in combinations(members, 2):
            if min(sizes[a], sizes[b]) >= threshold * max(sizes[a], sizes[b]) - 1e-9:
                seen.add((a, b))
    yield from sorted(seen)
