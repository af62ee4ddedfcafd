"""What ONNX Runtime makes of a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def optimized(path: Path) -> Counter[str]:
    """Return what ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path) + ".optimized"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
