"""Subsets of 0 ... size-1 as a bitmap, as Golomb-Rice coded gaps or as combinations of groups,
whichever is shortest.

Cells may also be left to the arithmetic code of the values, which then says which are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.codec.bits import BitReader, Bits, Members, from_bits, read_varint, to_bits, varint
from secateur.codec.combinations import Groups, find_groups
from secateur.errors import ArtifactError

_ALL, _BITMAP, _RICE = 0, 1, 2  # the coder byte; Rice with parameter k is _RICE + k
GROUPED = 253
ARITHMETIC = FULL, FLAGGED = 254, 255
"""Coder bytes of cells that the arithmetic code holds: none is zero, or flags say which are."""


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset and how it is written.

    Attributes:
        size: the subset is one of 0 ... size-1.
        members: in ascending order; None is all of them.
        coder: the byte that says how the subset is written.
        stream: bits in the index stream.
        groups: what the combinations are of, if that is how the subset is written.
    """

    size: int
    members: Members | None
    coder: int
    stream: int
    groups: Groups | None = None

    def __len__(self) -> int:
        return self.size if self.members is None else len(self.members)

    def header(self) -> bytes:
        """Return the coder byte and what it is followed by."""
        numbers: tuple[int, ...] = ()
        if self.groups:
            numbers = (self.groups.m, self.groups.n, self.groups.stride)
        elif _RICE <= self.coder < GROUPED:
            numbers = (len(self),)
        return bytes([self.coder]) + b"".join(map(varint, numbers))

    def bits(self) -> Bits:
        """Return the part of the index stream, ``stream`` bits."""
        if self.members is None:
            return np.zeros(0, dtype=np.uint8)
        if self.coder == _BITMAP:
            bitmap = np.zeros(self.size, dtype=np.uint8)
            bitmap[self.members] = 1
            return bitmap
        if self.groups:
            return self.groups.bits(self.members, self.size)
        k = self.coder - _RICE
        gaps = gaps_of(self.members)
        remainders = to_bits(gaps, k)
        quotients = np.ones(self.stream - len(remainders), dtype=np.uint8)
        quotients[np.cumsum((gaps >> k) + 1) - 1] = 0
        return np.concatenate([remainders, quotients])


def everything(size: int) -> Subset:
    """Return the subset that has all members, which costs no index bits."""
    return Subset(size, None, _ALL, 0)


def entrusted(size: int, flagged: bool) -> Subset:
    """Return all cells, left to the arithmetic code with or without flags for zeros."""
    return Subset(size, None, FLAGGED if flagged else FULL, 0)


def bitmap(members: Members, size: int) -> Subset:
    """Return the subset with one bit for each of 0 ... size-1."""
    return Subset(size, members, _BITMAP, size)


def rice(members: Members, size: int) -> Subset:
    """Return the subset as Golomb-Rice coded gaps with the best parameter (members ascending)."""
    k, stream = _best_parameter(gaps_of(members))
    return Subset(size, members, _RICE + k, stream)


def grouped(members: Members, size: int, positions: int) -> Subset | None:
    """Return the subset as combinations, if all groups of some kind have equally many members."""
    groups = find_groups(members, size, positions)
    return Subset(size, members, GROUPED, groups.stream(size), groups) if groups else None


def listed(members: Members, size: int, positions: int | None = None) -> Subset:
    """Return the subset in the shortest of its codings (members ascending, header counted).

    Args:
        positions: kernel positions of a weight whose cells these are; otherwise there are no
            groups.
    """
    codings = [bitmap(members, size), rice(members, size)]
    if positions is not None and (groups := grouped(members, size, positions)):
        codings.append(groups)
    return min(codings, key=lambda subset: subset.stream + 8 * len(subset.header()))


def gaps_of(members: Members) -> Members:
    """Return how many are skipped before each member (ascending) since the last one."""
    return np.diff(members, prepend=-1) - 1


def _best_parameter(gaps: Members) -> tuple[int, int]:
    """Return the Rice parameter with the fewest bits, and those bits, by trying each."""
    best, fewest = 0, len(gaps) + int(gaps.sum())
    for k in range(1, int(gaps.max(initial=0)).bit_length() + 1):
        stream = len(gaps) * (k + 1) + int((gaps >> k).sum())
        if stream < fewest:
            best, fewest = k, stream
    return best, fewest


@dataclass(frozen=True)
class SubsetHeader:
    """What the header says of a subset: the coder byte, for Rice the number of members, and what
    combinations are of."""

    coder: int
    count: int = 0
    groups: Groups | None = None

    def __str__(self) -> str:
        if self.groups:
            return f"{self.groups.n}:{self.groups.m} combinations"
        if self.coder in ARITHMETIC:
            return "arithmetic"
        if self.coder >= _RICE:
            return f"rice({self.coder - _RICE})"
        return "bitmap" if self.coder == _BITMAP else "all"


def read_header(record: bytes, start: int) -> tuple[SubsetHeader, int]:
    """Return a subset's header at ``start`` and the position after it."""
    if start >= len(record):
        raise ArtifactError("record: its header is cut off.")
    coder, start = record[start], start + 1
    if coder == GROUPED:
        m, start = read_varint(record, start)
        n, start = read_varint(record, start)
        stride, start = read_varint(record, start)
        return SubsetHeader(coder, groups=Groups(m, n, stride)), start
    count = 0
    if _RICE <= coder < GROUPED:
        count, start = read_varint(record, start)
    return SubsetHeader(coder, count), start


def read_subset(header: SubsetHeader, size: int, reader: BitReader) -> tuple[Members | None, int]:
    """Read a subset of 0 ... size-1; return its members (None is all) and how many they are.

    Raises:
        ArtifactError: the subset is not one of 0 ... size-1, or its bits run out.
    """
    if header.coder == _ALL or header.coder in ARITHMETIC:
        return None, size
    if header.coder == _BITMAP:
        members: Members = np.flatnonzero(reader.take(size))
        return members, len(members)
    if header.groups:
        if not header.groups.fits(size):
            raise ArtifactError(f"record: a range of {size} is not made of {header.groups}.")
        members = header.groups.read(size, reader)
        return members, len(members)
    k, count = header.coder - _RICE, header.count
    if k > size.bit_length() or count > size:
        raise ArtifactError(f"record: Rice parameter {k}, count {count} in a range of {size}.")
    remainders = reader.take(count * k)
    gaps = from_bits(remainders, k) if k else np.zeros(count, dtype=np.int64)
    # The gaps add up to less than size, so the quotients cannot take more bits than this.
    ends = np.flatnonzero(reader.peek(count + (size >> k)) == 0)[:count]
    if len(ends) < count:
        raise ArtifactError("record: a Rice quotient is cut off or too large.")
    gaps += np.diff(ends, prepend=-1) - 1 << k
    if count:
        reader.take(int(ends[-1]) + 1)
    if count + gaps.sum(dtype=np.float64) > size:  # in float64, which cannot wrap round
        raise ArtifactError(f"record: a position is outside its range of {size}.")
    return np.cumsum(gaps + 1) - 1, count
