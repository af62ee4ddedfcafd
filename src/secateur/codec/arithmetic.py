"""Levels as one adaptive arithmetic code: where the zeros are, signs and magnitudes together.

A binary range coder with carries (G. N. N. Martin, "Range encoding", 1979) in 32-bit integers, so
that every machine writes the same bytes. The chance of each bit comes from how often the bit was 0
and 1 in the same context before, both counted from 1 (Laplace's rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ArtifactError

LARGEST_REGION = 1 << 18
"""Cells that may be coded so: Python takes about a microsecond for each bit of each cell."""

_WHOLE, _RENORMAL = 1 << 32, 1 << 24  # the range at the start, and below which a byte is shifted
_DIGIT = 24  # bits below the next byte
_MOST_SEEN = 256  # counts that add up to this are halved: the past fades

# Contexts: whether the cell before is zero (0, 1), its sign (2, 3, 4), the nodes of the magnitude
# tree (from 5). More neighbours, such as the cell above, cost small tensors more than they tell.
_SIGN, _TREE = 3, 4


@dataclass(frozen=True)
class Coded:
    """An arithmetic code and the share of it that says which cells are zero, in bits."""

    stream: bytes
    flag_bits: float


def encode(ranks: NDArray[np.int64], largest: int, flagged: bool) -> Coded:
    """Code the ranks of a region's levels.

    Args:
        ranks: shape (cells,), each of -largest ... largest.
        largest: rank of the largest magnitude, at least 1.
        flagged: whether cells may be zero.
    """
    contexts, bits = _binarize(ranks, largest, flagged)
    zeros, ones = _fresh_counts(largest)
    digits: list[int] = []  # the code's bytes, each with a carry of at most 1 still in it
    low, width, flag_bits = 0, _WHOLE, 0.0
    for context, bit in zip(contexts.tolist(), bits.tolist(), strict=True):
        zero, seen = zeros[context], zeros[context] + ones[context]
        split = width * zero // seen
        if bit:
            low += split
            width -= split
            ones[context] += 1
        else:
            width = split
            zeros[context] += 1
        if context < 2:
            flag_bits += math.log2(seen / (seen - zero if bit else zero))
        if seen + 1 == _MOST_SEEN:
            _halve(zeros, ones, context)
        while width < _RENORMAL:
            digits.append(low >> _DIGIT)
            low = (low & (_RENORMAL - 1)) << 8
            width <<= 8
    return Coded(_finish(digits, low, width), flag_bits)


def decode(stream: bytes, cells: int, largest: int, flagged: bool) -> NDArray[np.int64]:
    """Invert :func:`encode`; only the very stream that it writes for these ranks is read.

    Raises:
        ArtifactError: the stream is not one of that many cells.
    """
    if not 0 < cells <= LARGEST_REGION or largest < 1:
        raise ArtifactError(f"record: no {cells:,} levels up to rank {largest} are coded so.")
    bit, finish = _reader(stream, largest)
    depth = _depth(largest)
    ranks = np.zeros(cells, dtype=np.int64)
    sign = 0  # of the cell before
    for cell in range(cells):
        if flagged and not bit(abs(sign)):
            sign = 0
            continue
        sign = -1 if bit(_SIGN + sign) else 1
        node = 1
        for shift in reversed(range(depth)):
            beyond = ((2 * node + 1) << shift) - (1 << depth) >= largest
            node = 2 * node + (0 if beyond else bit(_TREE + node))
        ranks[cell] = sign * (node - (1 << depth) + 1)
    finish()
    return ranks


def _binarize(
    ranks: NDArray[np.int64], largest: int, flagged: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return context and value of all bits in the order of the code."""
    before = np.sign(np.concatenate([np.zeros(1, dtype=np.int64), ranks[:-1]]))
    nonzero = ranks != 0
    everywhere = np.ones(len(ranks), dtype=bool)
    steps = [(np.abs(before), nonzero, everywhere)] if flagged else []
    steps.append((_SIGN + before, ranks < 0, nonzero))
    depth = _depth(largest)
    leaf = np.abs(ranks) - 1 + (1 << depth)
    for shift in reversed(range(depth)):
        node = leaf >> (shift + 1)
        possible = ((2 * node + 1) << shift) - (1 << depth) < largest
        steps.append((_TREE + node, (leaf >> shift) & 1, nonzero & possible))
    contexts, bits, coded = (np.stack(column, axis=1) for column in zip(*steps, strict=True))
    return contexts[coded], bits[coded]


def _depth(largest: int) -> int:
    """Return the bits of a magnitude's rank, counted from 0."""
    return (largest - 1).bit_length()


def _fresh_counts(largest: int) -> tuple[list[int], list[int]]:
    contexts = _TREE + (1 << _depth(largest))
    return [1] * contexts, [1] * contexts


def _halve(zeros: list[int], ones: list[int], context: int) -> None:
    zeros[context] = (zeros[context] + 1) // 2
    ones[context] = (ones[context] + 1) // 2


def _finish(digits: list[int], low: int, width: int) -> bytes:
    """Return the fewest further bytes that name a number in the interval, and settle carries."""
    whole = -(-low // _WHOLE)
    if whole * _WHOLE < low + width:
        digits = [*digits[:-1], digits[-1] + whole] if digits else []
    else:
        digits = [*digits, -(-low // _RENORMAL)]
    carry, settled = 0, bytearray(len(digits))
    for index in reversed(range(len(digits))):
        carry, settled[index] = divmod(digits[index] + carry, 256)
    return bytes(settled)


def _reader(stream: bytes, largest: int) -> tuple[Callable[[int], int], Callable[[], None]]:
    """Return what reads the next bit in a context, and what checks that the code ends there."""
    zeros, ones = _fresh_counts(largest)
    padded = stream + bytes(5)
    length, shifted = len(stream), 0
    width, offset = _WHOLE, int.from_bytes(padded[:4], "big")  # of the code from the interval

    def bit(context: int) -> int:
        nonlocal width, offset, shifted
        zero, seen = zeros[context], zeros[context] + ones[context]
        split = width * zero // seen
        if offset < split:
            value, width = 0, split
            zeros[context] += 1
        else:
            value, width, offset = 1, width - split, offset - split
            ones[context] += 1
        if seen + 1 == _MOST_SEEN:
            _halve(zeros, ones, context)
        while width < _RENORMAL:
            shifted += 1
            if shifted > length:
                raise ArtifactError("record: the arithmetic code ends too early.")
            width, offset = width << 8, offset << 8 | padded[shifted + 3]
        return value

    def finish() -> None:
        last = stream[-1] if stream else 0
        shorter = last == 0 or width - offset > (256 - last) * _RENORMAL
        one_more = length == shifted + 1 and offset < _RENORMAL and not shorter
        if length != shifted and not one_more:
            raise ArtifactError("record: the arithmetic code does not end with its last level.")

    return bit, finish
