"""Path-aware budgets: none of them is spent on weights that do not matter to any output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.channels import ChannelGraph
from secateur.sets.base import top_k


def useless(graph: ChannelGraph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mark non-zeros that reach no output, or that nothing but a constant reaches.

    Args:
        graph: of the model's channels.
        weights: by parameter name; others are as the model has them.

    Returns:
        Boolean, by parameter name, for those of ``weights`` that are layers of the graph.
    """
    flow = graph.flow(weights)
    unreachable, constant = flow.unreachable(), flow.constant_reads()
    return {
        name: (weight != 0) & (unreachable[name] | constant[name])
        for name, weight in weights.items()
        if name in unreachable
    }


def without_useless(
    graph: ChannelGraph, weights: Mapping[str, Tensor], gains: Mapping[str, Tensor], keep: int
) -> dict[str, Tensor]:
    """Return weights of which the ``keep`` largest all matter.

    Of these, the useless ones become zero and the next largest take their places, which may make
    others useless, until there are none. What became zero once stays so.

    Args:
        graph: of the model's channels.
        weights: by parameter name.
        gains: by parameter name, of the shapes of ``weights``: what elements are ranked by.
        keep: how many elements there is room for; of equal ones the first.
    """
    gain = torch.cat([gains[name].flatten() for name in weights]).nan_to_num()
    ranked = _largest(gain, 4 * keep)
    kept = torch.zeros_like(gain, dtype=torch.bool)
    dropped = kept.clone()
    kept[ranked[:keep]] = True
    following = keep
    while True:
        current = _filled(weights, ~kept)
        found = useless(graph, current)
        marks = torch.cat(
            [
                found.get(name, torch.zeros_like(each, dtype=torch.bool)).flatten()
                for name, each in weights.items()
            ]
        )
        count = int(marks.count_nonzero())
        if not count:
            return _filled(weights, dropped)
        dropped |= marks
        if following + count > len(ranked) < len(gain):
            ranked = _largest(gain, 4 * len(ranked))
        kept[marks] = False
        kept[ranked[following : following + count]] = True
        following += count


def _largest(gain: Tensor, count: int) -> Tensor:
    """Return where the largest elements are, from the largest on, of equal ones the first."""
    places = top_k(gain, count).nonzero().squeeze(1)
    return places[gain[places].argsort(descending=True, stable=True)]


def _filled(weights: Mapping[str, Tensor], zeros: Tensor) -> dict[str, Tensor]:
    """Return weights with zeros at marks that are one after the other for all of them."""
    parts = torch.split(zeros, [each.numel() for each in weights.values()])
    return {
        name: each.detach().masked_fill(part.view_as(each), 0)
        for (name, each), part in zip(weights.items(), parts, strict=True)
    }
