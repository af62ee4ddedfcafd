"""Several sets at once: patterns in order, and levels for what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.sets.base import ConstraintSet, Pattern, energy
from secateur.sets.levels import Levels, as_quantized, at_scale, best_scale, find_scale
from secateur.sets.levels import nearest_levels as nearest
from secateur.sets.unstructured import Unstructured

ALTERNATIONS = 20
"""Rounds of support and scale; element-wise patterns settle in the second."""


def join(patterns: Sequence[Pattern], levels: Levels | None) -> ConstraintSet:
    """Return the intersection of patterns and levels, or the only one of them itself."""
    if levels is not None and not patterns:
        return levels
    if levels is None and len(patterns) == 1:
        return patterns[0]
    return Intersection(tuple(patterns), levels)


def cover(patterns: Sequence[Pattern], support: Tensor) -> Tensor:
    """Return the support with all that the patterns keep or drop together with it."""
    whole = torch.ones_like(support)
    for pattern in patterns:
        whole &= pattern.cover(support)
    return whole


@dataclass(frozen=True)
class Intersection(ConstraintSet):
    """Tensors whose support is in every pattern and whose non-zeros are on ``levels``.

    **Patterns** are projected on in order: the best support of the first, then the best of the
    second inside it, and so on, as ADMM-NN-S prunes columns, then filters. The result is in each,
    but not always the nearest tensor that is.

    **With levels**, for one pattern that ranks single weights (``Unstructured``, ``NM`` without
    shared choices) the projection is exact, scale included: at a given scale the gain
    z^2 - (z - Q(z))^2 of keeping z grows with abs(z), so the best support is always among the
    largest magnitudes, and the scale search of
    :func:`secateur.sets.levels.best_scale` on these is global. Projecting in a row (prune, then
    quantize) is not: it keeps weights that would rather be zero than the smallest level. Other
    patterns alternate between support and scale; that ends no farther away than projecting in a
    row, but may miss the nearest member.

    A group that a structured pattern keeps is kept whole: unless zero is a level, all its elements
    are on levels and none is zero.
    """

    name: ClassVar[str] = "intersection"

    patterns: tuple[Pattern, ...]
    levels: Levels | None = None

    def __str__(self) -> str:
        return " & ".join(map(str, (*self.patterns, *([self.levels] if self.levels else []))))

    def split(self) -> tuple[tuple[Pattern, ...], Levels | None]:
        """Return patterns and levels."""
        return self.patterns, self.levels

    def fixed(self, shape: Sequence[int]) -> ConstraintSet:
        """Return the intersection of the patterns with counts for shares, and the levels."""
        return join([pattern.fixed(shape) for pattern in self.patterns], self.levels)

    def rounded(self, shape: Sequence[int], multiple: int) -> ConstraintSet:
        """Return the intersection of the rounded patterns, and the levels."""
        return join([pattern.rounded(shape, multiple) for pattern in self.patterns], self.levels)

    def relaxed(self, shape: Sequence[int], exponent: float) -> ConstraintSet:
        """Return the intersection of the relaxed patterns, without levels."""
        return join([pattern.relaxed(shape, exponent) for pattern in self.patterns], None)

    @property
    def elementwise(self) -> bool:
        """Whether any single element of an allowed support may be dropped."""
        return any(pattern.elementwise for pattern in self.patterns)

    def _support(self, gain: Tensor) -> Tensor:
        support = torch.ones_like(gain, dtype=torch.bool)
        for pattern in self.patterns:
            support &= pattern.support(torch.where(support, gain, 0.0))
        return support

    def _reconsidered(self, support: Tensor, gain: Tensor) -> Tensor:
        """Choose the support of each pattern again, given what the others keep now.

        The gain of a dead filter's elements must not count against the columns they are in.
        """
        for pattern in self.patterns:
            others = cover([each for each in self.patterns if each is not pattern], support)
            support = others & pattern.support(torch.where(others, gain, 0.0))
        return support

    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        if self.contains(weight):
            return weight.clone()
        kept = energy(weight, metric)
        support = self._support(kept)
        snapped = weight
        exact = metric is None and [type(each) for each in self.patterns] == [Unstructured]
        for _ in range(ALTERNATIONS if self.levels else 0):
            assert self.levels is not None
            grid = (0, *self.levels.magnitudes) if self.elementwise else self.levels.grid
            scale = best_scale(weight[support], grid)
            snapped = at_scale(nearest(weight, scale, grid), scale, weight.dtype)
            if exact:  # whatever would rather be zero is there by its level
                break
            lost = energy(weight.double() - snapped.double(), metric)
            support, previous = self._reconsidered(support, kept - lost), support
            if torch.equal(support, previous):
                break
        return torch.where(support, snapped, torch.zeros_like(weight))

    def contains(self, weight: Tensor) -> bool:
        """Say whether the zeros fit every pattern and one scale puts every non-zero on a level."""
        if not all(pattern.contains(weight) for pattern in self.patterns):
            return False
        if self.levels is None:
            return True
        if not self.elementwise and not self.levels.zero:
            live = weight != 0
            if not torch.equal(live, cover(self.patterns, live)):
                return False
        return bool(torch.isfinite(weight).all()) and find_scale(weight, self.levels) is not None

    def quantized(self, weight: Tensor) -> Quantized | None:
        """Return a member as levels (0 where pruned) times a scale; None without levels."""
        return as_quantized(weight, self.levels) if self.levels else None
