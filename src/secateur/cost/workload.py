"""What a machine is given to do, layer by layer, as plain data for models of machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.cost.account import inspect
from secateur.cost.encodings.gaps import RelativeEscape
from secateur.cost.weights import matrices

PatternKind = Literal["dense", "structured", "2:4", "unstructured"]

_KINDS: tuple[PatternKind, ...] = ("dense", "structured", "2:4", "unstructured")


@dataclass(frozen=True)
class LayerWork:
    """One layer as a machine sees it.

    Attributes:
        name: the layer's name.
        macs: multiply-accumulates of one inference, those with zero weights included.
        weights: number of weights, zeros included.
        nonzeros: number of weights that are not zero.
        weight_bits: bits of one weight.
        activation_bits: bits of one activation.
        index_bits: bits that say where the non-zeros are, if they may be anywhere.
        inputs: activations that the layer reads in one inference.
        outputs: activations that it writes.
        pattern: where the zeros are: nowhere ("dense"), in whole rows and columns of the GEMM
            matrix ("structured"), at least two in every four consecutive inputs and at most three
            quarters in all ("2:4"; sparser tensors have this form by chance), or anywhere
            ("unstructured").
        activation_macs: those of ``macs`` that multiply two activations, as in attention; zero
            weights spare none of them.
    """

    name: str
    macs: int
    weights: int
    nonzeros: int
    weight_bits: int
    activation_bits: int
    index_bits: int
    inputs: int
    outputs: int
    pattern: PatternKind
    activation_macs: int = 0

    @property
    def density(self) -> float:
        """Non-zeros per weight; 1 for a layer without weights, such as attention."""
        return self.nonzeros / self.weights if self.weights else 1.0


def workload(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    bits: tuple[int, int] = (32, 32),
    first_last_bits: int | None = None,
    weight_bits: Mapping[str, int] | None = None,
    activation_bits: Mapping[str, int] | None = None,
) -> tuple[LayerWork, ...]:
    """Describe the layers of a model that multiply, in the order of execution.

    Zeros are read off the weights as they stand, so a network is described after pruning. A cut
    network has smaller layers and needs no pattern.

    Args:
        model: any module.
        example_input: one inference: a batch of 1, or the tuple of arguments.
        bits: (weight bits, activation bits) of every layer.
        first_last_bits: both bits of the first and the last layer, where they differ.
        weight_bits: by layer, the bits of its weights where it has its own; see
            :func:`secateur.cost.inspect`.
        activation_bits: the same for what layers read.

    Raises:
        SecateurError: see :func:`secateur.cost.inspect`.
    """
    cost = inspect(model, example_input, bits, first_last_bits, weight_bits, activation_bits)
    return tuple(
        _layer_work(
            [weight.detach() for _, weight in matrices(model.get_submodule(layer.name))],
            name=layer.name,
            macs=layer.macs,
            weight_bits=layer.weight_bits,
            activation_bits=layer.activation_bits,
            inputs=layer.inputs,
            outputs=layer.outputs,
            activation_macs=layer.activation_macs,
        )
        for layer in cost.layers
        if layer.macs
    )


def pattern_of(weight: Tensor) -> PatternKind:
    """Say where the zeros of a weight tensor (out, in, ...) are, see :class:`LayerWork`."""
    support = weight != 0
    if support.all():
        return "dense"
    matrix = support.flatten(1)
    if torch.equal(matrix, matrix.any(1, keepdim=True) & matrix.any(0, keepdim=True)):
        return "structured"
    if weight.shape[1] % 4 or 4 * support.sum() < support.numel():
        return "unstructured"
    fours = support.movedim(1, -1).reshape(-1, 4)
    return "2:4" if fours.sum(1).max() <= 2 else "unstructured"


def gap_bits(weight: Tensor) -> int:
    """Count the bits of relative indices, as sparse accelerators store them (EIE, ISCA 2016)."""
    return RelativeEscape().storage(weight).index


def _layer_work(weights: list[Tensor], **counted: Any) -> LayerWork:
    """Join what is counted about a layer with what its weights show."""
    kinds = [pattern_of(weight) for weight in weights]
    return LayerWork(
        **counted,
        weights=sum(weight.numel() for weight in weights),
        nonzeros=sum(int(weight.count_nonzero()) for weight in weights),
        index_bits=sum(gap_bits(weight) for weight in weights if not weight.all()),
        pattern=max(kinds, key=_KINDS.index, default="dense"),
    )
