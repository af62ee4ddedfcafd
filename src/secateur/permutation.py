"""Channels in another order, so that N:M sparsity keeps more of the weights that read them.

The channels that layers make may stand in any order, if all that reads them follows; N:M sees only
which of them share a group of m. Swapping the two channels that add most to the energy kept, until
no swap adds any, is the greedy search of Pool and Yu (NeurIPS 2021, "Channel Permutations for N:M
Sparsity") without its escapes from local optima. The network computes what it did.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.channels import ChannelGraph, Group, Member
from secateur.channels.proof import difference, make_probes, run
from secateur.errors import ChannelError
from secateur.sets import NM
from secateur.sets.base import energy

LEAST_GAIN = 1e-5
"""Swaps go on while one adds this share of all energy."""


@dataclass(frozen=True)
class Gain:
    """What a layer keeps of its squared norm, from 0 to 1.

    Attributes:
        before: in the old order of its input channels.
        after: in the new one.
    """

    before: float
    after: float


@torch.no_grad()
def permute(model: nn.Module, example_input: Tensor, patterns: Mapping[str, NM]) -> dict[str, Gain]:
    """Reorder the channels of a network, in place, for the layers that will be N:M sparse.

    Channels move that are made by layers of the network and that all readers can follow: not those
    of its outputs, nor those that something needs at fixed places. A layer counts if its input is
    one such group of channels, whole and in order; all layers count alike.

    Args:
        model: outputs stay the same but for the order of sums.
        example_input: one batch.
        patterns: by layer; those along the flattened filter, or shared by rows, move nothing.

    Returns:
        What the layers keep whose inputs could move.

    Raises:
        ChannelError: the model cannot be traced, is parametrized, or computes something else in
            another order; it is left as it was.
    """
    graph = ChannelGraph(model, example_input)
    if graph.model is not model:
        raise ChannelError("model: it is parametrized; permute its channels before that.")
    saved = copy.deepcopy(model.state_dict())
    probes = make_probes(example_input, graph.rounds)
    expected = [run(model, probe) for probe in probes]
    moved: set[tuple[int, int]] = set()
    gains: dict[str, Gain] = {}
    for group in graph.groups:
        readers = _readers(graph, group, patterns)
        if not readers:
            continue
        tables = [_energy(model.get_submodule(name)) for name in readers]
        n = [patterns[name].n for name in readers]
        m = patterns[readers[0]].m
        order = best_order(tables, n, m, _kinds(group))
        for member in group.members:
            _move(model.get_submodule(member.module), member, order, moved)
        for name, table, each in zip(readers, tables, n, strict=True):
            gains[name] = Gain(_kept(table, each, m), _kept(table[:, order], each, m))
    fault = difference(expected, [run(model, probe) for probe in probes])
    if fault:
        model.load_state_dict(saved)
        raise ChannelError(
            f"model: {type(model).__name__} computes something else in another order of channels: "
            f"{fault}\nIts forward() seems to take channels by number. Remedy: permute: false."
        )
    return gains


def best_order(tables: Sequence[Tensor], n: Sequence[int], m: int, kinds: Sequence[int]) -> Tensor:
    """Return an order of channels, int64 ``(channels,)``, that no swap improves.

    With the top n of the others in its group known, a channel's place is worth their sum and what
    a newcomer adds: its excess over the least of them. So all swaps are judged by one table of
    places by newcomers, and the best ones between different groups are made together.

    Args:
        tables: nonnegative energies, each ``(rows, channels)``.
        n: kept of each m in each table.
        m: channels in a group; the last ones stay where they are if they make no group.
        kinds: by channel; only channels of one kind may change places, and none of kind -1.
    """
    ranked = [
        ((table / table.sum().clamp_min(1e-300)).float(), count)
        for table, count in zip(tables, n, strict=True)
        if count < m
    ]
    channels = tables[0].shape[1]
    order = torch.arange(channels)
    whole = channels // m * m
    kind = torch.tensor(kinds)[:whole]
    alike = (kind[:, None] == kind) & (kind >= 0)
    sums = torch.zeros(whole, dtype=torch.float64)  # by place
    excess = torch.zeros(whole, whole, dtype=torch.float64)  # by place and newcomer

    def judge(groups: Sequence[int]) -> None:
        for place in (each for group in groups for each in range(group * m, group * m + m)):
            first = place // m * m
            others = order[[each for each in range(first, first + m) if each != place]]
            best = [table[:, others].topk(count, dim=1).values for table, count in ranked]
            sums[place] = sum(each.sum() for each in best)
            excess[place] = sum(
                (table[:, :whole] - each[:, -1:]).clamp_(min=0).sum(0)
                for (table, _), each in zip(ranked, best, strict=True)
            )

    judge(range(whole // m))
    group_of = torch.arange(whole) // m
    while whole and ranked:
        newcomer = excess[:, order[:whole]]
        now = sums + newcomer.diagonal()
        gain = (sums[:, None] + newcomer - now[:, None]) + (sums + newcomer.T - now)
        gain[~alike | (group_of[:, None] == group_of)] = 0
        touched: set[int] = set()
        best = gain.flatten().topk(min(whole, gain.numel()))
        for worth, pair in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            one, other = divmod(pair, whole)
            groups = {one // m, other // m}
            if worth > LEAST_GAIN * len(tables) and not groups & touched:
                order[[one, other]] = order[[other, one]]
                touched |= groups
        if not touched:
            break
        judge(sorted(touched))
    return order


def _readers(graph: ChannelGraph, group: Group, patterns: Mapping[str, NM]) -> list[str]:
    """Return the planned layers that read a group whole, those with the first one's m."""
    if any(_bound(graph.model.get_submodule(member.module)) for member in group.members):
        return []
    own = torch.arange(group.channels)
    found = [
        member.module
        for member in group.members
        if member.side == "in"
        and member.module in patterns
        and patterns[member.module].axis == "input"
        and patterns[member.module].rows == 1
        and torch.equal(member.channel, own)
    ]
    return [name for name in found if patterns[name].m == patterns[found[0]].m]


