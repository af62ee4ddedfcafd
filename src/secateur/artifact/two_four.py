"""2:4 weights in the layouts of others: torch's semi-structured one and compressed-tensors.

Both hold a matrix, outputs x reduction dimension. That of a convolution has the input channels
last: OHWI, flattened to two dimensions, so that the groups of ``NM(2, 4)`` are groups of four
neighbours. Zeros lose their sign; a group with fewer than two non-zeros stores zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

from secateur.errors import ArtifactError, MembershipError
from secateur.kernels import nm_mask
from secateur.sets.nm import NM

TORCH_TILES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}
"""What torch's kernels want rows and columns to be multiples of (CUTLASS, torch 2.13)."""


def to_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and the metadata of torch's semi-structured layout (CUTLASS).

    Args:
        weight: a member of ``NM(2, 4)``, float16, bfloat16 or int8, ``(out, in, ...)``.

    Returns:
        Values, half as wide as the matrix, and two bits for each of them in int16 (int32 for int8)
        in the order that the kernels read.

    Raises:
        MembershipError: ``weight`` is not 2:4, or of a dtype or shape that the layout has not.
    """
    matrix = _matrix(weight)
    tiles = TORCH_TILES.get(weight.dtype)
    if tiles is None or any(n % tile for n, tile in zip(matrix.shape, tiles, strict=True)):
        raise MembershipError(
            f"torch has no 2:4 layout of {tuple(matrix.shape)} in {weight.dtype}: it takes\n"
            "multiples of 32x64 in float16 or bfloat16, of 16x128 in int8."
        )
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(matrix)  # type: ignore[no-untyped-call]
    return values, metadata


def from_torch(values: Tensor, metadata: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the weight that :func:`to_torch` was given, zeros without their sign."""
    matrix = conversions.sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return _unmatrix(matrix, shape)


def to_bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors ``sparse-24-bitmask`` of compressed-tensors for one weight, by name.

    ``NAME.compressed`` has the two values of each group, ``(rows, columns / 2)``; ``NAME.bitmask``
    one bit a weight, the first lowest, ``(rows, columns / 8)`` in uint8, rounded up;
    ``NAME.shape`` the shape of the matrix, ``(2, 1)``.

    Args:
        name: of the layer.
        weight: a member of ``NM(2, 4)``, ``(out, in, ...)``.

    Raises:
        MembershipError: ``weight`` is not 2:4.
    """
    matrix = _matrix(weight)
    keep = nm_mask(matrix, 2, 4)
    bits = np.packbits(keep.cpu().numpy(), axis=1, bitorder="little")
    return {
        f"{name}.shape": torch.tensor(matrix.shape).view(-1, 1),
        f"{name}.compressed": matrix[keep].view(len(matrix), -1),
        f"{name}.bitmask": torch.from_numpy(bits),
    }


def from_bitmask(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """Return the weight that :func:`to_bitmask` was given, zeros without their sign.

    Raises:
        ArtifactError: a tensor is missing, or they do not belong together.
    """
    try:
        stored, values, bits = (
            tensors[f"{name}.{part}"] for part in ("shape", "compressed", "bitmask")
        )
    except KeyError as error:
        raise ArtifactError(f"bitmask: there is no tensor {error}.") from error
    rows, columns = _matrix_shape(shape)
    fits = stored.flatten().tolist() == [rows, columns] and bits.dtype == torch.uint8
    if not fits or bits.shape != (rows, -(-columns // 8)):
        raise ArtifactError(f"bitmask: {name} is not a matrix of {rows}x{columns}.")
    unpacked = np.unpackbits(bits.cpu().numpy(), axis=1, count=columns, bitorder="little")
    keep = torch.from_numpy(unpacked.astype(bool))
    if int(keep.sum()) != values.numel():
        raise ArtifactError(f"bitmask: {name} has {values.numel()} values for {int(keep.sum())}.")
    matrix = torch.zeros(rows, columns, dtype=values.dtype)
    matrix[keep] = values.cpu().flatten()
    return _unmatrix(matrix, shape)


def _matrix(weight: Tensor) -> Tensor:
    """Return a 2:4 weight as outputs x reduction dimension, input channels last."""
    weight = weight.detach()
    whole = weight.ndim > 1 and weight.shape[1] % 4 == 0
    if not whole or not NM(2, 4).contains(weight):
        raise MembershipError(
            f"a weight of shape {tuple(weight.shape)} is not 2:4 in whole groups."
        )
    return weight.movedim(1, -1).flatten(1) + 0  # -0.0 becomes 0.0


def _unmatrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Invert :func:`_matrix`."""
    outputs, inputs, *kernel = shape
    return matrix.reshape(outputs, *kernel, inputs).movedim(-1, 1).contiguous() + 0


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()
