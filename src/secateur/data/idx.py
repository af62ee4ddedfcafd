"""The IDX format of the MNIST family: a magic number, big-endian sizes, then the bytes."""

from __future__ import annotations

import math

import numpy as np

from secateur.errors import DataError

UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes, source: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an IDX file of unsigned bytes.

    Args:
        content: the whole file, not compressed.
        source: name of the file, for the error message.

    Returns:
        A read-only uint8 array of the shape that the header states.

    Raises:
        DataError: not IDX, not unsigned bytes, or a length other than the header promises.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise DataError(f"data: '{source}' is not an IDX file of unsigned bytes.")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"data: '{source}' ends inside its IDX header.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DataError(
            f"data: '{source}' is {len(content)} bytes long, its header promises {expected}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
