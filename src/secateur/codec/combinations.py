"""n of each m: which combination each group has, at log2 C(m, n) bits a group and hardly more.

A combination is its rank in the combinatorial number system; several ranks share a word, so that
what is lost to whole bits is a fraction of a bit for many groups (2:4 takes 60 bits for 23 groups).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.codec.bits import BitReader, Bits, Members, from_bits, to_bits
from secateur.errors import ArtifactError

LARGEST_GROUP = 64
"""C(64, 32) is the largest number of combinations, below 2^61."""

_WORD = 62  # bits of the longest word; sums of ranks stay within int64

_CHOOSE = np.array(
    [[math.comb(p, i + 1) for p in range(LARGEST_GROUP)] for i in range(LARGEST_GROUP)],
    dtype=np.uint64,
)
"""C(p, i + 1) at row i and column p."""


def rank(kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of each combination p_1 < ... < p_n: C(p_1, 1) + ... + C(p_n, n).

    Args:
        kept: combinations, shape (groups, n), ascending, each below 64.
    """
    ranks: NDArray[np.uint64] = _CHOOSE[np.arange(kept.shape[1]), kept].sum(axis=1)
    return ranks.astype(np.int64)


def unrank(ranks: NDArray[np.int64], n: int, m: int) -> NDArray[np.int64]:
    """Invert :func:`rank` for numbers below C(m, n): the largest position first, then the next."""
    rest = ranks.astype(np.uint64)
    kept = np.empty((len(ranks), n), dtype=np.int64)
    for i in reversed(range(n)):
        kept[:, i] = np.searchsorted(_CHOOSE[i, :m], rest, side="right") - 1
        rest -= _CHOOSE[i, kept[:, i]]
    return kept


@dataclass(frozen=True)
class Groups:
    """Cells in blocks of ``m * stride``; each m that lie ``stride`` apart in a block are a group.

    Args:
        m: cells in a group, 2 to 64.
        n: members in each group, 1 to m - 1.
        stride: distance of neighbours in a group: kernel positions, or 1.
    """

    m: int
    n: int
    stride: int

    def fits(self, size: int) -> bool:
        """Say whether a range of ``size`` is made of such groups."""
        legal = 2 <= self.m <= LARGEST_GROUP and 1 <= self.n < self.m and self.stride >= 1
        return legal and size > 0 and size % (self.m * self.stride) == 0

    def stream(self, size: int) -> int:
        """Return the bits that the combinations of a range take."""
        full, rest = divmod(size // self.m, self._per_word)
        return full * self._width(self._per_word) + self._width(rest)

    def holds(self, members: Members, size: int) -> bool:
        """Say whether each group of a range that fits has n of these members."""
        marks = np.zeros(size, dtype=np.uint8)
        marks[members] = 1
        counts = marks.reshape(-1, self.m, self.stride).sum(axis=1, dtype=np.uint8)
        return bool((counts == self.n).all())

    def bits(self, members: Members, size: int) -> Bits:
        """Return the combinations of ascending members as a bit stream, group after group."""
        block, place = np.divmod(members, self.m * self.stride)
        lane, offset = np.divmod(place, self.stride)
        order = np.argsort(block * self.stride + offset, kind="stable")
        lanes = lane[order].reshape(-1, self.n)
        ranks = rank(lanes)
        full = len(ranks) // self._per_word * self._per_word
        words = ranks[:full].reshape(-1, self._per_word) @ self._powers(self._per_word)
        last = ranks[full:]
        word = np.array([last @ self._powers(len(last))], dtype=np.int64)
        return np.concatenate(
            [to_bits(words, self._width(self._per_word)), to_bits(word, self._width(len(last)))]
        )

    def read(self, size: int, reader: BitReader) -> Members:
        """Read combinations; return the members, ascending.

        Raises:
            ArtifactError: the bits run out, or a word is larger than all combinations of it.
        """
        full, rest = divmod(size // self.m, self._per_word)
        runs = [self._read_words(full, self._per_word, reader), self._read_words(1, rest, reader)]
        lanes = unrank(np.concatenate(runs), self.n, self.m)
        marks = np.zeros((len(lanes), self.m), dtype=bool)
        np.put_along_axis(marks, lanes, True, axis=1)
        return np.flatnonzero(marks.reshape(-1, self.stride, self.m).swapaxes(1, 2))

    def _read_words(self, count: int, ranks: int, reader: BitReader) -> NDArray[np.int64]:
        """Return the ranks of ``count`` words of ``ranks`` each."""
        width = self._width(ranks)
        if not count or not ranks:
            return np.zeros(0, dtype=np.int64)
        words = from_bits(reader.take(count * width), width)
        if int(words.max()) >= self._combinations**ranks:
            raise ArtifactError(f"record: a word of {self.n}:{self.m} groups is out of range.")
        found = np.empty((count, ranks), dtype=np.int64)
        for place in range(ranks):
            words, found[:, place] = np.divmod(words, self._combinations)
        return found.ravel()

    @property
    def _combinations(self) -> int:
        return math.comb(self.m, self.n)

    @property
    def _per_word(self) -> int:
        return int(_WORD / math.log2(self._combinations))

    def _width(self, ranks: int) -> int:
        return int((self._combinations**ranks - 1).bit_length())

    def _powers(self, ranks: int) -> NDArray[np.int64]:
        return np.array([self._combinations**place for place in range(ranks)], dtype=np.int64)


def find_groups(members: Members, size: int, positions: int) -> Groups | None:
    """Return the cheapest groups that have equally many members each, if there are any.

    Args:
        members: ascending.
        size: of the range that they are of.
        positions: kernel positions, tried as a stride before 1.
    """
    found = []
    for stride in dict.fromkeys((positions, 1)):
        for m in range(2, LARGEST_GROUP + 1):
            n, rest = divmod(len(members) * m, size)
            groups = Groups(m, n, stride)
            if not rest and groups.fits(size) and groups.holds(members, size):
                found.append(groups)
    return min(found, key=lambda groups: groups.stream(size), default=None)