def _bound(module: nn.Module) -> bool:
    """Say whether the channels of a module come in groups of their own."""
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and groups not in (1, getattr(module, "in_channels", 1))


def _kinds(group: Group) -> list[int]:
    """Number the channels by where they are found; those that cannot move have -1."""
    counts = [Counter(member.channel.tolist()) for member in group.members]
    places = [tuple(count[channel] for count in counts) for channel in range(group.channels)]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
    return [
        -1 if channel in group.kept_whole else numbers[place]
        for channel, place in enumerate(places)
    ]


def _energy(layer: nn.Module) -> Tensor:
    """Return the squares of a layer's weights, ``(rows, input channels)``, in float64."""
    assert isinstance(layer.weight, Tensor)
    squares = energy(layer.weight.detach().cpu(), None)
    return squares.reshape(*squares.shape[:2], -1).movedim(1, 2).flatten(0, 1)


def _kept(table: Tensor, n: int, m: int) -> float:
    whole = table.shape[1] // m * m
    groups = table[:, :whole].reshape(len(table), -1, m)
    kept = groups.topk(n, dim=2).values.sum() + table[:, whole:].sum()
    return float(kept / table.sum().clamp_min(1e-300))


def _move(module: nn.Module, member: Member, order: Tensor, moved: set[tuple[int, int]]) -> None:
    """Reorder one side of a module: the k-th place of a channel gets that of its successor."""
    index = torch.arange(len(member.channel))
    for channel, successor in enumerate(order.tolist()):
        index[member.channel == channel] = (member.channel == successor).nonzero().flatten()
    dim = 0 if member.side == "out" else 1
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, leaf, None)
        if tensor is None or tensor.ndim <= dim or (id(tensor), dim) in moved:
            continue
        if tensor.shape[dim] == len(index):  # a depthwise weight has no dimension of inputs
            tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))
            moved.add((id(tensor), dim))
