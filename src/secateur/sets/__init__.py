"""Constraint sets: what a compressed weight tensor may look like.

A pattern says where zeros are (``Unstructured``), levels say which values there are (``Levels``),
and ``pattern & levels`` is both at once.
"""

from secateur.sets.base import SETS, ConstraintSet, Pattern
from secateur.sets.intersection import Intersection
from secateur.sets.levels import Levels
from secateur.sets.unstructured import Unstructured

__all__ = ["SETS", "ConstraintSet", "Intersection", "Levels", "Pattern", "Unstructured"]
