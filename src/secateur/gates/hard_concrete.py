"""Hard-concrete gates (Louizos, Welling & Kingma, arXiv 1712.01312).

    s = sigmoid((log u - log(1 - u) + a) / beta),  u uniform in (0, 1)
    z = clip(gamma + (zeta - gamma) s, 0, 1)

The regularizer is the expected number of z that are not 0, sigmoid(a - beta log(-gamma / zeta)) for
each. Without noise s is sigmoid(a), and a channel is closed where z is 0 then.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.gates.gate import Gate

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch, as in the paper."""


class HardConcreteGate(Gate):
    """Multipliers in [0, 1] that can be exactly 0 and 1.

    Args:
        channels: number of channels.
        makers: see :class:`Gate`.
        logit: that ``a`` starts at; at 3 z is 1 without noise.
    """

    def __init__(self, channels: int, makers: list[Tensor], logit: float = 3.0) -> None:
        super().__init__(channels, makers)
        self.logit = nn.Parameter(torch.full((channels,), logit))

    def sample(self, count: int) -> Tensor:
        """Draw z for so many samples, ``(count, channels)``."""
        logit = self.logit
        u = torch.rand(count, self.channels, device=logit.device, dtype=logit.dtype)
        u = u.clamp(1e-6, 1 - 1e-6)
        return _stretched(torch.sigmoid((torch.logit(u) + logit) / BETA))

    def means(self) -> Tensor:
        """Return z without noise."""
        return _stretched(torch.sigmoid(self.logit))

    def certainty(self) -> Tensor:
        """Return a, less what it is where z reaches 0: 0 there."""
        return self.logit - math.log(-GAMMA / ZETA)

    def keep_prob(self) -> Tensor:
        """Return the probability that z is not 0."""
        return torch.sigmoid(self.logit - BETA * math.log(-GAMMA / ZETA))

    def penalty(self) -> Tensor:
        """Return the expected number of channels that are not 0."""
        return self.keep_prob().sum()


def _stretched(s: Tensor) -> Tensor:
    return (GAMMA + (ZETA - GAMMA) * s).clamp(0, 1)
