"""What every encoding has in common: its stream, its count, and the registry of their names.

A stream is header, index, values. The header holds the value coder and the scale as in
docs/format.md, then the encoding's own parameters. Index and values are bit streams, each filled
up with zero bits to a whole byte; the padding counts as metadata, with the header.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.codec import Quantized, Storage
from secateur.codec.bits import BitReader, Bits, Members, from_bits, read_varint, to_bits
from secateur.codec.record import matrix_shape
from secateur.codec.subset import Subset, read_header, read_subset
from secateur.codec.values import (
    Grid,
    Words,
    check_member,
    from_words,
    read_values,
    word_type,
    words,
    write_values,
)
from secateur.codec.values import read_header as read_value_header
from secateur.errors import ArtifactError, SecateurError

ENCODINGS: dict[str, type[Encoding]] = {}
"""Encodings by name, in the order of the tables. Each has defaults for all of its options."""

AnyEncoding = TypeVar("AnyEncoding", bound="type[Encoding]")

_EXTENDED = 0x80  # of the first byte: levels without zero are stored with one more bit and a zero


def register(cls: AnyEncoding) -> AnyEncoding:
    """Class decorator: let tables and :func:`secateur.cost.index_bits` name this encoding."""
    ENCODINGS[cls.name] = cls
    return cls


@dataclass(frozen=True, eq=False)
class Field:
    """A part of an index: codes of one fixed width in bits."""

    codes: NDArray[np.int64]
    width: int

    @property
    def stream(self) -> int:
        """Bits of all codes."""
        return len(self.codes) * self.width

    def bits(self) -> Bits:
        """Return the codes one after another."""
        return to_bits(self.codes, self.width)


@dataclass(frozen=True, eq=False)
class Index:
    """Which elements an encoding stores, and how it says so.

    Attributes:
        places: of the stored values in the flat tensor, in the order of the stream; None is all.
        header: the encoding's own parameters.
        parts: of the index stream.
    """

    places: Members | None
    header: bytes = b""
    parts: tuple[Field | Subset, ...] = ()


@dataclass(frozen=True, eq=False)
class Cells:
    """A tensor as an encoding sees it.

    Attributes:
        shape: of the tensor.
        flat: its elements in row-major order, as words, or levels if ``grid`` is not None.
        grid: of the levels.
    """

    shape: tuple[int, ...]
    flat: NDArray[np.signedinteger]
    grid: Grid | None

    @classmethod
    def of(cls, weight: Tensor, quantized: Quantized | None) -> Cells:
        """Return the cells of a tensor; the sign of zeros is dropped."""
        if quantized is None:
            unsigned = torch.where(weight == 0, torch.zeros_like(weight), weight)
            return cls(tuple(weight.shape), words(unsigned), None)
        grid = check_member(weight, quantized)
        levels = quantized.levels.detach().cpu().reshape(-1).numpy()
        return cls(tuple(weight.shape), levels, grid)

    @cached_property
    def nonzero(self) -> Members:
        """Positions of the non-zeros, ascending."""
        return np.flatnonzero(self.flat)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the GEMM matrix."""
        return matrix_shape(self.shape)

    def width(self, zeros: bool) -> int:
        """Return the bits of a stored value, where zeros must be expressed or need not be.

        Levels without zero use up all codes of their bits, so one zero among the stored values
        costs each of them one bit more.
        """
        if self.grid is None:
            return 8 * self.flat.itemsize
        return self.grid.bits + (zeros and not self.grid.zero)

    def header(self, zeros: bool) -> bytes:
        """Return the value coder and the scale."""
        head = bytearray(self.grid.header() if self.grid else b"\0")
        head[0] |= _EXTENDED if self.grid and self.width(zeros) > self.grid.bits else 0
        return bytes(head)

    def stored(self, index: Index) -> NDArray[np.signedinteger]:
        """Return the elements that an index lists."""
        return self.flat if index.places is None else self.flat[index.places]

    def write(self, stored: NDArray[np.signedinteger], zeros: bool) -> bytes:
        """Return the stream of values."""
        grid = self.grid
        if grid is None or self.width(zeros) == grid.bits:
            return write_values(stored, grid)
        codes = np.full(len(stored), 1 << grid.bits)  # the code of zero
        codes[stored != 0] = grid.codes(grid.ranks(stored[stored != 0].astype(np.int64)))
        return np.packbits(to_bits(codes, grid.bits + 1), bitorder="little").tobytes()


class Reader:
    """Reads the header parameters of an encoding, then its index; raises ArtifactError."""

    def __init__(self, stream: bytes, start: int) -> None:
        self._stream = stream
        self._start = start

    def number(self, largest: int) -> int:
        """Return the next integer of the header."""
        number, self._start = read_varint(self._stream, self._start)
        if number > largest:
            raise ArtifactError(f"stream: {number} where at most {largest} is possible.")
        return number

    @cached_property
    def _bits(self) -> BitReader:
        return BitReader(np.frombuffer(self._stream, dtype=np.uint8)[self._start :])

    def field(self, count: int, width: int) -> NDArray[np.int64]:
        """Return the next codes of the index; the header must have been read."""
        if width == 0:
            return np.zeros(count, dtype=np.int64)
        return from_bits(self._bits.take(count * width), width)

    def subset(self, size: int) -> Members | None:
        """Return a subset of 0 ... size-1 that is the whole index."""
        header, self._start = read_header(self._stream, self._start)
        return read_subset(header, size, self._bits)[0]

    def rest(self) -> bytes:
        """Return what follows the index."""
        return self._stream[self._start + self._bits.align() :]


