"""How far the grid of an activation reaches: chosen from a histogram of what a layer reads.

Values are counted as they come, batch by batch, in bins whose width is a power of two; where a
larger value comes, neighbouring bins are joined until it fits, so that neither the order nor the
size of batches matters. A grid of b bits has 2^b levels at equal steps, 0 among them: from 0 where
nothing negative is read, else from the smaller end of the range to the larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.quantizers import FixedQuantizer

BINS = 2**14
"""Bins on each side of zero; at least half of those on the larger side are in use."""

COARSE = 2**11
"""Bins that entropies are taken over: finer ones are too empty to compare distributions by."""

CANDIDATES, SMALLEST = 64, 1 / 32
"""Ends of a range that are tried, in equal ratios, and the smallest as a share of the outermost."""

STARTS, TURNS = (1.0, 0.5, 0.25), (1, 0)
"""Shares of the smallest value that searches start from, and which end is searched, in order, while
the other is held: 0 among the levels makes the error jump, so that one start is not enough."""

Calibration = Literal["mse", "percentile", "entropy", "minmax"]
"""How a range is chosen."""

CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)

Ends = tuple[float, float]
"""Magnitudes of the smallest and the largest value of a range."""


class Histogram:
    """Counts values in equal bins, on each side of zero.

    Attributes:
        counts: float64, ``(2, BINS)``, of magnitudes of values below and above zero. Zeros do not
            count: they are on every grid.
        top: end of the last bin; 0 while only zeros have come.
        outermost: magnitudes of the smallest and the largest value, 0 where there is none.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.float64)
        self.top = 0.0
        self.outermost: Ends = (0.0, 0.0)

    def add(self, values: Tensor) -> None:
        """Count one more batch, of any shape; what is not finite does not count."""
        flat = values.detach().flatten().double()
        flat = flat[flat.isfinite() & (flat != 0)]
        if not len(flat):
            return
        low, high = max(0.0, -float(flat.min())), max(0.0, float(flat.max()))
        self.outermost = (max(low, self.outermost[0]), max(high, self.outermost[1]))
        top = 2.0 ** math.ceil(math.log2(max(self.outermost)))
        while 0 < self.top < top:
            joined = self.counts.view(2, -1, 2).sum(2)
            self.counts = torch.cat([joined, torch.zeros_like(joined)], 1)
            self.top *= 2
        self.top = top
        bins = (flat.abs() * (BINS / top)).long().clamp_(max=BINS - 1) + BINS * (flat > 0)
        self.counts += torch.bincount(bins, minlength=2 * BINS).view(2, BINS).cpu()

    def grid(self, bits: int, how: Calibration, percentile: float) -> FixedQuantizer:
        """Return the grid of so many bits for what was counted.

        Args:
            bits: of a level.
            how: see :data:`RULES`.
            percentile: share of the values on each side of zero that ``percentile`` keeps, in
                percent.
        """
        if not self.top:
            return FixedQuantizer(1.0, 0, 2**bits - 1)
        ends = within(self, percentile) if how == "percentile" else RULES[how](self, bits)
        step, least = steps(torch.tensor([ends], dtype=torch.float64), bits)
        return FixedQuantizer(float(step), int(least), int(least) + 2**bits - 1)


