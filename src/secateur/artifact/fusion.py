"""Rewrites of an exported graph, so that runtimes find the patterns that they run in integers.

ONNX Runtime runs a layer in integers where dequantized input and weight go in, the bias is a
dequantized int32 in steps of both, and what comes out of a convolution is quantized, with nothing
but a ReLU between. Inputs must have the 256 levels of a byte: a Clip of fewer stands in the way.
The exporter writes biases as floats, leaves BatchNorms behind convolutions, since it cannot fold
into weights that are computed, and transposes between a weight and its product:

    DQ(levels, scale) -> Conv -> BatchNorm     becomes  DQ(levels, scale x s) -> Conv with a bias
    DQ(levels, scale) -> Transpose -> MatMul   becomes  DQ(levels transposed, scale) -> MatMul
    Conv, Gemm with a bias                     become   the same with DQ(int32, step x scale)
    Q -> DQ -> Q -> DQ, all of one grid        becomes  Q -> DQ
    Relu or Clip -> Q that clips as much       becomes  Q
    Q, DQ, Pad with zeros -> Conv              becomes  Q, DQ -> Conv that pads
    DQ(levels, scale) -> layer that reads floats   becomes  Mul(Cast(levels), scale) -> layer

The last four leave every bit of what is computed as it is. The last one is for what ONNX Runtime
would do otherwise: it makes floats of levels on every run, and takes a MatMul of them for one whose
inputs it may round to bytes. Casts and products of constants it computes once, on loading a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.artifact.integers import rounds_finely

Array = NDArray[Any]


def fuse(graph: Any) -> None:
    """Rewrite a graph of ``onnx_ir`` in place.

    What it computes changes by float rounding, and by that of biases if the network has others than
    integers hold (:func:`secateur.posttraining.round_biases`), where this is far below the noise of
    rounded inputs.
    """
    for node in list(graph):
        if node.op_type == "Conv":
            _fold_padding(graph, node)
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _drop_clipping(graph, node)
            _drop_rounding(graph, node)
    for node in list(graph):
        if node.op_type == "BatchNormalization":
            _fold_norm(graph, node)
        elif node.op_type == "Transpose":
            _fold_transpose(graph, node)
    for node in list(graph):
        if node.op_type in ("Conv", "Gemm") and len(node.inputs) == 3:
            _round_bias(graph, node)
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and _constant(node.inputs[0]) is not None:
            _scale_once(graph, node)


def _scale_once(graph: Any, weight: Any) -> None:
    """Compute a weight from its levels when a file is loaded, if no layer reads bytes beside it."""
    import onnx_ir as ir

    made = weight.outputs[0]
    users = [use.node for use in made.uses()]
    if made.shape is None or any(_reads_bytes(user) for user in users):
        return
    levels, scale = (_constant(each) for each in weight.inputs[:2])
    if levels.dtype != np.int8:
        return
    shape = [1] * levels.ndim
    if scale.size > 1:
        shape[_attribute(weight, "axis", 1)] = -1
    scales = _initializer(graph, f"{made.name}_scale", scale.reshape(shape))
    cast = ir.node("Cast", [weight.inputs[0]], {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [cast.outputs[0], scales])
    for node, name in ((cast, f"{made.name}_levels_as_floats"), (product, made.name)):
        node.outputs[0].name = name
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(levels.shape), made.dtype
        graph.insert_before(weight, node)
    old = weight.inputs[1:]
    _drop(graph, weight, product.outputs[0])
    for value in old:
        _forget(graph, value)


def _reads_bytes(node: Any) -> bool:
    """Say whether a layer reads what was quantized on its way."""
    return any(
        value is not None
        and (read := value.producer()) is not None
        and read.op_type == "DequantizeLinear"
        and _constant(read.inputs[0]) is None
        for value in node.inputs
    )


def _fold_padding(graph: Any, conv: Any) -> None:
    """Let a convolution pad with the zeros that are put around what it reads, before or after Q."""
    import onnx_ir as ir

    value = conv.inputs[0]
    while _alone(value) and value.producer().op_type in ("QuantizeLinear", "DequantizeLinear"):
        value = value.producer().inputs[0]
    pad = value.producer()
    auto = conv.attributes.get("auto_pad")
    if not _alone(value) or pad.op_type != "Pad" or (auto and auto.value != "NOTSET"):
        return
    amounts, filled = (_constant(each) for each in (*pad.inputs[1:3], None)[:2])
    mode = pad.attributes.get("mode")
    zeros = filled is None or not filled.any()
    if amounts is None or not zeros or (mode is not None and mode.value != "constant"):
        return
    before, after = amounts.reshape(2, -1).tolist()
    if len(pad.inputs) > 3 or any(before[:2] + after[:2]) or min(before + after) < 0:
        return
    pads = np.array(before[2:] + after[2:])
    if (own := conv.attributes.get("pads")) is not None:
        pads += own.value
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads.tolist())
    _drop(graph, pad, pad.inputs[0])


def _drop_clipping(graph: Any, rounding: Any) -> None:
    """Leave out what a grid clips anyway."""
    value, grid = rounding.inputs[0], _grid(rounding)
    if grid is None or not _alone(value) or value.producer().op_type not in ("Relu", "Clip"):
        return
    step, zero, least, most = grid
    clip = value.producer()
    low, high = (np.float32(-np.inf), np.float32(np.inf))
    if clip.op_type == "Relu":
        low = np.float32(0)
    elif len(clip.inputs) == 3 and None not in (ends := [_constant(e) for e in clip.inputs[1:]]):
        low, high = ends
    else:
        return
    if np.rint(low / step) + zero <= least and np.rint(high / step) + zero >= most:
        _drop(graph, clip, clip.inputs[0])


def _drop_rounding(graph: Any, rounding: Any) -> None:
    """Read what is on a grid already as it is."""
    before, made = rounding.inputs[0].producer(), rounding.outputs[0]
    after = made.uses()[0].node if _alone(made) else None
    if before is None or after is None or _grid(rounding) is None:
        return
    if before.op_type == after.op_type == "DequantizeLinear" and _grid(before) == _grid(rounding):
        _drop(graph, after, before.outputs[0])
        graph.remove(rounding, safe=True)


def _grid(node: Any) -> tuple[float, int, int, int] | None:
    """Return step, zero point, smallest and largest integer of what is rounded, if constant."""
    step, zero = (_constant(each) for each in (*node.inputs[1:3], None)[:2])
    if step is None or zero is None or step.size > 1:
        return None
    ends = np.iinfo(zero.dtype)
    return np.float32(step).item(), int(zero), int(ends.min), int(ends.max)


def _alone(value: Any) -> bool:
    """Say whether a node makes a value for one use."""
    made = value.producer() is not None and not value.is_graph_output()
    return made and len(value.uses()) == 1


def _fold_norm(graph: Any, norm: Any) -> None:
    """Fold a BatchNorm into scales and bias of the convolution before it, if they are constant."""
    conv = norm.inputs[0].producer()
    if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) > 1:
        return
    weight = _dequantized(conv.inputs[1])
    values = [_constant(each) for each in (*norm.inputs[1:5], *conv.inputs[2:3])]
    if weight is None or not _bytes_read(conv) or any(each is None for each in values):
        return
    gamma, beta, mean, variance, *bias = (np.asarray(each, np.float64) for each in values)
    factor = gamma / np.sqrt(variance + float(_attribute(norm, "epsilon", 1e-5)))
    if not factor.all():
        return
    levels, scale = (_constant(each) for each in weight.inputs[:2])
    if not rounds_finely(torch.from_numpy(levels.copy())):
        return
    signs = np.sign(factor).astype(np.int8).reshape(-1, *[1] * (levels.ndim - 1))
    name, shift = conv.outputs[0].name, beta + (sum(bias) - mean) * factor
    _replace(graph, weight, 0, f"{name}_levels", levels * signs)
    _rescale(graph, weight, (np.abs(factor) * scale).astype(np.float32))
    conv.resize_inputs(3)
    _replace(graph, conv, 2, f"{name}_bias", shift.astype(np.float32))
    _drop(graph, norm, conv.outputs[0])


def _fold_transpose(graph: Any, transpose: Any) -> None:
    """Store the levels of a matrix as its product reads them."""
    weight = _dequantized(transpose.inputs[0])
    if weight is not None and _constant(weight.inputs[0]).ndim == 2:
        _turn(graph, weight)
        _drop(graph, transpose, weight.outputs[0])


def _round_bias(graph: Any, node: Any) -> None:
    """Store the bias of a layer that reads quantized inputs as integers."""
    import onnx_ir as ir

    weight, read, bias = _dequantized(node.inputs[1]), _bytes_read(node), node.inputs[2]
    if weight is None or read is None:
        return
    step, values = _constant(read.inputs[1]), _constant(bias)
    levels, scale = (_constant(each) for each in weight.inputs[:2])
    if step is None or values is None or not rounds_finely(torch.from_numpy(levels.copy())):
        return
    values, step = values.astype(np.float64), np.float64(step)
    scale = np.broadcast_to(scale.astype(np.float64), values.shape)
    # a row of zeros has any scale: one that its bias is a multiple of
    dead = ~levels.reshape(len(levels), -1).any(1) & (values != 0)
    scale = np.where(dead, np.abs(values) / step / 2**20, scale).astype(np.float32)
    unit = step.astype(np.float32) * scale
    rounded = np.rint(values / unit)
    if np.abs(rounded).max(initial=0) >= 2**31 or not unit.all():
        return
    name = node.outputs[0].name
    _rescale(graph, weight, scale)
    integers = [_initializer(graph, f"{name}_bias_levels", rounded.astype(np.int32))]
    integers.append(_initializer(graph, f"{name}_bias_scale", unit))
    dequantized = ir.node("DequantizeLinear", integers, {"axis": 0})
    made = dequantized.outputs[0]
    made.name, made.shape, made.dtype = f"{name}_bias", bias.shape, bias.dtype
    graph.insert_before(node, dequantized)
    node.replace_input_with(2, made)
    _forget(graph, bias)


def _bytes_read(node: Any) -> Any:
    """Return what dequantizes the input of a layer, if its grid has all 256 levels of a byte."""
    read = node.inputs[0].producer()
    if read is None or read.op_type != "DequantizeLinear":
        return None
    made = read.inputs[0].producer()
    return read if made is not None and made.op_type == "QuantizeLinear" else None


def _dequantized(value: Any) -> Any:
    """Return the node that computes a weight from constant levels, for this use alone."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(value.uses()) > 1:
        return None
    return None if _constant(node.inputs[0]) is None else node


