"""QONNX: an ONNX file whose quantized tensors say their bits, for FPGA flows.

    weight (floats on levels), scale -> Quant(bits) -> layer
    x, step -> Quant(bits) -> Clip, where the grid has fewer levels than its bits hold -> layer

Any width is written as it is; weights of one bit as ``BipolarQuant``. The operators are those of
QONNX 1.0 (arXiv 2206.07527), domain ``qonnx.custom_op.general``, which runtimes do not execute.
Weights are stored as floats, which is the format's way: the file is not smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.artifact.foreign import operator
from secateur.artifact.onnx import require, to_program, write_program
from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.quantizers import FixedQuantizer
from secateur.quantizers.attach import INPUT, OUTPUT

DOMAIN = "qonnx.custom_op.general"
OPERATORS = ("Quant", "BipolarQuant")

NAMES = {"parametrizations.weight.original": "weight", "parametrizations.weight.0.": "weight_"}
"""How tensors are called in the file, by what they are called while it is made."""


def export_qonnx(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    path: Path,
    quantized: Mapping[str, Quantized],
) -> Path:
    """Write a network as one QONNX file for any batch size.

    Args:
        model: a plain network; its layers may read through fixed grids. It is left as it is.
        example_input: as :func:`secateur.export_onnx` takes it.
        path: the file to write.
        quantized: levels of its weights, by name of the tensor.

    Raises:
        MissingDependencyError: the extra ``onnx`` is not installed.
        SecateurError: nothing of it is quantized, or the exporter cannot express it.
    """
    require("onnx", "onnxscript")
    said, count = _with_quants(model, quantized)
    if not count:
        raise ArtifactError(
            "qonnx: no weight and no activation of this network is on levels.\n"
            "Quantize it first (bits: 4 in a stage), or export it as onnx."
        )
    program = to_program(said, example_input, _translations())
    found = sum(node.op_type in OPERATORS for node in program.model.graph)
    if found < count:
        raise ArtifactError(
            f"qonnx: {found} of {count} quantizers are in the exported graph.\n"
            "The exporter folded the others into floats; please report this as a bug."
        )
    for value in list(program.model.graph.initializers.values()):
        for ours, plain in NAMES.items():
            value.name = value.name.replace(ours, plain)
    write_program(program, path)
    return path


@torch.library.custom_op("secateur::quant", mutates_args=())
def quant(x: Tensor, scale: Tensor, bits: int, signed: bool, narrow: bool) -> Tensor:
    """Return x rounded to the multiples of a scale that so many bits hold, as QONNX defines it.

    Args:
        x: of any shape.
        scale: that broadcasts to x.
        bits: of a level; with 1 the result is the sign of x times the scale.
        signed: whether levels may be negative.
        narrow: whether the lowest of them is left out, so that they are symmetric.
    """
    if bits == 1 and signed:
        return torch.where(x >= 0, scale, -scale)
    least = narrow - 2 ** (bits - 1) if signed else 0
    most = 2 ** (bits - signed) - 1
    return torch.round(x / scale).clamp(least, most) * scale


@quant.register_fake
def _(x: Tensor, scale: Tensor, bits: int, signed: bool, narrow: bool) -> Tensor:
    return torch.empty_like(x)


class _Levels(nn.Module):
    """A weight that says its levels."""

    scale: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        magnitudes = quantized.levels.abs()
        most = int(magnitudes.max())
        self.bits = 1 if int(magnitudes.min()) == most == 1 else most.bit_length() + 1
        self.register_buffer("scale", quantized.scales().float())

    def forward(self, weight: Tensor) -> Tensor:
        return quant(weight, self.scale, self.bits, True, True)  # type: ignore[no-any-return]


class _Grid(nn.Module):
    """A grid that a layer reads through, or on which a module returns."""

    step: Tensor

    def __init__(self, grid: FixedQuantizer) -> None:
        super().__init__()
        self.least, self.most, self.signed = grid.least, grid.most, grid.least < 0
        self.bits = max(-1 - self.least, self.most).bit_length() + self.signed
        lowest = -(2 ** (self.bits - 1)) if self.signed else 0
        self.narrow = self.signed and self.least > lowest
        self.full = (lowest + self.narrow, 2 ** (self.bits - self.signed) - 1)
        self.register_buffer("step", grid.step)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = quant(x, self.step, self.bits, self.signed, self.narrow)
        if self.full == (self.least, self.most):
            return made
        return made.clamp(float(self.least * self.step), float(self.most * self.step))


def _with_quants(model: nn.Module, quantized: Mapping[str, Quantized]) -> tuple[nn.Module, int]:
    """Return a copy of a network that says its levels, and how many tensors do."""
    model = copy.deepcopy(model)
    count = 0
    for name, module in list(model.named_modules()):
        levels = quantized.get(f"{name}.weight" if name else "weight")
        if levels is not None and levels.levels.any():
            parametrize.register_parametrization(module, "weight", _Levels(levels))
            count += 1
        for place in (INPUT, OUTPUT):
            grid = getattr(module, place, None)
            if isinstance(grid, FixedQuantizer):
                setattr(module, place, _Grid(grid))
                count += 1
    return model, count


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return what the exporter writes for :func:`quant`."""
    import numpy as np
    from onnx import numpy_helper
    from onnxscript import opset20 as op

    inputs = ("X", "scale", "zeropt", "bitwidth")
    write_quant = operator(DOMAIN, "Quant", inputs, ("signed", "narrow", "rounding_mode"))
    write_bipolar = operator(DOMAIN, "BipolarQuant", ("X", "scale"), ())

    def constant(value: int) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, np.float32)))

    def write(x: Any, scale: Any, bits: int, signed: bool, narrow: bool) -> Any:
        if bits == 1 and signed:
            return write_bipolar(x, scale)
        how = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return write_quant(x, scale, constant(0), constant(bits), **how)

    return {torch.ops.secateur.quant.default: write}
