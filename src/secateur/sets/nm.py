"""N:M sparsity: of each m consecutive weights along the reduction dimension at most n stay.

The reduction dimension is what a product sums over: the input channels of a convolution, for each
kernel position, and the inputs of a linear layer. That is where hardware has its groups.
Where m does not divide it, the last group is a smaller one, as if zeros were appended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import SecateurError
from secateur.kernels import nm_apply, nm_mask, nm_part_
from secateur.sets.base import register
from secateur.sets.counted import Quota

Axis = Literal["input", "flat"]
LARGEST_GROUP = 64
"""Largest m. The n:m encodings count choices from as many."""


@register
@dataclass(frozen=True)
class NM(Quota):
    """At most n of each m consecutive input channels are not zero, at each output and position.

    The projection keeps the n largest magnitudes of each group, ties to the lower index. With
    ``rows`` above 1 that many outputs share one choice, the one of largest summed energy, so that a
    product runs on whole vectors of outputs; the last of them may be fewer.

    Args:
        n: weights of a group that may be non-zero.
        m: weights in a group, up to 64.
        axis: input (groups along the input channels, by kernel position) or flat (along the
            flattened filter, whose neighbours are kernel positions: results of the SR-STE paper).
        rows: consecutive outputs that share one choice.

    Raises:
        SecateurError: not 1 <= n <= m <= 64, ``rows`` is not positive, or there is no such axis.
    """

    name: ClassVar[str] = "nm"
    units: ClassVar[str] = "weights of each group"
    elementwise: ClassVar[bool] = True
    positional: ClassVar[bool] = True

    n: int
    m: int
    axis: Axis = "input"
    rows: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.n, self.m)
        if self.axis not in ("input", "flat"):
            raise SecateurError(f"axis: {self.axis!r} is not input or flat.")
        if self.rows < 1:
            raise SecateurError(f"rows: {self.rows} is not positive; 1 lets every output choose.")

    def __str__(self) -> str:
        flat = " flat" if self.axis == "flat" else ""
        shared = f" shared by {self.rows} rows" if self.rows > 1 else ""
        return f"{self.n}:{self.m}{flat}{shared}"

    def misfit(self, shape: Sequence[int]) -> str:
        """Say that there is no whole group."""
        length = self._cube(shape)[1]
        what = "weights in a filter" if self.axis == "flat" else "input channels"
        return f"its {what}, {length}, make no group of {self.m}" if length < self.m else ""

    def relaxed(self, shape: Sequence[int], exponent: float) -> NM:
        """Return n':m for the density ``d ** exponent``, n' rounded."""
        return replace(self, n=round(self.m * (self.n / self.m) ** exponent))

    def total(self, shape: Sequence[int]) -> int:
        """Return m."""
        return self.m

    def count(self, total: int) -> int:
        """Return n."""
        return self.n

    def keeping(self, units: int) -> NM:
        """Return the pattern with another n."""
        return replace(self, n=units)

    def sums(self, gain: Tensor) -> Tensor:
        """Return what the largest gains of all groups add up to, what the second largest do, ..."""
        ranked = groups_of(self._summed(gain), self.m).sort(dim=0, descending=True).values
        return ranked.flatten(1).sum(dim=1)

    def support(self, gain: Tensor) -> Tensor:
        """Mark the n elements, or shared positions, of largest positive gain in each group."""
        if self.n == self.m:
            return gain > 0
        summed = self._summed(gain).clamp(min=0)
        return self._spread(nm_mask(summed, self.n, self.m), gain.shape) & (gain > 0)

    def part_(self, weight: Tensor, rest: Tensor, mask: Tensor, factor: float = 1.0) -> None:
        """Take ``weight + factor * rest`` apart in one pass, where every output chooses for itself.

        What is not finite then stays, as the largest of its group.
        """
        if self.rows > 1 or self.n == self.m or not weight.is_contiguous():
            super().part_(weight, rest, mask, factor)
            return
        cube = self._cube(weight.shape)
        weight, rest, mask = weight.view(cube), rest.view(cube), mask.view(cube)
        nm_part_(weight, rest, mask, self.n, self.m, factor=factor)

    def contains(self, weight: Tensor) -> bool:
        """Say whether at most n positions of each group have a weight that is not zero."""
        touched = self._summed((weight != 0).double()) > 0
        return bool((groups_of(touched, self.m).sum(dim=0) <= self.n).all())

    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        if metric is not None or self.rows > 1 or self.n == self.m:
            return super()._project(weight, metric)
        cube = weight.reshape(self._cube(weight.shape))
        return nm_apply(cube, self.n, self.m).view(weight.shape)

    def _cube(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape as outputs x reduction dimension x what is apart."""
        outputs, inputs = (*shape, 1, 1)[:2]
        positions = math.prod(shape[2:])
        flat = self.axis == "flat"
        return (outputs, inputs * positions, 1) if flat else (outputs, inputs, positions)

    def _summed(self, values: Tensor) -> Tensor:
        """Return sums over the outputs that share a choice, in three dimensions."""
        cube = values.reshape(self._cube(values.shape))
        if self.rows == 1:
            return cube
        padded = functional.pad(cube, (0, 0, 0, 0, 0, -len(cube) % self.rows))
        return padded.view(len(padded) // self.rows, self.rows, *cube.shape[1:]).sum(dim=1)

    def _spread(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Give each output the choice that it shares; return it in the shape of the weight."""
        outputs = self._cube(shape)[0]
        return keep.repeat_interleave(self.rows, dim=0)[:outputs].view(shape)


def groups_of(values: Tensor, m: int, padding: float = 0) -> Tensor:
    """Return groups along dimension 1 as ``(m, outputs, groups, positions)``, padded, a copy."""
    padded = functional.pad(values, (0, 0, 0, -values.shape[1] % m), value=padding)
    outputs, length, positions = padded.shape
    return padded.reshape(outputs, length // m, m, positions).movedim(2, 0).contiguous()


def check_ratio(n: int, m: int) -> None:
    """Raise :class:`SecateurError` if n:m is no ratio that sets have."""
    if not 1 <= n <= m <= LARGEST_GROUP:
        raise SecateurError(f"n, m: {n}:{m} is not 1 <= n <= m <= {LARGEST_GROUP}.")
