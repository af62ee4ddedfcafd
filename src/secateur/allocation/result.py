"""What was allocated to each layer and why, as a plan and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.allocation.budget import Budget
from secateur.allocation.targets import quotas, sharing, with_bits, with_keep
from secateur.errors import RecipeError
from secateur.plan import Plan, Row

_OTHER = (
    "allocation: it was made for other layers or other sets than those of this plan.\n"
    "Remedy: start a new run."
)


@dataclass(frozen=True)
class Share:
    """What one layer got, and why.

    Attributes:
        layer: its name.
        target: its set, in words.
        weights: it has.
        kept: of these are not zero when the weights are projected now.
        cost: in units of the budget.
        share: of the network's whole cost.
        energy: share of the squared norm of its weights that stays.
        loss: what the network's loss rises by with this layer alone projected, at its old norm;
            None by magnitude.
        price: loss that one more unit of cost would save; None by magnitude, or if none would.
    """

    layer: str
    target: str
    weights: int
    kept: int
    cost: float
    share: float
    energy: float
    loss: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Allocation:
    """A budget spent.

    Attributes:
        plan: what each layer becomes, ready for a method.
        budget: that was asked for.
        by: ``magnitude`` or ``sensitivity``.
        limit: the budget in units.
        cost: what the plan takes, measured on the weights as they are.
        dense: what the dense network takes.
        rest: what of the cost belongs to no planned layer, by what it is.
        layers: one entry per planned layer.
    """

    plan: Plan
    budget: Budget
    by: str
    limit: float
    cost: float
    dense: float
    rest: Mapping[str, float]
    layers: tuple[Share, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, which :func:`apply` and the report understand."""
        return {
            "budget": self.budget.to_dict(),
            "by": self.by,
            "limit": self.limit,
            "cost": self.cost,
            "dense": self.dense,
            "rest": dict(self.rest),
            "keep": self.plan.keep,
            "layers": [
                {**dataclasses.asdict(share), **_choice(row)}
                for share, row in zip(self.layers, self.plan.compressed, strict=True)
            ],
        }


def apply(plan: Plan, data: Mapping[str, Any]) -> Plan:
    """Return a plan with what an earlier allocation chose for its layers.

    Args:
        plan: as it was given to ``allocate``.
        data: of :meth:`Allocation.to_dict`.

    Raises:
        RecipeError: the layers of the plan, or what their sets keep, are others.
    """
    chosen = {entry["layer"]: entry for entry in data["layers"]}
    rows = tuple(_restored(row, chosen.get(row.layer)) for row in plan.rows)
    if {row.layer for row in plan.compressed} != set(chosen):
        raise RecipeError(_OTHER)
    return sharing(replace(plan, rows=rows), data["keep"])


def concrete(row: Row) -> Row:
    """Return a row that keeps what it says in numbers, and for itself."""
    if row.set is None:
        return row
    keep = [each.count(each.total(row.shape)) for each in quotas(row.set)]
    return replace(row, set=with_keep(row.set, keep), pooled=False)


def _choice(row: Row) -> dict[str, Any]:
    """Return what an allocation says of a row; no ``keep`` where a budget is shared."""
    assert row.set is not None
    _, levels = row.set.split()
    keep = None if row.pooled else [each.count(each.total(row.shape)) for each in quotas(row.set)]
    return {"keep": keep, "bits": levels.bits if levels else None}


def _restored(row: Row, entry: Mapping[str, Any] | None) -> Row:
    if row.set is None or entry is None:
        return row
    keep, bits = entry["keep"], entry["bits"]
    target = with_bits(row.set, bits) if bits else row.set
    if keep is None and row.pooled:
        return replace(row, set=target)
    if keep is None or len(keep) != len(quotas(target)):
        raise RecipeError(_OTHER)
    return replace(row, set=with_keep(target, keep), pooled=False)