def _rescale(graph: Any, weight: Any, scale: Array) -> None:
    """Give each row of a weight a scale of its own, and a zero point, which must have their shape.

    ONNX Runtime multiplies integers in a Gemm only where the zero points are written out.
    """
    name = weight.outputs[0].name
    _replace(graph, weight, 1, f"{name}_scale", scale)
    weight.resize_inputs(3)
    _replace(graph, weight, 2, f"{name}_zeros", np.zeros(len(scale), np.int8))


def _turn(graph: Any, weight: Any) -> None:
    """Let the node of a matrix with a scale for each row compute its transpose."""
    import onnx_ir as ir

    levels = _constant(weight.inputs[0]).T
    _replace(graph, weight, 0, f"{weight.outputs[0].name}_levels", levels)
    weight.attributes["axis"] = ir.AttrInt64("axis", 1)
    weight.outputs[0].shape = ir.Shape(levels.shape)


def _replace(graph: Any, node: Any, place: int, name: str, array: Array) -> None:
    """Let a node read a new constant."""
    old = node.inputs[place]
    node.replace_input_with(place, _initializer(graph, name, array))
    _forget(graph, old)


def _initializer(graph: Any, name: str, array: Array) -> Any:
    """Add a constant to a graph."""
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape))
    value.dtype = tensor.dtype
    graph.initializers.pop(name, None)
    graph.register_initializer(value)
    return value


def _forget(graph: Any, value: Any) -> None:
    """Drop a constant that nothing reads any more."""
    if value is not None and not value.uses() and value.is_initializer():
        graph.initializers.pop(value.name, None)


def _drop(graph: Any, node: Any, instead: Any) -> None:
    """Remove a node; another value takes the place of what it returned."""
    node.outputs[0].replace_all_uses_with(instead, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _attribute(node: Any, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _constant(value: Any) -> Any:
    """Return the array that a value always is, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()
