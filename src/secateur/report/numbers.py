"""How reports write numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Write ``1814073344`` as ``1.81 G``; up to 9999 in full."""
    if abs(number) < 10_000:
        return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"
    step, prefix = next(pair for pair in _STEPS if abs(number) >= pair[0])
    return f"{significant(number / step)} {prefix}"


def size(number: float) -> str:
    """Write bytes in decimal units: ``46.8 MB``, ``812 B``."""
    if number < 1000:
        return f"{number:,.0f} B"
    step, prefix = next(pair for pair in _STEPS if number >= pair[0])
    return f"{significant(number / step)} {prefix}B"


def small(number: float, unit: str) -> str:
    """Write a small quantity with its prefix: ``6.30 mJ``, ``131 µs``."""
    steps = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))
    step, prefix = next((pair for pair in steps if abs(number) >= pair[0]), steps[-1])
    return f"{significant(number / step)} {prefix}{unit}" if number else f"0 {unit}"


def times(ratio: float | None) -> str:
    """Write a ratio: ``212x``, ``3.75x``; a missing one as a dash."""
    return "–" if ratio is None else f"{significant(ratio)}x"


def ratio(number: float) -> str:
    """Write a ratio on an axis, as short as it goes: ``0.1x``, ``10x``, ``75.9x``, ``1,000x``."""
    return f"{float(f'{number:.3g}'):,g}x"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Write a fraction of 1 as ``98.92 %``; a missing one as a dash."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(change: float) -> str:
    """Write a difference of two fractions in percentage points: ``−0.31``."""
    text = f"{100 * change:+.2f}"
    return "±0.00" if float(text) == 0 else text.replace("-", "−")


def plain(number: float) -> str:
    """Write a number as short as it goes to three digits: ``0.2``, ``1e-05``."""
    return f"{number:.3g}"


def bits(number: float) -> str:
    """Write bits per weight: ``4``, ``3.5``."""
    return f"{number:g}"


def layer_bits(layer: Mapping[str, Any]) -> str:
    """Write the bits of a layer's weights, and behind a stroke those of what it reads: ``4/8``."""
    inputs = layer.get("activation_bits", 32)
    return bits(layer["bits"]) + (f"/{bits(inputs)}" if inputs < 32 else "")


def scientific(number: float | None) -> str:
    """Write a small difference: ``0``, ``3.1e-07``; a missing one as a dash."""
    if number is None:
        return "–"
    return "0" if number == 0 else f"{number:.1e}"


def saturation(found: Mapping[str, float]) -> str:
    """Say what integer arithmetic does to outputs, beside what quantization itself does."""
    return (
        f"in integers the ONNX file's outputs are off by {percent(found['error'])} of themselves; "
        f"quantizing as such moves them by {percent(found['noise'])}"
    )


def duration(seconds: float) -> str:
    """Write seconds as ``42 s``, ``2 min 05 s`` or ``1 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shape(sizes: list[int] | tuple[int, ...]) -> str:
    """Write ``[20, 1, 5, 5]`` as ``20x1x5x5``."""
    return "x".join(str(value) for value in sizes)


def shapes(layer: Mapping[str, Any]) -> str:
    """Write a report's layer as ``500x800``, or ``500x800 -> 63x416`` if it was cut."""
    pair = (shape(layer["shape"]), shape(layer["compressed_shape"]))
    return " -> ".join(dict.fromkeys(pair))


def significant(number: float) -> str:
    """Write three significant digits without an exponent: ``0.0123``, ``4.29``, ``1,234``."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"
