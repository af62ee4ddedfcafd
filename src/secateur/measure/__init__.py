"""What this machine does: layers of a model timed in every form in which they could run."""

from secateur.measure.forms import FORMS, Form
from secateur.measure.result import BreakEven, Layer, Point
from secateur.measure.run import DENSITIES, breakeven

__all__ = ["DENSITIES", "FORMS", "BreakEven", "Form", "Layer", "Point", "breakeven"]
