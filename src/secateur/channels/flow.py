"""What flows through a network's channels for one set of weights: constants down, readers up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.channels.layer import Layer
from secateur.channels.steps import Emission, Step, Weights


class Flow:
    """Constants and readers of every step, each found in one pass over the graph.

    Attributes:
        emissions: what the channels of each step emit.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[int], weights: Weights) -> None:
        self.steps, self.outputs, self.weights = steps, outputs, weights
        self.emissions: list[Emission] = []
        for step in steps:
            self.emissions.append(step.forward(self.inputs(step), weights))
        self._reads: dict[bool, list[Tensor]] = {}

    def inputs(self, step: Step) -> list[Emission]:
        """Return what the inputs of a step emit."""
        return [self.emissions[index] for index in step.inputs]

    def columns(self, layer: Layer) -> Emission:
        """Return what the input channels of a layer emit, ``(in,)``."""
        return layer.columns(self.emissions[layer.inputs[0]])

    def reads(self, folded: bool) -> list[Tensor]:
        """Return, for each step, which positions of its profile reach an output of the model.

        Args:
            folded: whether constants that a bias can take over count as taken over.
        """
        if folded not in self._reads:
            read = [torch.zeros_like(emission.constant) for emission in self.emissions]
            for index in self.outputs:
                read[index].fill_(True)
            for step, own in zip(reversed(self.steps), reversed(read), strict=True):
                if step.inputs:
                    parts = step.backward(own, self.inputs(step), self.weights, folded)
                    for index, part in zip(step.inputs, parts, strict=True):
                        read[index] |= part
            self._reads[folded] = read
        return self._reads[folded]

    def layers(self, folded: bool) -> list[tuple[Layer, Tensor]]:
        """Return every layer with its output channels that are read, ``(out,)``."""
        pairs = zip(self.steps, self.reads(folded), strict=True)
        return [(step, read.flatten()) for step, read in pairs if isinstance(step, Layer)]

    def unreachable(self) -> dict[str, Tensor]:
        """Return, by parameter, which weights no output depends on, as bool in their shape.

        Their output channel is not read, or their input channel is always 0: each may take any
        value, alone, without any output changing.
        """
        found: dict[str, Tensor] = {}
        for layer, rows in self.layers(folded=False):
            constant, value = self.columns(layer)
            self._mark(found, layer, ~rows, constant & (value == 0))
        return found

    def constant_reads(self) -> dict[str, Tensor]:
        """Return, by parameter, which weights read a constant other than 0 that can be folded.

        All a weight there adds is a constant, which the bias can hold for free.
        """
        found: dict[str, Tensor] = {}
        for layer, _ in self.layers(folded=False):
            constant, value = self.columns(layer)
            columns = layer.foldable(constant, value) & (value != 0)
            rows = torch.zeros(layer.made.shape, dtype=torch.bool)
            self._mark(found, layer, rows, columns)
        return found

    def _mark(self, found: dict[str, Tensor], layer: Layer, rows: Tensor, columns: Tensor) -> None:
        weight = self.weights[layer.weight]
        mask = layer.mask(
            rows.to(weight.device), columns.to(weight.device), weight.shape
        ).contiguous()
        known = found.get(layer.weight)
        found[layer.weight] = mask if known is None else known & mask
