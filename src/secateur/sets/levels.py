"""Quantization levels, equally spaced or powers of two, with one scale per tensor.

The functions here take the levels as a *grid*: the allowed magnitudes in increasing order, in
multiples of the scale, 0 first where an element may become zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.codec.values import MOST_BITS, SPACINGS, Spacing, magnitudes
from secateur.errors import SecateurError
from secateur.sets.base import ConstraintSet, Pattern, register, require_finite

EXACT_SEARCH_LIMIT = 2**20
"""Breakpoints up to which the scale is the global optimum; beyond, a sample gives the start."""

REFINEMENTS = 20
"""Rounds of alternating least squares at most, after a sampled start."""


@register
@dataclass(frozen=True)
class Levels(ConstraintSet):
    """Every value is one of a few levels, with one free scale q for the tensor.

    Uniform levels without zero are {±q, ±2q, ..., ±2^(bits-1) q}, as in ADMM-NN-S: zero is what
    pruning leaves, not a level. With zero they are the symmetric signed integers
    {0, ±q, ..., ±(2^(bits-1) - 1) q}. Powers of two take as many magnitudes, {±q, ±2q, ±4q, ...}.
    ``Levels(1)`` is binary {±q}, ``Levels(2, zero=True)`` ternary {0, ±q}.

    Args:
        bits: width of a stored level, 1 to 8 (2 to 8 with zero; at most 4 for powers of two).
        zero: whether zero is a level.
        spacing: uniform (q, 2q, 3q, ...) or power_of_two (q, 2q, 4q, ...).

    Raises:
        SecateurError: ``bits`` is out of range, or there is no such ``spacing``.
    """

    name: ClassVar[str] = "levels"

    bits: int
    zero: bool = False
    spacing: Spacing = "uniform"

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise SecateurError(f"spacing: {self.spacing!r} is not {' or '.join(SPACINGS)}.")
        least, most = 2 if self.zero else 1, MOST_BITS[self.spacing]
        if not least <= self.bits <= most:
            reason = ""
            if self.bits == 1:
                reason = " (one bit cannot hold a signed grid with zero)"
            elif self.bits > most and self.spacing != "uniform":
                reason = " (further powers of two would be too small to matter)"
            raise SecateurError(f"bits: {self.bits} is not in {least}..{most}{reason}.")

    def __str__(self) -> str:
        powers = " powers of two" if self.spacing == "power_of_two" else ""
        return f"levels {self.bits} bit{powers}{' with zero' if self.zero else ''}"

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """The magnitudes of all levels but zero, increasing, in multiples of the scale."""
        return magnitudes(self.bits, self.zero, self.spacing)

    @property
    def grid(self) -> tuple[int, ...]:
        """The magnitudes of all levels: zero first if it is one."""
        return (0, *self.magnitudes) if self.zero else self.magnitudes

    def split(self) -> tuple[tuple[Pattern, ...], Levels | None]:
        """Return no patterns, and these levels."""
        return (), self

    def _project(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        if self.contains(weight):
            return weight.clone()
        scale = best_scale(weight, self.grid)
        return at_scale(nearest_levels(weight, scale, self.grid), scale, weight.dtype)

    def contains(self, weight: Tensor) -> bool:
        """Say whether one scale puts every element on a level."""
        if not self.zero and weight.numel() and not bool(weight.all()):
            return False
        return bool(torch.isfinite(weight).all()) and find_scale(weight, self) is not None

    def quantized(self, weight: Tensor) -> Quantized:
        """Return a member as integer levels times a scale; zeros become level 0."""
        return as_quantized(weight, self)


def as_quantized(weight: Tensor, levels: Levels) -> Quantized:
    """Express a tensor of levels (and pruned zeros) as integers times a scale.

    Raises:
        SecateurError: no scale puts every non-zero element on a level.
    """
    require_finite(weight)
    scale = find_scale(weight, levels)
    if scale is None:
        raise SecateurError(f"a tensor of shape {tuple(weight.shape)} is not on {levels}.")
    integers = nearest_levels(weight, scale, (0, *levels.magnitudes))
    return Quantized(integers, scale, levels.bits, levels.zero, levels.spacing)


def at_half(quantized: Quantized) -> Quantized:
    """Return the same levels with their one scale in float16, where that is in its normal range."""
    assert isinstance(quantized.scale, float)
    half = torch.tensor(quantized.scale, dtype=torch.float64).half()
    normal = torch.finfo(torch.float16).smallest_normal <= float(half) < math.inf
    return replace(quantized, scale=float(half)) if normal else quantized


def at_scale(integers: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``integers * scale`` rounded once to ``dtype``, as the decoder does."""
    return (integers.double() * scale).to(dtype)


def nearest_levels(weight: Tensor, scale: float, grid: Sequence[int]) -> Tensor:
    """Return the nearest multiples of ``scale`` with a magnitude in ``grid``, as int16.

    A value midway between two levels takes the smaller; a zero takes the least, positive.
    """
    multiples = nearest(weight.detach().double().abs() / scale, grid)
    return torch.where(weight < 0, -multiples, multiples).to(torch.int16)


