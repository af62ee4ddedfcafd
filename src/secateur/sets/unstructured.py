"""Non-structured sparsity: any weight may be zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.errors import SecateurError
from secateur.sets.base import Pattern, register, top_k


@register
@dataclass(frozen=True)
class Unstructured(Pattern):
    """At most ``keep`` non-zeros, or at most a ``density`` share of them.

    Args:
        density: share of the weights that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of weights that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "unstructured"
    elementwise: ClassVar[bool] = True

    density: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if (self.density is None) == (self.keep is None):
            raise SecateurError("unstructured: give either density or keep, not both or neither.")
        if self.density is not None and not 0 < self.density <= 1:
            raise SecateurError(
                f"density: {self.density} is not in (0, 1]; 0.1 keeps a tenth of the weights."
            )
        if self.keep is not None and self.keep < 0:
            raise SecateurError(f"keep: {self.keep} is negative; give a number of weights.")

    def __str__(self) -> str:
        return f"unstructured {self.density:.3%}" if self.density else f"unstructured {self.keep}"

    def count(self, total: int) -> int:
        """Return how many of ``total`` weights may be non-zero."""
        if self.keep is not None:
            return min(self.keep, total)
        assert self.density is not None
        return round(self.density * total)

    def support(self, gain: Tensor) -> Tensor:
        """Mark the elements of largest positive gain, at most :meth:`count` of them."""
        return top_k(gain, self.count(gain.numel())) & (gain > 0)

    def contains(self, weight: Tensor) -> bool:
        """Say whether at most :meth:`count` elements are non-zero."""
        return int(weight.count_nonzero()) <= self.count(weight.numel())
