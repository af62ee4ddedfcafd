"""Networks made smaller in fact: dead channels go, or the least important ones do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.channels.dead import find_dead, spare, width_step
from secateur.channels.fold import add_biases, fold_constants, merge
from secateur.channels.graph import ChannelGraph, Group
from secateur.channels.proof import difference, make_probes, run
from secateur.channels.surgery import Kept, kept_of, replay
from secateur.channels.trace import RETURNED
from secateur.errors import ChannelError


@dataclass(frozen=True)
class Compacted:
    """A smaller network.

    Attributes:
        model: a plain module of the same class, with fewer channels.
        kept: what was kept, for :func:`replay` on a freshly built network; JSON can hold it.
        notes: what stayed whole and why, one line each.
    """

    model: nn.Module
    kept: Kept
    notes: tuple[str, ...]


@torch.no_grad()
def compact(
    model: nn.Module, example_input: Tensor, round_to: int = 1, fixed: Collection[str] = ()
) -> Compacted:
    """Remove every channel that no output depends on, to a fixed point.

    A channel goes if all weights that read it are zero, or if it emits a constant, as one without
    weights does: the constant is folded into the biases behind it, and behind zero padding one
    constant channel stands for all of a layer.

    Args:
        model: left as it is.
        example_input: one batch; the result is checked on it.
        round_to: keep some dead channels so that widths are multiples of this.
        fixed: names of weights, such as quantized ones, that may lose values but not change them;
            behind zero padding they keep every constant channel.

    Raises:
        ChannelError: the model cannot be traced, or its code is bound to its present widths.
    """
    small = copy.deepcopy(model)
    graph = ChannelGraph(small, example_input)
    probes = make_probes(example_input, graph.rounds)
    expected = [run(small, probe) for probe in probes]
    biases = add_biases(graph)
    fold_constants(graph)

    def select() -> tuple[Tensor, list[str]]:
        flow = graph.flow()
        removed, readers, notes = find_dead(graph, flow, round_to, fixed)
        merge(readers, removed, flow)
        return removed, notes

    return _cut(graph, select, probes, expected, biases)


@torch.no_grad()
def shrink_to(
    model: nn.Module, example_input: Tensor, density: float = 0.7, round_to: int = 8
) -> Compacted:
    """Remove the least important channels of every group, and say what stayed whole.

    Args:
        model: left as it is.
        example_input: one batch.
        density: share of the channels of each group that stays, in (0, 1].
        round_to: widths become the nearest multiple of this, and at least one of it.

    Raises:
        ChannelError: the model cannot be traced, or an argument is out of range.
    """
    if not 0 < density <= 1:
        raise ChannelError(f"density: {density} is not in (0, 1].")
    if round_to < 1:
        raise ChannelError(f"round_to: {round_to} is not a positive integer.")
    small = copy.deepcopy(model)
    graph = ChannelGraph(small, example_input)

    def select() -> tuple[Tensor, list[str]]:
        removed = torch.zeros(graph.count, dtype=torch.bool)
        for group in graph.groups:
            removed[_least_important(graph, group, density, round_to)] = True
        spare(graph, removed, 1)
        return removed, []

    return _cut(graph, select, make_probes(example_input, graph.rounds), None, [])


def shrink(
    model: nn.Module, example_input: Tensor, density: float = 0.7, round_to: int = 8
) -> nn.Module:
    """Return a physically smaller network: the network alone of :func:`shrink_to`."""
    return shrink_to(model, example_input, density, round_to).model


def importance(graph: ChannelGraph, group: Group) -> Tensor:
    """Return the importance of a group's channels, ``(channels,)`` float64.

    It is the L2 norm of all weights of convolution, linear and normalization layers that a channel
    has, over all members of the group; the squares of each member are first divided by their mean,
    so that layers of different size and scale count alike.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        module = graph.model.get_submodule(member.module)
        weight = module.weight
        if not isinstance(weight, Tensor):  # a normalization without scale
            continue
        own = member.channel >= 0
        squares = torch.zeros_like(total)
        norms = _squares(weight.detach().cpu().double(), member.side, len(member.channel))
        squares.index_add_(0, member.channel[own], norms[own])
        total += squares / squares.mean().clamp_min(1e-30)
    return total.sqrt()


