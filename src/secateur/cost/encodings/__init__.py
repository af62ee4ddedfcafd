"""Encodings that platforms use for a weight tensor, by name; a new one is one class."""

from secateur.cost.encodings.base import ENCODINGS, Encoding, Indexed, register
from secateur.cost.encodings.direct import Bitmap, Csr, Dense
from secateur.cost.encodings.gaps import RelativeEscape, RelativeFiller, Rice
from secateur.cost.encodings.groups import NM, NMPositions, Structured
from secateur.cost.encodings.packed import Packed

__all__ = [
    "ENCODINGS",
    "NM",
    "Bitmap",
    "Csr",
    "Dense",
    "Encoding",
    "Indexed",
    "NMPositions",
    "Packed",
    "RelativeEscape",
    "RelativeFiller",
    "Rice",
    "Structured",
    "register",
]
