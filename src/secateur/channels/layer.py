"""Convolution and linear layers: the steps that read channels and make new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.channels.steps import Emission, Step, Weights


@dataclass(eq=False)
class Layer(Step):
    """A convolution or linear layer.

    Attributes:
        module: its name.
        weight: the parameter's name; its tensor is ``(out, in / groups, ...)``.
        bias: the parameter's name, if it has one.
        width: number of input channels.
        groups: of a convolution; 1 for a linear layer.
        padded: whether zeros are read beside a constant, so that it is not constant at borders.
        given: labels of the input's channels, ``(in,)``; None where they are not known one by one.
        made: labels of the output's channels, ``(out,)``.
        absorber: the bias or running mean that a folded constant goes to; empty if none can.
        shared: whether the same weight is used by another step too.
    """

    module: str
    weight: str
    bias: str | None
    width: int
    groups: int
    padded: bool
    given: Tensor | None
    made: Tensor
    absorber: str = ""
    shared: bool = False

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        """Constant where no non-zero weight reads what is not, and no padding breaks it."""
        constant, value = self.columns(inputs[0])
        nonzero = self.nonzero(weights)
        breaks = ~constant
        if self.padded:
            breaks = breaks | (value != 0)
        live = _product(nonzero, breaks)
        total = torch.zeros(live.shape, dtype=torch.float64)
        if bool(value.any()):
            total = self.contribution(value, weights)
        if self.bias is not None:
            total = total + weights[self.bias].to("cpu", torch.float64)
        return Emission.of((~live).view(self.profile), total.view(self.profile))

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        """A channel is read if a non-zero weight carries it to an output that is."""
        target = inputs[0].constant
        if self.given is None:
            return [torch.full(target.shape, bool(read.any()))]
        used = self.reads(read.flatten(), weights)
        if folded:
            used = used & ~self.foldable(*self.columns(inputs[0]))
        return [used.view(target.shape)]

    def reads(self, rows: Tensor, weights: Weights) -> Tensor:
        """Return which input channels, ``(in,)``, have a non-zero weight into these outputs."""
        grouped = rows.view(self.groups, 1, -1)
        nonzero = self.nonzero(weights)
        if bool(rows.all()):  # no product of large matrices where nothing is pruned
            return nonzero.any(1).flatten()
        return (grouped.float() @ nonzero.float()).flatten() > 0

    def foldable(self, constant: Tensor, value: Tensor) -> Tensor:
        """Return which input channels are constants that the bias can take over exactly."""
        exact = bool(self.absorber) and not self.padded and not self.shared
        return constant if exact else constant & (value == 0)

    def contribution(self, value: Tensor, weights: Weights) -> Tensor:
        """Return what constants ``(in,)`` add to every output, ``(out,)`` float64, no padding."""
        kernel = weights[self.weight]
        if self.groups == 1:  # most are zero: spare them the conversion
            some = value.nonzero().flatten()
            kernel, value = kernel[:, some.to(kernel.device)], value[some]
        kernel = kernel.to("cpu", torch.float64)
        summed = kernel.flatten(2).sum(2) if kernel.ndim > 2 else kernel
        matrix = summed.view(self.groups, -1, summed.shape[1])
        return (matrix @ value.view(self.groups, -1, 1)).flatten()

    def columns(self, emission: Emission) -> Emission:
        """Return what the input channels emit, ``(in,)``."""
        if self.given is None:
            blank = torch.zeros(self.width, dtype=torch.float64)
            return Emission(blank.bool(), blank)
        return Emission(emission.constant.flatten(), emission.value.flatten())

    def nonzero(self, weights: Weights) -> Tensor:
        """Return which kernels are not zero, bool ``(groups, out / groups, in / groups)``."""
        mask = weights.kernels(self.weight)
        return mask.view(self.groups, -1, mask.shape[1])

    def mask(self, rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
        """Return the weights, in their shape, whose output is in rows or input in columns."""
        grouped = rows.view(self.groups, -1, 1) | columns.view(self.groups, 1, -1)
        matrix = grouped.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2))
        return matrix.expand(shape)


def _product(nonzero: Tensor, columns: Tensor) -> Tensor:
    """Return which outputs, ``(out,)``, a non-zero weight connects to one of the columns."""
    if bool(columns.all()):
        return nonzero.any(2).flatten()
    grouped = columns.view(len(nonzero), -1, 1)
    return (nonzero.float() @ grouped.float()).flatten() > 0
