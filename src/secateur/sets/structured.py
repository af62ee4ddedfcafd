"""Structured sparsity: weights that live and die in groups.

Groups are named after the GEMM matrix of a layer, as in ADMM-NN-S (arXiv 1907.02124): its rows are
the filters (dimension 0 of the weight), its columns the other dimensions flattened. They work for
linear layers and for convolutions in one to three dimensions. In a grouped convolution dimension 1
counts the inputs of each group.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sets.base import register, top_k
from secateur.sets.counted import Counted


class Grouped(Counted):
    """At most ``keep`` groups of weights are not zero, or at most a ``density`` share of them.

    The projection keeps the groups of largest summed gain, for free values those of largest L2
    norm, whole. That is the nearest member, as the gains of groups add up. Groups of equal sums go
    by the lower number, and one that gains nothing is never kept.
    """

    removable: ClassVar[bool] = False
    """Whether groups are whole channels, which leave the network, so that their number is a width
    of it."""

    @abstractmethod
    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the number of the group of each element, from 0, broadcastable to ``shape``.

        Args:
            shape: of the weight, with two dimensions at least.
        """

    def total(self, shape: Sequence[int]) -> int:
        """Return the number of groups."""
        numbers = self.groups(_matrix_like(shape))
        return int(numbers.max()) + 1 if numbers.numel() else 0

    def support(self, gain: Tensor) -> Tensor:
        """Mark all elements of the groups of largest positive gain."""
        sums = self.sums(gain)
        keep = top_k(sums, self.count(len(sums))) & (sums > 0)
        return keep[self._numbers(gain)].view_as(gain)

    def rounded(self, shape: Sequence[int], multiple: int) -> Grouped:
        """Return the pattern that keeps the nearest multiple of whole channels, at least one."""
        total = self.total(shape)
        keep = self.count(total)
        if not self.removable or keep % multiple == 0 or keep == total:
            return self
        nearest = max(1, (2 * keep + multiple) // (2 * multiple)) * multiple
        return replace(self, density=None, keep=min(nearest, total))

    def contains(self, weight: Tensor) -> bool:
        """Say whether at most :meth:`count` groups have an element that is not zero."""
        sums = self.sums((weight != 0).double())
        return int(sums.count_nonzero()) <= self.count(len(sums))

    def cover(self, support: Tensor) -> Tensor:
        """Mark all elements of every group that the support touches."""
        touched = self.sums(support.double()) > 0
        return touched[self._numbers(support)].view_as(support)

    def sums(self, gain: Tensor) -> Tensor:
        """Return the summed gain of each group."""
        sums = gain.new_zeros(self.total(gain.shape))
        return sums.index_add_(0, self._numbers(gain), gain.reshape(-1))

    def _numbers(self, values: Tensor) -> Tensor:
        """Return the group number of each element, flat."""
        shape = _matrix_like(values.shape)
        return self.groups(shape).to(values.device).expand(shape).reshape(-1)


def _matrix_like(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape with ones added until there are two dimensions."""
    return (*shape, *[1] * (2 - len(shape)))


@register
@dataclass(frozen=True)
class Filter(Grouped):
    """At most a share of the output filters W[o] is not zero.

    Where filters are outputs of the network, pruning them takes classes away: leave the last layer
    out (``layers: {fc2: dense}``).

    Args:
        density: share of the filters that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of filters that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "filter"
    units: ClassVar[str] = "filters"
    removable: ClassVar[bool] = True

    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the output of each element."""
        return torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))


@register
@dataclass(frozen=True)
class Channel(Grouped):
    """At most a share of the input channels W[:, c] is not zero.

    Args:
        density: share of the channels that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of channels that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "channel"
    units: ClassVar[str] = "channels"
    removable: ClassVar[bool] = True

    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the input channel of each element."""
        return torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2))


@register
@dataclass(frozen=True)
class Column(Grouped):
    """At most a share of the GEMM columns W[:, c, y, x] is not zero: all filters have one shape.

    Args:
        density: share of the columns that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of columns that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "column"
    units: ClassVar[str] = "columns"

    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the GEMM column of each element."""
        return torch.arange(math.prod(shape[1:])).view(1, *shape[1:])


@register
@dataclass(frozen=True)
class Kernel(Grouped):
    """At most a share of the kernels W[o, c] is not zero. In a linear layer that is one weight.

    Args:
        density: share of the kernels that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of kernels that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither are given, or one is out of range.
    """

    name: ClassVar[str] = "kernel"
    units: ClassVar[str] = "kernels"

    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the kernel of each element."""
        return torch.arange(shape[0] * shape[1]).view(*shape[:2], *[1] * (len(shape) - 2))


@register
@dataclass(frozen=True)
class Block(Grouped):
    """At most a share of the blocks, ``rows`` x ``columns``, of the GEMM matrix is not zero.

    Where the matrix does not divide into blocks, the last ones are smaller.

    Args:
        rows: filters in a block.
        columns: GEMM columns in a block.
        density: share of the blocks that may be non-zero, in (0, 1]; the count is rounded.
        keep: number of blocks that may be non-zero; give this or ``density``.

    Raises:
        SecateurError: both or neither of density and keep are given, or an option is out of range.
    """

    name: ClassVar[str] = "block"
    units: ClassVar[str] = "blocks"
    positional: ClassVar[bool] = True

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for option in ("rows", "columns"):
            if getattr(self, option) < 1:
                raise SecateurError(
                    f"{option}: {getattr(self, option)} is not positive; give the size of a block."
                )
        super().__post_init__()

    def __str__(self) -> str:
        return super().__str__().replace("block", f"block {self.rows}x{self.columns}", 1)

    def groups(self, shape: tuple[int, ...]) -> Tensor:
        """Return the block of each element, counted along the rows of blocks."""
        width = math.prod(shape[1:])
        down = torch.arange(shape[0]) // self.rows
        across = torch.arange(width) // self.columns
        return (down[:, None] * math.ceil(width / self.columns) + across).view(shape)
