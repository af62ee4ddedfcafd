"""Bit streams, filled from the least significant bit of each byte, and varints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ArtifactError

Bits = NDArray[np.uint8]
"""One byte per bit, each 0 or 1."""

Members = NDArray[np.int64]
"""Of a range, those in a subset."""

_CHUNK = 1 << 18  # codes expanded to one byte per bit at a time; a multiple of 8


def to_bits(codes: NDArray[np.integer], width: int) -> Bits:
    """Return the lowest ``width`` bits of each code, one code after another."""
    shifts = np.arange(width, dtype=codes.dtype)
    return ((codes[:, None] >> shifts) & 1).astype(np.uint8).ravel()


def from_bits(bits: Bits, width: int) -> NDArray[np.int64]:
    """Invert :func:`to_bits`; the number of bits is a multiple of ``width`` > 0."""
    columns = bits.reshape(-1, width)
    codes = np.zeros(len(columns), dtype=np.int64)
    for bit in range(width):
        codes |= columns[:, bit].astype(np.int64) << bit
    return codes


def pack(codes: NDArray[np.uint8], width: int) -> bytes:
    """Pack codes of ``width`` <= 8 bits into ``ceil(len * width / 8)`` bytes."""
    if width == 8:
        return codes.tobytes()
    chunks = (codes[start : start + _CHUNK] for start in range(0, len(codes), _CHUNK))
    return b"".join(
        np.packbits(to_bits(chunk, width), bitorder="little").tobytes() for chunk in chunks
    )


def unpack(data: bytes, count: int, width: int) -> NDArray[np.uint8]:
    """Invert :func:`pack`.

    Raises:
        ArtifactError: the data are not exactly as long as ``count`` codes, or their padding is
            not zero.
    """
    if len(data) != (count * width + 7) // 8:
        raise ArtifactError(f"record: {len(data)} bytes hold no {count} values of {width} bits.")
    buffer = np.frombuffer(data, dtype=np.uint8)
    if width == 8:
        return buffer
    codes = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = codes[start : start + _CHUNK]
        first = start * width // 8
        reader = BitReader(buffer[first : first + (len(chunk) * width + 7) // 8])
        chunk[:] = from_bits(reader.take(len(chunk) * width), width)
        reader.align()
    return codes


class BitReader:
    """Reads a bit stream from the front; every method raises ArtifactError when it runs out."""

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self._buffer = buffer
        self._position = 0

    def peek(self, count: int) -> Bits:
        """Return up to ``count`` bits, fewer only at the end of the stream."""
        last = min(self._position + count, 8 * len(self._buffer))
        window = self._buffer[self._position // 8 : (last + 7) // 8]
        offset = self._position % 8
        return np.unpackbits(window, bitorder="little")[offset : offset + last - self._position]

    def take(self, count: int) -> Bits:
        """Return the next ``count`` bits."""
        if self._position + count > 8 * len(self._buffer):
            raise ArtifactError("record: a bit stream ends too early.")
        bits = self.peek(count)
        self._position += count
        return bits

    def align(self) -> int:
        """Skip the zero bits up to the next whole byte and return how many bytes were read."""
        if self.take(-self._position % 8).any():
            raise ArtifactError("record: the padding of a bit stream is not zero.")
        return self._position // 8


def varint(number: int) -> bytes:
    """Return an integer >= 0 as unsigned LEB128: seven bits a byte, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the integer at ``start`` and the position after it.

    Raises:
        ArtifactError: it is cut off, longer than 9 bytes, or has superfluous zero groups.
    """
    number = 0
    for index, byte in enumerate(data[start : start + 9]):
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if index and not byte:
                break
            return number, start + index + 1
    raise ArtifactError("a number in the file is malformed or cut off.")
