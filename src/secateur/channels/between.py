"""Tracing of the operators between layers: moves, pooling, elementwise functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from secateur.channels import operators as ops
from secateur.channels.attention import heads_of
from secateur.channels.steps import ACTIVATION, Move, Pointwise, Profile, Spatial, Step
from secateur.channels.trace import Activation, Tracer, title


def move(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """A view, permutation or part of a tensor: run it on positions to see where they go."""
    place, function = tracer.inputs(node)[0], node.target
    packet = function.overloadpacket  # type: ignore[union-attr]
    activation = tracer.activations[place]
    if call.get("train"):
        return False
    if packet in ops.SELECTIONS and _selects(tracer, packet, call, activation):
        return False
    positions = _positions(activation).expand(activation.shape).contiguous()
    arguments = [positions if isinstance(a, fx.Node) else a for a in node.args]
    if packet in ops.IDENTITIES:
        moved: Any = positions
    else:
        moved = function(*arguments, **node.kwargs)  # type: ignore[operator]
    several = isinstance(moved, (list, tuple))
    sources = [_shrunk(part) for part in (moved if several else [moved])]
    assert activation.labels is not None
    labels = [activation.labels.flatten()[source] for source in sources]
    if packet in ops.VIEWS:
        _tie_rows(tracer, node, labels[0])
    elif packet in ops.DIVISIONS and not _tie_parts(tracer, labels, activation):
        return False
    if packet in ops.VIEWS | ops.DIVISIONS:
        tracer.rigid.extend(labels)
    steps = [Move(node.name, (place,), tuple(s.shape), s) for s in sources]
    if several:
        tracer.add_all(node, [*steps], [*labels])
    else:
        tracer.add(node, steps[0], labels[0])
    return True


def _positions(activation: Activation, start: int = 0) -> Tensor:
    size = torch.Size(activation.profile).numel()
    return torch.arange(start, start + size).reshape(activation.profile)


def _shrunk(positions: Tensor) -> Tensor:
    """Shrink to 1 every dimension along which all positions are the same."""
    for dim in range(positions.ndim):
        first = positions.narrow(dim, 0, min(1, positions.shape[dim]))
        if positions.shape[dim] > 1 and bool((positions == first).all()):
            positions = first
    return positions.contiguous()


def _selects(tracer: Tracer, packet: Any, call: dict[str, Any], activation: Activation) -> bool:
    """Tell whether a slice, roll or the like takes channels by positions that may change."""
    if packet in (ops.aten.roll, ops.aten.flip):
        return any(activation.profile[dim] > 1 for dim in call["dims"]) or not call["dims"]
    dim = call["dim"]
    assert activation.labels is not None
    if activation.profile[dim] == 1 or tracer.ties.tied(activation.labels, dim):
        return False
    if packet is not ops.aten.slice:
        return True
    whole = (call["start"] or 0) == 0 and call["step"] == 1
    return not (whole and (call["end"] is None or call["end"] >= activation.shape[dim]))


def _tie_rows(tracer: Tracer, node: fx.Node, labels: Tensor) -> None:
    """Where a view spreads channels over several dimensions, remove only along one of them.

    It is the last, or that of the heads of attention.
    """
    varying = [dim for dim, size in enumerate(labels.shape) if size > 1]
    if len(varying) < 2:
        return
    heads = heads_of(node)
    free = varying[-1] if heads is None else heads
    for dim in varying:
        if dim != free:
            tracer.ties.tie(labels.narrow(dim, 0, 1), labels)


def _tie_parts(tracer: Tracer, labels: list[Tensor], activation: Activation) -> bool:
    """Keep the parts of a division by channels of one size; False if they never were."""
    if all(part.shape == activation.profile for part in labels):
        return True
    if any(part.shape != labels[0].shape for part in labels):
        return False
    for part in labels[1:]:
        tracer.ties.tie(labels[0], part)
    return True


def cat(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """A concatenation along the channels, or of one and the same thing along another dimension."""
    places = [tracer.place(tensor) for tensor in call["tensors"]]
    parts = [tracer.activations[place] for place in places]
    dim = call["dim"] % len(parts[0].profile)
    if any(size > 1 for part in parts for d, size in enumerate(part.profile) if d != dim):
        return False
    labels, sources, start = [], [], 0
    for part in parts:
        shape = tuple(part.shape[d] if d == dim else 1 for d in range(len(part.shape)))
        if part.labels is None:
            unknown = tracer.ties.fresh(part.profile)
            tracer.ties.pin(unknown, f"{title(node)} appends it to what has no channels")
            labels.append(unknown.flatten())
        else:
            labels.append(part.labels.flatten())
        sources.append(_positions(part, start).expand(shape))
        start += labels[-1].numel()
    source = torch.cat(sources, dim)
    step = Move(node.name, tuple(places), tuple(source.shape), source)
    tracer.add(node, step, torch.cat(labels)[source])
    return True


def spatial(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """Pooling, interpolation, means or padding over dimensions that are not the channels."""
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    place = tracer.inputs(node)[0]
    activation, ndim = tracer.activations[place], len(tracer.activations[place].shape)
    if packet in ops.POOLS:
        dims = range(ndim - ops.POOLS[packet], ndim)
    elif packet is ops.aten.pad:
        pairs = list(zip(call["pad"][::2], call["pad"][1::2], strict=True))
        dims = [ndim - 1 - i for i, pair in enumerate(pairs) if any(pair)]  # type: ignore[assignment]
    else:
        given = call.get("dim")
        listed = [given] if isinstance(given, int) else list(given or range(ndim))
        dims = [dim % ndim for dim in listed]  # type: ignore[assignment]
    assert activation.labels is not None
    if any(activation.profile[dim] > 1 for dim in dims):
        return False
    profile: Profile = activation.profile
    if packet in ops.REDUCTIONS and not call["keepdim"]:
        profile = tuple(size for dim, size in enumerate(profile) if dim not in dims)
    step = Spatial(node.name, (place,), profile, ops.border_of(node.target, call))
    tracer.add(node, step, activation.labels.view(profile))
    return True


def pointwise(tracer: Tracer, node: fx.Node, call: dict[str, Any]) -> bool:
    """An elementwise function, of channels, which are tied where they meet, or of numbers alone."""
    if any(isinstance(a, fx.Node) for a in node.kwargs.values()) or any(
        isinstance(a, (list, tuple)) for a in node.args
    ):
        return False
    places = [tracer.place(a) for a in node.args if isinstance(a, fx.Node)]
    ndim = len(node.meta["val"].shape)
    parts = [_aligned(tracer.activations[place], ndim) for place in places]
    if not all(a.meta["val"].is_floating_point() for a in node.all_input_nodes):
        return False
    labelled = [part for part in parts if part.labels is not None]
    base = max(labelled or parts, key=lambda part: torch.Size(part.profile).numel())
    followed = True
    for part in parts:
        spread = any(b > 1 and r > 1 for b, r in zip(base.profile, part.shape, strict=True))
        if part.profile == base.profile and base.labels is not None and part.labels is not None:
            tracer.ties.tie(base.labels, part.labels)
        elif spread and part.labels is None:
            tracer.ties.pin(base.labels, f"{title(node)} joins them with what is not followed")
            followed = False
        elif spread or any(size > 1 for size in part.profile):
            return False
    if not followed:
        tracer.add(node, Step(node.name, tuple(places), base.profile), base.labels)
        return True
    step = Pointwise(
        node.name,
        tuple(places),
        base.profile,
        function=node.target,
        arguments=tuple(ACTIVATION if isinstance(a, fx.Node) else a for a in node.args),
        options=dict(node.kwargs),
        product=node.target.overloadpacket in ops.PRODUCTS,  # type: ignore[union-attr]
    )
    tracer.add(node, step, base.labels)
    return True


def _aligned(activation: Activation, ndim: int) -> Activation:
    """Put dimensions of size 1 in front, as broadcasting does."""
    front = (1,) * (ndim - len(activation.shape))
    profile = front + activation.profile
    labels = None if activation.labels is None else activation.labels.view(profile)
    return Activation(profile, labels, front + activation.shape)


HANDLERS = {
    **dict.fromkeys(ops.MOVES, move),
    **dict.fromkeys(ops.POOLS, spatial),
    **dict.fromkeys(ops.REDUCTIONS, spatial),
    ops.aten.pad: spatial,
    ops.aten.cat: cat,
}
