"""Relative encodings: each value comes with its gap, the zeros in row-major order before it.

On a large random support of ratio u, a gap is t or more with probability (1 - 1/u)^t. The means of
the closed forms follow from it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from secateur.codec.bits import Members, varint
from secateur.codec.subset import gaps_of, rice
from secateur.cost.encodings.base import Cells, Field, Index, Indexed, Reader, register
from secateur.errors import SecateurError

WIDEST = 32
"""Most bits of a gap's code, and the largest Rice parameter that closed forms try."""


@dataclass(frozen=True)
class Relative(Indexed):
    """Gaps in codes of one width. The largest code, all ones, lengthens a gap that is too long.

    The header has the width and the number of codes; the index is the codes.

    Args:
        width: bits of a code, 1 to 32; by default the width with the fewest bits altogether.

    Raises:
        SecateurError: the width is out of range.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and not 1 <= self.width <= WIDEST:
            raise SecateurError(f"width: {self.width} is not in 1..{WIDEST}.")

    def __str__(self) -> str:
        return f"{self.name} {self.width}" if self.width else self.name

    @abstractmethod
    def span(self, width: int) -> int:
        """Return how many elements the code of all ones covers."""

    @abstractmethod
    def valued(self, codes: Members, width: int) -> NDArray[np.bool_]:
        """Return which codes come with a value."""

    @abstractmethod
    def bits_at(self, width: int, codes: int, cells: Cells) -> int:
        """Count, for this width and this many codes, what depends on the width."""

    @abstractmethod
    def expected_at(self, width: int, codes: float, bits: float) -> float:
        """Return the mean for this width and this many codes per non-zero."""

    def index(self, cells: Cells) -> Index:
        """Store the non-zeros, and what fills up long gaps."""
        gaps = gaps_of(cells.nonzero)
        width = self.width or self._best_width(gaps, cells)
        lengthened, rest = np.divmod(gaps, self.span(width))
        codes = np.full(len(gaps) + lengthened.sum(), (1 << width) - 1)
        codes[np.cumsum(lengthened + 1) - 1] = rest
        header = bytes([width]) + varint(len(codes))
        return Index(self._places(codes, width), header, (Field(codes, width),))

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read the codes."""
        width = reader.number(WIDEST)
        codes = reader.field(reader.number(math.prod(shape)), width)
        return self._places(codes, width)

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the mean for the given width, or for the best one."""
        widths = [self.width] if self.width else range(1, WIDEST + 1)
        return min(
            self.expected_at(width, _per_success(self.span(width), ratio), bits) for width in widths
        )

    def _best_width(self, gaps: Members, cells: Cells) -> int:
        def bits_at(width: int) -> int:
            return self.bits_at(width, len(gaps) + int((gaps // self.span(width)).sum()), cells)

        return min(range(1, (int(gaps.max(initial=0)) + 1).bit_length() + 1), key=bits_at)

    def _places(self, codes: Members, width: int) -> Members:
        covered = np.where(codes == (1 << width) - 1, self.span(width), codes + 1)
        places: Members = np.cumsum(covered) - 1
        return places[self.valued(codes, width)]


@register
@dataclass(frozen=True)
class RelativeFiller(Relative):
    """Fixed-width gaps; a zero is stored where a gap overflows (Deep Compression, EIE).

    A filler is a code of all ones with a value of its own, zero. Levels without zero have no code
    for it: one filler makes every value of the tensor one bit wider.
    """

    name: ClassVar[str] = "relative_filler"

    def span(self, width: int) -> int:
        """Return the zeros of the longest gap and the filler."""
        return 1 << width

    def valued(self, codes: Members, width: int) -> NDArray[np.bool_]:
        """Return that all codes come with a value."""
        return np.ones(len(codes), dtype=bool)

    def bits_at(self, width: int, codes: int, cells: Cells) -> int:
        """Count codes and values."""
        return codes * (width + cells.width(zeros=codes > len(cells.nonzero)))

    def expected_at(self, width: int, codes: float, bits: float) -> float:
        """Return the mean bits of codes and fillers."""
        return codes * (width + bits) - bits


@register
@dataclass(frozen=True)
class RelativeEscape(Relative):
    """Fixed-width gaps; the code of all ones makes a gap longer and comes without a value."""

    name: ClassVar[str] = "relative_escape"

    def span(self, width: int) -> int:
        """Return the zeros that an escape stands for."""
        return (1 << width) - 1

    def valued(self, codes: Members, width: int) -> NDArray[np.bool_]:
        """Return which codes are no escapes."""
        return np.not_equal(codes, (1 << width) - 1)

    def bits_at(self, width: int, codes: int, cells: Cells) -> int:
        """Count the codes."""
        return codes * width

    def expected_at(self, width: int, codes: float, bits: float) -> float:
        """Return the mean bits of codes."""
        return codes * width


@register
@dataclass(frozen=True)
class Rice(Indexed):
    """Golomb-Rice coded gaps with the best parameter, as the packed file writes them."""

    name: ClassVar[str] = "rice"

    def index(self, cells: Cells) -> Index:
        """Store the non-zeros, in row-major order."""
        listed = rice(cells.nonzero, cells.flat.size)
        return Index(cells.nonzero, listed.header(), (listed,))

    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Read the gaps."""
        return reader.subset(math.prod(shape))

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the mean for the best parameter k: k bits and, at (1 - 1/u)^(2^k) = q, a unary
        quotient of mean 1 + q / (1 - q) = 1 / (1 - q)."""
        return min(k + _per_success(2**k, ratio) for k in range(WIDEST + 1))


def _per_success(span: int, ratio: float) -> float:
    """Return 1 / (1 - (1 - 1/u)^span): steps of this span until one has a non-zero, on average."""
    return -1 / math.expm1(span * math.log1p(-1 / ratio))
