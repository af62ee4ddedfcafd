"""Constants that pruned channels leave behind, moved exactly to where they cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.channels.flow import Flow
from secateur.channels.graph import ChannelGraph
from secateur.channels.layer import Layer


@torch.no_grad()
def fold_constants(graph: ChannelGraph) -> int:
    """Fold what constant channels emit into the biases behind them, in place in the graph's model.

    The weights that read such a channel become zero. A layer without a bias uses the running mean
    of the batch normalization that follows it; without one, and behind zero padding, only a
    constant of 0 can go. The outputs in evaluation mode do not change.

    Returns:
        How many non-zero weights became zero.
    """
    flow = graph.flow()
    weights, freed = graph.weights(), 0
    for layer in graph.layers:
        constant, value = flow.columns(layer)
        columns = layer.foldable(constant, value)
        weight = weights[layer.weight]
        nothing = torch.zeros(layer.made.shape, dtype=torch.bool, device=weight.device)
        mask = layer.mask(nothing, columns.to(weight.device), weight.shape) & (weight != 0)
        if layer.shared or not bool(mask.any()):
            continue
        folded = value.masked_fill(~columns, 0.0)
        if bool(folded.any()):
            change = layer.contribution(folded, weights)
            target = weights[layer.absorber]
            target.add_((change if layer.bias is not None else -change).to(target))
        weight.masked_fill_(mask, 0)
        freed += int(mask.sum())
    return freed


def add_biases(graph: ChannelGraph) -> list[str]:
    """Give a bias of zero to each layer that could fold a constant if it had one.

    Returns:
        The names of the modules.
    """
    flow, changed = graph.flow(), []
    for layer, rows in flow.layers(folded=False):
        constant, value = flow.columns(layer)
        carried = constant & (value != 0) & layer.reads(rows, flow.weights)
        barred = layer.absorber or layer.bias or layer.padded or layer.shared or not layer.module
        if barred or not bool(carried.any()):
            continue
        module = graph.model.get_submodule(layer.module)
        weight = flow.weights[layer.weight]
        module.bias = nn.Parameter(weight.new_zeros(len(layer.made)))
        layer.bias = layer.absorber = f"{layer.module}.bias"
        changed.append(layer.module)
    return changed


class Reader(NamedTuple):
    """A layer that pads with zeros and reads constants.

    Attributes:
        layer: which.
        classes: of its input channels, ``(in,)``.
        value: the constants, ``(in,)`` float64; 0 where there is none.
        carried: bool ``(in,)``, the constants that it really reads.
    """

    layer: Layer
    classes: Tensor
    value: Tensor
    carried: Tensor


def choose_carriers(readers: Sequence[Reader], kept: Tensor, candidates: Tensor) -> Tensor:
    """Return the channel classes to keep so that each reader has one constant for all of its own.

    Args:
        kept: bool by class, those that stay anyway.
        candidates: bool by class, those that could go if another carries their constants.
    """
    kept = kept.clone()
    scores = torch.zeros(kept.shape, dtype=torch.long)
    for reader in readers:
        scores[reader.classes[reader.value != 0]] += 1
    for reader in readers:
        needed = reader.carried & candidates[reader.classes]
        present = (reader.value != 0) & kept[reader.classes]
        if bool(needed.any()) and not bool(present.any()):
            best = max(
                needed.nonzero().flatten().tolist(),
                key=lambda i: (int(scores[reader.classes[i]]), float(reader.value[i].abs())),
            )
            kept[reader.classes[best]] = True
    return kept


@torch.no_grad()
def merge(readers: Sequence[Reader], removed: Tensor, flow: Flow) -> None:
    """Let one constant channel stand for all removed ones: W[:, c] += sum_j v_j / v_c W[:, j]."""
    for reader in readers:
        gone = reader.carried & removed[reader.classes]
        stays = (reader.value != 0) & ~removed[reader.classes]
        if not bool(gone.any()):
            continue
        carrier = int(reader.value.masked_fill(~stays, 0.0).abs().argmax())
        weight = flow.weights[reader.layer.weight]
        sources = gone.nonzero().flatten().to(weight.device)
        ratio = (reader.value[gone] / reader.value[carrier]).to(weight.device)
        total = torch.tensordot(weight[:, sources].double(), ratio, dims=([1], [0]))
        weight[:, carrier] += total.to(weight)
        weight[:, sources] = 0
