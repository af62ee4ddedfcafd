"""What can be budgeted, and in which units it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ONE: Mapping[str, float] = {"": 1}
BYTES = {
    **{"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
}
OPERATIONS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
JOULES = {"": 1, "J": 1, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9}


@dataclass(frozen=True)
class Unit:
    """A unit of cost.

    Attributes:
        name: in the plural.
        suffixes: what may follow a number, and how many units it stands for.
    """

    name: str
    suffixes: Mapping[str, float] = field(default_factory=lambda: ONE)


KINDS = {
    "weights": Unit("weights"),
    "bits": Unit("bits"),
    "file": Unit("bytes", BYTES),
    "macs": Unit("MACs", OPERATIONS),
    "bops": Unit("BOPs", OPERATIONS),
    "energy": Unit("joules", JOULES),
}
"""By the name that a budget uses."""
