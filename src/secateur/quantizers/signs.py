"""Which activations are never negative, so that their grids need no sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.channels import operators as ops
from secateur.channels.trace import export

aten = torch.ops.aten

POSITIVE = frozenset(
    {aten.relu, aten.relu_, aten.sigmoid, aten.sigmoid_, aten.hardsigmoid, aten.hardsigmoid_}
    | {aten.abs, aten.exp, aten.square, aten.softmax}
)
"""Operators that return nothing below zero, whatever they are given."""

BOUNDED = {aten.hardtanh: "min_val", aten.hardtanh_: "min_val", aten.clamp: "min"}
"""Operators with an argument that nothing they return is below."""

KEEPING = (
    ops.MOVES
    | set(ops.POOLS)
    | ops.REDUCTIONS
    | ops.PRODUCTS
    | {aten.add, aten.add_, aten.cat, aten.maximum, aten.minimum}
)
"""Operators that return nothing below zero where nothing that they take is."""


def unsigned_inputs(model: nn.Module, example_input: Tensor) -> set[str]:
    """Return the layers, by module name, that never read a value below zero.

    Args:
        model: traced in evaluation mode and left as it is.
        example_input: one batch; it may hold anything, the model's input counts as signed.

    Raises:
        ChannelError: the model cannot be traced.
    """
    with torch.no_grad():
        program = export(model, example_input)
    names = program.graph_signature.inputs_to_parameters
    positive: set[fx.Node] = set()
    found: dict[str, bool] = {}
    for node in program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in ops.LAYERS:
            weight = names.get(node.args[1].name, "")
            layer = weight.removesuffix("weight").removesuffix(".")
            found[layer] = found.get(layer, True) and node.args[0] in positive
        elif node.op == "call_function" and _is_positive(node, packet, positive):
            positive.add(node)
        elif packet is not None and node.target._schema.is_mutable:
            positive.discard(node.args[0])
    return {layer for layer, unsigned in found.items() if unsigned}


def _is_positive(node: fx.Node, packet: Any, positive: set[fx.Node]) -> bool:
    if packet in POSITIVE:
        return True
    if packet in BOUNDED:
        least = ops.named_arguments(node.target, node.args, node.kwargs)[BOUNDED[packet]]
        return isinstance(least, int | float) and least >= 0
    if packet is None or packet in KEEPING:  # taking one of several outputs keeps them, too
        return all(given in positive for given in node.all_input_nodes) and _adds_none(node)
    if packet is aten.pad:
        value = ops.border_of(node.target, ops.named_arguments(node.target, node.args, node.kwargs))
        return node.args[0] in positive and (value is None or value >= 0)
    return False


def _adds_none(node: fx.Node) -> bool:
    """Tell whether no number among the arguments is below zero; sizes may be -1."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in ops.PRODUCTS or packet in (aten.add, aten.add_):
        given = (*node.args, *node.kwargs.values())
        return all(each >= 0 for each in given if isinstance(each, int | float))
    return True
