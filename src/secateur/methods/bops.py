"""Bit operations of a network in training, with gradients by gates and bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.channels import ChannelGraph
from secateur.channels.trace import evaluating
from secateur.cost import inspect
from secateur.gates import Gate, Gated
from secateur.quantizers import FixedQuantizer, Quantizer, input_quantizer, weight_quantizer

FULL_BITS = 32


@dataclass(frozen=True)
class Product:
    """One layer that multiplies.

    Attributes:
        name: of the module.
        macs: multiply-accumulates with all channels, for one image.
        given: int64, the class of each input channel; None where it does not count, as in a
            depthwise convolution, whose inputs are its outputs.
        made: int64, the class of each output channel; None for an operation without channels.
        weights: number of them.
        inputs: numbers that it reads for one image.
        outputs: numbers that it writes.
    """

    name: str
    macs: int
    given: Tensor | None
    made: Tensor | None
    weights: int = 0
    inputs: int = 0
    outputs: int = 0


class BopCount:
    """BOPs = sum over layers of MACs x inputs kept x outputs kept x weight bits x input bits.

    Channels count as kept or pruned on both sides of a layer, and nothing but multiplications
    counts, at 32 bits where nothing is quantized. The first and the last layer count like all.

    Args:
        graph: of the model, before anything was attached to it.
        products: its layers that multiply.

    Attributes:
        gates: of :func:`~secateur.gates.attach_gates`; none until they are given.
        dense: BOPs of the whole network at 32 bits, for one image.
    """

    def __init__(self, graph: ChannelGraph, products: Sequence[Product]) -> None:
        self.model, self.products = graph.model, products
        self.layers = [graph.model.get_submodule(each.name) for each in products]
        self.classes = graph.count
        self.gates: Sequence[Gated] = ()
        self.dense = sum(each.macs for each in products) * FULL_BITS**2
        device = next(self.model.parameters()).device
        shares = torch.zeros(2 * len(products), self.classes)
        for row, product in enumerate(products):
            for side, classes in enumerate((product.given, product.made)):
                if classes is not None:
                    ones = torch.ones(len(classes)) / len(classes)
                    shares[2 * row + side].index_add_(0, classes, ones)
        self._shares = shares.to(device)
        self._alone = (shares.sum(1) == 0).float().to(device)
        self._macs = torch.tensor([float(each.macs) for each in products], device=device)

    @classmethod
    def of(cls, graph: ChannelGraph) -> BopCount:
        """Count the multiply-accumulates of the model of a graph as it is now."""
        layers = {each.module: each for each in graph.layers}
        batch = len(graph.example_input)
        products = []
        for row in inspect(graph.model, graph.example_input).layers:
            given, made = (graph.sides.get((row.name, side)) for side in ("in", "out"))
            layer = layers.get(row.name)
            if layer is not None and layer.groups > 1 and layer.groups == layer.width:
                given = None
            if row.name in graph.heads:  # products of activations, for each head
                given, made = None, graph.heads[row.name]
            if row.macs:
                weights = math.prod(row.shape) if row.shape else 0
                sizes = (weights, row.inputs // batch, row.outputs // batch)
                products.append(Product(row.name, row.macs // batch, given, made, *sizes))
        return cls(graph, products)

    def soft(self) -> Tensor:
        """Return the BOPs as a share of the dense network's, a scalar with gradients."""
        kept = self.kept(lambda gate: gate.keep_prob())
        sides = self.sides(kept).prod(1)
        bits = self.real_bits().to(sides).prod(1)
        return sides * self._macs @ bits / self.dense

    def sides(self, kept: Tensor) -> Tensor:
        """Return the shares of channels that are open before and behind each product.

        Args:
            kept: of each channel class, ``(classes,)``, floating point on any device.

        Returns:
            ``(products, 2)``; 1 where channels do not count.
        """
        return (self._shares.to(kept) @ kept + self._alone.to(kept)).view(-1, 2)

    def hard(self) -> int:
        """Return the BOPs for one image with whole bits and whole channels."""
        kept = self.kept(lambda gate: gate.open().float()).bool().cpu()
        widths, total = self.widths(), 0
        for product in self.products:
            macs = product.macs
            for classes in (product.given, product.made):
                if classes is not None:
                    macs = macs * int(kept[classes].sum()) // len(classes)
            weights, inputs = widths.get(product.name, (FULL_BITS, FULL_BITS))
            total += macs * weights * inputs
        return total

    def widths(self) -> dict[str, tuple[int, int]]:
        """Return (weight bits, input bits) of every layer that multiplies, in whole bits."""
        found = {}
        for product, layer in zip(self.products, self.layers, strict=True):
            pair = _grids(layer)
            weights, inputs = (FULL_BITS if each is None else each.width for each in pair)
            found[product.name] = (weights, inputs)
        return found

    def real_bits(self) -> Tensor:
        """Return weight bits and input bits of every product, ``(products, 2)`` with gradients."""
        full = self._shares.new_tensor(float(FULL_BITS))
        grids = (grid for layer in self.layers for grid in _grids(layer))
        bits = [grid.bits() if isinstance(grid, Quantizer) else full for grid in grids]
        return torch.stack(bits).view(-1, 2)

    def kept(self, of: Callable[[Gate], Tensor]) -> Tensor:
        """Return what a function says of the channels of each gate, by class; 1 without a gate."""
        kept = torch.ones(self.classes, device=self._shares.device)
        for gate, classes, _ in self.gates:
            kept = kept.index_put((classes.to(kept.device),), of(gate))
        return kept


def _grids(layer: nn.Module) -> tuple[Quantizer | None, Quantizer | FixedQuantizer | None]:
    return weight_quantizer(layer), input_quantizer(layer)


def called(model: nn.Module, example_input: Tensor) -> set[str]:
    """Return the modules that run when the model does, by name."""
    seen: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, i, name=name: seen.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
