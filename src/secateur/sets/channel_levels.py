"""Levels with one scale for each output channel, which learned quantizers leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.sets.levels import Levels


@dataclass(frozen=True)
class ChannelLevels(Levels):
    """Every output channel (dimension 0) is on the same levels with a scale of its own.

    No recipe asks for it: the methods that train one scale for a tensor cannot train these.
    """

    def __str__(self) -> str:
        return f"{super().__str__()} by channel"

    @property
    def each(self) -> Levels:
        """The levels of one channel."""
        return Levels(self.bits, self.zero, self.spacing)

    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        return torch.stack([self.each.project(row) for row in weight])

    def contains(self, weight: Tensor) -> bool:
        """Say whether one scale for each channel puts every element on a level."""
        return all(self.each.contains(row) for row in weight)

    def quantized(self, weight: Tensor) -> Quantized:
        """Return a member as integer levels times scales; zeros become level 0."""
        rows = [self.each.quantized(row) for row in weight]
        scales = tuple(row.scale for row in rows if isinstance(row.scale, float))
        levels = torch.stack([row.levels for row in rows])
        return Quantized(levels, scales, self.bits, self.zero, self.spacing)
