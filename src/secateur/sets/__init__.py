"""Constraint sets: what a compressed weight tensor may look like.

Patterns say where zeros are (``Unstructured``; ``Filter``, ``Channel``, ``Column``, ``Kernel`` and
``Block`` in groups; ``NM`` and ``Transposable`` n of each m), levels say which values there are
(``Levels``), and ``pattern & levels``, or ``pattern & pattern & levels``, is all of it at once.
"""

from secateur.sets.base import SETS, ConstraintSet, Pattern
from secateur.sets.counted import Counted, Quota
from secateur.sets.intersection import Intersection, join
from secateur.sets.levels import Levels
from secateur.sets.nm import NM
from secateur.sets.structured import Block, Channel, Column, Filter, Grouped, Kernel
from secateur.sets.transposable import Transposable
from secateur.sets.unstructured import Unstructured

__all__ = [
    "NM",
    "SETS",
    "Block",
    "Channel",
    "Column",
    "ConstraintSet",
    "Counted",
    "Filter",
    "Grouped",
    "Intersection",
    "Kernel",
    "Levels",
    "Pattern",
    "Quota",
    "Transposable",
    "Unstructured",
    "join",
]
