"""Plans of rising cost, and the largest of them that a budget allows."""

from __future__ import annotations

from abc import ABC, abstractmethod

from secateur.allocation.measure import Costs, Measure
from secateur.plan import Plan, Row


class Candidates(ABC):
    """Plans from the cheapest to the most expensive, one of which is to be chosen.

    Attributes:
        count: number of plans.
    """

    count: int

    @abstractmethod
    def plan(self, position: int) -> Plan:
        """Return one of the plans, 0 the cheapest."""

    @abstractmethod
    def why(self, row: Row) -> tuple[float | None, float | None]:
        """Return what the loss rises by with this row alone, and what one more unit would save."""


def largest(
    candidates: Candidates, measure: Measure, limit: float, least: tuple[Plan, Costs]
) -> tuple[Plan, Costs]:
    """Return the most expensive plan within a limit, as measured, and its cost, by bisection.

    Args:
        candidates: to choose from.
        measure: of their cost.
        limit: in units of the measure.
        least: a plan within the limit, and its cost, should there be no other.
    """
    best, low, high = least, -1, candidates.count
    while high - low > 1:
        middle = (low + high) // 2
        plan = candidates.plan(middle)
        costs = measure.of(plan)
        if costs.total <= limit:
            best, low = (plan, costs), middle
        else:
            high = middle
    return best
