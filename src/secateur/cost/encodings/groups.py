"""Encodings of what patterns leave: n of m input channels, or whole rows and columns."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.codec.bits import Members, varint
from secateur.codec.combinations import rank, unrank
from secateur.codec.record import matrix_shape
from secateur.cost.encodings.base import Cells, Field, Index, Indexed, Reader, bits_for, register
from secateur.errors import ArtifactError, MembershipError, SecateurError


@dataclass(frozen=True)
class Grouped(Indexed):
    """n values for each m consecutive input channels, zeros among them where fewer are not zero.

    Groups are along dimension 1, the input channels, which is what hardware needs; they come in
    the order of the flat tensor with the input channels last.

    Args:
        n: values stored of each group.
        m: input channels of a group.

    Raises:
        SecateurError: not 1 <= n <= m <= 64.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= 64:
            raise SecateurError(f"n, m: {self.n}:{self.m} is not 1 <= n <= m <= 64.")

    def __str__(self) -> str:
        return f"{self.name} {self.n}:{self.m}"

    @property
    @abstractmethod
    def metadata(self) -> int:
        """Bits that say which n of m a group stores."""

    @abstractmethod
    def field(self, kept: NDArray[np.int64]) -> Field:
        """Return the index for the kept positions of each group, shape (groups, n), ascending."""

    @abstractmethod
    def read_field(self, reader: Reader, groups: int) -> NDArray[np.int64]:
        """Invert :meth:`field`."""

    def index(self, cells: Cells) -> Index:
        """Store n of each group: its non-zeros, and its first zeros up to n.

        Raises:
            MembershipError: a group has more than n non-zeros, or there are no such groups.
        """
        places = _groups(cells.shape, self.m)
        if places is None:
            raise MembershipError(
                f"{self}: shape {cells.shape} has no dimension 1 that is a multiple of {self.m}."
            )
        zero = cells.flat[places] == 0
        crowded = int(((~zero).sum(axis=1) > self.n).sum())
        if crowded:
            raise MembershipError(
                f"{self}: {crowded} of {len(places)} groups have more than {self.n} non-zeros."
            )
        kept = np.sort(np.argsort(zero, axis=1, kind="stable")[:, : self.n], axis=1)
        stored = np.take_along_axis(places, kept, axis=1)
        return Index(stored.reshape(-1), b"", (self.field(kept),))

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read the kept positions."""
        places = _groups(shape, self.m)
        if places is None:
            raise ArtifactError(f"stream: a tensor of shape {shape} has no {self} encoding.")
        kept = self.read_field(reader, len(places))
        return np.take_along_axis(places, kept, axis=1).reshape(-1)

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the metadata that go with each non-zero of full groups: only at ratio m / n."""
        if not math.isclose(ratio, self.m / self.n):
            return super().expected_index_bits(ratio, bits)
        return self.metadata / self.n


@register
@dataclass(frozen=True)
class NM(Grouped):
    """n:m with one number for each group, of log2 C(m, n) bits, rounded up
    (:func:`secateur.codec.combinations.rank`).
    """

    name: ClassVar[str] = "nm"

    @property
    def metadata(self) -> int:
        """Bits that tell all choices apart."""
        return bits_for(math.comb(self.m, self.n))

    def field(self, kept: NDArray[np.int64]) -> Field:
        """Return the number of each group's choice."""
        return Field(rank(kept), self.metadata)

    def read_field(self, reader: Reader, groups: int) -> NDArray[np.int64]:
        """Read the numbers; return what they stand for."""
        ranks = reader.field(groups, self.metadata)
        if (ranks >= math.comb(self.m, self.n)).any():
            raise ArtifactError(f"stream: there is no such choice of {self.n} from {self.m}.")
        return unrank(ranks, self.n, self.m)


@register
@dataclass(frozen=True)
class NMPositions(Grouped):
    """n:m with the position of each value in its group: 2 bits at 2:4, as tensor cores read it."""

    name: ClassVar[str] = "nm_positions"

    @property
    def metadata(self) -> int:
        """Bits of all positions of a group."""
        return self.n * bits_for(self.m)

    def field(self, kept: NDArray[np.int64]) -> Field:
        """Return the positions."""
        return Field(kept.reshape(-1), bits_for(self.m))

    def read_field(self, reader: Reader, groups: int) -> NDArray[np.int64]:
        """Read the positions."""
        kept = reader.field(groups * self.n, bits_for(self.m)).reshape(groups, self.n)
        if (np.diff(kept, axis=1) <= 0).any() or (kept >= self.m).any():
            raise ArtifactError("stream: the positions of a group do not rise.")
        return kept


@register
@dataclass(frozen=True)
class Structured(Indexed):
    """The dense matrix of the rows and columns of the GEMM matrix that hold a non-zero.

    The header has both counts. The index is the number of each live row, then of each live column,
    at fixed width; a side on which all are live lists none. Zeros inside are stored.
    """

    name: ClassVar[str] = "structured"

    def index(self, cells: Cells) -> Index:
        """Store live rows x live columns, in row-major order."""
        lengths = cells.matrix
        sides = np.divmod(cells.nonzero, max(lengths[1], 1))
        live = [np.unique(side) for side in sides]
        places = live[0][:, None] * lengths[1] + live[1]
        parts = [
            Field(side, bits_for(length))
            for side, length in zip(live, lengths, strict=True)
            if len(side) < length
        ]
        header = b"".join(varint(len(side)) for side in live)
        return Index(places.reshape(-1), header, tuple(parts))

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read the live rows and columns."""
        lengths = matrix_shape(shape)
        counts = [reader.number(length) for length in lengths]
        rows, columns = (
            reader.field(count, bits_for(length)) if count < length else np.arange(length)
            for count, length in zip(counts, lengths, strict=True)
        )
        return (rows[:, None] * lengths[1] + columns).reshape(-1)


def _groups(shape: tuple[int, ...], m: int) -> Members | None:
    """Return the flat places of each group, shape (groups, m), or None if there are none."""
    if len(shape) < 2 or shape[1] % m:
        return None
    places = np.arange(math.prod(shape)).reshape(shape)
    return np.moveaxis(places, 1, -1).reshape(-1, m)
