"""What a method that chooses bits itself has made of the layers of its plan, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from secateur.plan import Plan, Row
from secateur.sets import Levels, join
from secateur.sets.channel_levels import ChannelLevels


class Outcome(TypedDict):
    """What training has chosen.

    Attributes:
        layers: by name ``{"bits": 3, "by_channel": False}``, the levels of its weight, or
            ``{"dense": why}``; layers that are as planned are left out.
        spent: by kind of budget, the share that the network takes.
    """

    layers: Mapping[str, Mapping[str, Any]]
    spent: Mapping[str, float]


def finished(plan: Plan, outcome: Outcome) -> Plan:
    """Return a plan whose rows have the sets that their weights ended in; others are unchanged."""

    def ended(row: Row) -> Row:
        found = outcome["layers"].get(row.layer)
        if found is None or row.set is None:
            return row
        if "dense" in found:
            return replace(row, set=None, note=found["dense"])
        patterns, asked = row.set.split()
        if patterns:  # beside them levels have one scale, and are those that were asked for
            return replace(row, set=join(patterns, asked and replace(asked, bits=found["bits"])))
        levels = ChannelLevels if found["by_channel"] else Levels
        spacing = asked.spacing if asked else "uniform"
        return replace(row, set=levels(found["bits"], zero=True, spacing=spacing))

    return replace(plan, rows=tuple(ended(row) for row in plan.rows))
