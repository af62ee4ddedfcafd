"""How long a network takes on a platform: the roofline model, layer by layer.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009: a layer takes as long as the slower of its arithmetic
and its memory traffic, which overlap perfectly. The pruning-to-performance ratio (PPR) is that of
X. Ma et al., "Non-Structured DNN Weight Pruning: Is It Beneficial in Any Platform?",
arXiv 1907.02124. Where arithmetic is the bound, it is one over the efficiency of the platform's
skipping, and sparsity breaks even at one minus that efficiency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from secateur.cost.platforms.model import Platform, SkipKind
from secateur.cost.workload import LayerWork, PatternKind
from secateur.errors import SecateurError

Bound = Literal["compute", "memory"]

_USABLE: dict[PatternKind, tuple[SkipKind, ...]] = {
    "dense": (),
    "structured": ("structured", "unstructured"),
    "2:4": ("2:4", "unstructured"),
    "unstructured": ("unstructured",),
}
"""A machine that skips zeros anywhere also skips them where they have a pattern."""

_POSITION_BITS = 2
"""Which of four inputs a weight of a 2:4 layer belongs to."""


@dataclass(frozen=True)
class LayerTime:
    """How long a layer takes.

    Attributes:
        name: the layer's name.
        run_as: the kind of zeros that are skipped, or "dense".
        compute_seconds: time of its arithmetic.
        memory_seconds: time of its traffic with the memory outside the chip.
    """

    name: str
    run_as: PatternKind
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """Time of one inference: the longer of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> Bound:
        """What the layer waits for."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


@dataclass(frozen=True)
class Timing:
    """How long a network takes on a platform, as modelled.

    Attributes:
        platform: name of the platform.
        layers: one entry per layer, in the order of execution.
    """

    platform: str
    layers: tuple[LayerTime, ...]

    @property
    def seconds(self) -> float:
        """Time of one inference."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def bound(self) -> Bound:
        """What most of the time is spent waiting for."""
        computing = sum(layer.seconds for layer in self.layers if layer.bound == "compute")
        return "compute" if 2 * computing >= self.seconds else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Return the times as plain data."""
        layers = [
            asdict(layer) | {"seconds": layer.seconds, "bound": layer.bound}
            for layer in self.layers
        ]
        total = {"seconds": self.seconds, "bound": self.bound}
        return {"platform": self.platform, "total": total, "layers": layers}


def faster(before: Timing, after: Timing) -> float:
    """Return how many times faster the second network is; infinite if it takes no time."""
    return before.seconds / after.seconds if after.seconds else math.inf


@dataclass(frozen=True)
class Comparison:
    """A pruned network beside the dense one it comes from, on one platform.

    Attributes:
        dense: times of the dense network.
        pruned: times of the pruned one.
        pruning_rate: weights of the dense network per non-zero of the pruned one.
    """

    dense: Timing
    pruned: Timing
    pruning_rate: float

    @property
    def speedup(self) -> float:
        """How many times faster the pruned network is; below 1 it is slower."""
        return faster(self.dense, self.pruned)

    @property
    def ppr(self) -> float:
        """Pruning-to-performance ratio: weights removed per speed-up; 1 is ideal."""
        return self.pruning_rate / self.speedup

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        figures = {"pruning_rate": self.pruning_rate, "speedup": self.speedup, "ppr": self.ppr}
        return {**figures, "dense": self.dense.to_dict(), "pruned": self.pruned.to_dict()}


def timing(platform: Platform, network: Sequence[LayerWork]) -> Timing:
    """Model one inference of a network.

    Weights fill the memory on the chip and stay there; the share of them that does not fit is
    read from outside in every inference, evenly over the layers.

    Raises:
        SecateurError: the platform has no multiplier or no storage as wide as a layer needs.
    """
    ways = [_way(platform, layer) for layer in network]
    encoded = [
        _weight_bytes(platform, layer, way) for layer, way in zip(network, ways, strict=True)
    ]
    held = min(1.0, platform.memory.on_chip_bytes / max(1.0, sum(encoded)))
    times = []
    for layer, way, weight_bytes in zip(network, ways, encoded, strict=True):
        traffic = weight_bytes * (1 - held)
        if platform.memory.activations == "off_chip":
            width = _width(platform, layer, layer.activation_bits)
            traffic += (layer.inputs + layer.outputs) * width / 8
        compute = _dense_seconds(platform, layer) * _share(platform, layer, way)
        memory = traffic / platform.memory.bytes_per_second
        times.append(LayerTime(layer.name, way, compute, memory))
    return Timing(platform.name, tuple(times))


def compare(
    platform: Platform, dense: Sequence[LayerWork], pruned: Sequence[LayerWork]
) -> Comparison:
    """Model a dense and a pruned network on a platform."""
    nonzeros = sum(layer.nonzeros for layer in pruned)
    rate = sum(layer.weights for layer in dense) / nonzeros if nonzeros else math.inf
    return Comparison(timing(platform, dense), timing(platform, pruned), rate)


def _way(platform: Platform, layer: LayerWork) -> PatternKind:
    """Return how a layer runs: the fastest of the ways its zeros can be skipped, else dense."""
    usable: list[PatternKind] = [
        kind
        for kind in _USABLE[layer.pattern]
        if kind in platform.skips and 1 - layer.density >= platform.skips[kind].from_sparsity
    ]
    return min(usable, key=lambda kind: _share(platform, layer, kind), default="dense")


def _share(platform: Platform, layer: LayerWork, way: PatternKind) -> float:
    """Return the time of a layer's arithmetic per time of the same layer without zeros."""
    if way == "dense":
        return 1.0
    kept = 0.5 if way == "2:4" else layer.density
    unskippable = layer.activation_macs / max(1, layer.macs)
    return unskippable + (1 - unskippable) * kept / platform.skips[way].efficiency


def _weight_bytes(platform: Platform, layer: LayerWork, way: PatternKind) -> float:
    """Return the bytes of a layer's weights, with what says where they belong."""
    width = _width(platform, layer, layer.weight_bits)
    if way == "dense":
        return layer.weights * width / 8
    if way == "2:4":
        return layer.weights / 2 * (width + _POSITION_BITS) / 8
    index = layer.index_bits if way == "unstructured" else 0
    return (layer.nonzeros * width + index) / 8


def _dense_seconds(platform: Platform, layer: LayerWork) -> float:
    compute = platform.compute
    if compute.bops_per_second is not None:
        bits = (layer.macs - layer.activation_macs) * layer.weight_bits
        bits += layer.activation_macs * layer.activation_bits
        return bits * layer.activation_bits / compute.bops_per_second
    assert compute.macs_per_second is not None
    needed = max(layer.weight_bits, layer.activation_bits)
    width = _next(compute.macs_per_second, needed, platform, layer, "multiplies")
    return layer.macs / compute.macs_per_second[width]


def _width(platform: Platform, layer: LayerWork, bits: int) -> int:
    """Return the bits in which a number is stored."""
    widths = platform.memory.widths
    return bits if widths is None else _next(widths, bits, platform, layer, "stores")


def _next(
    widths: Sequence[int] | dict[int, float],
    needed: int,
    platform: Platform,
    layer: LayerWork,
    does: str,
) -> int:
    wide = [width for width in widths if width >= needed]
    if not wide:
        raise SecateurError(
            f"platform {platform.name}: it {does} at most {max(widths)} bits, "
            f"but layer '{layer.name}' has {needed}.\n"
            "Give the bits to which the network is quantized, or take another platform."
        )
    return min(wide)
