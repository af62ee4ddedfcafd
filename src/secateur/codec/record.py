"""Record of one tensor: header, index stream, value stream (docs/format.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.codec.arithmetic import LARGEST_REGION, Coded
from secateur.codec.bits import BitReader, Members
from secateur.codec.subset import (
    ARITHMETIC,
    FLAGGED,
    Subset,
    SubsetHeader,
    entrusted,
    everything,
    listed,
    read_header,
    read_subset,
)
from secateur.codec.values import (
    Grid,
    Quantized,
    check_member,
    from_words,
    read_region,
    read_values,
    word_type,
    words,
    write_region,
    write_values,
)
from secateur.codec.values import read_header as read_value_header
from secateur.errors import ArtifactError

_LIVE = 0x80


@dataclass(frozen=True)
class Storage:
    """Bits of a stored tensor, counted apart. Add them up with ``+`` or ``sum(..., Storage())``.

    Attributes:
        values: bits of the stored values.
        index: bits that say where they are; in an arithmetic code, what its zero flags cost.
        metadata: the rest: header, scale and padding to whole bytes.
    """

    values: int = 0
    index: int = 0
    metadata: int = 0

    def __add__(self, other: Storage) -> Storage:
        return Storage(
            self.values + other.values, self.index + other.index, self.metadata + other.metadata
        )

    @property
    def total(self) -> int:
        """All bits together."""
        return self.values + self.index + self.metadata


@dataclass(frozen=True, eq=False)
class _Plan:
    """One way to write a tensor: its live rows and columns, if listed, and its cells."""

    matrix: NDArray[np.signedinteger]  # words, or levels if grid is not None
    grid: Grid | None
    live: tuple[Subset, Subset] | None
    cells: Subset

    @property
    def subsets(self) -> tuple[Subset, ...]:
        return (*(self.live or ()), self.cells)

    def header(self) -> bytes:
        head = bytearray(self.grid.header() if self.grid else b"\0")
        head[0] |= _LIVE if self.live else 0
        return bytes(head) + b"".join(subset.header() for subset in self.subsets)

    @cached_property
    def coded(self) -> Coded | None:
        """The arithmetic code, if that holds the cells."""
        if self.grid is None or self.cells.coder not in ARITHMETIC:
            return None
        return write_region(self._stored(), self.grid, self.cells.coder == FLAGGED)

    def storage(self) -> Storage:
        header, index = 8 * len(self.header()), sum(subset.stream for subset in self.subsets)
        if self.coded:
            stream = 8 * len(self.coded.stream)
            flags = min(round(self.coded.flag_bits), stream)
            return Storage(stream - flags, index + flags, header + -index % 8)
        width = self.grid.bits if self.grid else 8 * self.matrix.itemsize
        values = width * len(self.cells)
        return Storage(values, index, header + -values % 8 + -index % 8)

    def write(self) -> bytes:
        index = np.concatenate([subset.bits() for subset in self.subsets])
        packed = np.packbits(index, bitorder="little").tobytes()
        values = self.coded.stream if self.coded else write_values(self._stored(), self.grid)
        return self.header() + packed + values

    def _stored(self) -> NDArray[np.signedinteger]:
        """Return the cells that have a value, in order."""
        region = self.matrix
        if self.live:
            # Indexing by None adds an axis, so a full list is written out.
            rows, columns = (
                np.arange(side.size) if side.members is None else side.members for side in self.live
            )
            region = region[np.ix_(rows, columns)]
        flat = region.reshape(-1)
        return flat if self.cells.members is None else flat[self.cells.members]


def encode(weight: Tensor, quantized: Quantized | None = None) -> bytes:
    """Return the shortest record of a tensor that the format offers.

    Without ``quantized`` the elements are stored bit for bit, -0.0 and NaN included; only +0.0
    counts as zero there. With it, the levels are stored, and zeros lose their sign.

    Args:
        weight: any shape; a dtype of ``secateur.codec.values.DTYPES``.
        quantized: the same tensor as levels and scale.

    Raises:
        MembershipError: ``quantized`` is out of range or does not say what the weight is.
        ArtifactError: the dtype cannot be stored.
    """
    plan = _choose(weight, quantized)
    return plan.write() if plan else b""


def storage(weight: Tensor, quantized: Quantized | None = None) -> Storage:
    """Count the bits of :func:`encode` without writing them: ``total == 8 * len(encode(...))``."""
    plan = _choose(weight, quantized)
    return plan.storage() if plan else Storage()


def decode(record: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor of a record, on the CPU.

    Memory is bounded by a small multiple of what ``shape`` says, whatever the record holds.

    Raises:
        ArtifactError: the record is not that of a tensor of this shape and dtype.
    """
    shape = tuple(shape)
    if not record:
        return from_words(np.zeros(math.prod(shape), dtype=word_type(dtype)), shape, dtype)
    header = _Header.read(record)
    if header.grid and header.grid.by_row:
        return _levels(record, header, header.grid, shape).weight(dtype)
    return _read(record, header, shape, dtype)


