"""The search for a budget: a two-sided constraint on the logarithm of cost, with a ramp.

Let v be the largest log(cost / limit) of all limits, of whole bits and open channels with
straight-through gradients, and v(t) the path from where it is at the start down (or up) to 0, a
straight line, so that costs fall geometrically. The constraint is c = v - v(t) = 0, by the method
of multipliers:

    penalty = lambda c + rho / 2 c^2,    lambda <- lambda + eta c   after each step

A penalty on excess alone overshoots, since the loss hardly pulls bits back up; without the path
the first steps destroy what the weights know.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

RHO = 5.0
"""Of the quadratic term."""

DUAL = 100.0
"""What lambda gains in a whole search per unit of a constant violation."""

ARRIVED = 0.7
"""Share of the search after which the path is at its end."""


MEASURED = 20
"""Times in a search that costs are measured which depend on values of weights."""


class Pressure:
    """The penalty of one search.

    Attributes:
        steps: of the search; 0 until it begins.
        done: steps that were taken.
        multiplier: lambda.
        start: v when the search began.
    """

    def __init__(self) -> None:
        self.begin(0, 0.0)

    def begin(self, steps: int, excess: float) -> None:
        """Start a search of so many steps at an excess v."""
        self.steps, self.start = steps, excess
        self.done, self.multiplier, self.violation = 0, 0.0, 0.0

    @property
    def progress(self) -> float:
        """Share of the search that is over."""
        return self.done / self.steps if self.steps else 0.0

    def penalty(self, excess: Tensor) -> Tensor:
        """Return what is added to the loss, for v now, a scalar with gradients."""
        c = excess - self.start * max(0.0, 1 - self.progress / ARRIVED)
        self.violation = float(c.detach())
        return self.multiplier * c + RHO / 2 * c.square()

    def step(self) -> None:
        """Go on along the path; call after each optimizer step."""
        self.done += 1
        if self.steps:
            self.multiplier += DUAL / self.steps * self.violation

    def due(self) -> bool:
        """Tell whether costs should be measured again that depend on values of weights."""
        return self.steps > 0 and self.done % math.ceil(self.steps / MEASURED) == 0

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        vars(self).update(state)


def straight_through(whole: Tensor, smooth: Tensor) -> Tensor:
    """Return the first with the gradient of the second."""
    return whole + (smooth - smooth.detach())
