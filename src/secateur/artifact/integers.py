"""Integers in an ONNX file: weights as int8 with scales, activations through 8-bit containers.

The exporter folds a fake-quantized weight into floats, and writes rounding as five operators. So
before export each quantized layer computes its weight from int8 levels by an operator of our own,
and reads through another one, which become the operators that runtimes know:

    levels (int8), scale -> DequantizeLinear (axis 0), Cast and Mul in the end if inputs are floats
    x -> QuantizeLinear -> Clip, where the grid has fewer levels -> DequantizeLinear
    x -> Clip -> QuantizeLinear -> DequantizeLinear, where it lacks one, as -127 ... 127 does

The levels themselves are in the file, so any width up to 8 bits keeps its own range. Activations
are unsigned bytes, a grid with negative levels by its zero point: processors multiply unsigned by
signed bytes. ONNX Runtime rounds a bias inside of a layer to a multiple of the product of both
steps, which is coarse where bits are few; it is added by an operator of its own there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.quantizers import FixedQuantizer
from secateur.quantizers.attach import INPUT, OUTPUT

INT8 = 127
"""Largest magnitude of a weight's level; -128 is left out, as in other symmetric grids."""

NEARLY_WHOLE = 2**8 - 2
"""Largest level less smallest of a grid that lacks one level of a byte: clipped before it is
rounded, so that the layer still reads bytes."""

FINE = 0.01
"""Share of the noise of rounded inputs that a rounded bias may add."""

OVERHEAD = 512
"""Bytes that dequantizing takes in a file, about: what a weight alone must save to be integers."""


@torch.library.custom_op("secateur::dequantize", mutates_args=())
def dequantize(levels: Tensor, scale: Tensor) -> Tensor:
    """Return int8 levels times a scale, or times one of each row, as float32."""
    return levels.double().mul(_broadcast(scale, levels)).float()