def steps(ends: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return step and smallest level of grids of so many bits for ranges ``(..., 2)``."""
    step = ends.sum(-1) / (2**bits - 1)
    return step, -torch.round(ends[..., 0] / step)


def outermost(histogram: Histogram, bits: int) -> Ends:
    """Return the range of all values."""
    return histogram.outermost


def within(histogram: Histogram, percentile: float) -> Ends:
    """Return the ends of the bins in which, on each side, so many percent of the values are."""
    found = []
    for counts, end in zip(histogram.counts, histogram.outermost, strict=True):
        running = counts.cumsum(0)
        place = int(torch.searchsorted(running, running[-1] * percentile / 100))
        found.append(min((place + 1) * histogram.top / BINS, end))
    return found[0], found[1]


def least_squares(histogram: Histogram, bits: int) -> Ends:
    """Return the range whose grid moves values least, in the mean square.

    One end is searched while the other is held, in turn, from several starts.
    """
    used = histogram.counts > 0
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (histogram.top / BINS)
    values = torch.cat([-middles[used[0]], middles[used[1]]])
    counts = histogram.counts[used]
    exponents = torch.linspace(math.log2(SMALLEST), 0, CANDIDATES, dtype=torch.float64)
    outer = torch.tensor(histogram.outermost, dtype=torch.float64)
    tried = exponents.exp2()[:, None] * outer
    both = bool(outer.all())
    found: list[tuple[float, Ends]] = []
    for start in STARTS if both else STARTS[:1]:
        ends = outer * torch.tensor([start, 1.0])
        for side in TURNS if both else (int(outer.argmax()),):
            ranges = ends.repeat(CANDIDATES, 1)
            ranges[:, side] = tried[:, side]
            errors = _errors(values, counts, ranges, bits)
            ends = ranges[errors.argmin()]
        found.append((float(errors.min()), (float(ends[0]), float(ends[1]))))
    return min(found)[1]


def _errors(values: Tensor, counts: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """Return the summed squared error of values on the grid of each range."""
    step, least = (each[:, None] for each in steps(ranges, bits))
    levels = torch.round(values / step)
    levels = torch.minimum(torch.maximum(levels, least), least + 2**bits - 1)
    return (levels.mul_(step).sub_(values)).square_() @ counts


def least_divergence(histogram: Histogram, bits: int) -> Ends:
    """Return the range that keeps most of the distribution of magnitudes: the least KL divergence.

    As TensorRT does (Migacz, GTC 2017): P is the histogram, clipped, with what lies beyond in its
    last bin; Q has the mass of each level spread evenly over those bins of P that round to it and
    are not empty. One limit holds for both sides.
    """
    counts = histogram.counts.sum(0).view(COARSE, -1).sum(1)
    signed = histogram.outermost[0] > 0
    exponents = torch.linspace(math.log2(SMALLEST), 0, CANDIDATES, dtype=torch.float64)
    limits = (exponents.exp2() * max(histogram.outermost)).tolist()
    width, most = histogram.top / COARSE, 2 ** (bits - signed) - 1
    limit = min(limits, key=lambda each: divergence(counts, width, each, most))
    low, high = histogram.outermost
    return min(low, limit), min(high, limit)


def divergence(counts: Tensor, width: float, limit: float, most: int) -> float:
    """Return KL(P || Q) for one range; see :func:`least_divergence`.

    Args:
        counts: of bins of magnitudes that start at 0, float64.
        width: of a bin.
        limit: the range.
        most: the largest level.
    """
    end = min(len(counts), max(1, math.ceil(limit / width - 1e-9)))
    inside = counts[:end]
    clipped = inside.clone()
    clipped[-1] += counts[end:].sum()
    middles = (torch.arange(end, dtype=counts.dtype) + 0.5) * width
    level = torch.round(middles * (most / limit)).clamp_(max=most).long()
    used = (inside > 0).to(counts.dtype)
    mass, bins = (counts.new_zeros(most + 1).index_add_(0, level, each) for each in (inside, used))
    spread = (mass / bins.clamp_min(1))[level] * used
    p, q = clipped / clipped.sum(), spread / spread.sum().clamp_min(TINY)
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp_min(TINY))).sum())


TINY = 1e-30
"""Stands for the mass of a bin that only values from beyond the range are in."""

RULES: dict[str, Callable[[Histogram, int], Ends]] = {
    "minmax": outermost,
    "mse": least_squares,
    "entropy": least_divergence,
}
"""What a range is chosen by, but for ``percentile``, which takes a number of its own."""
