"""How far the grid of an activation reaches: chosen from a histogram of what a layer reads.

Grids are symmetric, or start at 0 where nothing negative is read, so magnitudes say all. They are
counted as they come, batch by batch, in bins whose width is a power of two; where a larger value
comes, neighbouring bins are joined until it fits, so that neither the order nor the size of batches
matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.quantizers import FixedQuantizer

BINS = 2**14
"""Bins of a histogram; at least half of them are in use."""

CANDIDATES, SMALLEST = 128, 1 / 32
"""Ranges that are tried, in equal ratios, and the smallest as a share of the largest value."""

COARSE = 2**11
"""Bins that entropies are taken over: finer ones are too empty to compare distributions by."""

Calibration = Literal["mse", "percentile", "entropy", "minmax"]
"""How a range is chosen."""

CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)


class Histogram:
    """Counts magnitudes in equal bins from 0 to a power of two.

    Attributes:
        counts: float64, ``(BINS,)``, of values that are not 0: those are on every grid.
        top: end of the last bin; 0 while only zeros have come.
        largest: magnitude.
        signed: whether a value below zero has come.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.top = self.largest = 0.0
        self.signed = False

    def add(self, values: Tensor) -> None:
        """Count one more batch, of any shape; what is not finite does not count."""
        flat = values.detach().flatten().float()
        flat = flat[flat.isfinite() & (flat != 0)]
        if not len(flat):
            return
        self.signed = self.signed or bool((flat < 0).any())
        magnitudes = flat.abs()
        self.largest = max(self.largest, float(magnitudes.max()))
        top = 2.0 ** math.ceil(math.log2(self.largest))
        while 0 < self.top < top:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.top *= 2
        self.top = top
        bins = (magnitudes.double() * (BINS / top)).long().clamp_(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64."""
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.top / BINS)

    def grid(self, bits: int, how: Calibration, percentile: float) -> FixedQuantizer:
        """Return the grid of so many bits for what was counted.

        Args:
            bits: 2 or more; the grid is signed if a value below zero has come.
            how: see :data:`RULES`.
            percentile: share of the values that are not zero, in percent, that ``percentile`` keeps.
        """
        most = 2 ** (bits - self.signed) - 1
        limit = 1.0
        if self.largest:
            limit = kept(self, percentile) if how == "percentile" else RULES[how](self, most)
        return FixedQuantizer(limit / most, most, self.signed)


def kept(histogram: Histogram, percentile: float) -> float:
    """Return the end of the bin below which so many percent of the values are."""
    shares = histogram.counts.cumsum(0) / histogram.counts.sum()
    last = int(torch.searchsorted(shares, percentile / 100))
    return min((last + 1) * histogram.top / BINS, histogram.largest)


def largest(histogram: Histogram, most: int) -> float:
    """Return the largest magnitude."""
    return histogram.largest


def least_squares(histogram: Histogram, most: int) -> float:
    """Return the range that moves values least, in the mean square."""
    limits = _candidates(histogram)
    values = histogram.centers[None]
    steps = (limits / most)[:, None]
    on_grid = torch.round(values / steps).clamp_(max=most) * steps
    errors = (on_grid - values).square_() @ histogram.counts
    return float(limits[errors.argmin()])


def least_divergence(histogram: Histogram, most: int) -> float:
    """Return the range that keeps most of the distribution: the smallest KL divergence.

    As in TensorRT (Migacz, GTC 2017): P is the histogram, clipped, with what lies beyond in its last
    bin; Q has the mass of each level spread evenly over the bins of P that round to it and are not
    empty.
    """
    counts = histogram.counts.view(COARSE, -1).sum(1)
    width = histogram.top / COARSE
    limits = _candidates(histogram)
    return min(limits.tolist(), key=lambda each: divergence(counts, width, each, most))


def divergence(counts: Tensor, width: float, limit: float, most: int) -> float:
    """Return KL(P || Q) for one range; see :func:`least_divergence`.

    Args:
        counts: of bins of magnitudes that start at 0, float64.
        width: of a bin.
        limit: the range.
        most: the largest level.
    """
    end = min(len(counts), max(1, math.ceil(limit / width - 1e-9)))
    clipped = counts[:end].clone()
    inside = clipped.clone()
    clipped[-1] += counts[end:].sum()
    centers = (torch.arange(end, dtype=counts.dtype) + 0.5) * width
    level = torch.round(centers * (most / limit)).clamp_(max=most).long()
    used = (inside > 0).to(counts.dtype)
    mass, bins = (counts.new_zeros(most + 1).index_add_(0, level, each) for each in (inside, used))
    spread = torch.where(inside > 0, (mass / bins.clamp_min(1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / spread.sum().clamp_min(1e-300)
    # a bin that only values from beyond are in has no mass in Q
    return float(torch.where(p > 0, p * (p / q.clamp_min(1e-12)).log(), 0.0).sum())


def _candidates(histogram: Histogram) -> Tensor:
    """Return ranges up to the largest value."""
    exponents = torch.linspace(math.log2(SMALLEST), 0, CANDIDATES, dtype=torch.float64)
    return exponents.exp2() * histogram.largest


RULES: dict[str, Callable[[Histogram, int], float]] = {
    "minmax": largest,
    "mse": least_squares,
    "entropy": least_divergence,
}
"""What a range is chosen by, but for ``percentile``, which takes a number of its own."""
