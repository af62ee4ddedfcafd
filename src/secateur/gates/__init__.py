"""Gates: trained multipliers of channel groups that close where a channel is not worth its cost."""

from __future__ import annotations

from secateur.gates.attach import PORT, Gated, attach_gates, fold_gates
from secateur.gates.gate import Gate, Port
from secateur.gates.hard_concrete import HardConcreteGate
from secateur.gates.vib import VIBGate

__all__ = [
    "PORT",
    "Gate",
    "Gated",
    "HardConcreteGate",
    "Port",
    "VIBGate",
    "attach_gates",
    "fold_gates",
]
