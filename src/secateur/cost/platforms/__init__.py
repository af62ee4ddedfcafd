"""Models of machines that are not here: what a network would take there, and what pruning pays."""

from secateur.cost.platforms.assess import Assessment, assess, narrowed
from secateur.cost.platforms.model import Platform, load_platform
from secateur.cost.platforms.roofline import Comparison, LayerTime, Timing, compare, timing
from secateur.cost.platforms.verdict import Verdict, break_even, first_paying, verdict
from secateur.cost.shipped import shipped

__all__ = [
    "Assessment",
    "Comparison",
    "LayerTime",
    "Platform",
    "Timing",
    "Verdict",
    "assess",
    "break_even",
    "compare",
    "first_paying",
    "load_platform",
    "narrowed",
    "platform_names",
    "timing",
    "verdict",
]


def platform_names() -> list[str]:
    """Return the names of the platforms that come with the package."""
    return shipped("platforms")
