"""The compiled kernel: found beside this file if the installation could build it, called by ctypes.

It has a plain C interface on pointers, so one build serves every version of torch and Python.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 3  # as in nm.cpp: a library of other sources is not called
MAX_M = 64  # as in nm.cpp
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
APPLY, MASK, DECAY = 0, 1, 2
INSTALL = "pip install --force-reinstall --no-cache-dir --no-deps secateur"  # and a C++ compiler


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None if it is not there or of other sources."""
    places = (Path(__file__).with_name(f"_nm{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((place for place in places if place.exists()), None)
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
        if found.secateur_nm_abi() != ABI:
            return None
    except (OSError, AttributeError):  # of another machine, or not this library
        return None
    integer, count, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    found.secateur_nm.argtypes = [
        *(integer, integer, pointer, pointer, ctypes.c_float),
        *(count, count, count, integer, integer, integer),
    ]
    found.secateur_nm_part.argtypes = [
        *(pointer, pointer, pointer, ctypes.c_float),
        *(count, count, count, integer, integer, integer),
    ]
    return found


def facts() -> dict[str, Any]:
    """Return what runs N:M masks here: ``version`` ("AVX2", "portable" or None), ``install``."""
    found = library()
    version = None
    if found is not None:
        version = "AVX2" if found.secateur_nm_has_avx2() else "portable"
    return {"version": version, "install": INSTALL}


def serves(weight: Tensor, m: int) -> bool:
    """Say whether the compiled kernel can take this tensor in groups of this size."""
    usable = weight.device.type == "cpu" and weight.dtype in FORMATS and m <= MAX_M
    return usable and library() is not None


def run(
    operation: int, weight: Tensor, out: Tensor, n: int, m: int, axis: int, decay: float = 0.0
) -> None:
    """Run the kernel on all of torch's threads. ``serves(weight, m)`` must hold.

    Args:
        operation: ``APPLY``, ``MASK`` or ``DECAY`` (float32 only).
        weight: dense in memory, dimensions in any order.
        out: of the shape and strides of ``weight``; for ``MASK`` of one byte per element.
        n: elements kept of each group.
        m: elements of a group.
        axis: along which groups run.
        decay: factor of ``DECAY``.
    """
    found = library()
    assert found is not None
    status = found.secateur_nm(
        *(operation, FORMATS[weight.dtype], weight.data_ptr(), out.data_ptr(), decay),
        *_layout(weight, axis),
        *(n, m, torch.get_num_threads()),
    )
    _check(status)


def part(
    weight: Tensor, rest: Tensor, mask: Tensor, n: int, m: int, axis: int, factor: float
) -> None:
    """Run the kernel that takes ``weight + factor * rest`` apart. ``serves(weight, m)`` must hold.

    Args:
        weight: float32, dense in memory, dimensions in any order.
        rest: float32, of the shape and strides of ``weight``.
        mask: one byte per element, of the same shape and strides.
        n: elements kept of each group.
        m: elements of a group.
        axis: along which groups run.
        factor: of ``rest``.
    """
    found = library()
    assert found is not None
    status = found.secateur_nm_part(
        *(each.data_ptr() for each in (weight, rest, mask)),
        factor,
        *_layout(weight, axis),
        *(n, m, torch.get_num_threads()),
    )
    _check(status)


def _layout(weight: Tensor, axis: int) -> tuple[int, int, int]:
    """Return the memory of a dense tensor as (outer, length of the axis, inner)."""
    length = weight.shape[axis]
    inner = weight.stride(axis) if length > 1 else 1
    return weight.numel() // max(1, length * inner), length, inner


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the N:M kernel refused its arguments (status {status}).")
