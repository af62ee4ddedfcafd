"""Ways to run a layer: dense, smaller, sparse in several formats, in integers.

Each form builds one layer of random weights at a density, in the format that torch, SciPy or MKL
run. What an inference repeats, such as unfolding images into columns, is part of what is timed;
what happens once, such as building an index or packing weights, is not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.measure.prepared import (
    Prepared,
    UnsupportedError,
    at_random,
    columns,
    folded,
    matrix,
    multiply,
    random_inputs,
    random_weight,
    require_plain,
    share_of,
)
from secateur.measure.shapes import Convolution, Linear, Shape

ROUND_TO = 8
"""Channels of a smaller layer are a multiple of this, because kernels work in vectors."""

SHARED_BY = 32
"""Outputs that share their inputs in the gathered form; the more, the more dense work a gather."""

_BLOCK_EDGES = (16, 8, 4)
_LARGEST_WEIGHT = 63  # 7 bits: 8-bit weights saturate 16-bit sums on processors without VNNI
_LARGEST_ACTIVATION, _MIDDLE = 255, 128


@dataclass(frozen=True)
class Form:
    """A way to run a layer.

    Attributes:
        about: one line: the format, and what runs it.
        prepare: builds a layer of a shape at a density with a random generator. Raises
            ``UnsupportedError`` where there is no such layer.
        prunes: whether the density matters to it; if not, it is timed with all weights.
        exact: whether all weights make it the very dense layer, with nothing to time.
    """

    about: str
    prepare: Callable[[Shape, float, torch.Generator], Prepared]
    prunes: bool = True
    exact: bool = False


def dense(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build the layer as torch runs it eagerly; the density is ignored."""
    weight, inputs = random_weight(shape, generator), random_inputs(shape, generator)
    return Prepared(lambda: multiply(shape, inputs, weight), 1.0, weight, inputs)


