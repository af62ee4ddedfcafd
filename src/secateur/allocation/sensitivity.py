"""What each layer alone does to the loss: a ladder of densities and bits, measured and filled in.

Each projected weight is scaled back to the norm it had before the loss is measured, which is the
first thing that retraining would do. Without that a sparse layer mutes all that follows: its loss
is soon that of guessing, the rest of it seems to be worth nothing, and at high ratios some layer
ends with a single weight. That the losses of layers add up is an assumption all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocation.candidates import Candidates
from secateur.allocation.knapsack import Floats, frontier
from secateur.allocation.measure import Measure
from secateur.allocation.targets import at_share, density, least_share, with_bits
from secateur.errors import NonFiniteError
from secateur.plan import Plan, Row
from secateur.sets import ConstraintSet

Loss = Callable[[nn.Module], float]

RUNGS = 8
"""Densities at which a layer's loss is measured, in equal ratios from all to one unit."""

FINE = 64 * (RUNGS - 1) + 1
"""Densities that a layer may get, in equal ratios as well."""

HEADROOM = 2.0
"""Estimated cost, in budgets, up to which options are combined; measured, it may be less."""


@dataclass(frozen=True)
class Options:
    """The sets that a layer may get.

    Attributes:
        targets: without repetition.
        cost: of the layer with each.
        loss: what the network's loss rises by with that layer alone projected.
    """

    targets: tuple[ConstraintSet, ...]
    cost: Floats
    loss: Floats

    def price(self, chosen: ConstraintSet) -> float | None:
        """Return the loss that one more unit of cost would save, or None if none would.

        It is the steepest way on from the chosen set, so options off the convex hull do not hide
        those behind them.
        """
        at = self.targets.index(chosen)
        rise, fall = self.cost - self.cost[at], self.loss[at] - self.loss
        better = (rise > 0) & (fall > 0)
        return float((fall[better] / rise[better]).max()) if better.any() else None


class Sensitivity(Candidates):
    """Plans of least total loss at their cost, as measured layer by layer.

    Its :meth:`why` gives the loss increase of a layer alone, at its old norm.

    Args:
        plan: whose patterns are to be told how much to keep, path-aware or not; layers are
            measured alone, where paths hardly matter.
        measure: holds the model and its weights.
        fixed: layers that keep what the plan says.
        loss: of the network on calibration data.
        bits: widths of levels to choose from; none leaves levels as they are.
        limit: of the total cost.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """

    def __init__(
        self,
        plan: Plan,
        measure: Measure,
        fixed: Collection[str],
        loss: Loss,
        bits: Sequence[int],
        limit: float,
    ) -> None:
        self.base, self.measure, self.loss, self.bits = plan, measure, loss, bits
        self.dense = self._finite("the dense network")
        self.options = {
            row.layer: self._fixed(row) if row.layer in fixed else self._options(row)
            for row in plan.compressed
        }
        spent = [(each.cost, each.loss) for each in self.options.values()]
        self.frontier = frontier(spent, HEADROOM * (limit - sum(measure.rest.values())))
        self.count = len(self.frontier.cost)

    def plan(self, position: int) -> Plan:
        """Return the plan at a point of the frontier of cost and loss."""
        picks = self.frontier.picks[position]
        sets = {
            layer: options.targets[pick]
            for (layer, options), pick in zip(self.options.items(), picks, strict=True)
        }
        rows = (
            replace(row, set=sets[row.layer], pooled=False) if row.set else row
            for row in self.base.rows
        )
        return replace(self.base, rows=tuple(rows))

    def why(self, row: Row) -> tuple[float, float | None]:
        """Return the loss increase of a chosen row alone, measured, and the price of a unit."""
        assert row.set is not None
        return self._alone(row, row.set)[1], self.options[row.layer].price(row.set)

    def _alone(self, row: Row, target: ConstraintSet) -> tuple[float, float]:
        """Return the cost of a layer in a set, and what the loss rises by."""
        costs = self.measure.of(Plan((replace(row, set=target, pooled=False),)))
        parameter = self.measure.parameters[row.parameter]
        before, after = self.measure.weights[row.parameter], costs.projected[row.parameter]
        _write(parameter, after * _ratio(before, after))
        try:
            rise = self._finite(f"{row.layer} in {target}") - self.dense
        finally:
            _write(parameter, before)
        return costs.layers[row.layer], rise

    def _fixed(self, row: Row) -> Options:
        assert row.set is not None
        cost, loss = self._alone(row, row.set)
        return Options((row.set,), np.array([cost]), np.array([loss]))

    def _options(self, row: Row) -> Options:
        """Measure a layer at a ladder of densities for each width of its levels.

        Between rungs the loss and the logarithm of the cost are taken as straight lines over the
        logarithm of the density.
        """
        assert row.set is not None
        found: dict[ConstraintSet, tuple[float, float]] = {}
        for target in [with_bits(row.set, width) for width in self.bits] or [row.set]:
            rungs = _ladder(row, target, RUNGS)
            measured = [self._alone(row, rung) for rung in rungs]
            found |= dict(zip(rungs, measured, strict=True))
            between = [each for each in _ladder(row, target, FINE) if each not in found]
            found |= dict(zip(between, _interpolated(row, between, rungs, measured), strict=True))
        cost, loss = np.array(list(found.values())).T
        return Options(tuple(found), cost, loss)

    def _finite(self, what: str) -> float:
        value = float(self.loss(self.measure.model))
        if not math.isfinite(value):
            raise NonFiniteError(f"loss: it is {value} for {what}.")
        return value


@torch.no_grad()
def _write(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def _ratio(before: Tensor, after: Tensor) -> float:
    """Return the norm of a weight over that of its projection, or 1 if nothing is left."""
    norm = float(after.norm())
    return float(before.norm()) / norm if norm else 1.0


def _ladder(row: Row, target: ConstraintSet, rungs: int) -> list[ConstraintSet]:
    """Return sets from all units to one, in equal ratios, each once."""
    shares = np.geomspace(1, least_share(row), rungs)
    return list(dict.fromkeys(at_share(row, target, float(share)) for share in shares))


def _interpolated(
    row: Row,
    wanted: Sequence[ConstraintSet],
    rungs: Sequence[ConstraintSet],
    measured: Sequence[tuple[float, float]],
) -> list[tuple[float, float]]:
    """Return cost and loss of sets between rungs."""
    at, known = ([-math.log(density(row, each)) for each in targets] for targets in (wanted, rungs))
    costs, losses = zip(*measured, strict=True)
    cost = np.exp(np.interp(at, known, np.log(np.maximum(costs, 1))))
    return list(zip(cost.tolist(), np.interp(at, known, losses).tolist(), strict=True))
