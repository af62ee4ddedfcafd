"""Tracing of attention: a head's queries, keys and values live and die together.

Between heads nothing is mixed, inside of one everything is, so the channels of attention are its
heads. Whether a network takes fewer of them is its code's to say: a view to ``(-1, head_size)``
does, one to ``(heads, head_size)`` does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.channels import operators as ops
from secateur.channels.steps import Emission, Step, Weights
from secateur.channels.trace import Activation, Tracer, caller, title

HEADS = -3
"""Dimension of the heads of what is mixed: ``(batch, heads, tokens, head_size)``."""


@dataclass(eq=False)
class Apart(Step):
    """What keeps positions apart, or sums over those of one head; it emits no constant."""

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        return [read.expand(each.constant.shape) for each in inputs]


@dataclass(eq=False)
class Mix(Step):
    """Sums of values over tokens, weighted by head; the last input holds the values.

    Attributes:
        mean: whether the weights add up to one, so that any constant stays one, not only zero.
    """

    mean: bool

    def forward(self, inputs: Sequence[Emission], weights: Weights) -> Emission:
        constant, value = inputs[-1]
        return Emission.of(constant if self.mean else constant & (value == 0), value)

    def backward(
        self, read: Tensor, inputs: Sequence[Emission], weights: Weights, folded: bool
    ) -> list[Tensor]:
        """The weights of a head matter only to values that are not constant."""
        *others, _ = inputs
        mixed = (read & ~self.forward(inputs, weights).constant).any(-1, keepdim=True)
        return [*(mixed.expand(each.constant.shape) for each in others), read]


def attention(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """Scaled dot-product attention: ``(batch, heads, tokens, head_size)`` three times."""
    places = [tracer.place(call[name]) for name in ("query", "key", "value")]
    parts = [tracer.activations[place] for place in places]
    heads = {part.shape[HEADS] for part in parts if len(part.shape) > -HEADS - 1}
    if len(heads) != 1 or call["enable_gqa"] or not all(_by_head(part, -1) for part in parts):
        return False
    first = _tied(tracer, parts[0], -1)
    for part in parts[1:]:
        tracer.ties.tie(first, _tied(tracer, part, -1))
    mask = call["attn_mask"]
    if mask is not None:
        given = tracer.activations[tracer.place(mask)]
        if given.labels is not None:
            return False
        if len(given.shape) > -HEADS - 1 and given.shape[HEADS] > 1:
            tracer.ties.pin(first, f"{title(node)} takes a mask for each head")
    tracer.heads[caller(node)] = first.flatten()
    plain = mask is None and not call["is_causal"]
    step = Mix(node.name, tuple(places), parts[2].profile, mean=plain)
    tracer.add(node, step, parts[2].labels)
    return True


def product(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """A product of two activations: of queries and keys, or of weights by head and values."""
    places = [tracer.place(call[name]) for name in ("self", "other")]
    one, other = (tracer.activations[place] for place in places)
    if one.labels is None or other.labels is None or len(one.shape) != len(other.shape):
        return False
    if one.profile[:-2] != other.profile[:-2]:
        return False
    rows, inner, columns = one.profile[-2], one.profile[-1], other.profile[-1]
    if rows == columns == 1 and inner == other.profile[-2] and one.shape[-1] == inner:
        labels = _tied(tracer, one, -1)
        tracer.ties.tie(labels, _tied(tracer, other, -2))
        tracer.heads[caller(node)] = labels.flatten()
        tracer.add(node, Apart(node.name, tuple(places), tuple(labels.shape)), labels)
        return True
    if rows == inner == other.profile[-2] == 1:
        tracer.ties.tie(one.labels, other.labels)
        step = Mix(node.name, tuple(places), other.profile, mean=False)
        tracer.add(node, step, other.labels)
        return True
    return False


def softmax(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """Softmax over what is the same channel, such as tokens."""
    place = tracer.inputs(node)[0]
    activation = tracer.activations[place]
    if activation.profile[call["dim"]] > 1:
        return False
    tracer.add(node, Apart(node.name, (place,), activation.profile), activation.labels)
    return True


def _by_head(part: Activation, last: int) -> bool:
    """Tell whether labels vary over heads and the last dimension, and over nothing else."""
    ndim = len(part.shape)
    varying = {dim - ndim for dim, size in enumerate(part.profile) if size > 1}
    return part.labels is not None and varying <= {HEADS, last}


def _tied(tracer: Tracer, part: Activation, dim: int) -> Tensor:
    """Tie labels along a dimension; return the first of them."""
    assert part.labels is not None
    first = part.labels.narrow(dim, 0, 1)
    tracer.ties.tie(first, part.labels)
    return first


def heads_of(node: fx.Node) -> int | None:
    """Return which dimension of a view's result attention takes for its heads, if any does."""
    value = node.meta["val"]
    markers = [
        torch.arange(size).view(-1, *[1] * (value.ndim - dim - 1)).expand(value.shape)
        for dim, size in enumerate(value.shape)
    ]
    for reached in _mixed(node, markers):
        for dim, marker in enumerate(reached):
            if marker.shape[HEADS] > 1 and bool((marker != marker.narrow(HEADS, 0, 1)).any()):
                return dim
    return None


def _mixed(node: fx.Node, markers: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield markers as they arrive at attention, moved as what a node returns is moved."""
    for user in node.users:
        packet = getattr(user.target, "overloadpacket", None)
        if packet in ops.MIXES and markers[0].ndim >= -HEADS:
            yield markers
        elif packet in ops.MOVES and packet not in ops.IDENTITIES:
            arguments = [[m if a is node else a for a in user.args] for m in markers]
            # markers lie in memory in another way, so that a view may have to be a copy
            views = (ops.aten.view, ops.aten._unsafe_view)
            function: Any = ops.aten.reshape if packet in views else packet
            moved = [function(*given, **user.kwargs) for given in arguments]
            if isinstance(moved[0], Tensor):
                yield from _mixed(user, moved)
            else:
                for item in user.users:  # each takes one of several parts
                    yield from _mixed(item, [parts[item.args[1]] for parts in moved])
        elif packet in ops.IDENTITIES or (
            packet is not None
            and ops.is_pointwise(user.target)
            and user.meta["val"].shape == markers[0].shape
        ):
            yield from _mixed(user, markers)


HANDLERS = {
    ops.aten.scaled_dot_product_attention: attention,
    ops.aten.matmul: product,
    ops.aten.softmax: softmax,
}