def levels(record: bytes, shape: Sequence[int]) -> Quantized | None:
    """Return the levels of a record, int16 on the CPU, and their scales; None if it has none.

    Raw values have none, nor has an empty record, which does not say whether its zeros were levels.

    Raises:
        ArtifactError: the record is not that of a tensor of this shape.
    """
    header = _Header.read(record) if record else None
    if header is None or header.grid is None:
        return None
    return _levels(record, header, header.grid, tuple(shape))


def _levels(record: bytes, header: _Header, grid: Grid, shape: tuple[int, ...]) -> Quantized:
    if isinstance(grid.scale, tuple) and (len(grid.scale),) != shape[:1]:
        raise ArtifactError(f"record: {len(grid.scale)} scales for a tensor of shape {shape}.")
    unscaled = replace(header, grid=replace(grid, scale=1.0))
    integers = _read(record, unscaled, shape, torch.int16)
    return Quantized(integers, grid.scale, grid.bits, grid.zero, grid.spacing)


def _read(record: bytes, header: _Header, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor of a record whose header has been read."""
    size = math.prod(shape)
    if size == 0:
        raise ArtifactError("record: data for a tensor without elements.")
    elements = np.zeros(size, dtype=word_type(dtype))
    reader = BitReader(np.frombuffer(record, dtype=np.uint8)[header.length :])
    places, count = _read_places(header, shape, reader)
    stored = record[header.length + reader.align() :]
    grid, cells = header.grid, header.subsets[-1]
    if grid and cells.coder in ARITHMETIC:
        values = read_region(stored, count, grid, cells.coder == FLAGGED, dtype)
    else:
        values = read_values(stored, count, grid, dtype)
    elements[slice(None) if places is None else places] = values
    return from_words(elements, shape, dtype)


def format_of(record: bytes) -> int:
    """Return the earliest version of the format that has all that a record uses."""
    if not record:
        return 1
    header = _Header.read(record)
    by_row = header.grid is not None and header.grid.by_row
    return 2 if by_row or any(each.groups for each in header.subsets) else 1


def describe(record: bytes) -> str:
    """Say in a few words how a record is coded, for example ``3 bits, rice(4)``."""
    if not record:
        return "zeros"
    header = _Header.read(record)
    live = [f"live rows {header.subsets[0]}, columns {header.subsets[1]}"] if header.live else []
    grid = header.grid
    values = f"{grid.bits} bits{' with zero' * grid.zero}" if grid else "raw"
    values += " powers of two" if grid and grid.spacing == "power_of_two" else ""
    values += " by row" if grid and grid.by_row else ""
    return ", ".join([values, *live, str(header.subsets[-1])])


@dataclass(frozen=True)
class _Header:
    grid: Grid | None
    live: bool
    subsets: list[SubsetHeader]
    length: int

    @classmethod
    def read(cls, record: bytes) -> _Header:
        grid, position = read_value_header(record)
        live = bool(record[0] & _LIVE)
        subsets = []
        for _ in range(3 if live else 1):
            subset, position = read_header(record, position)
            subsets.append(subset)
        if any(each.coder in ARITHMETIC for each in (subsets if grid is None else subsets[:-1])):
            raise ArtifactError("record: only the cells of levels can be coded with the values.")
        return cls(grid, live, subsets, position)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the GEMM matrix: dimension 0 by the others flattened."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def _read_places(
    header: _Header, shape: tuple[int, ...], reader: BitReader
) -> tuple[Members | None, int]:
    """Return where the stored elements go in the flat tensor (None: everywhere), and how many."""
    if not header.live:
        return read_subset(header.subsets[0], math.prod(shape), reader)
    height, width = matrix_shape(shape)
    rows, row_count = read_subset(header.subsets[0], height, reader)
    columns, column_count = read_subset(header.subsets[1], width, reader)
    cells, count = read_subset(header.subsets[2], row_count * column_count, reader)
    if cells is None:
        cells = np.arange(count)
    row, column = np.divmod(cells, max(column_count, 1))
    row = row if rows is None else rows[row]
    column = column if columns is None else columns[column]
    return row * width + column, count


def _choose(weight: Tensor, quantized: Quantized | None) -> _Plan | None:
    """Return the plan with the fewest bytes, or None if there is nothing but zeros."""
    if quantized is None:
        return _shortest(weight, words(weight), None)
    grid = check_member(weight, quantized)
    plan = _shortest(weight, quantized.levels.detach().cpu().reshape(-1).numpy(), grid)
    if plan and grid.by_row:  # of narrow matrices the scales may take more than the values
        raw = _shortest(weight, words(weight), None)
        return plan if not raw or plan.storage().total <= raw.storage().total else raw
    return plan


def _shortest(weight: Tensor, flat: NDArray[np.signedinteger], grid: Grid | None) -> _Plan | None:
    rows, columns = matrix_shape(weight.shape)
    matrix = flat.reshape(rows, columns)
    count = int(np.count_nonzero(flat))
    if count == 0:
        return None
    plans = (
        _Plan(matrix, grid, live, cells)
        for live, region, members in _regions(flat, (rows, columns))
        for cells in _cells(members, region, grid, math.prod(weight.shape[2:]))
    )
    return min(plans, key=lambda plan: plan.storage().total)


def _cells(
    members: Members | None, region: int, grid: Grid | None, positions: int
) -> Iterator[Subset]:
    """Yield the codings of the cells; all of them only if the value coder can say each one."""
    full = members is None or len(members) == region
    if full or grid is None or grid.zero:
        yield everything(region)
    if members is not None and not full:
        yield listed(members, region, positions)
    if grid and region <= LARGEST_REGION:
        yield entrusted(region, flagged=not full)


def _regions(
    flat: NDArray[np.signedinteger], shape: tuple[int, int]
) -> Iterator[tuple[tuple[Subset, Subset] | None, int, Members | None]]:
    """Yield the regions worth trying, their sizes, and where non-zeros are (None: everywhere)."""
    if flat.all():
        yield None, flat.size, None
        return
    nonzero = np.flatnonzero(flat)
    yield None, flat.size, nonzero
    if min(shape) == 1:
        return
    places = np.divmod(nonzero, shape[1])
    sides = []
    for place, length in zip(places, shape, strict=True):
        rank = np.zeros(length, dtype=np.int64)
        rank[place] = 1
        alive = np.flatnonzero(rank)
        choices = [(everything(length), place)]
        if len(alive) < length:
            choices.append((listed(alive, length), (np.cumsum(rank) - 1)[place]))
        sides.append(choices)
    for (rows, row), (columns, column) in itertools.islice(itertools.product(*sides), 1, None):
        yield (rows, columns), len(rows) * len(columns), row * len(columns) + column