def _squares(weight: Tensor, side: str, width: int) -> Tensor:
    """Return the sum of squares by output or by input channel, ``(width,)``."""
    rows = weight.flatten(1).square() if weight.ndim > 1 else weight.square()[:, None]
    if side == "out":
        return rows.sum(1)
    columns = weight.flatten(2).square().sum(2) if weight.ndim > 2 else weight.square()
    groups = width // columns.shape[1]
    return columns.view(groups, -1, columns.shape[1]).sum(1).flatten()


def _least_important(graph: ChannelGraph, group: Group, density: float, round_to: int) -> Tensor:
    step = width_step(group.step, round_to)
    target = max(1, math.floor(density * group.channels / step + 0.5)) * step
    scores = importance(graph, group)
    scores[list(group.kept_whole)] = math.inf
    order = scores.argsort(descending=True, stable=True)
    gone = order[min(target, group.channels) :]
    return group.classes[gone[scores[gone] < math.inf]]


def _cut(
    graph: ChannelGraph,
    select: Callable[[], tuple[Tensor, list[str]]],
    probes: list[Tensor],
    expected: list[list[Tensor]] | None,
    biases: list[str],
) -> Compacted:
    """Remove what ``select`` says; if the model's code cannot bear it, all but what it fixes."""
    for attempt in range(2):
        removed, notes = select()
        kept = kept_of(graph.sides, removed)
        reference = expected or _masked_runs(graph, removed, probes)
        kept_with_biases = copy.deepcopy(kept)
        for name in biases:
            kept_with_biases.setdefault(name, {})["bias"] = True
        try:
            small = replay(kept, _twin(graph.model))
            found = [run(small, probe) for probe in probes]
            fault = difference(reference, found)
        except Exception as error:  # whatever the user's forward raises
            fault = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not fault:
            return Compacted(small, kept_with_biases, tuple(_notes(graph) + notes))
        if attempt == 0:
            graph.keep_rigid()
    raise ChannelError(
        f"model: {type(graph.model).__name__} does not run with fewer channels: {fault}\n"
        "Its forward() seems to fix the number of channels; take sizes from tensors there."
    )


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy that shares the tensors: replay replaces those it cuts."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _masked_runs(graph: ChannelGraph, removed: Tensor, probes: list[Tensor]) -> list[list[Tensor]]:
    """Return the outputs with all weights zero that read a removed channel."""
    weights = graph.weights()
    masked: dict[str, Tensor] = {}
    for layer in graph.layers:
        if layer.given is not None:
            weight = masked.get(layer.weight, weights[layer.weight])
            columns = removed[graph.classes[layer.given]].to(weight.device)
            rows = torch.zeros(len(layer.made), dtype=torch.bool, device=weight.device)
            masked[layer.weight] = weight.masked_fill(layer.mask(rows, columns, weight.shape), 0)
    return [run(graph.model, probe, masked) for probe in probes]


def _notes(graph: ChannelGraph) -> list[str]:
    """List, by group and reason, what had to stay whole."""
    lines = []
    for group in graph.groups:
        makers = [m.module for m in group.members if m.side == "out"]
        title = makers[0] + (f" and {len(makers) - 1} more" if len(makers) > 1 else "")
        for reason in dict.fromkeys(group.kept_whole.values()):
            if reason == RETURNED:
                continue
            count = sum(1 for r in group.kept_whole.values() if r == reason)
            lines.append(f"{title}: {count} of {group.channels} channels stay: {reason}")
        if group.channels == 1 < group.step and not group.kept_whole:
            lines.append(f"{title}: {group.step} channels stay: they live and die together")
    for layer in graph.layers:
        if not layer.module:
            why = "it is the weight of no layer of its own"
            lines.append(f"{layer.weight}: {len(layer.made)} channels stay: {why}")
    return list(dict.fromkeys(lines))
