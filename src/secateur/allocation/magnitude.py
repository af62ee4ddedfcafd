"""One threshold for all layers: what is below it goes.

Single weights are compared as they are. The distance to a projected network falls by the energy w^2
of each weight that stays, so the largest of all layers give the nearest network of a given size:
the global top-k, which training goes on to project onto.

Groups are compared by their energy per weight, in multiples of the mean of their layer. The groups
of a layer average over many weights and differ little, while layers differ by their widths (an
initialization divides by it), so that one threshold on plain energies takes all groups of one layer
and none of another. Where a plan weighs filters by their BatchNorm, the energy is that of the
rescaled filter. For N:M the units of a layer are the largest weights of all groups of m, the second
largest, and so on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from secateur.allocation.candidates import Candidates
from secateur.allocation.measure import Measure
from secateur.allocation.targets import quotas, sharing, with_keep
from secateur.plan import Plan, Row
from secateur.sets import ConstraintSet, Unstructured
from secateur.sets.base import energy, top_k


class Threshold(Candidates):
    """Plans that keep the units (weights or groups) of largest gain per weight over all layers.

    Args:
        plan: whose patterns are to be told how much to keep.
        measure: holds the model and its weights.
        fixed: layers that keep what the plan says.
    """

    def __init__(self, plan: Plan, measure: Measure, fixed: Collection[str]) -> None:
        metrics = plan.metrics(measure.model)
        self.base = plan
        self.rows = [
            row for row in plan.compressed if row.set and quotas(row.set) and row.layer not in fixed
        ]
        self.gains = {
            row.layer: _gain(row, energy(measure.weights[row.parameter], metrics.get(row.layer)))
            for row in self.rows
        }
        self.means = [_means(row, self.gains[row.layer]) for row in self.rows]
        self.count = sum(len(means) for means in self.means)

    def plan(self, position: int) -> Plan:
        """Return the plan that keeps ``position + 1`` units, and at least one in each layer.

        Layers that share a budget go on doing so, with at least as many weights as there are
        layers; further patterns keep what is above the same threshold.
        """
        means = torch.cat(self.means)
        marks = top_k(means, position + 1)
        threshold = float(means[marks].min())
        parts = torch.split(marks, [len(each) for each in self.means])
        counts = {row.layer: int(part.sum()) for row, part in zip(self.rows, parts, strict=True)}
        pooled = [counts[row.layer] for row in self.rows if row.pooled]
        sets = {
            row.layer: self._set(row, max(1, counts[row.layer]), threshold)
            for row in self.rows
            if not row.pooled
        }
        rows = tuple(replace(row, set=sets.get(row.layer, row.set)) for row in self.base.rows)
        return sharing(replace(self.base, rows=rows), max(sum(pooled), len(pooled)))

    def why(self, row: Row) -> tuple[None, None]:
        """Return nothing: no loss was measured."""
        return None, None

    def _set(self, row: Row, keep: int, threshold: float) -> ConstraintSet:
        """Return the row's set whose first pattern keeps a number of units."""
        assert row.set is not None
        first, *others = quotas(row.set)
        gain = self.gains[row.layer]
        support = first.keeping(keep).support(gain)
        numbers = [keep]
        for pattern in others:
            sums, sizes = pattern.sums(gain * support), pattern.sums(support.double())
            numbers.append(max(1, int(((sizes > 0) & (sums >= threshold * sizes)).sum())))
            support &= pattern.keeping(numbers[-1]).support(gain * support)
        return with_keep(row.set, numbers)


def _gain(row: Row, energy: Tensor) -> Tensor:
    """Return what an element counts for: its energy, but relative to its layer's mean if units
    are not single weights."""
    assert row.set is not None
    mean = energy.mean()
    single = isinstance(quotas(row.set)[0], Unstructured)
    return energy if single or not mean else energy / mean


def _means(row: Row, gain: Tensor) -> Tensor:
    """Return the gain per weight of each unit of the row's first pattern."""
    assert row.set is not None
    first = quotas(row.set)[0]
    return first.sums(gain) / first.sums(torch.ones_like(gain))
