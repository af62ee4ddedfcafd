"""Which channels nothing depends on, to a fixed point."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.channels.flow import Flow
from secateur.channels.fold import Reader, choose_carriers
from secateur.channels.graph import ChannelGraph


class Dead(NamedTuple):
    """What can go.

    Attributes:
        removed: bool by channel class.
        readers: layers whose constants have to be merged before.
        notes: constants that stay, and why.
    """

    removed: Tensor
    readers: list[Reader]
    notes: list[str]


def find_dead(graph: ChannelGraph, flow: Flow, round_to: int, fixed: Collection[str] = ()) -> Dead:
    """Find the channels that every reader ignores, or sees as a constant it can do without.

    The flow is already a fixed point: constants run down in one pass and readers up in another,
    and neither depends on the other once constants count as folded.
    """
    needed = torch.zeros(graph.count, dtype=torch.bool)
    needed[list(graph.pinned)] = True
    candidates = torch.zeros(graph.count, dtype=torch.bool)
    readers, notes = [], []
    for layer, rows in flow.layers(folded=True):
        if layer.given is None:
            continue
        constant, value = flow.columns(layer)
        classes = graph.classes[layer.given]
        read = layer.reads(rows, flow.weights) & ~layer.foldable(constant, value)
        mergeable = layer.groups == 1 and not layer.shared and layer.weight not in fixed
        carried = read & constant & mergeable
        needed[classes[read & ~carried]] = True
        candidates[classes[carried]] = True
        readers.append(Reader(layer, classes, value * mergeable, carried))
        if bool(stuck := (read & constant & ~carried).sum()):
            why = "pads with zeros, channel by channel"
            why = "pads with zeros and its weights are fixed" if layer.weight in fixed else why
            why = "is used more than once" if layer.shared else why
            notes.append(f"{layer.module}: {int(stuck)} constant channels stay: it {why}")
    candidates &= ~needed
    ignored = ~needed & ~candidates
    kept = choose_carriers([r for r in readers if bool(r.carried.any())], needed, candidates)
    removed = ignored | (candidates & ~kept)
    spare(graph, removed, round_to)
    return Dead(removed, readers, notes)


def spare(graph: ChannelGraph, removed: Tensor, round_to: int) -> None:
    """Take channels off the removed ones, in place: no layer ends empty, widths are rounded up."""
    for group in graph.groups:
        width = width_step(group.step, round_to)
        kept = int((~removed[group.classes]).sum())
        target = min(group.channels, math.ceil(max(kept, 1) / width) * width)
        gone = group.classes[removed[group.classes]]
        removed[gone[: target - kept]] = False
        for member in group.members:
            own = group.classes[member.channel[member.channel >= 0]]
            if member.side == "out" and bool(removed[own].all()):
                removed[own[0]] = False


def width_step(indices: int, round_to: int) -> int:
    """Return how many channels of so many indices each make a width divisible by ``round_to``."""
    return round_to // math.gcd(round_to, indices)
