"""Automatic rates: a budget for the whole network, distributed over its layers.

ADMM-NN-S sets the rate of every layer by hand. Here one figure is given, and each layer's share
follows from its weights (``magnitude``) or from what the loss says (``sensitivity``).
"""

from secateur.allocation.budget import Budget, parse_budgets
from secateur.allocation.distribute import WAYS, allocate
from secateur.allocation.measure import MEASURES
from secateur.allocation.result import Allocation, Share, apply

__all__ = [
    "MEASURES",
    "WAYS",
    "Allocation",
    "Budget",
    "Share",
    "allocate",
    "apply",
    "parse_budgets",
]
