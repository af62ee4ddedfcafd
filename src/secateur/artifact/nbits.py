"""Linear weights at 2, 4 or 8 bits in an ONNX file: the operator ``com.microsoft.MatMulNBits``.

It reads a weight in blocks of neighbours along the reduction dimension, each with a scale; a layer
on our levels has one scale, or one for each output, which its blocks share. With accuracy level 4,
which is what makes it fast, ONNX Runtime rounds what a layer reads to int8 as well, by the largest
magnitude in each block. So does the operator in torch, :func:`matmul_nbits`: the file computes what
the network of :func:`with_products` does, and not to the last digits what it was exported from.

Source: the operator's specification in ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.artifact.foreign import operator
from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.quantizers.attach import INPUT

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
WIDTHS = (2, 4, 8)
"""Bits that it takes."""

BLOCK, LEAST_BLOCK = 128, 16
"""Weights that share a scale, and activations that are rounded together: a power of two."""

ACCURACY_LEVEL = 4
"""Products of int8. Without it weights become floats on every run, no faster than floats."""

SMALL_BATCH = 8
"""Samples of an inference up to which it is the form to choose (docs/export.md)."""


def chosen(batch: int | None) -> bool:
    """Say whether networks that are deployed for a batch size, if it is known, multiply so."""
    return batch is not None and batch <= SMALL_BATCH


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


class _Product(nn.Linear):
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


def with_products(model: nn.Module, quantized: Mapping[str, Quantized]) -> tuple[nn.Module, int]:
    """Return a copy of a network that computes with packed weights, and how many it has.

    Layers that read through a grid keep their integers, and so do others than plain ``nn.Linear``.

    Args:
        model: a plain network.
        quantized: levels of weights, by name of the tensor.
    """
    model = copy.deepcopy(model)
    count = 0
    for name, module in model.named_modules():
        levels = quantized.get(f"{name}.weight" if name else "weight")
        if levels is None or type(module) is not nn.Linear or hasattr(module, INPUT):
            continue
        bits = width_of(levels)
        if bits is None:
            continue
        packed, scales = pack(levels, bits)
        if packed.nbytes + scales.nbytes >= 4 * levels.levels.numel():
            continue
        module.register_buffer("weight_packed", packed)
        module.register_buffer("weight_scales", scales)
        module.bits = bits  # type: ignore[assignment]
        module.__class__ = _Product
        count += 1
    return model, count


def packed_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that a network of :func:`with_products` has packed."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _Product)
    }


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


def check_products(graph: Any, weights: int) -> None:
    """Raise ArtifactError unless an exported graph multiplies with so many packed weights."""
    found = {node.inputs[1].name for node in graph if node.op_type == OPERATOR}
    if len(found) != weights:
        raise ArtifactError(
            f"onnx: {len(found)} of {weights} packed weights are in the exported graph.\n"
            "A layer's forward() was not called; export without a batch size."
        )
