"""What a gate can do: one multiplier per channel, noisy in training, closed or open at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Gate(nn.Module, ABC):
    """Multipliers z of the channels of one group, trained with the loss.

    In training z is drawn anew for every sample and channel; in evaluation it is :meth:`scale`,
    which is 0 where the gate is closed. A frozen gate is its scale in training, too.

    Args:
        makers: for each module that makes channels of the group, which of the gate's channels, as
            int64 indices; of each at least one stays open.
        channels: number of channels.
    """

    made: Tensor
    factor: Tensor

    def __init__(self, channels: int, makers: list[Tensor]) -> None:
        super().__init__()
        self.channels = channels
        self.frozen = False
        self.register_buffer("factor", torch.zeros(channels))
        mask = torch.zeros(len(makers), channels, dtype=torch.bool)
        for row, own in enumerate(makers):
            mask[row, own] = True
        self.register_buffer("made", mask, persistent=False)

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Draw z for so many samples, ``(count, channels)``."""

    @abstractmethod
    def means(self) -> Tensor:
        """Return what z is without noise, ``(channels,)``."""

    @abstractmethod
    def certainty(self) -> Tensor:
        """Return how surely each channel is open, ``(channels,)``; negative is closed."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return what the open channels cost as a regularizer, a scalar."""

    def keep_prob(self) -> Tensor:
        """Return a smooth stand-in for :meth:`open`, ``(channels,)`` in [0, 1], for costs."""
        return torch.sigmoid(self.certainty())

    @torch.no_grad()
    def freeze(self, open: Tensor) -> None:
        """Open these channels and no others from now on, without noise.

        One that was closed with z = 0 gets a tenth of what the others have on average.

        Args:
            open: bool ``(channels,)``, of which each maker has one.
        """
        means = self.means()
        little = means[means != 0].mean() / 10 if bool((means != 0).any()) else means + 1
        self.factor.copy_(torch.where(means == 0, little, means) * open)
        self.frozen = True
        self.requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        """Return whether it is frozen, for ``state_dict``."""
        return torch.tensor(self.frozen)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        self.frozen = bool(state)

    @torch.no_grad()
    def open(self) -> Tensor:
        """Return which channels stay, bool ``(channels,)``."""
        if self.frozen:
            return self.factor != 0
        return (self.certainty() >= 0) | self.least()

    @torch.no_grad()
    def least(self) -> Tensor:
        """Return the surest channel of each maker, bool ``(channels,)``: these always stay."""
        certainty = self.certainty()
        best = certainty.masked_fill(~self.made, -torch.inf).argmax(1)
        return torch.zeros_like(certainty, dtype=torch.bool).index_fill(0, best, True)

    @torch.no_grad()
    def scale(self) -> Tensor:
        """Return what evaluation multiplies by, ``(channels,)``."""
        return self.factor if self.frozen else self.means() * self.open()


class Port(nn.Module):
    """The place where a gate multiplies what one module makes.

    Args:
        gate: shared with the other ports of the group.
        index: int64 ``(module's channels,)``, into the gate's channels, and past their end for
            channels that have no gate.
        dim: of the channels in the module's output.
    """

    index: Tensor

    def __init__(self, gate: Gate, index: Tensor, dim: int) -> None:
        super().__init__()
        self.gate, self.dim = gate, dim
        self.direct = torch.equal(index, torch.arange(gate.channels))
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, channel by channel times the gate, in its shape."""
        noisy = self.training and not self.gate.frozen
        z = self.spread(self.gate.sample(len(x)) if noisy else self.gate.scale()[None])
        shape = [len(z), *(1,) * (x.ndim - 1)]
        shape[self.dim] = z.shape[1]
        return x * z.to(x.dtype).view(shape)

    def spread(self, z: Tensor) -> Tensor:
        """Return multipliers of the module's channels, ``(n, channels)``, for those of the gate."""
        if self.direct:
            return z
        return torch.cat([z, z.new_ones(len(z), 1)], 1)[:, self.index]
