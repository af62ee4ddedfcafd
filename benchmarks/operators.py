"""What ONNX Runtime makes of a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime


def operators(path: Path, optimized: Path) -> dict[str, int]:
    """Count the operators that run, and write the graph of them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(sorted(Counter(node.op_type for node in onnx.load(optimized).graph.node).items()))
