"""Whether integers on this machine compute what they should: an ONNX file against itself in floats.

x86 without VNNI adds pairs of products in 16 bits that saturate. No error tells of it; outputs are
just wrong. Without optimizations ONNX Runtime runs the very same file step by step in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.artifact.onnx import OnnxModel


@dataclass(frozen=True)
class Saturation:
    """What integer arithmetic adds to the error of an ONNX file, as shares of output norms.

    Attributes:
        error: of the file as it runs, against the same file in floats. Ordinary rounding, which
            ends beside another level now and then, leaves it near the noise or below.
        noise: of the file in floats, against the network before it was quantized; None if that was
            not given.
    """

    error: float
    noise: float | None


def saturation(path: Path, inputs: Tensor, reference: Tensor | None = None) -> Saturation:
    """Measure what integer arithmetic adds to the error of an ONNX file on this machine.

    Args:
        path: an ONNX file with one input and one output.
        inputs: a batch.
        reference: what the network returned for it before it was quantized.

    Raises:
        MissingDependencyError: the extra ``onnx`` is not installed.
        ArtifactError: the file is missing, or ONNX Runtime refuses it.
    """
    integers, floats = OnnxModel(path)(inputs), OnnxModel(path, optimized=False)(inputs)
    noise = None if reference is None else _distance(floats, reference.detach().cpu())
    return Saturation(_distance(integers, floats), noise)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference as a share of that of what is expected."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
