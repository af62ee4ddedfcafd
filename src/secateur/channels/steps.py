"""The steps of a traced network, and what each does to the channels that run through it.

Every activation has a *profile*: its shape with each dimension along which all positions belong to
the same channel shrunk to 1, so ``(1, C, 1, 1)`` after a convolution and ``(1, C * H * W)`` after
flattening. On profiles a step knows two things:

* ``forward``: which positions are constant, over inputs and over space, and their value;
* ``backward``: which positions of its inputs somebody reads, given those of its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Profile = tuple[int, ...]


class Weights(dict[str, Tensor]):
    """Parameters and buffers by name, as they were when a flow began."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({name: tensor.detach() for name, tensor in tensors.items()})
        self._kernels: dict[str, Tensor] = {}

    def kernels(self, name: str) -> Tensor:
        """Return which kernels of a weight are not zero, bool ``(out, in / groups)``."""
        if name not in self._kernels:
            mask = self[name] != 0
            self._kernels[name] = (mask.flatten(2).any(2) if mask.ndim > 2 else mask).cpu()
        return self._kernels[name]


class Emission(NamedTuple):
    """What the channels of an activation emit.

    Attributes:
        constant: bool, of the activation's profile.
        value: float64, the constants; 0 where not constant.
    """

    constant: Tensor
    value: Tensor

    @classmethod
    def of(cls, constant: Tensor, value: Tensor) -> Emission:
        """Blank the values that are not constant."""
        return cls(constant, value.masked_fill(~constant, 0.0))


@dataclass(eq=False)
class Step:
    """A step nothing is known of: it emits no constant and reads everything if it is read.

    Attributes:
        name: of the node in the traced graph.
        inputs: indices of the steps whose activations it takes.
        profile: of its output.
    """

    name: str
    inputs: tuple[int, ...]
    profile: Profile

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        """Return what the output's channels emit."""
        shape = self.profile
        return Emission(
            torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
        )

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        """Return, for each input, a bool tensor of its profile: which positions are read.

        Args:
            read: which positions of the output are read.
            inputs: what the inputs emit.
            weights: parameters and buffers by name.
            folded: whether constants that can be folded into a bias count as folded.
        """
        used = bool(read.any())
        return [torch.full(i.constant.shape, used) for i in inputs]


@dataclass(eq=False)
class Number(Step):
    """A parameter or buffer of one element, such as the step of a quantizer: a constant."""

    tensor: str

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        value = _double(weights[self.tensor]).view(self.profile)
        return Emission.of(value.isfinite(), value)


@dataclass(eq=False)
class Pointwise(Step):
    """An elementwise function: constant where all its inputs are."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    product: bool

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        values = iter([i.value for i in inputs])
        arguments = [next(values).clone() if a is ACTIVATION else a for a in self.arguments]
        value = self.function(*arguments, **self.options)
        constant = torch.ones(self.profile, dtype=torch.bool)
        zero = torch.zeros(self.profile, dtype=torch.bool)
        for emission in inputs:
            constant = constant & emission.constant
            zero = zero | (emission.constant & (emission.value == 0))
        if self.product:
            value, constant = value.masked_fill(zero, 0.0), constant | zero
        return Emission.of(constant & value.isfinite(), value.expand(self.profile))

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        return [_reduced(read, i.constant.shape) for i in inputs]


ACTIVATION = object()
"""Stands in the arguments of a pointwise step where an activation goes."""


def _reduced(read: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: a position is read if any that it was copied to is."""
    return read if read.shape == shape else read.long().sum_to_size(shape) > 0


@dataclass(eq=False)
class Norm(Step):
    """Batch normalization with running statistics; parameters and buffers by name."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    epsilon: float

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        (given,) = inputs
        constant = given.constant
        scale = (_double(weights[self.variance]) + self.epsilon).rsqrt()
        shift = -_double(weights[self.mean]) * scale
        if self.weight is not None:
            gamma = _double(weights[self.weight])
            scale, shift = scale * gamma, shift * gamma
            constant = constant | (gamma == 0).view(given.constant.shape)
        if self.bias is not None:
            shift = shift + _double(weights[self.bias])
        value = given.value * scale.view(given.value.shape) + shift.view(given.value.shape)
        return Emission.of(constant, value)

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        if self.weight is not None:
            read = read & (weights[self.weight].cpu() != 0).view(read.shape)
        return [read]


def _double(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)


@dataclass(eq=False)
class Slope(Step):
    """PReLU; one slope for all channels, or one for each."""

    weight: str

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        (given,) = inputs
        slope = _double(weights[self.weight])
        shape = given.value.shape if slope.numel() > 1 else (1,) * given.value.ndim
        value = given.value
        return Emission(given.constant, torch.where(value < 0, value * slope.view(shape), value))

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        return [read]


@dataclass(eq=False)
class Spatial(Step):
    """Pooling, interpolation or padding over space: a constant stays one.

    Attributes:
        border: the one constant that survives what is mixed in at the border; None if all do.
    """

    border: float | None

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        (given,) = inputs
        constant = given.constant
        if self.border is not None:
            constant = constant & (given.value == self.border)
        return Emission.of(constant.view(self.profile), given.value.view(self.profile))

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        return [read.reshape(inputs[0].constant.shape)]


@dataclass(eq=False)
class Move(Step):
    """Views, permutations, slices and concatenations: positions move, nothing is computed.

    Attributes:
        source: of the output's profile; position in the inputs' profiles, flattened and joined.
    """

    source: Tensor

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        constant = torch.cat([i.constant.flatten() for i in inputs])
        value = torch.cat([i.value.flatten() for i in inputs])
        return Emission(constant[self.source], value[self.source])

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        sizes = [i.constant.numel() for i in inputs]
        joined = torch.zeros(sum(sizes), dtype=torch.bool)
        joined[self.source[read]] = True
        return [
            part.view(i.constant.shape)
            for part, i in zip(torch.split(joined, sizes), inputs, strict=True)
        ]
