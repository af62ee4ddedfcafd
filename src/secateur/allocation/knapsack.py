"""The multiple-choice knapsack: one option for each layer, least loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

POINTS = 4096
"""Points of a frontier that are kept while layers are added."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """All sums of one option per layer that no other sum beats in both cost and loss.

    Attributes:
        cost: rising.
        loss: falling.
        picks: of shape (points, layers), which option of each layer makes the sum.
    """

    cost: Floats
    loss: Floats
    picks: Integers


def frontier(options: Sequence[tuple[Floats, Floats]], most: float) -> Frontier:
    """Return the Pareto frontier of cost and loss, each summed over the layers.

    Layers are added one at a time, and of every sum with an option of the next layer those are
    kept that are cheaper than all of less loss. That is exact, convex or not. Where more than
    ``POINTS`` are left, their costs are put into as many equal bins and the least loss of each is
    kept. A bin is ``most / POINTS`` wide, so a budget buys at least what it would have bought
    exactly were it smaller by one bin for each layer.

    Args:
        options: costs and losses of each layer's options, of equal length.
        most: cost above which sums are dropped, unless nothing would be left.
    """
    least = np.array([cost.min() for cost, _ in options])
    remaining = least[::-1].cumsum()[::-1] - least  # what the layers still to come take at least
    sums = Frontier(np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64))
    for (costs, losses), rest in zip(options, remaining, strict=True):
        useful = _undominated(costs, losses)
        cost = np.add.outer(sums.cost, costs[useful]).ravel()
        loss = np.add.outer(sums.loss, losses[useful]).ravel()
        kept = _undominated(cost, loss)
        within = kept[cost[kept] + rest <= most]
        kept = _thinned(within if len(within) else kept[:1], cost)
        before, option = np.divmod(kept, len(useful))
        picks = np.column_stack([sums.picks[before], useful[option]])
        sums = Frontier(cost[kept], loss[kept], picks)
    return sums


def _undominated(cost: Floats, loss: Floats) -> Integers:
    """Return the points that have less loss than all cheaper ones, by rising cost."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], best[1:] < best[:-1]])
    return np.asarray(order[better], dtype=np.int64)


def _thinned(points: Integers, cost: Floats) -> Integers:
    """Return the last of the points in each of ``POINTS`` equal bins of cost, and the first."""
    if len(points) <= POINTS:
        return points
    span = cost[points]
    bins = ((span - span[0]) / (span[-1] - span[0]) * (POINTS - 1)).astype(np.int64)
    last = np.concatenate([bins[1:] > bins[:-1], [True]])
    last[0] = True
    return np.asarray(points[last], dtype=np.int64)
