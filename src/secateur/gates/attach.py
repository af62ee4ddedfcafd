"""Gates on the channel groups of a network, and their removal into its weights.

A group's channels are made in several places: by each layer that a residual sum adds up, by a
depthwise convolution and what feeds it. The same gate multiplies all of them, right behind the
layer or, if a BatchNorm with scale and shift comes next, behind that: there any multiplier,
whatever its sign, goes into scale and shift without changing anything that follows. (The papers put
the gate behind the activation; for a ReLU and positive z it is the same.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.channels import ChannelGraph, Group
from secateur.channels.layer import Layer
from secateur.channels.steps import Norm
from secateur.gates.gate import Gate, Port

PORT = "output_gate"
"""Name of the child that multiplies what a module makes."""

Make = Callable[[int, list[Tensor]], Gate]


class Gated(NamedTuple):
    """A gate in its place.

    Attributes:
        gate: of a group.
        classes: int64, by the gate's channel, the number of its channel class in the graph.
        modules: where it multiplies.
    """

    gate: Gate
    classes: Tensor
    modules: tuple[str, ...]


def attach_gates(graph: ChannelGraph, make: Make) -> list[Gated]:
    """Put a gate on every group of channels that can be removed.

    Args:
        graph: of the model, which is changed in place.
        make: builds the gate of so many channels, made by these modules (see :class:`Gate`).

    Returns:
        One entry per group that has a gate; channels that must stay have none.
    """
    places = dict(_places(graph))
    found = []
    for group in graph.groups:
        free = [i for i in range(group.channels) if i not in group.kept_whole]
        indices = {
            places[member.module]: _indices(group, free, member.channel)
            for member in group.members
            if member.side == "out" and member.module in places
        }
        if not free or not indices:
            continue
        device = next(graph.model.parameters()).device
        gate = make(len(free), [each[each < len(free)] for each in indices.values()])
        gate.to(device)
        for name, index in indices.items():
            module = graph.model.get_submodule(name)
            module.add_module(PORT, Port(gate, index.to(device), _dim(module)))
            module.register_forward_hook(_multiply)
        found.append(Gated(gate, group.classes[free], tuple(indices)))
    return found


def _indices(group: Group, free: list[int], channel: Tensor) -> Tensor:
    """Return which of a gate's channels those of a module are; past the end for none."""
    place = torch.full((group.channels + 1,), len(free))
    place[free] = torch.arange(len(free))
    return place[channel]


def _places(graph: ChannelGraph) -> Iterator[tuple[str, str]]:
    """Yield each layer with the module whose output is to be multiplied."""
    users = Counter(index for step in graph.steps for index in step.inputs)
    users.update(graph.outputs)
    norms = {step.inputs[0]: step for step in graph.steps if isinstance(step, Norm)}
    for index, step in enumerate(graph.steps):
        if isinstance(step, Layer) and step.module:
            norm = norms.get(index)
            follows = norm is not None and norm.weight and norm.bias and users[index] == 1
            yield step.module, norm.mean.rpartition(".")[0] if norm and follows else step.module


def _dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return getattr(module, PORT)(output)  # type: ignore[no-any-return]


@torch.no_grad()
def fold_gates(model: nn.Module) -> dict[str, Tensor]:
    """Multiply the gates into the modules that they are behind, and take them off.

    Closed channels end with zero weights and biases; outputs in evaluation mode do not change.

    Returns:
        By module name, what its outputs were multiplied by, ``(channels,)``.
    """
    folded = {}
    for name, module in list(model.named_modules()):
        port = getattr(module, PORT, None)
        if not isinstance(port, Port):
            continue
        scale = port.spread(port.gate.scale()[None])[0]
        for leaf in (module.weight, module.bias):
            if isinstance(leaf, Tensor):
                leaf.mul_(scale.view(-1, *(1,) * (leaf.ndim - 1)))
        delattr(module, PORT)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _multiply:
                del module._forward_hooks[key]
        folded[name] = scale
    return folded
