"""How the penalty weight rho of ADMM moves from one update to the next."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["grow", "constant", "ladder", "balanced"]

RUNGS = 4
"""Rungs of the ladder: full ADMM runs from the weights of the one before, Z and U afresh."""

BALANCE = 0.1
BALANCED_FACTOR = 1.2


def growth_factor(schedule: Schedule, first: float, last: float, updates: int) -> float:
    """Return the factor per update; it takes rho from ``first`` to ``last`` in ``updates``.

    Where the number of updates is unknown (0), it is 1.3, as in the authors' released code.
    """
    if schedule != "grow":
        return 1.0
    return (last / first) ** (1 / (updates - 1)) if updates > 1 else 1.3


def first_rho(schedule: Schedule, first: float, last: float, rung: int) -> float:
    """Return where a phase starts: rungs of the ladder rise geometrically to ``last``."""
    return first * (last / first) ** (rung / (RUNGS - 1)) if schedule == "ladder" else first


def next_rho(
    schedule: Schedule, rho: float, growth: float, last: float, primal: float, dual: float
) -> float:
    """Return the rho of the next update.

    ``balanced`` follows the residuals (Boyd et al., section 3.4.1, with the factors of the
    authors' released code): up while ||W - Z||^2 is not small against the move of Z, else down.

    Args:
        schedule: its name.
        rho: the present value.
        growth: factor of ``grow``.
        last: largest value.
        primal: ||W - Z||.
        dual: ||Z - Z_old||.
    """
    if schedule == "balanced":
        small = primal**2 < BALANCE * dual**2
        return min(rho / BALANCED_FACTOR if small else rho * BALANCED_FACTOR, last)
    return min(rho * growth, max(last, rho))
