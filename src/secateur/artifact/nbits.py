"""Linear weights at 2, 4 or 8 bits in an ONNX file: the operator ``com.microsoft.MatMulNBits``.

It reads a weight in blocks of neighbours along the reduction dimension, each with a scale; a layer
on our levels has one scale, or one for each output, which its blocks share. With accuracy level 4,
which is what makes it fast, ONNX Runtime rounds what a layer reads to int8 as well, by the largest
magnitude in each block. So does the operator in torch, :func:`matmul_nbits`: the file computes what
a network of such layers does, and not to the last digits what it was exported from.

Source: the operator's specification in ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.artifact.foreign import operator
from secateur.codec import Quantized

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
WIDTHS = (2, 4, 8)
"""Bits that it takes."""

BLOCK, LEAST_BLOCK = 128, 16
"""Weights that share a scale, and activations that are rounded together: a power of two."""

ACCURACY_LEVEL = 4
"""Products of int8. Without it weights become floats on every run, no faster than floats."""


def width_of(quantized: Quantized) -> int | None:
    """Return the fewest bits that hold the levels of a matrix, or None if 8 do not.

    A width of b holds -2^(b-1) ... 2^(b-1) - 1. ``levels`` of b bits need b with zero, and one more
    without, since pruning adds zero to their 2^b values.
    """
    levels = quantized.levels
    if levels.ndim != 2 or not levels.numel():
        return None
    least, most = int(levels.min()), int(levels.max())
    return next((b for b in WIDTHS if -(2 ** (b - 1)) <= least and most < 2 ** (b - 1)), None)


def bytes_of(quantized: Quantized, bits: int) -> int:
    """Return what the packed weight and its scales take."""
    return sum(tensor.nbytes for tensor in pack(quantized, bits))


def pack(quantized: Quantized, bits: int) -> tuple[Tensor, Tensor]:
    """Return the weight as the operator reads it.

    Args:
        quantized: a matrix (outputs, inputs) whose levels fit the bits.
        bits: 2, 4 or 8.

    Returns:
        Codes, level + 2^(bits-1), ``(outputs, blocks, block x bits / 8)`` uint8, the first in the
        lowest bits, and scales, ``(outputs, blocks)`` float32.
    """
    outputs, inputs = quantized.levels.shape
    block = min(BLOCK, max(LEAST_BLOCK, 1 << (inputs - 1).bit_length()))
    blocks, each = -(-inputs // block), 8 // bits
    padded = functional.pad(quantized.levels, (0, blocks * block - inputs))
    codes = (padded + 2 ** (bits - 1)).view(outputs, blocks, block // each, each)
    packed = (codes.int() << bits * torch.arange(each)).sum(-1).to(torch.uint8)
    return packed, quantized.scales().float().expand(outputs, blocks).contiguous()


def unpack(packed: Tensor, scales: Tensor, bits: int, inputs: int) -> Tensor:
    """Return the matrix (outputs, inputs) of :func:`pack`, float32."""
    codes = packed.int()[..., None] >> bits * torch.arange(8 // bits) & 2**bits - 1
    levels = codes.flatten(2) - 2 ** (bits - 1)
    matrix: Tensor = (levels * scales[..., None]).flatten(1)
    return matrix[:, :inputs]


@torch.library.custom_op("secateur::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, inputs: int, outputs: int, block: int
) -> Tensor:
    """Return ``x @ weight.T`` with x rounded to int8 in blocks, as ONNX Runtime computes it.

    Args:
        x: ``(..., inputs)`` float32.
        packed: codes of :func:`pack`.
        scales: of :func:`pack`.
        bits: 2, 4 or 8.
        inputs: columns of the weight.
        outputs: rows of the weight.
        block: columns of a block.
    """
    blocks = functional.pad(x, (0, -inputs % block)).view(*x.shape[:-1], -1, block)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    levels = torch.round(blocks / step.where(step > 0, torch.ones_like(step)))
    rounded = (levels * step).flatten(-2)[..., :inputs]
    return functional.linear(rounded, unpack(packed, scales, bits, inputs))


@matmul_nbits.register_fake
def _(
    x: Tensor, packed: Tensor, scales: Tensor, bits: int, inputs: int, outputs: int, block: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class Product(nn.Linear):
    """A linear layer on a packed weight; its plain one is for code that asks about it."""

    weight_packed: Tensor
    weight_scales: Tensor
    bits: int

    def forward(self, input: Tensor) -> Tensor:
        packed, scales = self.weight_packed, self.weight_scales
        block = packed.shape[2] * 8 // self.bits
        made: Tensor = matmul_nbits(
            input, packed, scales, self.bits, self.in_features, self.out_features, block
        )
        return made if self.bias is None else made + self.bias


def equip(layer: nn.Linear, quantized: Quantized, bits: int) -> None:
    """Let a layer compute on its levels."""
    packed, scales = pack(quantized, bits)
    layer.register_buffer("weight_packed", packed)
    layer.register_buffer("weight_scales", scales)
    layer.bits = bits  # type: ignore[assignment]
    layer.__class__ = Product


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what the exporter writes for the operator."""
    sizes = ("K", "N", "bits", "block_size", "accuracy_level")
    product = operator(DOMAIN, OPERATOR, ("A", "B", "scales"), sizes)

    def write(
        x: Any, packed: Any, scales: Any, bits: int, inputs: int, outputs: int, block: int
    ) -> Any:
        given = dict(zip(sizes, (inputs, outputs, bits, block, ACCURACY_LEVEL), strict=True))
        return product(x, packed, scales, **given)

    return {torch.ops.secateur.matmul_nbits.default: write}
