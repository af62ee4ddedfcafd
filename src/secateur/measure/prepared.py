"""Random layers of a shape, and the matrices that sparse forms make of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.measure.shapes import Convolution, Linear, Shape


class UnsupportedError(Exception):
    """A form does not exist for a shape; the message says why. Never reaches a user as an error."""


@dataclass(frozen=True)
class Prepared:
    """A layer in some form, ready to run.

    Attributes:
        run: computes the output once; all that an inference would not repeat is already done.
        density: share of the dense layer's weights that it keeps.
        weight: the dense weight that it stands for, as torch's own layer would hold it.
        inputs: what it reads, as torch's own layer would read it.
    """

    run: Callable[[], Any]
    density: float
    weight: Tensor
    inputs: Tensor


def random_inputs(shape: Shape, generator: torch.Generator) -> Tensor:
    """Return normally distributed float32 inputs."""
    if isinstance(shape, Linear):
        return torch.randn(shape.rows, shape.inputs, generator=generator)
    return torch.randn(shape.batch, shape.inputs, *shape.size, generator=generator)


def random_weight(shape: Shape, generator: torch.Generator) -> Tensor:
    """Return normally distributed float32 weights."""
    if isinstance(shape, Linear):
        return torch.randn(shape.outputs, shape.inputs, generator=generator)
    return torch.randn(shape.weight_shape, generator=generator)


def multiply(shape: Shape, inputs: Tensor, weight: Tensor) -> Tensor:
    """Compute the dense layer with torch's own operation, without bias."""
    if isinstance(shape, Linear):
        return functional.linear(inputs, weight)
    more = shape.output_padding or [0] * len(shape.size)
    return torch.convolution(
        inputs,
        weight,
        None,
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.transposed,
        more,
        shape.groups,
    )


def require_plain(shape: Shape, grouped: bool = False) -> None:
    """Refuse what has no form as a product of one weight matrix with columns.

    Raises:
        UnsupportedError: a transposed or three-dimensional convolution, or one with groups unless
            they are allowed.
    """
    if isinstance(shape, Linear):
        return
    if shape.transposed:
        raise UnsupportedError("a transposed convolution has no such form")
    if len(shape.size) != 2:
        raise UnsupportedError("torch unfolds only two dimensions into columns")
    if shape.groups > 1 and not grouped:
        raise UnsupportedError("a convolution in groups has no such form")


def matrix(shape: Shape, weight: Tensor) -> Tensor:
    """Return the weight as (outputs, rows of :func:`columns`); groups stand on the diagonal."""
    flat = weight.flatten(1)
    if isinstance(shape, Linear) or shape.groups == 1:
        return flat
    diagonal: Tensor = torch.block_diag(*flat.chunk(shape.groups))  # type: ignore[no-untyped-call]
    return diagonal


def columns(shape: Shape, inputs: Tensor) -> Tensor:
    """Return the inputs as (inputs x kernel, positions): im2col, where it is needed at all."""
    if isinstance(shape, Linear):
        return inputs.t()
    if set(shape.kernel) == {1} and not any(shape.padding):
        down, across = shape.stride
        unfolded = inputs[:, :, ::down, ::across].flatten(2)
    else:
        unfolded = functional.unfold(
            inputs, shape.kernel, shape.dilation, shape.padding, shape.stride
        )
    return unfolded[0] if shape.batch == 1 else unfolded.transpose(0, 1).flatten(1)


def folded(shape: Shape, product: Tensor) -> Tensor:
    """Return a product (outputs, positions) as the output of the layer. Inverts the layout."""
    if isinstance(shape, Linear):
        return product.t()
    split = product.view(shape.outputs, shape.batch, *shape.output_size)
    return split.transpose(0, 1).contiguous()


def at_random(total: int, share: float, generator: torch.Generator) -> Tensor:
    """Return which of ``total`` things are kept: at least one, the share rounded."""
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.randperm(total, generator=generator)[: max(1, round(share * total))]] = True
    return kept


def share_of(part: Convolution | Linear, whole: Convolution | Linear) -> float:
    """Return the weights of one shape per weight of another."""
    return part.weights / whole.weights
