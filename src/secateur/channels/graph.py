"""The channels of a network: which live and die together, and what flows through them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.channels import attention, between, layers
from secateur.channels.flow import Flow
from secateur.channels.layer import Layer
from secateur.channels.operators import ROUNDINGS
from secateur.channels.steps import Weights
from secateur.channels.trace import Handler, Tracer, export, settled


@dataclass(frozen=True)
class Member:
    """One side of a module that channels of a group run through.

    Attributes:
        module: its name in the model.
        side: ``"out"`` for what it makes (or normalizes), ``"in"`` for what it reads.
        channel: int64, by index along that side: the channel of the group, or -1 for none.
    """

    module: str
    side: str
    channel: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that are made by the same modules; each is removed everywhere or nowhere.

    Attributes:
        channels: how many there are.
        members: where they are.
        kept_whole: channel to the reason why it cannot be removed, in plain words.
        classes: int64, ``(channels,)``: their numbers in the graph.
    """

    channels: int
    members: tuple[Member, ...]
    kept_whole: dict[int, str]
    classes: Tensor

    @property
    def step(self) -> int:
        """How many indices of each making module go with one channel: their common divisor."""
        counts = [
            count
            for member in self.members
            if member.side == "out"
            for count in Counter(member.channel[member.channel >= 0].tolist()).values()
        ]
        return math.gcd(*counts)


class ChannelGraph:
    """The channels of a model, traced once; evaluating weights is then a matter of milliseconds.

    Args:
        model: any module that ``torch.export`` can trace. It is traced in evaluation mode and
            left as it is; the graph holds it to look up its current weights. Of one with
            parametrized weights it holds a copy with these weights as they are now.
        example_input: one batch.

    Attributes:
        groups: which channels are removed together, and where.
        heads: int64, ``(heads,)``: classes of the heads of attention, by the module that attends.

    Raises:
        ChannelError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        model = settled(model)
        self.model, self.example_input = model, example_input
        handlers: dict[Any, Handler] = {
            **layers.HANDLERS,
            **between.HANDLERS,
            **attention.HANDLERS,
        }
        tracer = Tracer(model, handlers, between.pointwise)
        with torch.no_grad():
            tracer.run(export(model, example_input))
        self.steps, self.outputs = tracer.steps, tracer.outputs
        self.layers = [step for step in self.steps if isinstance(step, Layer)]
        self.classes, self.pinned = tracer.ties.classes()
        self.sides = {key: self.classes[labels] for key, labels in tracer.sides.items()}
        self.heads = {name: self.classes[labels] for name, labels in tracer.heads.items()}
        rigid = [self.classes[labels.flatten()] for labels in tracer.rigid]
        self.rigid = torch.unique(torch.cat(rigid)) if rigid else torch.zeros(0, dtype=torch.long)
        self.groups = self._groups()

    @property
    def rounds(self) -> bool:
        """Whether the network rounds activations, as one with quantizers does."""
        functions = (getattr(step, "function", None) for step in self.steps)
        return any(getattr(each, "overloadpacket", None) in ROUNDINGS for each in functions)

    @property
    def count(self) -> int:
        """Number of channel classes: channels that are removed together count once."""
        return int(self.classes.max()) + 1 if len(self.classes) else 0

    def keep_rigid(self) -> None:
        """Pin all channels whose number the model's code may fix in a view or a split."""
        for number in self.rigid.tolist():
            self.pinned.setdefault(number, "a view or split in forward() fixes its size")
        self.groups = self._groups()

    def weights(self, changed: Mapping[str, Tensor] | None = None) -> Weights:
        """Return the model's parameters and buffers by name, some of them replaced."""
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return Weights({**own, **(changed or {})})

    def flow(self, weights: Mapping[str, Tensor] | None = None) -> Flow:
        """Evaluate the graph.

        Args:
            weights: tensors to use instead of the model's own, by parameter name.
        """
        with torch.no_grad():
            return Flow(self.steps, self.outputs, self.weights(weights))

    @torch.no_grad()
    def unreachable(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return which weights no output depends on: see :meth:`Flow.unreachable`."""
        return self.flow(weights).unreachable()

    @torch.no_grad()
    def constant_reads(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return which weights only a bias is needed for: see :meth:`Flow.constant_reads`."""
        return self.flow(weights).constant_reads()

    def _groups(self) -> tuple[Group, ...]:
        """Join classes that one module makes, then list where each group is found."""
        parent = list(range(self.count))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        made = {
            number for (_, side), c in self.sides.items() if side == "out" for number in c.tolist()
        }
        for (_, side), numbers in self.sides.items():
            if side == "out":
                first, *rest = sorted(set(numbers.tolist()))
                for number in rest:
                    parent[root(number)] = root(first)
        found: dict[int, list[int]] = {}
        for number in sorted(made):
            found.setdefault(root(number), []).append(number)
        return tuple(self._group(numbers) for numbers in found.values())

    def _group(self, numbers: list[int]) -> Group:
        place = torch.full((self.count,), -1)
        place[numbers] = torch.arange(len(numbers))
        members = tuple(
            Member(module, side, place[classes])
            for (module, side), classes in self.sides.items()
            if bool((place[classes] >= 0).any())
        )
        kept = {i: self.pinned[n] for i, n in enumerate(numbers) if n in self.pinned}
        return Group(len(numbers), members, kept, torch.tensor(numbers))