class Encoding(ABC):
    """A way in which a platform stores a weight tensor; derive it as a frozen dataclass."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def storage(self, weight: Tensor, quantized: Quantized | None = None) -> Storage:
        """Count the bits of :meth:`encode` by kind: ``total == 8 * len(encode(...))``.

        Raises:
            MembershipError: ``weight`` cannot be encoded so, or is not what ``quantized`` says.
        """

    @abstractmethod
    def encode(self, weight: Tensor, quantized: Quantized | None = None) -> bytes:
        """Return the stream of a tensor.

        Args:
            weight: any shape; a dtype of ``secateur.codec.values.DTYPES``.
            quantized: the same tensor as levels and scale; without it each value takes the bits
                of its dtype.

        Raises:
            MembershipError: ``weight`` cannot be encoded so, or is not what ``quantized`` says.
        """

    @abstractmethod
    def decode(self, stream: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the tensor of a stream, on the CPU.

        Raises:
            ArtifactError: the stream is not that of a tensor of this shape and dtype.
        """

    def expected_index_bits(self, ratio: float, bits: float) -> float:
        """Return the mean bits per non-zero beyond its own value, on a large random support.

        Args:
            ratio: elements per non-zero, above 1.
            bits: of a value; zero is one of its values where zeros are stored.

        Raises:
            SecateurError: there is no closed form.
        """
        raise SecateurError(
            f"encoding: '{self}' has no closed form for a random support of ratio {ratio:g}.\n"
            "Remedy: measure it on a tensor with measured_index_bits."
        )


class Indexed(Encoding):
    """An encoding that stores some elements and an index that says which.

    An element is zero if it equals zero: the sign of a zero is not kept, -0.0 comes back as 0.0.
    Where zeros are among the stored values, levels without zero take one bit more
    (:meth:`Cells.width`).
    """

    @abstractmethod
    def index(self, cells: Cells) -> Index:
        """Choose which elements are stored, and how that is said.

        Raises:
            MembershipError: this encoding cannot express these zeros.
        """

    @abstractmethod
    def read_index(self, reader: Reader, shape: tuple[int, ...]) -> Members | None:
        """Invert :meth:`index`: return the places of the stored values (None: everywhere)."""

    def storage(self, weight: Tensor, quantized: Quantized | None = None) -> Storage:
        """Count header, index and values; see :meth:`Encoding.storage`."""
        cells = Cells.of(weight, quantized)
        index = self.index(cells)
        stored = cells.stored(index)
        zeros = not stored.all()
        values, places = len(stored) * cells.width(zeros), sum(part.stream for part in index.parts)
        header = 8 * (len(cells.header(zeros)) + len(index.header))
        return Storage(values, places, header + -values % 8 + -places % 8)

    def encode(self, weight: Tensor, quantized: Quantized | None = None) -> bytes:
        """Write header, index and values; see :meth:`Encoding.encode`."""
        cells = Cells.of(weight, quantized)
        index = self.index(cells)
        stored = cells.stored(index)
        zeros = not stored.all()
        bits = [np.zeros(0, dtype=np.uint8), *(part.bits() for part in index.parts)]
        places = np.packbits(np.concatenate(bits), bitorder="little").tobytes()
        return cells.header(zeros) + index.header + places + cells.write(stored, zeros)

    def decode(self, stream: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read header, index and values; see :meth:`Encoding.decode`."""
        shape = tuple(shape)
        if not stream:
            raise ArtifactError("stream: it is empty.")
        grid, start = read_value_header(stream)
        reader = Reader(stream, start)
        elements = np.zeros(math.prod(shape), dtype=word_type(dtype))
        places = self.read_index(reader, shape)
        count = len(elements) if places is None else len(places)
        if places is not None and count and places.max() >= len(elements):
            raise ArtifactError(f"stream: a place is beyond the tensor of {len(elements)}.")
        if grid is not None and stream[0] & _EXTENDED:
            values = _read_extended(reader.rest(), count, grid, dtype)
        else:
            values = read_values(reader.rest(), count, grid, dtype)
        elements[slice(None) if places is None else places] = values
        return from_words(elements, shape, dtype)


def bits_for(count: int) -> int:
    """Return the narrowest width that tells ``count`` possibilities apart."""
    return max(count - 1, 0).bit_length()


def _read_extended(data: bytes, count: int, grid: Grid, dtype: torch.dtype) -> Words:
    """Read levels without zero from codes that have a zero too."""
    reader = BitReader(np.frombuffer(data, dtype=np.uint8))
    codes = from_bits(reader.take(count * (grid.bits + 1)), grid.bits + 1)
    if reader.align() != len(data) or (codes > 1 << grid.bits).any():
        raise ArtifactError(f"stream: the values are not {count} of {grid.bits + 1} bits.")
    return np.append(grid.table(dtype), np.zeros(1, dtype=word_type(dtype)))[codes]
