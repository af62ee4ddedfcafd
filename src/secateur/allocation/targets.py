"""What an allocation may choose of a layer's set: how much its patterns keep, and its bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from secateur.plan import Plan, Row
from secateur.sets import ConstraintSet, Quota, Unstructured, join


def quotas(target: ConstraintSet) -> list[Quota]:
    """Return the patterns of a set that keep a number of something."""
    return [each for each in target.split()[0] if isinstance(each, Quota)]


def with_keep(target: ConstraintSet, keep: Sequence[int]) -> ConstraintSet:
    """Return the set with other numbers of units for its :func:`quotas`."""
    patterns, levels = target.split()
    numbers = iter(keep)
    kept = [each.keeping(next(numbers)) if isinstance(each, Quota) else each for each in patterns]
    return join(kept, levels)


def with_bits(target: ConstraintSet, bits: int) -> ConstraintSet:
    """Return the set with levels of another width; one without levels stays as it is.

    Raises:
        SecateurError: its levels cannot have this width.
    """
    patterns, levels = target.split()
    return join(patterns, replace(levels, bits=bits)) if levels else target


def sharing(plan: Plan, keep: int) -> Plan:
    """Return the plan whose pooled rows keep a number of weights together."""
    total = sum(row.weights for row in plan.rows if row.pooled)

    def told(row: Row) -> Row:
        if not row.pooled or row.set is None:
            return row
        _, levels = row.set.split()
        return replace(row, set=join((Unstructured(density=min(1.0, keep / total)),), levels))

    return replace(plan, rows=tuple(told(row) for row in plan.rows), keep=keep)


def at_share(row: Row, target: ConstraintSet, share: float) -> ConstraintSet:
    """Return a row's set if each of its patterns keeps a share of its units, at least one."""
    totals = (each.total(row.shape) for each in quotas(target))
    return with_keep(target, [max(1, round(share * total)) for total in totals])


def density(row: Row, target: ConstraintSet) -> float:
    """Return the share of the weights that the patterns of a row's set leave, if independent."""
    totals = [(each, each.total(row.shape)) for each in quotas(target)]
    return math.prod(each.count(total) / total for each, total in totals)


def least_share(row: Row) -> float:
    """Return the share at which each pattern of a row's set keeps one unit only."""
    assert row.set is not None
    return 1 / max((each.total(row.shape) for each in quotas(row.set)), default=1)
