"""The layers of a model as shapes to time: what is multiplied, with its real input size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from secateur.cost.profile import Operand, Product, profile

_MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operation -> position of the left one of its two matrices."""


@dataclass(frozen=True)
class Linear:
    """A product of ``rows`` vectors with an (outputs, inputs) weight matrix."""

    inputs: int
    outputs: int
    rows: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.weights * self.rows

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs}, {self.rows} row{'s' if self.rows > 1 else ''}"


@dataclass(frozen=True)
class Convolution:
    """A convolution of 2 or 3 dimensions; one of 1 dimension has height 1, as torch runs it.

    Attributes:
        batch: images at once.
        inputs: channels read.
        outputs: channels written.
        size: input pixels along each dimension.
        kernel: kernel size along each dimension, as are all that follow.
        stride: see ``torch.nn.functional.conv2d``.
        padding: the same on both sides.
        dilation: see there.
        groups: of channels that do not see each other.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
    """

    batch: int
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as torch stores it."""
        first, second = (
            (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        )
        return (first, second // self.groups, *self.kernel)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Output pixels along each dimension."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        sides = zip(self.size, reach, self.stride, self.padding, strict=True)
        if not self.transposed:
            return tuple((n + 2 * p - r) // s + 1 for n, r, s, p in sides)
        more = self.output_padding
        return tuple(
            (n - 1) * s - 2 * p + r + o for (n, r, s, p), o in zip(sides, more, strict=True)
        )

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        pixels = self.size if self.transposed else self.output_size
        return self.batch * self.weights * math.prod(pixels)

    def __str__(self) -> str:
        parts = [f"{_by(self.kernel)} {self.inputs}->{self.outputs} @ {_by(self.size)}"]
        if set(self.stride) != {1}:
            parts.append(f"stride {_by(tuple(dict.fromkeys(self.stride)))}")
        if self.groups > 1:
            parts.append(f"{self.groups} groups")
        if set(self.dilation) != {1}:
            parts.append(f"dilation {_by(tuple(dict.fromkeys(self.dilation)))}")
        if self.transposed:
            parts.append("transposed")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        return ", ".join(parts)


Shape = Linear | Convolution


@dataclass(frozen=True)
class Untimed:
    """An operation that no form is timed for.

    Attributes:
        operation: its ATen name.
        macs: multiply-accumulates of all its executions; None where nobody has a formula.
    """

    operation: str
    macs: int | None


@dataclass
class Found:
    """The shapes of a model.

    Attributes:
        names: shape -> names of the layers that have it, one for each execution.
        untimed: what multiplies without being one of these shapes.
    """

    names: dict[Shape, list[str]] = field(default_factory=dict)
    untimed: list[Untimed] = field(default_factory=list)


def shapes(model: nn.Module, inputs: tuple[Any, ...]) -> Found:
    """Find the distinct shapes of convolutions and linear layers that ``model(*inputs)`` executes.

    Raises:
        SecateurError: the model cannot run on these inputs.
    """
    measured = profile(model, inputs)
    found, others = Found(), dict[str, int]()
    for product in measured.products:
        shape = _shape(product)
        if shape is None:
            others[product.operation] = others.get(product.operation, 0) + product.macs
        else:
            found.names.setdefault(shape, []).append(product.module)
    found.untimed = [Untimed(*other) for other in others.items()]
    found.untimed += [Untimed(operation, None) for operation in measured.uncounted]
    return found


def _shape(product: Product) -> Shape | None:
    if product.operation == "convolution":
        return _convolution(product.arguments)
    if product.operation in _MATRIX_PRODUCTS:
        first = _MATRIX_PRODUCTS[product.operation]
        return _linear(*product.arguments[first : first + 2])
    return None


def _linear(left: Operand, right: Operand) -> Linear | None:
    """Return the layer of a product of (batches of) matrices, if one of them is a weight."""
    if left.parameter == right.parameter:
        return None
    *_, height, inner = left.shape
    width = right.shape[-1]
    batches = math.prod(left.shape[:-2])
    if right.parameter:
        return Linear(inner, width, batches * height)
    return Linear(inner, height, batches * width)


def _convolution(arguments: tuple[Any, ...]) -> Convolution | None:
    read, weight, _, stride, padding, dilation, transposed, output_padding, groups = arguments
    if not weight.parameter:
        return None
    dimensions = len(weight.shape) - 2

    def each(values: Any, fill: int) -> tuple[int, ...]:
        listed = tuple(values) * (dimensions if len(values) == 1 else 1)
        return (fill, *listed) if dimensions == 1 else listed

    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return Convolution(
        batch=read.shape[0] if len(read.shape) == dimensions + 2 else 1,
        inputs=weight.shape[0] if transposed else weight.shape[1] * groups,
        outputs=channels,
        size=each(read.shape[-dimensions:], 1),
        kernel=each(weight.shape[2:], 1),
        stride=each(stride, 1),
        padding=each(padding, 0),
        dilation=each(dilation, 1),
        groups=groups,
        transposed=transposed,
        output_padding=each(output_padding, 0) if transposed else (),
    )


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
