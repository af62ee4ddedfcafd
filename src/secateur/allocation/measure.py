"""What planned weights cost, by kind of budget.

A new kind of budget is one class here: what a layer takes, what everything else takes, and what the
dense network takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from secateur.artifact.architecture import Architecture
from secateur.artifact.container import entry_bytes
from secateur.codec import Storage, storage
from secateur.plan import BIAS, Plan, Row
from secateur.sets import ConstraintSet
from secateur.sets.levels import at_half

MEASURES: dict[str, type[Measure]] = {}
"""Measures by the name of the budget's kind."""

FLOAT_BITS = 32

AnyMeasure = TypeVar("AnyMeasure", bound="type[Measure]")


def register(cls: AnyMeasure) -> AnyMeasure:
    """Class decorator: let budgets name this measure."""
    MEASURES[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Costs:
    """What a plan's projection of a network costs.

    Attributes:
        layers: by name of the planned layer.
        rest: everything else that the budget counts, by what it is.
        projected: the weights that were measured, by parameter name.
    """

    layers: Mapping[str, float]
    rest: Mapping[str, float]
    projected: Mapping[str, Tensor]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.layers.values()) + sum(self.rest.values())


class Measure(ABC):
    """One kind of cost of one network.

    Args:
        model: the network, at the weights that are to be projected; they may change meanwhile.
        plan: whose rows are measured.
        overhead: bytes of a packed file that no tensor takes (``packed.overhead_bytes``).

    Attributes:
        rest: what cannot be planned, by what it is.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, plan: Plan, overhead: int) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.weights = {
            row.parameter: self.parameters[row.parameter].detach().clone()
            for row in plan.compressed
        }
        self.rest: dict[str, float] = {}

    @staticmethod
    @abstractmethod
    def dense(model: nn.Module, plan: Plan) -> float:
        """Return what a network costs before compression: a budget of ``10x`` is a tenth of that.

        Args:
            model: the network.
            plan: made for the network as it is.
        """

    @abstractmethod
    def layer(self, row: Row, target: ConstraintSet, weight: Tensor) -> float:
        """Return what a layer costs.

        Args:
            row: of the plan.
            target: the set that the weight is a member of.
            weight: as projected.
        """

    def of(self, plan: Plan) -> Costs:
        """Project the network's weights with a plan and measure them.

        Args:
            plan: with all rows of the measure's plan, or some.
        """
        weights = {row.parameter: self.weights[row.parameter] for row in plan.compressed}
        plan = plan.within(weights)
        projected = plan.project(weights, self.model)
        sets = plan.sets(projected)
        layers = {
            row.layer: self.layer(row, sets[row.layer], projected[row.parameter])
            for row in plan.compressed
        }
        return Costs(layers, self.rest, projected)


@register
class Weights(Measure):
    """Non-zeros among the planned weights."""

    name = "weights"

    @staticmethod
    def dense(model: nn.Module, plan: Plan) -> float:
        """Count the planned weights."""
        return float(sum(row.weights for row in plan.compressed))

    def layer(self, row: Row, target: ConstraintSet, weight: Tensor) -> float:
        """Count the non-zeros."""
        return float(weight.count_nonzero())


@register
class Bits(Measure):
    """Bits of the planned weights in a packed file: values, indices and headers of records.

    Dense weights take 32 bits each.
    """

    name = "bits"

    @staticmethod
    def dense(model: nn.Module, plan: Plan) -> float:
        """Count the bits of the planned weights in float32."""
        return FLOAT_BITS * Weights.dense(model, plan)

    def layer(self, row: Row, target: ConstraintSet, weight: Tensor) -> float:
        """Count the bits of the weight's record."""
        return stored(target, weight).total


@register
class File(Measure):
    """Bytes of the whole packed file, against the dense network in float32.

    A layer takes the entries of its weight and of its bias, which will have 8 bits, and which is
    zero where no weight is left, but for the last layer. All other tensors are stored as they are.
    """

    name = "file"

    def __init__(self, model: nn.Module, plan: Plan, overhead: int) -> None:
        super().__init__(model, plan, overhead)
        rows = plan.compressed
        architecture = Architecture.of(model)
        own = (name for row in rows for name in (row.parameter, row.bias))
        planned = {architecture.first_names[name] for name in own if name in self.parameters}
        self.last = rows[-1].layer
        self.rest = {"container": float(overhead)}
        for name, tensor in architecture.tensors.items():
            if name not in planned:
                self.rest[name] = entry_bytes(storage(tensor).total // 8)

    @staticmethod
    def dense(model: nn.Module, plan: Plan) -> float:
        """Count the bytes of the state dict in float32."""
        return float(4 * sum(tensor.numel() for tensor in model.state_dict().values()))

    def layer(self, row: Row, target: ConstraintSet, weight: Tensor) -> float:
        """Count the bytes of the entries of weight and bias."""
        total = entry_bytes(stored(target, weight).total // 8)
        if row.bias in self.parameters:
            bias = self.parameters[row.bias].detach()
            if row.layer != self.last:
                bias = bias.masked_fill((weight == 0).flatten(1).all(dim=1), 0)
            total += entry_bytes(stored(BIAS, BIAS.project(bias)).total // 8)
        return total


def stored(target: ConstraintSet, weight: Tensor) -> Storage:
    """Return the bits that a member of a set will take, the scale of its levels in float16."""
    quantized = target.quantized(weight)
    if quantized is None:
        return storage(weight)
    quantized = at_half(quantized)
    return storage(quantized.weight(weight.dtype), quantized)
