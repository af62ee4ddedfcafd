"""What compression pays on a platform, and how much of it zeros do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.cost.platforms.model import Platform
from secateur.cost.platforms.roofline import Timing, faster, timing
from secateur.cost.platforms.verdict import break_even
from secateur.cost.workload import LayerWork


@dataclass(frozen=True)
class Assessment:
    """A compressed network on a platform, beside the dense one it comes from.

    Attributes:
        platform: its name.
        compressed: times of the compressed network.
        without_zeros: times of the same, with its zeros stored and multiplied.
        dense: times of the dense network; None if there is none to compare with.
        sparsity: share of zeros among the weights of the compressed network.
        break_even: sparsity from which these zeros gain time; None if they never do.
        narrowed_to: bits to which wider operands were narrowed; None if none was wider.
    """

    platform: str
    compressed: Timing
    without_zeros: Timing
    dense: Timing | None
    sparsity: float
    break_even: float | None
    narrowed_to: int | None

    @property
    def speedup(self) -> float | None:
        """How many times faster the compressed network is than the dense one."""
        return faster(self.dense, self.compressed) if self.dense else None

    @property
    def by_size(self) -> float | None:
        """The part of it that smaller layers and fewer bits bring; zeros bring the rest."""
        return faster(self.dense, self.without_zeros) if self.dense else None

    @property
    def by_zeros(self) -> float:
        """How many times faster the network is for its zeros; below 1 they make it slower."""
        return faster(self.without_zeros, self.compressed)

    @property
    def text(self) -> str:
        """A few sentences with the numbers that carry them."""
        zeros = self._about_zeros()
        if self.dense:
            outcome = (
                f"{self.speedup:.2f}x as fast as the dense network, {self.by_size:.2f}x by smaller "
                f"layers and fewer bits, {self.by_zeros:.2f}x by zeros. {zeros}"
            )
        elif self.sparsity:
            outcome = f"{self.by_zeros:.2f}x as fast as without its zeros. {zeros}"
        else:
            outcome = "no zeros to skip."
        narrow = f" Operands of more than {self.narrowed_to} bits are taken as {self.narrowed_to}."
        return f"On {self.platform}: {outcome}{narrow if self.narrowed_to else ''}"

    def _about_zeros(self) -> str:
        if not self.sparsity:
            return "It has no zeros."
        if self.break_even is None:
            return "Zeros gain nothing here, however many."
        would = "pay" if self.sparsity >= self.break_even else "would pay only"
        return (
            f"Zeros, {100 * self.sparsity:.1f} % of its weights, {would} from "
            f"{100 * self.break_even:.1f} % on."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, without layers; an infinite ratio as None."""
        speedup = {"whole": self.speedup, "size": self.by_size, "zeros": self.by_zeros}
        return {
            "platform": self.platform,
            "seconds": {
                "dense": self.dense.seconds if self.dense else None,
                "without_zeros": self.without_zeros.seconds,
                "compressed": self.compressed.seconds,
            },
            "speedup": {by: None if ratio == math.inf else ratio for by, ratio in speedup.items()},
            "waits_for": self.compressed.bound,
            "sparsity": self.sparsity,
            "break_even": self.break_even,
            "narrowed_to": self.narrowed_to,
            "text": self.text,
        }


def assess(
    platform: Platform, network: Sequence[LayerWork], dense: Sequence[LayerWork] | None = None
) -> Assessment:
    """Say what compression pays on a platform.

    Operands wider than the platform can take are narrowed to what it can, in both networks, as
    whoever runs them there must do; what that costs in accuracy is not known here.

    Args:
        platform: the machine.
        network: the compressed network.
        dense: the network it comes from, if that is known.
    """
    pruned = narrowed(platform, network)
    filled = [
        replace(layer, nonzeros=layer.weights, index_bits=0, pattern="dense") for layer in pruned
    ]
    origin = None if dense is None else narrowed(platform, dense)
    fits = pruned == list(network) and (dense is None or origin == list(dense))
    weights = sum(layer.weights for layer in pruned)
    return Assessment(
        platform=platform.name,
        compressed=timing(platform, pruned),
        without_zeros=timing(platform, filled),
        dense=timing(platform, origin) if origin is not None else None,
        sparsity=1 - sum(layer.nonzeros for layer in pruned) / weights if weights else 0.0,
        break_even=break_even(platform, filled, pruned) if weights else None,
        narrowed_to=None if fits else platform.widest,
    )


def narrowed(platform: Platform, network: Sequence[LayerWork]) -> list[LayerWork]:
    """Return a network with no operand wider than the platform multiplies and stores."""
    widest = platform.widest
    if widest is None:
        return list(network)
    return [
        replace(
            layer,
            weight_bits=min(layer.weight_bits, widest),
            activation_bits=min(layer.activation_bits, widest),
        )
        for layer in network
    ]
