"""What this machine does: layers timed in every form in which they could run, and whole networks
in the runtimes that are here."""

from secateur.measure.forms import FORMS, Form
from secateur.measure.networks import Agreement, Bench, Figure, Spread, bench
from secateur.measure.result import BreakEven, Layer, Point
from secateur.measure.run import DENSITIES, breakeven
from secateur.measure.runtimes import RUNTIMES, Runtime

__all__ = [
    "DENSITIES",
    "FORMS",
    "RUNTIMES",
    "Agreement",
    "Bench",
    "BreakEven",
    "Figure",
    "Form",
    "Layer",
    "Point",
    "Runtime",
    "Spread",
    "bench",
    "breakeven",
]
