"""Pruned and quantized at once: a pattern about zeros joined with levels for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.sets.base import ConstraintSet, Pattern
from secateur.sets.levels import (
    Levels,
    as_quantized,
    at_scale,
    best_scale,
    find_scale,
    nearest_levels,
)

ALTERNATIONS = 20
"""Rounds of support and scale; element-wise patterns settle in the second."""


@dataclass(frozen=True)
class Intersection(ConstraintSet):
    """Tensors whose support is in ``pattern`` and whose non-zeros are on ``levels``.

    For element-wise patterns (``Unstructured``) the projection is exact, scale included: at a
    given scale the gain z^2 - (z - Q(z))^2 of keeping z grows with abs(z), so the best support is
    always among the largest magnitudes, and the scale search of
    :func:`secateur.sets.levels.best_scale` on these is global. Projecting in a row (prune, then
    quantize) is not: it keeps weights that would rather be zero than the smallest level. Other
    patterns alternate between support and scale.
    """

    name: ClassVar[str] = "intersection"

    pattern: Pattern
    levels: Levels

    def __str__(self) -> str:
        return f"{self.pattern} & {self.levels}"

    @property
    def least(self) -> int:
        """The smallest level magnitude inside the support: 0 where an element may be left out."""
        return 0 if self.pattern.elementwise else self.levels.least

    def _project(self, weight: Tensor) -> Tensor:
        if self.contains(weight):
            return weight.clone()
        energy = weight.double().square()
        support = self.pattern.support(energy)
        snapped = weight
        for _ in range(ALTERNATIONS):
            scale = best_scale(weight[support], self.levels.top, self.least)
            integers = nearest_levels(weight, scale, self.levels.top, self.least)
            snapped = at_scale(integers, scale, weight.dtype)
            gain = energy - (weight.double() - snapped.double()).square()
            support, previous = self.pattern.support(gain), support
            if torch.equal(support, previous):
                break
        return torch.where(support, snapped, torch.zeros_like(weight))

    def contains(self, weight: Tensor) -> bool:
        """Say whether the zeros fit the pattern and one scale puts every non-zero on a level."""
        return (
            bool(torch.isfinite(weight).all())
            and self.pattern.contains(weight)
            and find_scale(weight, self.levels.top) is not None
        )

    def quantized(self, weight: Tensor) -> Quantized:
        """Return a member as integer levels (0 where pruned) times a scale."""
        return as_quantized(weight, self.levels)
