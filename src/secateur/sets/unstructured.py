"""Non-structured sparsity: any weight may be zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.sets.base import register, top_k
from secateur.sets.counted import Counted


@register
@dataclass(frozen=True)
class Unstructured(Counted):
    """At most ``keep`` non-zeros, or at most a ``density`` share of them.

    Args:
        density: share of the weights that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of weights that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "unstructured"
    units: ClassVar[str] = "weights"
    elementwise: ClassVar[bool] = True

    def total(self, shape: Sequence[int]) -> int:
        """Return the number of weights."""
        return math.prod(shape)

    def sums(self, gain: Tensor) -> Tensor:
        """Return the gain of each weight."""
        return gain.flatten()

    def support(self, gain: Tensor) -> Tensor:
        """Mark the elements of largest positive gain, at most :meth:`count` of them."""
        return top_k(gain, self.count(gain.numel())) & (gain > 0)

    def contains(self, weight: Tensor) -> bool:
        """Say whether at most :meth:`count` elements are non-zero."""
        return int(weight.count_nonzero()) <= self.count(weight.numel())
