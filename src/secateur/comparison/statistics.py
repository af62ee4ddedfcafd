"""Means with their spread, and which of several candidates nothing else is better than."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """A figure over seeds.

    Attributes:
        mean: of the values.
        deviation: their sample standard deviation; 0 for a single value.
        values: one per seed.
    """

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """Return the statistic of one value or more."""
        found = tuple(values)
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        return cls(statistics.fmean(found), spread, found)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points (cost, accuracy) that no other point is better than.

    A point is better if it costs no more and is no less accurate, and not equal in both. The front
    is in the order of rising cost; equal points are all on it or all not.
    """
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1]))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1] or points[at] == points[front[-1]]:
            front.append(at)
    return front
