"""Value coders: a tensor's elements as raw words, or as integer levels times scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.codec import arithmetic
from secateur.codec.bits import pack, read_varint, unpack, varint
from secateur.errors import ArtifactError, MembershipError

Words = NDArray[np.signedinteger]
"""The bits of a tensor's elements as little-endian signed integers of the same width."""

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""The dtypes that can be stored; only the floating-point ones also as levels."""

Scale = float | tuple[float, ...]
"""Of a whole tensor, or one for each row of its GEMM matrix."""

Spacing = Literal["uniform", "power_of_two"]
"""How levels follow each other: q, 2q, 3q, ... or q, 2q, 4q, ..."""

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
_BY_ROW = 64  # in the value coder: one scale for each row
MOST_BITS: dict[Spacing, int] = {"uniform": 8, "power_of_two": 4}


def magnitudes(bits: int, zero: bool, spacing: Spacing) -> tuple[int, ...]:
    """Return the magnitudes of all levels but zero, increasing, in multiples of the scale."""
    ranks = range(1, (1 << (bits - 1)) + 1 - zero)
    return tuple(ranks) if spacing == "uniform" else tuple(1 << (rank - 1) for rank in ranks)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as integer levels times its scale or scales, rounded once to its dtype.

    Attributes:
        levels: integer tensor (int16 or wider) of the weight's shape, 0 where the weight is zero;
            the others have a magnitude of :func:`magnitudes`.
        scale: > 0 and representable in float32; 2 bytes on disk if representable in float16,
            otherwise 4. A tuple has one for each element of dimension 0.
        bits: 1 ... 8, of each stored level; at most 4 for powers of two.
        zero: whether 0 is a level; if not, a weight is zero only by being pruned.
        spacing: ``uniform`` or ``power_of_two``.
    """

    levels: Tensor
    scale: Scale
    bits: int
    zero: bool
    spacing: Spacing = "uniform"

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor itself."""
        return (self.levels.double() * self.scales()).to(dtype)

    def scales(self) -> Tensor:
        """Return the scale or scales as float64, in a shape that broadcasts to the levels'."""
        scales = torch.tensor(self.scale, dtype=torch.float64, device=self.levels.device)
        return scales.view(-1, *(1,) * (self.levels.ndim - 1)) if scales.ndim else scales


