"""Tracing of the operators that own parameters with channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from secateur.channels import operators as ops
from secateur.channels.layer import Layer
from secateur.channels.steps import Norm, Slope, Step
from secateur.channels.surgery import CONVOLUTIONS, NORMS
from secateur.channels.ties import Ties
from secateur.channels.trace import Tracer, title


def layer(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """A convolution or linear layer: reads channels one by one and makes new ones."""
    weight, bias = call["weight"], call["bias"]
    if weight not in tracer.tensors or not (bias is None or bias in tracer.tensors):
        return False
    shape, ndim = tuple(weight.meta["val"].shape), node.meta["val"].ndim
    groups = call.get("groups", 1)
    dim = ndim - 1 if len(shape) == 2 else ndim - len(shape) + 1
    width = shape[1] * groups
    activation = tracer.activations[tracer.place(call["input"])]
    given = activation.vector(dim, width)
    if given is None:
        tracer.ties.pin(activation.labels, f"{title(node)} reads single positions")
    made = tracer.ties.fresh((shape[0],))
    owner = tracer.parameter(weight)
    homes = [name for name, _ in tracer.modules(weight, (nn.Linear, *CONVOLUTIONS))]
    for name, labels in (("in", given), ("out", made)):
        if labels is None:
            continue
        tracer.side(owner, name, labels)
        if not homes:
            tracer.ties.pin(labels, f"{title(node)} has a weight of no layer of its own")
        for home in homes:
            tracer.sides[home, name] = labels
    _tie_groups(tracer.ties, given, made, groups)
    step = Layer(
        node.name,
        (tracer.place(call["input"]),),
        tuple(shape[0] if d == dim else 1 for d in range(ndim)),
        module=homes[0] if homes else "",
        weight=tracer.tensors[weight],
        bias=tracer.tensors[bias] if bias is not None else None,
        width=width,
        groups=groups,
        padded=len(shape) > 2 and _padded(call["padding"], shape),
        given=given,
        made=made,
    )
    tracer.add(node, step, made.view(step.profile))
    return True


def _padded(padding: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether a convolution pads with zeros; ``same`` does unless its kernels are 1 wide."""
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in shape[2:])
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def _tie_groups(ties: Ties, given: Tensor | None, made: Tensor, groups: int) -> None:
    """Tie what must go together so that all groups of a convolution stay of one size.

    A depthwise channel lives with its outputs; otherwise the j-th channels of all groups do.
    """
    if groups == 1:
        return
    rows = made.view(groups, -1)
    if given is None:
        ties.pin(made, "its grouped convolution reads channels that cannot be told apart")
    elif len(given) == groups:
        ties.tie(given.view(groups, 1), rows)
    else:
        ties.tie(given.view(groups, -1)[:1], given.view(groups, -1))
        ties.tie(rows[:1], rows)


def norm(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """Batch normalization with running statistics: one scale and shift for each channel."""
    mean, place = call["running_mean"], tracer.place(call["input"])
    homes = tracer.modules(mean, NORMS)
    if len(homes) != 1 or call["training"]:
        return False
    activation = tracer.activations[place]
    labels = activation.vector(1, mean.meta["val"].shape[0])
    if labels is None:
        return False
    tracer.side(homes[0][1], "out", labels)
    tracer.sides[homes[0][0], "out"] = labels
    step = Norm(
        node.name,
        (place,),
        activation.profile,
        weight=tracer.tensors.get(call["weight"]),
        bias=tracer.tensors.get(call["bias"]),
        mean=tracer.tensors[mean],
        variance=tracer.tensors[call["running_var"]],
        epsilon=call["eps"],
    )
    tracer.add(node, step, activation.labels)
    return True


def slope(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """PReLU: one slope for all channels, or one for each."""
    weight, place = call["weight"], tracer.place(call["self"])
    homes = tracer.modules(weight, (nn.PReLU,))
    if len(homes) != 1:
        return False
    activation = tracer.activations[place]
    size = weight.meta["val"].shape[0]
    if size > 1:
        labels = activation.vector(1, size)
        if labels is None:
            return False
        tracer.side(homes[0][1], "out", labels)
        tracer.sides[homes[0][0], "out"] = labels
    step = Slope(node.name, (place,), activation.profile, tracer.tensors[weight])
    tracer.add(node, step, activation.labels)
    return True


def joint_norm(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """Layer or group normalization: channels stay what they are, and all of them are needed."""
    place = tracer.place(call["input"])
    activation = tracer.activations[place]
    tracer.ties.pin(activation.labels, f"{title(node)} normalizes over channels")
    tracer.add(node, Step(node.name, (place,), activation.profile), activation.labels)
    return True


HANDLERS = {
    **dict.fromkeys(ops.LAYERS, layer),
    **dict.fromkeys(ops.NORMALIZATIONS, joint_norm),
    ops.aten.batch_norm: norm,
    ops.aten.prelu: slope,
}
