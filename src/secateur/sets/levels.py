"""Uniform quantization levels with one scale per tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.errors import SecateurError
from secateur.sets.base import ConstraintSet, register, require_finite

EXACT_SEARCH_LIMIT = 2**20
"""Breakpoints up to which the scale is the global optimum; beyond, a sample gives the start."""

REFINEMENTS = 20
"""Rounds of alternating least squares at most, after a sampled start."""


@register
@dataclass(frozen=True)
class Levels(ConstraintSet):
    """Every value is one of equally spaced levels, with one free scale q for the tensor.

    Without zero the levels are {±q, ±2q, ..., ±2^(bits-1) q}, as in ADMM-NN-S: zero is what
    pruning leaves, not a level. With zero they are the symmetric signed integers
    {0, ±q, ..., ±(2^(bits-1) - 1) q}.

    Args:
        bits: width of a stored level, 1 to 8 (2 to 8 with zero).
        zero: whether zero is a level.

    Raises:
        SecateurError: ``bits`` is out of range.
    """

    name: ClassVar[str] = "levels"

    bits: int
    zero: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.zero else 1
        if not least <= self.bits <= 8:
            raise SecateurError(
                f"bits: {self.bits} is not in {least}..8"
                + (" (one bit cannot hold a signed grid with zero)." if self.zero else ".")
            )

    def __str__(self) -> str:
        return f"levels {self.bits} bit{' with zero' if self.zero else ''}"

    @property
    def top(self) -> int:
        """The largest level, in multiples of the scale."""
        return (1 << (self.bits - 1)) - int(self.zero)

    @property
    def least(self) -> int:
        """The smallest level magnitude, in multiples of the scale."""
        return 0 if self.zero else 1

    def _project(self, weight: Tensor) -> Tensor:
        if self.contains(weight):
            return weight.clone()
        scale = best_scale(weight, self.top, self.least)
        return at_scale(nearest_levels(weight, scale, self.top, self.least), scale, weight.dtype)

    def contains(self, weight: Tensor) -> bool:
        """Say whether one scale puts every element on a level."""
        if not self.zero and weight.numel() and not bool(weight.all()):
            return False
        return bool(torch.isfinite(weight).all()) and find_scale(weight, self.top) is not None

    def quantized(self, weight: Tensor) -> Quantized:
        """Return a member as integer levels times a scale; zeros become level 0."""
        return as_quantized(weight, self)


def as_quantized(weight: Tensor, levels: Levels) -> Quantized:
    """Express a tensor of levels (and pruned zeros) as integers times a scale.

    Raises:
        SecateurError: no scale puts every non-zero element on a level.
    """
    require_finite(weight)
    scale = find_scale(weight, levels.top)
    if scale is None:
        raise SecateurError(f"a tensor of shape {tuple(weight.shape)} is not on {levels}.")
    integers = nearest_levels(weight, scale, levels.top, 0)
    return Quantized(integers, scale, levels.bits, levels.zero)


def at_scale(integers: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``integers * scale`` rounded once to ``dtype``, as the decoder does."""
    return (integers.double() * scale).to(dtype)


def nearest_levels(weight: Tensor, scale: float, top: int, least: int) -> Tensor:
    """Return the nearest multiples of ``scale`` with magnitude in [least, top], as int16.

    A value midway between two levels takes the smaller; a zero takes ``+least``.
    """
    multiples = (weight.detach().double().abs() / scale - 0.5).ceil().clamp(least, top)
    return torch.where(weight < 0, -multiples, multiples).to(torch.int16)


