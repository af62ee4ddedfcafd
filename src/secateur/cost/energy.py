"""Energy of one inference, modelled from tables of operation energies.

The count is the usual one (V. Sze et al., "Efficient processing of deep neural networks", Proc.
IEEE 105(12), 2017): arithmetic, and the traffic that cannot be avoided. Every weight is read once,
every input of a layer is read once and every output written once; reuse in between is free, and so
are control, clocks, leakage, biases, normalization and activation functions. Weights lie in the
smallest SRAM of the table that holds those of the whole network, activations in the smallest that
holds the inputs and outputs of any one layer, else in DRAM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.cost.node import Node, load_node
from secateur.cost.workload import LayerWork, workload

NODE = "45nm"
"""The technology node where none is chosen."""

CAVEAT = (
    "Modelled, not measured: at batch 1, real machines spent 29 to 3,100 times as much on one\n"
    "network (arXiv 1812.01739). Compare networks on one node with it; never quote the joules."
)


@dataclass(frozen=True)
class LayerEnergy:
    """Joules of one layer in one inference.

    Attributes:
        name: the layer's name.
        compute: of its multiply-accumulates.
        weights: of reading its weights, and their indices where zeros are skipped.
        activations: of reading its inputs and writing its outputs.
    """

    name: str
    compute: float
    weights: float
    activations: float

    @property
    def joules(self) -> float:
        """All three."""
        return self.compute + self.weights + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Return the three and their sum as plain data."""
        return asdict(self) | {"joules": self.joules}


@dataclass(frozen=True)
class Energy:
    """Modelled energy of one inference.

    Attributes:
        node: name of the technology node.
        layers: one entry per layer that multiplies, in the order of execution.
        skip_zeros: whether zero weights are neither multiplied nor stored.
        weights_in: bytes of the SRAM that holds the weights; None for DRAM.
        activations_in: the same for activations.
        caveat: what to print beside any of these figures.
    """

    node: str
    layers: tuple[LayerEnergy, ...]
    skip_zeros: bool
    weights_in: int | None
    activations_in: int | None
    caveat: str = CAVEAT

    @property
    def joules(self) -> float:
        """Joules of one inference."""
        return self.total.joules

    @property
    def total(self) -> LayerEnergy:
        """All layers together, under the name ``total``."""
        return LayerEnergy(
            "total",
            compute=sum(layer.compute for layer in self.layers),
            weights=sum(layer.weights for layer in self.layers),
            activations=sum(layer.activations for layer in self.layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the energy as plain data."""
        layers = [layer.to_dict() for layer in self.layers]
        return asdict(self) | {"joules": self.joules, "layers": layers}


def energy(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    bits: tuple[int, int] = (32, 32),
    first_last_bits: int | None = None,
    node: str | Path = NODE,
    skip_zeros: bool = False,
    weight_bits: Mapping[str, int] | None = None,
    activation_bits: Mapping[str, int] | None = None,
) -> Energy:
    """Model the energy of one inference.

    Args:
        model: any module; its zero weights are those that may be skipped.
        example_input: one inference: a batch of 1, or the tuple of arguments.
        bits: (weight bits, activation bits) of every layer. 16 and 32 are floating point.
        first_last_bits: both bits of the first and the last layer, where they differ.
        node: one of :func:`secateur.cost.node.node_names`, or the path of a YAML file.
        skip_zeros: whether the hardware skips zero weights; ordinary hardware multiplies them.
        weight_bits: by layer, the bits of its weights where it has its own; see
            :func:`secateur.cost.inspect`.
        activation_bits: the same for what layers read.

    Raises:
        SecateurError: bits are out of range, the model cannot run, or there is no such node.
    """
    layers = workload(model, example_input, bits, first_last_bits, weight_bits, activation_bits)
    return energy_of(layers, load_node(node), skip_zeros)


def energy_of(network: Sequence[LayerWork], node: Node, skip_zeros: bool = False) -> Energy:
    """Model the energy of one inference of a network that is given as plain data."""
    stored = [_weight_bits(layer, skip_zeros) for layer in network]
    moved = [(layer.inputs + layer.outputs) * layer.activation_bits for layer in network]
    weights_in = node.home(sum(stored) / 8)
    activations_in = node.home(max(moved, default=0) / 8)
    layers = tuple(
        LayerEnergy(
            name=layer.name,
            compute=(layer.macs - layer.activation_macs)
            * (layer.density if skip_zeros else 1.0)
            * node.mac_joules(layer.weight_bits, layer.activation_bits)
            + layer.activation_macs * node.mac_joules(layer.activation_bits, layer.activation_bits),
            weights=weight_bits * node.bit_joules(weights_in),
            activations=activation_bits * node.bit_joules(activations_in),
        )
        for layer, weight_bits, activation_bits in zip(network, stored, moved, strict=True)
    )
    return Energy(node.name, layers, skip_zeros, weights_in, activations_in)


def _weight_bits(layer: LayerWork, skip_zeros: bool) -> int:
    if not skip_zeros:
        return layer.weights * layer.weight_bits
    return layer.nonzeros * layer.weight_bits + layer.index_bits
