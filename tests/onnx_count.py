"""What an ONNX file with integers costs, counted from the file alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")


def constants(model: Any) -> dict[str, np.ndarray]:
    found = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def bops_of(path: Path) -> int:
    """Count BOPs from an ONNX file alone: shapes, levels in use, and the ranges of its clips."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values, shapes = constants(model), {}
    for each in (*model.graph.value_info, *model.graph.output):
        shapes[each.name] = [d.dim_value for d in each.type.tensor_type.shape.dim]
    made_by = {output: node for node in model.graph.node for output in node.output}
    total = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        levels = values[made_by[node.input[1]].input[0]].astype(int)
        inputs = made_by[made_by[node.input[0]].input[0]]
        low, high = 0, 255
        if inputs.op_type == "Clip":
            low, high = (int(values[name]) for name in inputs.input[1:3])
        weight_bits = math.ceil(math.log2(2 * abs(levels).max() + 1))
        places = math.prod(shapes[node.output[0]][2:]) if node.op_type == "Conv" else 1
        total += levels.size * places * weight_bits * math.ceil(math.log2(high - low + 1))
    return total
