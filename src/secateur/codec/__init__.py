"""Bit streams: one tensor as the shortest record that docs/format.md offers, and back."""

from secateur.codec.record import Storage, decode, describe, encode, format_of, levels, storage
from secateur.codec.values import Quantized

__all__ = [
    "Quantized",
    "Storage",
    "decode",
    "describe",
    "encode",
    "format_of",
    "levels",
    "storage",
]
