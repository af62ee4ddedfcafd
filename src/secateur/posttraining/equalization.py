"""Cross-layer equalization (Nagel, van Baalen, Blankevoort & Welling, arXiv 1906.04721).

Between two layers with nothing but functions f(s x) = s f(x) for s > 0, a channel may be divided by
s where it is made and multiplied by s where it is read. With r the largest magnitude of its weights
on the one side and t on the other, s = sqrt(r / t) makes both the same, so that no channel wastes
the range of a grid that it shares. Here s is the nearest power of two, which changes no bit of the
outputs. Where a BatchNorm follows the first layer, it is the BatchNorm that is divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.channels import operators as ops
from secateur.channels.trace import export

aten = torch.ops.aten

HOMOGENEOUS = ops.IDENTITIES | set(ops.POOLS) | {aten.relu, aten.relu_, aten.leaky_relu}
"""Operators that keep channels in place and pass a positive factor on."""

ROUNDS, MOST = 20, 10
"""Times at most that all pairs are visited, and the largest exponent of a factor."""


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which reads nothing but what the first makes.

    Attributes:
        first: weight ``(channels, ...)`` that makes the channels.
        shifts: what else is proportional to them: biases.
        norm: weight, running variance and epsilon of the BatchNorm behind the first layer.
        second: weight that reads them, as ``(channels, ...)`` whatever its layout: a view.
    """

    first: Tensor
    shifts: tuple[Tensor, ...]
    norm: tuple[Tensor, Tensor, float] | None
    second: Tensor

    def balance(self) -> bool:
        """Divide and multiply; say whether anything changed."""
        made = self.first.abs().flatten(1).amax(1)
        if self.norm is not None:
            gamma, variance, epsilon = self.norm
            made = made * gamma.abs() / (variance + epsilon).sqrt()
        read = self.second.abs().flatten(1).amax(1)
        known = (made > 0) & (read > 0)
        exponent = torch.where(known, torch.log2(made / read) / 2, 0.0).round_().clamp_(-MOST, MOST)
        factor = exponent.exp2()
        scaled = self.first if self.norm is None else self.norm[0]
        for each in (scaled, *self.shifts):
            each.div_(_along(factor, each))
        self.second.mul_(_along(factor, self.second))
        return bool(exponent.any())


@torch.no_grad()
def equalize(model: nn.Module, example_input: Tensor) -> int:
    """Balance the ranges of channels between layers, in place; outputs stay what they are.

    Args:
        model: traced in evaluation mode.
        example_input: a batch; values do not matter.

    Returns:
        How many pairs of layers were balanced.

    Raises:
        ChannelError: the model cannot be traced.
    """
    found = pairs(model, export(model, example_input))
    for _ in range(ROUNDS):
        changed = [pair.balance() for pair in found]
        if not any(changed):
            break
    return len(found)


def pairs(model: nn.Module, program: torch.export.ExportedProgram) -> list[Pair]:
    """Return the pairs of layers of an exported program of the model."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    known = {
        node: tensors[names[node.name]].detach()
        for node in program.graph.nodes
        if node.name in names and len(node.users) == 1
    }
    found = []
    for node in program.graph.nodes:
        if _packet(node) in ops.LAYERS and (pair := _pair(node, known)) is not None:
            found.append(pair)
    return found


def _pair(layer: fx.Node, known: Mapping[Any, Tensor]) -> Pair | None:
    """Follow what a layer makes to the one layer that reads it."""
    call = ops.named_arguments(layer.target, layer.args, layer.kwargs)
    shifts, norm = [call["bias"]], None
    node: fx.Node = layer
    while len(node.users) == 1:
        (user,) = node.users
        packet = _packet(user)
        if packet in ops.LAYERS:
            return _built(call["weight"], shifts, norm, user, node, known)
        if packet is aten.batch_norm and node is layer:
            norm = ops.named_arguments(user.target, user.args, user.kwargs)
            shifts = [norm["bias"]]
        elif packet not in HOMOGENEOUS and not _flattens(layer, user):
            return None
        node = user
    return None


def _built(
    weight: fx.Node,
    shifts: list[fx.Node | None],
    norm: Mapping[str, Any] | None,
    reader: fx.Node,
    read: fx.Node,
    known: Mapping[Any, Tensor],
) -> Pair | None:
    """Return the pair, if all its tensors are its own and the layouts are understood."""
    call = ops.named_arguments(reader.target, reader.args, reader.kwargs)
    given = [weight, call["weight"], *(each for each in shifts if each is not None)]
    given += [norm["weight"], norm["running_var"]] if norm else []
    if call["input"] is not read or any(each not in known for each in given):
        return None
    first = known[weight]
    second = _by_channel(known[call["weight"]], len(first), call.get("groups", 1))
    if second is None:
        return None
    behind = (known[norm["weight"]], known[norm["running_var"]], norm["eps"]) if norm else None
    return Pair(first, tuple(known[each] for each in shifts if each is not None), behind, second)


def _by_channel(weight: Tensor, channels: int, groups: int) -> Tensor | None:
    """Return a view of a reading weight with its input channels first."""
    if groups == 1 and weight.shape[1] % channels == 0:  # several columns each behind flattening
        return weight.view(len(weight), channels, -1, *weight.shape[2:]).movedim(1, 0)
    if groups == channels and weight.shape[1] == 1:
        return weight.view(channels, -1, *weight.shape[1:])
    return None


def _flattens(layer: fx.Node, node: fx.Node) -> bool:
    """Tell whether a node drops or flattens positions behind a convolution, channels in order."""
    packet, (given,) = _packet(node), node.all_input_nodes[:1] or (None,)
    if given is None or _packet(layer) is aten.linear:
        return False
    before, after = given.meta["val"].shape, node.meta["val"].shape
    if packet is aten.mean:
        return len(before) > 2 and after[:2] == before[:2]
    flat = len(after) == 2 and after[0] == before[0]
    return packet in ops.VIEWS and flat and after[1] == before[1:].numel()


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _along(factor: Tensor, tensor: Tensor) -> Tensor:
    """Return factors of dimension 0 in a shape that broadcasts."""
    return factor.view(-1, *(1,) * (tensor.ndim - 1))
