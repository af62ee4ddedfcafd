"""What all patterns that keep a number of something, or a share of it, have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from secateur.errors import SecateurError
from secateur.sets.base import Pattern


class Quota(Pattern):
    """A pattern that keeps a number of units, which an allocation may choose."""

    units: ClassVar[str]
    """What is counted, in the plural."""

    @abstractmethod
    def total(self, shape: Sequence[int]) -> int:
        """Return how many units a weight of this shape has."""

    @abstractmethod
    def count(self, total: int) -> int:
        """Return how many of ``total`` units may be non-zero."""

    @abstractmethod
    def keeping(self, units: int) -> Quota:
        """Return the pattern that keeps another number of units."""

    @abstractmethod
    def sums(self, gain: Tensor) -> Tensor:
        """Return the summed gain of each unit.

        Args:
            gain: of each element, in the shape of the weight.
        """


@dataclass(frozen=True)
class Counted(Quota):
    """At most ``keep`` units are not zero, or at most a ``density`` share of them.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    density: float | None = field(default=None, kw_only=True)
    keep: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.density is None) == (self.keep is None):
            raise SecateurError(f"{self.name}: give either density or keep, not both or neither.")
        if self.density is not None and not 0 < self.density <= 1:
            raise SecateurError(
                f"density: {self.density} is not in (0, 1]; 0.1 keeps a tenth of the {self.units}."
            )
        if self.keep is not None and self.keep < 0:
            raise SecateurError(f"keep: {self.keep} is negative; give a number of {self.units}.")

    def __str__(self) -> str:
        return f"{self.name} {self.density:.3%}" if self.density else f"{self.name} {self.keep}"

    def count(self, total: int) -> int:
        """Return how many of ``total`` units may be non-zero; a share is at least one."""
        if self.keep is not None:
            return min(self.keep, total)
        assert self.density is not None
        return min(max(1, round(self.density * total)), total)

    def keeping(self, units: int) -> Counted:
        """Return the pattern that keeps a number of units."""
        return replace(self, density=None, keep=units)

    def fixed(self, shape: Sequence[int]) -> Counted:
        """Return the pattern that keeps as many units as this one does of a shape."""
        return self.keeping(self.count(self.total(shape)))

    def relaxed(self, shape: Sequence[int], exponent: float) -> Counted:
        """Return the pattern that keeps the share ``d ** exponent`` where this one keeps ``d``."""
        total = self.total(shape)
        share = (self.count(total) / total) ** exponent if total else 1
        return self.keeping(round(total * share))

    def changed(self, **options: Any) -> Counted:
        """Return this pattern with other options; density and keep replace each other."""
        if "density" in options or "keep" in options:
            options = {"density": None, "keep": None, **options}
        return replace(self, **options)
