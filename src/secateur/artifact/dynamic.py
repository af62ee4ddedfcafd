"""Linear weights as int8 in an ONNX file whose inputs are rounded as they come: for large batches.

    x -> DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul by both scales

One step and one zero point hold for all that a layer reads in an inference. All are operators of
ONNX itself; ONNX Runtime fuses them into one product of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec import Quantized

SEVEN_BITS = 63
"""Largest level with which two products of bytes fit into the 16 bits in which processors without
VNNI add them."""


def fits(quantized: Quantized) -> bool:
    """Say whether any processor multiplies bytes by the levels of a matrix without saturating."""
    levels = quantized.levels
    return levels.ndim == 2 and bool(levels.numel()) and int(levels.abs().max()) <= SEVEN_BITS


@torch.library.custom_op("secateur::matmul_dynamic", mutates_args=())
def matmul_dynamic(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Return ``x @ (levels * scale)`` with x rounded to one of 256 levels, as ONNX defines it.

    Args:
        x: ``(..., inputs)`` float32.
        levels: ``(inputs, outputs)`` int8.
        scale: one, or one of each output, float32.
    """
    least, most = x.amin().clamp_max(0), x.amax().clamp_min(0)
    step = (most - least) / 255
    step = step.where(step > 0, torch.ones_like(step))
    zero = torch.round(-least / step).clamp(0, 255)
    rounded = torch.round(x / step).add(zero).clamp(0, 255) - zero
    return (rounded.double() @ levels.double()).float() * (step * scale)


@matmul_dynamic.register_fake
def _(x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], levels.shape[1])


class Dynamic(nn.Linear):
    """A linear layer on int8 levels; its plain weight is for code that asks about it."""

    weight_levels: Tensor
    weight_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = matmul_dynamic(input, self.weight_levels, self.weight_scale)
        return made if self.bias is None else made + self.bias


def equip(layer: nn.Linear, quantized: Quantized) -> None:
    """Let a layer compute on its levels."""
    levels = quantized.levels.to(torch.int8).T.contiguous()
    layer.register_buffer("weight_levels", levels)
    layer.register_buffer("weight_scale", torch.tensor(quantized.scale, dtype=torch.float32))
    layer.__class__ = Dynamic


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what the exporter writes for the operator."""
    from onnx import TensorProto
    from onnxscript import opset20 as op

    def write(x: Any, levels: Any, scale: Any) -> Any:
        integers, step, zero = op.DynamicQuantizeLinear(x)
        sums = op.Cast(op.MatMulInteger(integers, levels, zero), to=TensorProto.FLOAT)
        return op.Mul(sums, op.Mul(step, scale))

    return {torch.ops.secateur.matmul_dynamic.default: write}