@dataclass(frozen=True)
class Grid:
    """The header of levels: code -> rank -> level x scale. ``None`` stands for raw values instead.

    The rank of a level is the position of its magnitude, from 1, with the level's sign; 0 for 0.
    """

    bits: int
    zero: bool
    scale: Scale
    spacing: Spacing = "uniform"

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """The magnitudes of all levels but zero."""
        return magnitudes(self.bits, self.zero, self.spacing)

    def ranks(self, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rank of each level, which must be one that can be stored."""
        if self.spacing == "uniform":
            return levels
        return np.sign(levels) * np.frexp(np.abs(levels))[1]  # 2^k is 0.5 x 2^(k + 1)

    def codes(self, ranks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the code of each rank; without zero, 0 has none."""
        if self.zero:
            return (ranks + (1 << (self.bits - 1))).astype(np.uint8)
        sign = (ranks < 0).astype(np.int64) << (self.bits - 1)
        codes: NDArray[np.int64] = np.abs(ranks) - 1 | sign
        return codes.astype(np.uint8)

    def table(self, dtype: torch.dtype) -> Words:
        """Return the element that each of the ``2**bits`` codes stands for, as words.

        There is to be one scale.
        """
        assert isinstance(self.scale, float)
        positive = torch.tensor(self.magnitudes, dtype=torch.float64)
        if self.zero:  # the code 0 has no meaning; readers refuse it
            none = torch.zeros(1, dtype=torch.float64)
            levels = torch.cat([none, -positive.flip(0), none, positive])
        else:
            levels = torch.cat([positive, -positive])
        return words((levels * self.scale).to(dtype))

    def header(self) -> bytes:
        """Return the value coder byte (without the live bit) and the scale or scales."""
        scales = np.atleast_1d(np.array(self.scale))
        narrow = bool((np.minimum(scales, 65504).astype("<f2") == scales).all())
        kind = 32 * SPACINGS.index(self.spacing) + 4 * (self.bits - 1)
        coder = 1 + _BY_ROW * self.by_row + kind + 2 * self.zero + (not narrow)
        count = varint(len(scales)) if self.by_row else b""
        return bytes([coder]) + count + scales.astype("<f2" if narrow else "<f4").tobytes()

    @property
    def by_row(self) -> bool:
        """Whether each row has a scale of its own."""
        return isinstance(self.scale, tuple)


def read_header(record: bytes) -> tuple[Grid | None, int]:
    """Return the value coder at the start of a record (None: raw) and the position after it."""
    coder, position, count = record[0] & 0x7F, 1, 1
    if coder == 0:
        return None, 1
    by_row, rest = divmod(coder - 1, _BY_ROW)
    kind, rest = divmod(rest, 32)
    bits, flags = rest // 4 + 1, rest % 4
    if by_row:
        count, position = read_varint(record, position)
    end = position + count * (4 if flags & 1 else 2)
    known = kind < len(SPACINGS) and bits <= MOST_BITS[SPACINGS[kind]]
    if not known or len(record) < end:
        raise ArtifactError(f"record: value coder {coder} is unknown or its scale is cut off.")
    scales = np.frombuffer(record[position:end], "<f4" if flags & 1 else "<f2").tolist()
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            raise ArtifactError(f"record: the scale is {scale}, not a positive number.")
    return Grid(bits, bool(flags & 2), tuple(scales) if by_row else scales[0], SPACINGS[kind]), end


def words(tensor: Tensor) -> Words:
    """Return the bits of a tensor's elements in row-major order."""
    if tensor.dtype not in DTYPES:
        raise ArtifactError(f"tensors of dtype {tensor.dtype} cannot be stored in a packed file.")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    native = flat.view(_WORD[tensor.element_size()]).numpy()
    return native.astype(native.dtype.newbyteorder("<"), copy=False)


def from_words(elements: Words, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Invert :func:`words`; the memory is shared."""
    if dtype == torch.bool and ((elements != 0) & (elements != 1)).any():
        raise ArtifactError("record: a boolean is neither 0 nor 1.")
    native = elements.astype(elements.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native).view(dtype).reshape(shape)


def word_type(dtype: torch.dtype) -> np.dtype[np.signedinteger]:
    """Return the integer type that holds the bits of one element."""
    if dtype not in DTYPES:
        raise ArtifactError(f"tensors of dtype {dtype} cannot be stored in a packed file.")
    return np.dtype(f"<i{dtype.itemsize}")


def check_member(weight: Tensor, quantized: Quantized) -> Grid:
    """Check that the levels and scale say exactly what the weight is; return their header.

    Raises:
        MembershipError: they do not, or bits, scale or a level is out of range.
    """
    grid = Grid(quantized.bits, quantized.zero, quantized.scale, quantized.spacing)
    weight, levels = weight.detach().cpu(), quantized.levels.cpu()
    if not weight.is_floating_point() or levels.is_floating_point() or levels.shape != weight.shape:
        raise MembershipError(
            f"levels of shape {tuple(levels.shape)} and dtype {levels.dtype} cannot stand for a "
            f"tensor of shape {tuple(weight.shape)} and dtype {weight.dtype}."
        )
    most = MOST_BITS[grid.spacing]
    if not 1 <= grid.bits <= most:
        raise MembershipError(f"bits: {grid.bits} is not one of 1 ... {most} ({grid.spacing}).")
    scales = quantized.scale if isinstance(quantized.scale, tuple) else (quantized.scale,)
    if grid.by_row and len(scales) != (len(levels) if levels.ndim else 0):
        raise MembershipError(f"scale: {len(scales)} for a tensor of shape {tuple(weight.shape)}.")
    for scale in scales:
        if not (scale > 0 and float(np.float64(scale).astype(np.float32)) == scale < math.inf):
            raise MembershipError(f"scale: {scale} is not positive and representable in float32.")
    largest = max(grid.magnitudes, default=0)
    if levels.numel() and int(levels.abs().max()) > largest:
        raise MembershipError(f"levels: one exceeds {largest} ({grid.bits} bits).")
    if grid.spacing == "power_of_two" and bool((levels.abs() & (levels.abs() - 1)).any()):
        raise MembershipError("levels: one is not a power of two.")
    if not torch.equal(quantized.weight(weight.dtype).cpu(), weight):
        raise MembershipError("weight: it is not levels x scale; project it first.")
    return grid


def write_values(elements: NDArray[np.signedinteger], grid: Grid | None) -> bytes:
    """Return the value stream of raw words or of levels."""
    if grid is None:
        return elements.tobytes()
    return pack(grid.codes(grid.ranks(elements.astype(np.int64))), grid.bits)


def read_values(data: bytes, count: int, grid: Grid | None, dtype: torch.dtype) -> Words:
    """Return the ``count`` elements of a value stream as words.

    Raises:
        ArtifactError: the stream is not exactly that long, or holds a code that means nothing.
    """
    if grid is None:
        if len(data) != count * dtype.itemsize:
            raise ArtifactError(f"record: {len(data)} bytes of values, expected {count} {dtype}.")
        return np.frombuffer(data, dtype=word_type(dtype))
    codes = unpack(data, count, grid.bits)
    if grid.zero and not codes.all():
        raise ArtifactError("record: a level is out of range.")
    return grid.table(dtype)[codes]


def write_region(levels: NDArray[np.signedinteger], grid: Grid, flagged: bool) -> arithmetic.Coded:
    """Return the arithmetic code of a region's levels, zeros among them if ``flagged``."""
    return arithmetic.encode(grid.ranks(levels.astype(np.int64)), len(grid.magnitudes), flagged)


def read_region(data: bytes, cells: int, grid: Grid, flagged: bool, dtype: torch.dtype) -> Words:
    """Invert :func:`write_region`; return the elements as words.

    Raises:
        ArtifactError: the data are not the code of that many levels.
    """
    ranks = arithmetic.decode(data, cells, len(grid.magnitudes), flagged)
    nonzero = ranks != 0
    elements = np.zeros(cells, dtype=word_type(dtype))
    elements[nonzero] = grid.table(dtype)[grid.codes(ranks[nonzero])]
    return elements
