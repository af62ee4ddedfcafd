"""What compression pays on a platform, and how much of it zeros do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.cost.platforms.model import Platform
from secateur.cost.platforms.roofline import Comparison, compare
from secateur.cost.platforms.verdict import break_even
from secateur.cost.workload import LayerWork


@dataclass(frozen=True)
class Assessment:
    """A compressed network on a platform, beside the dense one it comes from.

    Attributes:
        platform: its name.
        whole: the compressed network beside the dense one.
        zeros: the compressed network beside itself with its zeros stored and multiplied.
        sparsity: share of zeros among the weights of the compressed network.
        break_even: sparsity from which these zeros gain time; None if they never do.
        narrowed_to: bits to which wider operands were narrowed; None if none was wider.
    """

    platform: str
    whole: Comparison
    zeros: Comparison
    sparsity: float
    break_even: float | None
    narrowed_to: int | None

    @property
    def smaller(self) -> float:
        """Speed-up by layers that are smaller, and by fewer bits."""
        return Comparison(self.whole.dense, self.zeros.dense, 1.0).speedup

    @property
    def text(self) -> str:
        """A few sentences with the numbers that carry them."""
        outcome = f"{self.zeros.speedup:.2f}x as fast as without its zeros"
        if self.whole.dense != self.zeros.dense:
            outcome = (
                f"{self.whole.speedup:.2f}x as fast as the dense network, {self.smaller:.2f}x by "
                f"smaller layers and fewer bits, {self.zeros.speedup:.2f}x by zeros"
            )
        sentences = [f"On {self.platform}: {outcome}.", self._about_zeros()]
        if self.narrowed_to:
            width = self.narrowed_to
            sentences.append(f"Operands of more than {width} bits are taken as {width}.")
        return " ".join(sentences)

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
        speedup = {
            "whole": self.whole.speedup,
            "smaller": self.smaller,
            "zeros": self.zeros.speedup,
        }
        return {
            "platform": self.platform,
            "seconds": {
                "dense": self.whole.dense.seconds,
                "without_zeros": self.zeros.dense.seconds,
                "compressed": self.whole.pruned.seconds,
            },
            "speedup": {of: each if each < math.inf else None for of, each in speedup.items()},
            "waits_for": self.whole.pruned.bound,
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
        dense: the network it comes from; if not given, the same layers and bits without zeros.
    """
    pruned = narrowed(platform, network)
    filled = [
        replace(layer, nonzeros=layer.weights, index_bits=0, pattern="dense") for layer in pruned
    ]
    origin = filled if dense is None else narrowed(platform, dense)
    fits = pruned == list(network) and (dense is None or origin == list(dense))
    weights = sum(layer.weights for layer in pruned)
    return Assessment(
        platform=platform.name,
        whole=compare(platform, origin, pruned),
        zeros=compare(platform, filled, pruned),
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
