"""Budgets: what a compressed network may cost in all."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.allocation.units import KINDS, Unit
from secateur.errors import RecipeError, did_you_mean

_AMOUNT = re.compile(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")
_EXAMPLES = "{weights: 348x}, {bops: 40x} or {file: 1.5kB}"


@dataclass(frozen=True)
class Budget:
    """The most that a network may cost, as an amount or as a ratio to the dense network.

    Attributes:
        kind: what is counted, a name in ``KINDS``.
        number: units of the kind, or the ratio.
        ratio: whether ``number`` is a ratio: the dense cost is divided by it.
    """

    kind: str
    number: float
    ratio: bool = False

    @classmethod
    def parse(cls, raw: Any) -> Budget:
        """Read a budget as a recipe states it: ``{"weights": "348x"}``, ``{"file": "1.5kB"}``.

        Args:
            raw: one kind with a number of its units, with or without a suffix such as ``kB``
                (1000 bytes) or ``KiB`` (1024), or with a ratio that ends in ``x``.

        Raises:
            RecipeError: it is not that; the message begins with ``budget``.
        """
        if not isinstance(raw, Mapping) or len(raw) != 1:
            raise RecipeError(f"budget: {raw!r} is not a map of one kind, such as {_EXAMPLES}.")
        kind, value = next(iter(raw.items()))
        if kind not in KINDS:
            raise RecipeError(
                f"budget: there is no kind {kind!r}.{did_you_mean(str(kind), KINDS)}\n"
                f"Kinds are {', '.join(KINDS)}, as in {_EXAMPLES}."
            )
        number, ratio = _read(kind, value)
        if ratio and number < 1:
            raise RecipeError(
                f"budget.{kind}: {value!r} is more than the dense network takes.\n"
                "Remedy: give how many times less it shall be, for example 20x."
            )
        return cls(kind, number, ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return what :meth:`parse` reads."""
        number = int(self.number) if self.number.is_integer() else self.number
        return {self.kind: f"{number}x" if self.ratio else number}

    def limit(self, dense: float) -> float:
        """Return the budget in units, given what the dense network takes."""
        return dense / self.number if self.ratio else self.number


def parse_budgets(raw: Any, kinds: Collection[str]) -> tuple[Budget, ...]:
    """Read one or several budgets, ``{"bops": "40x", "file": "20kB"}``.

    Args:
        raw: as :meth:`Budget.parse` reads it, but with any number of kinds.
        kinds: those that can be met together.

    Raises:
        RecipeError: it is not that; the message begins with ``budget``.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise RecipeError(f"budget: {raw!r} is not a map from kinds to amounts: {_EXAMPLES}.")
    budgets = tuple(Budget.parse({kind: value}) for kind, value in raw.items())
    for each in budgets:
        if each.kind not in kinds:
            raise RecipeError(
                f"budget.{each.kind}: this method cannot meet one of this kind.\n"
                f"Remedy: one or several of {', '.join(kinds)}."
            )
    return budgets


def _read(kind: str, value: Any) -> tuple[float, bool]:
    """Return the number of a value, its suffix applied, and whether it is a ratio."""
    unit: Unit = KINDS[kind]
    match = None if isinstance(value, bool) else _AMOUNT.fullmatch(str(value))
    number = float(match[1]) if match else 0.0
    if match is None or not 0 < number < math.inf:
        raise RecipeError(
            f"budget.{kind}: {value!r} is not a positive number of {unit.name} or a "
            f"ratio.\nRemedy: write it as in {_EXAMPLES}."
        )
    suffix = match[2]
    if suffix == "x":
        return number, True
    if suffix not in unit.suffixes:
        raise RecipeError(
            f"budget.{kind}: {value!r} has the unknown suffix '{suffix}'.\n"
            f"Remedy: give one of {', '.join(['x', *filter(None, unit.suffixes)])}."
        )
    return number * unit.suffixes[suffix], False
