"""Encodings without a pattern: every element, a bitmap, or rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.codec.bits import Members, varint
from secateur.codec.record import matrix_shape
from secateur.codec.subset import bitmap
from secateur.cost.encodings.base import Cells, Field, Index, Indexed, Reader, bits_for, register
from secateur.errors import ArtifactError


@register
@dataclass(frozen=True)
class Dense(Indexed):
    """Every element, zeros too."""

    name: ClassVar[str] = "none"

    def index(self, cells: Cells) -> Index:
        """Store everything."""
        return Index(None)

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Return None: everything is stored."""
        return None

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the bits of the zeros that go with each non-zero."""
        return (ratio - 1) * bits


@register
@dataclass(frozen=True)
class Bitmap(Indexed):
    """One bit for each element says whether it has a value."""

    name: ClassVar[str] = "bitmap"

    def index(self, cells: Cells) -> Index:
        """Store the non-zeros, in row-major order."""
        listed = bitmap(cells.nonzero, cells.flat.size)
        return Index(cells.nonzero, listed.header(), (listed,))

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read the bitmap."""
        return reader.subset(math.prod(shape))

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the bits of the map that go with each non-zero."""
        return ratio


@register
@dataclass(frozen=True)
class Csr(Indexed):
    """Compressed sparse rows of the GEMM matrix.

    The header has the number k of values. The index is rows + 1 pointers, each of the fewest bits
    that hold 0 ... k, then k column numbers, each of the fewest bits that tell columns apart.
    """

    name: ClassVar[str] = "csr"

    def index(self, cells: Cells) -> Index:
        """Store the non-zeros, row by row."""
        rows, columns = cells.matrix
        row, column = np.divmod(cells.nonzero, max(columns, 1))
        pointers = np.searchsorted(row, np.arange(rows + 1))
        count = len(cells.nonzero)
        parts = Field(pointers, bits_for(count + 1)), Field(column, bits_for(columns))
        return Index(cells.nonzero, varint(count), parts)

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read pointers and columns."""
        rows, columns = matrix_shape(shape)
        count = reader.number(rows * columns)
        per_row = np.diff(reader.field(rows + 1, bits_for(count + 1)))
        if (per_row < 0).any() or per_row.sum() != count:
            raise ArtifactError(f"stream: the row pointers do not rise to {count}.")
        row = np.repeat(np.arange(rows), per_row)
        return row * columns + reader.field(count, bits_for(columns))