def best_scale(weight: Tensor, top: int, least: int) -> float:
    """Return the scale q > 0 that minimizes the squared distance to the grid.

    With integer levels a_i the best scale is <|w|, a> / <a, a> and lowers the squared distance by
    <|w|, a>^2 / <a, a>. As q falls from infinity, one a_i at a time goes up by one, at
    q = |w_i| / (a_i + 1/2); walking these breakpoints with two running sums visits every
    assignment that can be nearest, so the best of them is the global optimum. Alternating least
    squares (ADMM-NN's own code scans ±10 % around max|w|/top) then has nothing left to improve;
    it only refines the scale of tensors so large that the walk runs on a sample of magnitudes.

    Args:
        weight: any shape, finite.
        top: largest level.
        least: 0 if an element may become zero, else 1.

    Returns:
        A positive number that float32 holds exactly; 1.0 for a tensor of zeros.
    """
    magnitudes = weight.detach().double().abs().flatten()
    magnitudes = magnitudes[magnitudes > 0] if least == 0 else magnitudes
    if magnitudes.numel() == 0 or not bool(magnitudes.any()):
        return 1.0
    steps = max(1, EXACT_SEARCH_LIMIT // max(1, top - least))
    sample = magnitudes
    if magnitudes.numel() > steps:
        stride = math.ceil(magnitudes.numel() / steps)
        sample = magnitudes.sort(descending=True).values[::stride]
    scale = _walk_breakpoints(sample, top, least)
    for _ in range(REFINEMENTS if sample is not magnitudes else 0):
        refined = refine_scale(weight, scale, top, least)
        if refined == scale:
            break
        scale = refined
    return _to_float32(scale, weight.dtype)


def refine_scale(weight: Tensor, scale: float, top: int, least: int) -> float:
    """Return the best scale for the levels that are nearest at ``scale``: half a round of
    alternating least squares. It never raises the squared distance."""
    magnitudes = weight.detach().double().abs().flatten()
    levels = (magnitudes / scale - 0.5).ceil().clamp(least, top)
    square = float(levels @ levels)
    return _to_float32(float(magnitudes @ levels) / square, weight.dtype) if square else scale


def _walk_breakpoints(magnitudes: Tensor, top: int, least: int) -> float:
    """Return the globally best scale for a vector of magnitudes, not all zero."""
    start = magnitudes.new_tensor([least])
    dot = magnitudes.sum() * start
    square = magnitudes.numel() * start.square()
    if top > least:
        halves = torch.arange(least, top, device=magnitudes.device, dtype=torch.float64) + 0.5
        breakpoints = (magnitudes[:, None] / halves).flatten()
        order = breakpoints.argsort(descending=True, stable=True)
        rise = magnitudes[:, None].expand(-1, top - least).flatten()[order]
        growth = (2 * halves).expand(magnitudes.numel(), -1).flatten()[order]
        dot = torch.cat([dot, dot + rise.cumsum(0)])
        square = torch.cat([square, square + growth.cumsum(0)])
    gain = torch.where(square > 0, dot.square() / square, -1.0)
    best = int(gain.argmax())
    return float(dot[best] / square[best])


def find_scale(weight: Tensor, top: int) -> float | None:
    """Return a scale that puts every non-zero element exactly on a level, or None.

    Rounding ``level * scale`` to the tensor's dtype leaves, for each value and level, an interval
    of scales that give just that value. A sweep over the ends of all these intervals finds the
    scales at which every value has a level.

    Args:
        weight: any shape, finite.
        top: largest level, in multiples of the scale.
    """
    values = weight.detach().abs().flatten()
    values = values[values > 0]
    if values.numel() == 0:
        return 1.0
    if torch.unique(values[: 4 * top]).numel() > top:  # a quick no for free values
        return None
    values = torch.unique(values)
    if values.numel() > top:
        return None
    low, high = (end.flatten() for end in _scale_intervals(values, top))
    ends = torch.cat([high, low])  # from the largest scale down, an interval opens at its high end
    order = ends.argsort(descending=True, stable=True)
    covered = torch.where(order < len(high), 1, -1).cumsum(0)
    for position in (covered == values.numel()).nonzero().squeeze(1).tolist():
        upper, lower = float(ends[order[position]]), float(ends[order[position + 1]])
        for scale in _candidates(lower, upper):
            multiples = (values.double() / scale).round()
            if torch.equal(at_scale(multiples, scale, values.dtype), values):
                return scale
    return None


def _scale_intervals(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return, by value and level, the least and the largest scale that round to the value."""
    exact = values.double()
    above = torch.nextafter(values, torch.full_like(values, math.inf)).double()
    below = torch.nextafter(values, torch.zeros_like(values)).double()
    above = torch.where(torch.isfinite(above), above, 2 * exact - below)
    levels = torch.arange(1, top + 1, device=values.device, dtype=torch.float64)
    return ((exact + below) / 2)[:, None] / levels, ((exact + above) / 2)[:, None] / levels


def _candidates(low: float, high: float) -> list[float]:
    """Return a few positive scales in [low, high], cheapest to store first."""
    middle = torch.tensor([(low + high) / 2, low, high], dtype=torch.float64)
    rounded = [float(each) for each in torch.cat([middle.half().double(), middle.float().double()])]
    return [scale for scale in rounded if 0 < scale < math.inf and low <= scale <= high]


def _to_float32(scale: float, dtype: torch.dtype) -> float:
    """Round to float32, but not below the smallest number that ``dtype`` can hold."""
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    return float(torch.tensor(min(max(scale, least), torch.finfo(torch.float32).max)).float())
