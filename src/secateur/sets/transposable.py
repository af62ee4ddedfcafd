"""N:M sparsity in both directions, so that the transposed weight of a backward pass has it too.

Transposable masks are those of Hubara et al. (arXiv 2102.08124), with "at most" for "exactly".
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from secateur.sets.base import Pattern, register
from secateur.sets.nm import check_ratio

EXACT_TILE = 4
"""Largest m at which all choices of a tile are compared."""

CHUNK = 2**14
"""Tiles compared at a time."""


@register
@dataclass(frozen=True)
class Transposable(Pattern):
    """At most n of each m consecutive inputs, and of each m consecutive outputs, are not zero.

    For each kernel position the outputs x inputs matrix is cut into m x m tiles, smaller ones at
    its ends. The best choice in a tile is a b-matching of largest weight: up to m = 4 all are
    compared, so the projection is exact. Beyond, weights are taken from the largest to the smallest
    wherever their row and column have room, which keeps half of the best energy at least.

    Args:
        n: weights that may be non-zero in each row and column of a tile.
        m: rows and columns of a tile, up to 64.

    Raises:
        SecateurError: not 1 <= n <= m <= 64.
    """

    name: ClassVar[str] = "transposable"
    elementwise: ClassVar[bool] = True
    positional: ClassVar[bool] = True

    n: int
    m: int

    def __post_init__(self) -> None:
        check_ratio(self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} transposable"

    def misfit(self, shape: Sequence[int]) -> str:
        """Say that there is no whole tile."""
        height, width, _ = _cube(shape)
        sides = f"{height} outputs x {width} input channels"
        return f"its {sides} make no tile of {self.m}" if min(height, width) < self.m else ""

    def relaxed(self, shape: Sequence[int], exponent: float) -> Transposable:
        """Return n':m for the density ``d ** exponent``, n' rounded."""
        return replace(self, n=round(self.m * (self.n / self.m) ** exponent))

    def support(self, gain: Tensor) -> Tensor:
        """Mark the best choice of each tile; one that is a member already is kept whole."""
        tiles = self._tiles(gain.clamp(min=0))
        live = tiles > 0
        keep = torch.empty_like(live)
        best = _compared if self.m <= EXACT_TILE else _greedy
        for start in range(0, len(tiles), CHUNK):
            keep[start : start + CHUNK] = best(tiles[start : start + CHUNK], self.n)
        fits = self._fits(live)
        return self._untiled(torch.where(fits[:, None, None], live, keep & live), gain.shape)

    def contains(self, weight: Tensor) -> bool:
        """Say whether no row and no column of a tile has more than n non-zeros."""
        return bool(self._fits(self._tiles(weight != 0)).all())

    def _fits(self, live: Tensor) -> Tensor:
        rows, columns = live.sum(dim=2), live.sum(dim=1)
        return (rows <= self.n).all(dim=1) & (columns <= self.n).all(dim=1)

    def _tiles(self, values: Tensor) -> Tensor:
        """Return the tiles, shape ``(tiles, m, m)``, filled up with zeros."""
        height, width, positions = _cube(values.shape)
        matrices = values.reshape(height, width, positions).permute(2, 0, 1)
        padded = functional.pad(matrices, (0, -width % self.m, 0, -height % self.m))
        down, across = padded.shape[1] // self.m, padded.shape[2] // self.m
        rows = padded.reshape(positions, down, self.m, across, self.m)
        return rows.transpose(2, 3).flatten(0, 2)

    def _untiled(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Invert :meth:`_tiles`."""
        height, width, positions = _cube(shape)
        down, across = -(-height // self.m), -(-width // self.m)
        rows = tiles.view(positions, down, across, self.m, self.m).transpose(2, 3)
        matrices = rows.reshape(positions, down * self.m, across * self.m)[:, :height, :width]
        return matrices.permute(1, 2, 0).reshape(shape)


def _cube(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a shape as outputs x inputs x kernel positions."""
    height, width = (*shape, 1, 1)[:2]
    return height, width, math.prod(shape[2:])


def _compared(tiles: Tensor, n: int) -> Tensor:
    """Return the best choice in each tile of gains, the first of equals."""
    choices = _choices(n, tiles.shape[1]).to(tiles.device)
    best = (tiles.flatten(1) @ choices.double().T).argmax(dim=1)
    return choices[best].view_as(tiles)


@functools.cache
def _choices(n: int, m: int) -> Tensor:
    """Return all choices that cannot be added to, flat, those with lower indices first."""
    rows = [row for row in itertools.product((True, False), repeat=m) if sum(row) <= n]
    tiles = torch.tensor(list(itertools.product(rows, repeat=m)))
    down, across = tiles.sum(dim=1), tiles.sum(dim=2)
    room = (across < n)[:, :, None] & (down < n)[:, None, :] & ~tiles
    return tiles[(down <= n).all(dim=1) & ~room.flatten(1).any(dim=1)].flatten(1)


def _greedy(tiles: Tensor, n: int) -> Tensor:
    """Take gains in falling order wherever row and column have fewer than n."""
    m, count = tiles.shape[1], torch.arange(len(tiles), device=tiles.device)
    keep = torch.zeros_like(tiles, dtype=torch.bool)
    down, across = (torch.zeros_like(tiles[:, 0], dtype=torch.int64) for _ in range(2))
    for place in tiles.flatten(1).argsort(dim=1, descending=True, stable=True).unbind(dim=1):
        row, column = place // m, place % m
        room = (across[count, row] < n) & (down[count, column] < n)
        keep[count, row, column] = room
        across[count, row] += room
        down[count, column] += room
    return keep
