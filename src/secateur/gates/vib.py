"""Gates of the variational information bottleneck (Dai et al., VIBNet, arXiv 1802.10399).

    z = mu + sigma eps,  eps ~ N(0, 1)

The regularizer is the divergence of N(mu, sigma^2) from the best prior N(0, mu^2 + sigma^2):

    KL = 1/2 log(1 + mu^2 / sigma^2)

A channel is closed where its signal-to-noise ratio alpha = mu^2 / sigma^2 is below a threshold.
(The authors' code has the reciprocal for alpha; here it is that of DJPQ's text.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.gates.gate import Gate

EPSILON = 1e-12
"""Added to sigma^2 and mu^2, so that logarithms exist."""


class VIBGate(Gate):
    """Gaussian multipliers; mu starts at 1.

    Args:
        channels: number of channels.
        makers: see :class:`Gate`.
        threshold: of alpha, below which a channel is closed.
        log_variance: that sigma^2 starts at. VIBNet's own code has -9, from where it takes many
            thousand steps to close anything.
    """

    def __init__(
        self,
        channels: int,
        makers: list[Tensor],
        threshold: float = 1e-3,
        log_variance: float = -5.0,
    ) -> None:
        super().__init__(channels, makers)
        self.threshold = threshold
        self.mu = nn.Parameter(torch.ones(channels))
        self.log_variance = nn.Parameter(torch.full((channels,), log_variance))

    def sample(self, count: int) -> Tensor:
        """Draw z for so many samples, ``(count, channels)``."""
        noise = torch.randn(count, self.channels, device=self.mu.device, dtype=self.mu.dtype)
        return torch.addcmul(self.mu, noise, (self.log_variance / 2).exp())

    def means(self) -> Tensor:
        """Return mu."""
        return self.mu

    def log_alpha(self) -> Tensor:
        """Return the logarithm of mu^2 / sigma^2, ``(channels,)``."""
        return (self.mu.square() + EPSILON).log() - (self.log_variance.exp() + EPSILON).log()

    def certainty(self) -> Tensor:
        """Return log(alpha / threshold)."""
        return self.log_alpha() - math.log(self.threshold)

    def penalty(self) -> Tensor:
        """Return the divergence, in nats, summed over the channels."""
        return 0.5 * torch.log1p(self.mu.square() / (self.log_variance.exp() + EPSILON)).sum()