@dequantize.register_fake
def _(levels: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(levels, dtype=torch.float32)


@torch.library.custom_op("secateur::on_grid", mutates_args=())
def on_grid(x: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    """Return x rounded to multiples of a step, from ``least`` to ``most`` of them."""
    return torch.round(x / step).clamp(least, most) * step


@on_grid.register_fake
def _(x: Tensor, step: Tensor, least: int, most: int) -> Tensor:
    return torch.empty_like(x)


def _broadcast(scale: Tensor, levels: Tensor) -> Tensor:
    return scale.double().view(-1, *(1,) * (levels.ndim - 1)) if scale.ndim else scale.double()


class _Rounding(nn.Module):
    """What a :class:`FixedQuantizer` does, as one operator."""

    step: Tensor

    def __init__(self, grid: FixedQuantizer) -> None:
        super().__init__()
        self.least, self.most = grid.least, grid.most
        self.register_buffer("step", grid.step)

    def forward(self, x: Tensor) -> Tensor:
        return on_grid(x, self.step, self.least, self.most)  # type: ignore[no-any-return]


def by_every_name(model: nn.Module, quantized: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """Return levels by all names that each tensor has: layers may share a weight."""
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {named[name]: each for name, each in quantized.items() if name in named}
    return {name: known[tensor] for name, tensor in named.items() if tensor in known}


def fits(quantized: Quantized) -> bool:
    """Say whether int8 holds the levels of a weight."""
    levels = quantized.levels
    return levels.ndim > 1 and (not levels.numel() or int(levels.abs().max()) <= INT8)


def rounds_finely(levels: Tensor) -> bool:
    """Say whether a bias may be rounded to a multiple of the product of both steps.

    With input step d and weight step e, rounding inputs makes noise of variance
    (d e)^2 sum(k^2) / 12 in an output whose weights have levels k, rounding its bias (d e)^2 / 12.
    """
    noise = levels.long().square().flatten(1).sum(1)
    return bool((noise[noise > 0] * FINE >= 1).all())


def adds_integers(layer: nn.Module, levels: Quantized) -> bool:
    """Say whether the bias of a layer becomes an integer, to be added to sums of integers."""
    grid = getattr(layer, INPUT, None)
    whole = _is_bytes(grid) and grid.most - grid.least >= NEARLY_WHOLE
    return whole and fits(levels) and rounds_finely(levels.levels)


def with_integers(model: nn.Module, quantized: Mapping[str, Quantized]) -> tuple[nn.Module, int]:
    """Return a copy of a network for the exporter, and how many weights of it are integers.

    Equal weights, such as one that several layers share or those of dead layers, count once: the
    exporter may join what is computed from them.

    A layer without integer weights reads through its grid in floats: ONNX Runtime quantizes a float
    weight by itself, to 8 bits, where it finds quantized inputs.

    Args:
        model: a plain network; layers may read through fixed grids.
        quantized: levels of weights, by name of the tensor, of which those become integers that
            are a layer's ``weight`` and fit.
    """
    model = copy.deepcopy(model)
    written: set[tuple[Any, ...]] = set()
    for name, module in list(model.named_modules()):
        if _is_bytes(returns := getattr(module, OUTPUT, None)):
            setattr(module, OUTPUT, _Rounding(returns))
        levels = quantized.get(f"{name}.weight" if name else "weight")
        if levels is None or not fits(levels):
            continue
        apart = False
        if _is_bytes(reads := getattr(module, INPUT, None)):
            apart = not adds_integers(module, levels)
            setattr(module, INPUT, _Rounding(reads))
        elif 3 * levels.levels.numel() <= OVERHEAD:
            continue
        _swap(module, levels, apart)
        integers = levels.levels.to(torch.int8)
        written.add((integers.shape, levels.scale, integers.cpu().numpy().tobytes()))
    return model, len(written)


def _is_bytes(grid: FixedQuantizer | None) -> TypeGuard[FixedQuantizer]:
    return isinstance(grid, FixedQuantizer) and grid.most - grid.least < 2**8


def _swap(module: nn.Module, quantized: Quantized, apart: bool) -> None:
    """Let a layer compute its weight from integers, and add its bias apart from them or not."""
    scale = torch.tensor(quantized.scale, dtype=torch.float32)
    del module.weight
    bias = getattr(module, "bias", None)
    if bias is not None and apart:
        del module.bias
        module.register_buffer("bias", None)
        shape = (-1, *(1,) * (quantized.levels.ndim - 2))
        module.register_buffer("added", bias.detach().view(shape))
        module.register_forward_hook(lambda own, given, made: made + own.added)
    module.register_buffer("weight_levels", quantized.levels.to(torch.int8))
    module.register_buffer("weight_scale", scale)
    kind = type(module)
    weight = property(lambda own: dequantize(own.weight_levels, own.weight_scale))
    module.__class__ = type(kind.__name__, (kind,), {"weight": weight})


def translations() -> dict[Any, Callable[..., Any]]:
    """Return what the exporter writes for our operators."""
    import numpy as np
    from onnx import numpy_helper
    from onnxscript import opset20 as op

    def constant(value: int) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, np.uint8)))

    def write_dequantize(levels: Any, scale: Any) -> Any:
        # ONNX Runtime multiplies integers in a Gemm only where the zero points are written out
        zeros = numpy_helper.from_array(np.zeros([int(n) for n in scale.shape], np.int8))
        return op.DequantizeLinear(levels, scale, op.Constant(value=zeros), axis=0)

    def write_on_grid(x: Any, step: Any, least: int, most: int) -> Any:
        zero = constant(-least)
        if most - least == NEARLY_WHOLE:
            x = op.Clip(x, op.Mul(step, float(least)), op.Mul(step, float(most)))
        integers = op.QuantizeLinear(x, step, zero)
        if most - least < NEARLY_WHOLE:
            integers = op.Clip(integers, constant(0), constant(most - least))
        return op.DequantizeLinear(integers, step, zero)

    return {
        torch.ops.secateur.dequantize.default: write_dequantize,
        torch.ops.secateur.on_grid.default: write_on_grid,
    }


def check_integers(graph: Any, weights: int) -> None:
    """Raise ArtifactError unless an exported graph holds at least so many weights as integers."""
    found = sum(
        node.op_type == "DequantizeLinear"
        and node.inputs[0].const_value is not None
        and node.inputs[0].const_value.dtype.name == "INT8"
        for node in graph
    )
    if found < weights:
        raise ArtifactError(
            f"onnx: {found} of {weights} quantized weights are integers in the exported graph.\n"
            "The exporter folded the others into floats; please report this as a bug."
        )