def smaller(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build a dense layer with fewer inputs and outputs, or with fewer groups."""
    cut = _cut(shape, density)
    layer = dense(cut, 1.0, generator)
    return replace(layer, density=share_of(cut, shape))


def csr(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build a layer with zeros at random places as torch's CSR matrix."""
    weight, inputs = _scattered(shape, density, generator)
    sparse = _compressed(matrix(shape, weight).to_sparse_csr)
    kept = int(weight.count_nonzero()) / weight.numel()
    return Prepared(_product(shape, sparse, inputs), kept, weight, inputs)


def csr_by_scipy(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build the same as SciPy's CSR matrix."""
    try:
        from scipy import sparse
    except ImportError as error:
        raise UnsupportedError('SciPy is not installed: pip install "secateur[measure]"') from error
    weight, inputs = _scattered(shape, density, generator)
    held = sparse.csr_matrix(matrix(shape, weight).numpy())
    kept = int(weight.count_nonzero()) / weight.numel()

    def run() -> Tensor:
        return folded(shape, torch.from_numpy(held @ columns(shape, inputs).numpy()))

    return Prepared(run, kept, weight, inputs)


def bsr(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build a layer with square blocks of zeros at random places as torch's BSR matrix."""
    require_plain(shape)
    weight, inputs = random_weight(shape, generator), random_inputs(shape, generator)
    flat = weight.flatten(1)
    edge = next((edge for edge in _BLOCK_EDGES if not any(n % edge for n in flat.shape)), None)
    if edge is None:
        raise UnsupportedError("the matrix does not divide into square blocks of 16, 8 or 4")
    down, across = (n // edge for n in flat.shape)
    blocks = at_random(down * across, density, generator)
    spread = blocks.view(down, across).repeat_interleave(edge, 0).repeat_interleave(edge, 1)
    flat = flat * spread
    sparse = _compressed(flat.to_sparse_bsr, (edge, edge))
    kept = int(blocks.sum()) / blocks.numel()
    return Prepared(_product(shape, sparse, inputs), kept, flat.view(weight.shape), inputs)


def gather(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build a layer in which groups of outputs share the inputs that they read.

    The inputs of each group are gathered, then multiplied as one dense layer in groups.
    """
    require_plain(shape)
    weight, inputs = random_weight(shape, generator), random_inputs(shape, generator)
    groups = shape.outputs // _sharing(shape.outputs)
    choices = [at_random(shape.inputs, density, generator) for _ in range(groups)]
    kept = int(choices[0].sum())
    index = torch.cat([choice.nonzero()[:, 0] for choice in choices])
    spread = torch.stack(choices).repeat_interleave(shape.outputs // groups, 0)
    packed = weight[spread].view(shape.outputs, kept, *weight.shape[2:])
    mask = spread.view(*spread.shape, *[1] * (weight.ndim - 2))
    if isinstance(shape, Linear):
        stacked = packed.view(groups, -1, kept)

        def run() -> Tensor:
            read = inputs.t()[index].view(groups, kept, -1)
            return torch.bmm(stacked, read).flatten(0, 1).t()

    else:
        grouped = replace(shape, inputs=groups * kept, groups=groups)

        def run() -> Tensor:
            return multiply(grouped, inputs[:, index], packed)

    return Prepared(run, kept / shape.inputs, weight * mask, inputs)


def int8(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
    """Build a layer of 7-bit weights and 8-bit activations that arrive and leave as integers.

    It runs oneDNN's operation for x86 processors, to which torch's own quantized export lowers.
    The result is the integers; they stand for ``(value - 128) * output_scale(...)``.
    """
    require_plain(shape, grouped=True)
    weight, inputs = random_weight(shape, generator), random_inputs(shape, generator)
    scale = weight.flatten(1).abs().amax(1) / _LARGEST_WEIGHT
    spread = scale.view(-1, *[1] * (weight.ndim - 1))
    integers = (weight / spread).round().to(torch.int8)
    step = float(inputs.abs().max()) / (_LARGEST_ACTIVATION - _MIDDLE)
    codes = (inputs / step).round().add(_MIDDLE).clamp(0, _LARGEST_ACTIVATION).to(torch.uint8)
    weight, inputs = integers * spread, (codes.float() - _MIDDLE) * step
    after = output_scale(multiply(shape, inputs, weight))
    scales = (scale, torch.zeros(shape.outputs, dtype=torch.long), None)
    rest: tuple[Any, ...] = (after, _MIDDLE, torch.uint8, "none", [], "")
    ops = torch.ops.onednn
    if isinstance(shape, Linear):
        packed = ops.qlinear_prepack(integers, [shape.rows, shape.inputs])

        def run() -> Tensor:
            out: Tensor = ops.qlinear_pointwise(codes, step, _MIDDLE, packed, *scales, *rest)
            return out

    else:
        codes = codes.contiguous(memory_format=torch.channels_last)
        how = (shape.stride, shape.padding, shape.dilation, shape.groups)
        packed = ops.qconv_prepack(integers, scale, step, _MIDDLE, *how, list(codes.shape))

        def run() -> Tensor:
            out: Tensor = ops.qconv_pointwise(codes, step, _MIDDLE, packed, *scales, *how, *rest)
            return out

    return Prepared(run, 1.0, weight, inputs)


def output_scale(outputs: Tensor) -> float:
    """Return the step of 8-bit integers that hold these outputs."""
    return float(outputs.abs().max()) / (_LARGEST_ACTIVATION - _MIDDLE)


FORMS: dict[str, Form] = {
    "smaller": Form(
        f"dense torch layer with fewer channels (multiples of {ROUND_TO}) or fewer groups",
        smaller,
        exact=True,
    ),
    "csr": Form("zeros anywhere: torch CSR (MKL on x86) x columns by unfold", csr),
    "scipy": Form("zeros anywhere: SciPy CSR (one thread) x columns by unfold", csr_by_scipy),
    "bsr": Form("square blocks of 16, 8 or 4: torch BSR (MKL on x86) x columns by unfold", bsr),
    "gather": Form(
        f"{SHARED_BY} or more outputs share their inputs: torch gather, then dense in groups",
        gather,
    ),
    "int8": Form(
        "8-bit activations, 7-bit weights, none pruned: oneDNN through torch.ops.onednn",
        int8,
        prunes=False,
    ),
}
"""The forms that are timed beside the dense one, by name."""


def _scattered(shape: Shape, density: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    require_plain(shape, grouped=True)
    weight, inputs = random_weight(shape, generator), random_inputs(shape, generator)
    return weight * at_random(weight.numel(), density, generator).view(weight.shape), inputs


def _product(shape: Shape, sparse: Tensor, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: folded(shape, sparse @ columns(shape, inputs))


def _cut(shape: Shape, density: float) -> Shape:
    """Return the smaller shape of about this share of the weights."""
    if isinstance(shape, Convolution) and shape.groups > 1:
        groups = _fewer(shape.groups, density)
        inputs, outputs = (
            channels // shape.groups * groups for channels in (shape.inputs, shape.outputs)
        )
        return replace(shape, inputs=inputs, outputs=outputs, groups=groups)
    wide = [channels for channels in (shape.inputs, shape.outputs) if channels >= 2 * ROUND_TO]
    if not wide:
        raise UnsupportedError(f"it has fewer than {2 * ROUND_TO} channels on both sides")
    share = density ** (1 / len(wide))
    inputs, outputs = (_fewer(channels, share) for channels in (shape.inputs, shape.outputs))
    return replace(shape, inputs=inputs, outputs=outputs)


def _fewer(channels: int, share: float) -> int:
    """Return a share of the channels as a multiple; too few to share stay as they are."""
    if channels < 2 * ROUND_TO:
        return channels
    return min(channels, ROUND_TO * max(1, round(channels * share / ROUND_TO)))


def _sharing(outputs: int) -> int:
    """Return how many outputs share their inputs: the smallest divisor that is enough."""
    return next((size for size in range(SHARED_BY, outputs) if outputs % size == 0), outputs)


def _compressed(convert: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return a sparse tensor with 32-bit indices, which MKL takes without converting them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse formats a beta
        found = convert(*arguments)
        return torch.sparse_compressed_tensor(
            found.crow_indices().int(),
            found.col_indices().int(),
            found.values(),
            found.shape,
            layout=found.layout,
        )