def nearest(multiples: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the element of the grid nearest to each of these magnitudes, in their dtype."""
    if len(grid) == grid[-1] - grid[0] + 1:  # consecutive: ten times faster than a search
        return (multiples - 0.5).ceil().clamp(grid[0], grid[-1])
    levels = multiples.new_tensor(grid)
    return levels[torch.bucketize(multiples, (levels[1:] + levels[:-1]) / 2)]


def best_scale(weight: Tensor, grid: Sequence[int]) -> float:
    """Return the scale q > 0 that minimizes the squared distance to the grid.

    With levels a_i the best scale is <|w|, a> / <a, a> and lowers the squared distance by
    <|w|, a>^2 / <a, a>. As q falls from infinity, one a_i at a time goes up to the next level, at
    q = |w_i| / (the middle of the two); walking these breakpoints with two running sums visits
    every assignment that can be nearest, so the best of them is the global optimum. Alternating
    least squares (ADMM-NN's own code scans ±10 % around max|w| / largest level) then has nothing
    left to improve; it only refines the scale of tensors so large that the walk runs on a sample
    of magnitudes.

    Args:
        weight: any shape, finite.
        grid: increasing magnitudes, 0 first if an element may become zero.

    Returns:
        A positive number that float32 holds exactly; 1.0 for a tensor of zeros.
    """
    magnitudes = weight.detach().double().abs().flatten()
    magnitudes = magnitudes[magnitudes > 0] if grid[0] == 0 else magnitudes
    if magnitudes.numel() == 0 or not bool(magnitudes.any()):
        return 1.0
    steps = max(1, EXACT_SEARCH_LIMIT // max(1, len(grid) - 1))
    sample = magnitudes
    if magnitudes.numel() > steps:
        stride = math.ceil(magnitudes.numel() / steps)
        sample = magnitudes.sort(descending=True).values[::stride]
    scale = _walk_breakpoints(sample, grid)
    for _ in range(REFINEMENTS if sample is not magnitudes else 0):
        refined = refine_scale(weight, scale, grid)
        if refined == scale:
            break
        scale = refined
    return storable_scale(scale, weight.dtype)


def refine_scale(weight: Tensor, scale: float, grid: Sequence[int]) -> float:
    """Return the best scale for the levels that are nearest at ``scale``: half a round of
    alternating least squares. It never raises the squared distance."""
    magnitudes = weight.detach().double().abs().flatten()
    levels = nearest(magnitudes / scale, grid)
    square = float(levels @ levels)
    return storable_scale(float(magnitudes @ levels) / square, weight.dtype) if square else scale


def _walk_breakpoints(magnitudes: Tensor, grid: Sequence[int]) -> float:
    """Return the globally best scale for a vector of magnitudes, not all zero."""
    levels = magnitudes.new_tensor(grid)
    dot = magnitudes.sum() * levels[:1]
    square = magnitudes.numel() * levels[:1].square()
    if len(grid) > 1:
        steps = levels[1:] - levels[:-1]
        middles = (levels[1:] + levels[:-1]) / 2
        order = (magnitudes[:, None] / middles).flatten().argsort(descending=True, stable=True)
        rise = (magnitudes[:, None] * steps).flatten()[order]
        growth = levels.square().diff().expand(magnitudes.numel(), -1).flatten()[order]
        dot = torch.cat([dot, dot + rise.cumsum(0)])
        square = torch.cat([square, square + growth.cumsum(0)])
    gain = torch.where(square > 0, dot.square() / square, -1.0)
    best = int(gain.argmax())
    return float(dot[best] / square[best])


def find_scale(weight: Tensor, levels: Levels) -> float | None:
    """Return a scale that puts every non-zero element exactly on a level, or None.

    Rounding ``level * scale`` to the tensor's dtype leaves, for each value and level, an interval
    of scales that give just that value. A sweep over the ends of all these intervals finds the
    scales at which every value has a level.

    Args:
        weight: any shape, finite.
        levels: whose magnitudes are allowed.
    """
    grid = levels.magnitudes
    values = weight.detach().abs().flatten()
    values = values[values > 0]
    if values.numel() == 0:
        return 1.0
    if torch.unique(values[: 4 * len(grid)]).numel() > len(grid):  # a quick no for free values
        return None
    values = torch.unique(values)
    if values.numel() > len(grid):
        return None
    low, high = (end.flatten() for end in _scale_intervals(values, grid))
    ends = torch.cat([high, low])  # from the largest scale down, an interval opens at its high end
    order = ends.argsort(descending=True, stable=True)
    covered = torch.where(order < len(high), 1, -1).cumsum(0)
    for position in (covered == values.numel()).nonzero().squeeze(1).tolist():
        upper, lower = float(ends[order[position]]), float(ends[order[position + 1]])
        for scale in _candidates(lower, upper):
            if torch.equal(
                at_scale(nearest_levels(values, scale, grid), scale, values.dtype), values
            ):
                return scale
    return None


def _scale_intervals(values: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return, by value and level, the least and the largest scale that round to the value."""
    exact = values.double()
    above = torch.nextafter(values, torch.full_like(values, math.inf)).double()
    below = torch.nextafter(values, torch.zeros_like(values)).double()
    above = torch.where(torch.isfinite(above), above, 2 * exact - below)
    levels = exact.new_tensor(grid)
    return ((exact + below) / 2)[:, None] / levels, ((exact + above) / 2)[:, None] / levels


def _candidates(low: float, high: float) -> list[float]:
    """Return a few positive scales in [low, high], cheapest to store first."""
    middle = torch.tensor([(low + high) / 2, low, high], dtype=torch.float64)
    rounded = [float(each) for each in torch.cat([middle.half().double(), middle.float().double()])]
    return [scale for scale in rounded if 0 < scale < math.inf and low <= scale <= high]


def storable_scale(scale: float, dtype: torch.dtype) -> float:
    """Round to float32, but not below the smallest number that ``dtype`` can hold."""
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    return float(torch.tensor(min(max(scale, least), torch.finfo(torch.float32).max)).float())
