"""What the weights of a network take under each encoding of a platform, and what they must take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.codec import Quantized, Storage
from secateur.cost.breakeven import find
from secateur.cost.encodings import ENCODINGS, Dense, Encoding
from secateur.cost.weights import matrices
from secateur.errors import MembershipError, SecateurError, did_you_mean

_WEIGHT = "weight"
"""What the names of tensors have in them that are weights and not, say, positions or tokens."""


@dataclass(frozen=True)
class Bound:
    """The fewest bits for a code that knows nothing but how many elements and non-zeros there are
    and how often each value occurs. Zeros with a structure, and values that follow from their
    neighbours, can take fewer.

    Attributes:
        support: log2 C(N, k) bits for which k of N elements are not zero.
        values: k times the zero-order entropy of the non-zeros' values.
    """

    support: float = 0.0
    values: float = 0.0

    def __add__(self, other: Bound) -> Bound:
        return Bound(self.support + other.support, self.values + other.values)

    @property
    def total(self) -> float:
        """All bits together."""
        return self.support + self.values


def bound(weight: Tensor) -> Bound:
    """Return the entropy bound of a tensor: any shape, any dtype."""
    flat = weight.detach().flatten()
    nonzeros = flat[flat != 0]
    count, size = nonzeros.numel(), flat.numel()
    logarithm = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    frequency = torch.unique(nonzeros, return_counts=True)[1].double()
    values = float((frequency * torch.log2(count / frequency)).sum())
    return Bound(logarithm / math.log(2), values)


@dataclass(frozen=True)
class LayerStorage:
    """One weight tensor under each encoding.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        weights: number of elements.
        nonzeros: number of elements that are not zero.
        bits: of one value: of its level, or of its dtype.
        dense: bits of all elements in their dtype.
        encodings: by encoding, its bits; where it cannot encode the tensor, those of ``none``.
        refused: by encoding that cannot encode the tensor, why not.
        bound: the entropy bound.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzeros: int
    bits: int
    dense: int
    encodings: Mapping[str, Storage]
    refused: Mapping[str, str]
    bound: Bound


@dataclass(frozen=True)
class StorageTable:
    """The weights of a network under each encoding.

    Attributes:
        layers: one row for each weight tensor.
    """

    layers: tuple[LayerStorage, ...]

    @property
    def total(self) -> dict[str, Storage]:
        """Bits of all layers by encoding; a layer that it refuses is stored as ``none``."""
        names = self.layers[0].encodings
        return {
            name: sum((layer.encodings[name] for layer in self.layers), Storage()) for name in names
        }

    @property
    def bound(self) -> Bound:
        """The entropy bound of all layers."""
        return sum((layer.bound for layer in self.layers), Bound())

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data: ``layers``, and the same sums as ``total``."""
        layers = [_with_totals(asdict(layer)) for layer in self.layers]
        total = {
            "weights": sum(layer.weights for layer in self.layers),
            "nonzeros": sum(layer.nonzeros for layer in self.layers),
            "dense": sum(layer.dense for layer in self.layers),
            "encodings": {name: asdict(each) for name, each in self.total.items()},
            "refused": {
                name: sum(name in layer.refused for layer in self.layers) for name in self.total
            },
            "bound": asdict(self.bound),
        }
        return {"layers": layers, "total": _with_totals(total)}


def storage_table(
    weights: nn.Module | Mapping[str, Tensor],
    quantized: Mapping[str, Quantized] | None = None,
    encodings: Sequence[str | Encoding] = tuple(ENCODINGS),
) -> StorageTable:
    """Count what weights take under each encoding; biases and norms are left out.

    Args:
        weights: tensors by name; or a model, of which the weights of two or more dimensions are
            taken as the modules compute with them, masked or parametrized, and tied ones once. A
            weight is what has that word in its name, such as ``in_proj_weight`` of attention.
        quantized: by name of the tensor (``conv1.weight``), the same as levels and scale. Biases
            of a model may be among them.
        encodings: names or encodings, by default all with their defaults.

    Raises:
        MembershipError: levels are not what their weight is.
        SecateurError: there are no weights, levels belong to none, or an encoding is unknown.
    """
    others: set[str] = set()
    if isinstance(weights, nn.Module):
        others = set(weights.state_dict())  # biases, and tied weights by their other names
        weights = dict(_weights(weights))
    tensors = dict(weights)
    levels = dict(quantized or {})
    if not tensors:
        raise SecateurError("weights: there is none of two or more dimensions.")
    for name in levels:
        if name not in tensors and name not in others:
            raise SecateurError(f"quantized: '{name}' is no weight.{did_you_mean(name, tensors)}")
    chosen = [find(each) for each in encodings]
    return StorageTable(
        tuple(_layer(name, weight, levels.get(name), chosen) for name, weight in tensors.items())
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[Tensor] = set()
    for layer, module in model.named_modules():
        for name, weight in matrices(module):
            if _WEIGHT in name and weight not in seen:
                seen.add(weight)
                yield f"{layer}.{name}" if layer else name, weight.detach()


def _layer(
    name: str, weight: Tensor, quantized: Quantized | None, chosen: Sequence[Encoding]
) -> LayerStorage:
    encodings, refused = {}, {}
    dense = Dense().storage(weight, quantized)
    for encoding in chosen:
        try:
            encodings[str(encoding)] = encoding.storage(weight, quantized)
        except MembershipError as error:
            encodings[str(encoding)] = dense
            refused[str(encoding)] = str(error)
    width = 8 * weight.element_size()
    return LayerStorage(
        name=name,
        shape=tuple(weight.shape),
        weights=weight.numel(),
        nonzeros=int(torch.count_nonzero(weight)),
        bits=quantized.bits if quantized else width,
        dense=weight.numel() * width,
        encodings=encodings,
        refused=refused,
        bound=bound(quantized.levels if quantized else weight),
    )


def _with_totals(row: dict[str, Any]) -> dict[str, Any]:
    """Add to all bits by kind their sum."""
    for bits in (*row["encodings"].values(), row["bound"]):
        bits["total"] = sum(bits.values())
    return row
