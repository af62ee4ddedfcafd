"""Which ATen operators belong to which kind of step; what is in no table is unknown."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

LAYERS = frozenset({aten.conv1d, aten.conv2d, aten.conv3d, aten.linear})

POINTWISE = frozenset({aten.hardswish, aten.hardswish_})
"""Elementwise operators that torch does not tag as such."""

PRODUCTS = frozenset({aten.mul, aten.mul_})
"""Operators for which a zero on one side is a zero."""

ROUNDINGS = frozenset({aten.round, aten.round_, aten.floor, aten.floor_, aten.ceil, aten.ceil_})
"""Operators in which the last digit of a sum may become a whole step."""

IDENTITIES = frozenset(
    {
        aten.alias,
        aten.clone,
        aten.contiguous,
        aten.detach,
        aten.dropout,
        aten.dropout_,
        aten.feature_dropout,
        aten.feature_dropout_,
    }
)
VIEWS = frozenset({aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten})
"""Operators whose arguments are sizes: of what they return, several dimensions may be channels."""

REORDERINGS = frozenset(
    {aten.permute, aten.transpose, aten.t, aten.movedim, aten.squeeze, aten.unsqueeze, aten.expand}
)
DIVISIONS = frozenset({aten.chunk, aten.split, aten.split_with_sizes})
SELECTIONS = frozenset({aten.slice, aten.select, aten.unbind, aten.roll, aten.flip})
MOVES = IDENTITIES | VIEWS | REORDERINGS | DIVISIONS | SELECTIONS

POOLS = {
    aten.max_pool1d: 1,
    aten.max_pool2d: 2,
    aten.max_pool3d: 3,
    aten.avg_pool1d: 1,
    aten.avg_pool2d: 2,
    aten.avg_pool3d: 3,
    aten.adaptive_avg_pool1d: 1,
    aten.adaptive_avg_pool2d: 2,
    aten.adaptive_avg_pool3d: 3,
    aten.upsample_nearest1d: 1,
    aten.upsample_nearest2d: 2,
    aten.upsample_nearest3d: 3,
    aten.upsample_bilinear2d: 2,
}
"""Operators over the last dimensions, by how many; each output is a mean or one of its inputs."""

AVERAGES = frozenset({aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d})
REDUCTIONS = frozenset({aten.mean, aten.amax, aten.amin})

MIXES = frozenset({aten.scaled_dot_product_attention, aten.matmul})
"""Operators that mix tokens by head."""

NORMALIZATIONS = frozenset({aten.layer_norm, aten.group_norm, aten.rms_norm})
"""Operators whose every output depends on several channels, but which keep channels apart."""


def is_pointwise(function: Any) -> bool:
    """Tell whether an operator computes every element from the ones at the same place."""
    if function.overloadpacket in POINTWISE:
        return True
    tags = function.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def border_of(function: Any, arguments: dict[str, Any]) -> float | None:
    """Return the only constant that pooling or padding keeps; None if it keeps any."""
    packet = function.overloadpacket
    if packet is aten.pad:
        return float(arguments["value"] or 0) if arguments["mode"] == "constant" else None
    if packet in AVERAGES:
        padding = arguments["padding"]
        padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
        if (padded and arguments["count_include_pad"]) or arguments.get("divisor_override"):
            return 0.0
    return None


def named_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments by the names in the operator's schema, defaults included."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(function._schema.arguments):
        if position < len(args):
            found[argument.name] = args[position]
        else:
            default = argument.default_value if argument.has_default_value() else None
            found[argument.name] = kwargs.get(argument.name, default)
    return found
