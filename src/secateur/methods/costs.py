"""Kinds of cost that a budget may limit, of a network in training: from bits and open channels.

Every kind is a sum over the layers that multiply, of terms in the shares of channels that are open
before and behind a layer, its weight bits and its input bits. The same code takes whole numbers, to
count, and straight-through stand-ins for them, which have gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur import cost
from secateur.channels import ChannelGraph, longest
from secateur.codec import Quantized, Storage, storage
from secateur.codec.bits import varint
from secateur.cost.energy import NODE, energy
from secateur.cost.node import load_node
from secateur.gates import PORT
from secateur.methods.bops import BopCount, Product
from secateur.quantizers import weight_quantizer
from secateur.quantizers.text import LAYERS

COSTS: dict[str, type[Cost]] = {}
"""Kinds by the name that a budget uses."""

STEP_BYTES = 7
"""Of the entry of a layer's step of inputs."""

TEXTS = '"widths":"","activations":"",'
"""What a file puts around its notes on channels and grids."""


@dataclass(frozen=True)
class State:
    """What costs depend on.

    Attributes:
        weights: bits of the weights of each layer, ``(layers,)`` float64.
        inputs: bits of what it reads.
        kept: whether the channels of each class are open, ``(classes,)`` float64.
    """

    weights: Tensor
    inputs: Tensor
    kept: Tensor


class Cost(ABC):
    """One kind of cost of one network.

    Args:
        count: of the network, with its gates.
        graph: of its channels.
        overhead: bytes of a packed file that no tensor takes.
    """

    name: ClassVar[str]

    def __init__(self, count: BopCount, graph: ChannelGraph, overhead: int) -> None:
        self.count = count
        self.macs = _column(each.macs for each in count.products)

    def __init_subclass__(cls) -> None:
        COSTS[cls.name] = cls

    @staticmethod
    @abstractmethod
    def dense(model: nn.Module, example_input: Tensor) -> float:
        """Return what a network costs in float32, for one image."""

    @abstractmethod
    def layers(self, state: State) -> Tensor:
        """Return what each layer costs, ``(layers,)``."""

    def rest(self, state: State) -> Tensor:
        """Return what everything else costs, a scalar."""
        return torch.zeros((), dtype=torch.float64)

    def total(self, state: State) -> Tensor:
        """Return all of it, a scalar."""
        return self.layers(state).sum() + self.rest(state)

    def measure(self, state: State, still: bool) -> None:  # noqa: B027 - most have nothing to see
        """Look at the weights again, for costs that depend on their values.

        Args:
            state: of the network.
            still: whether the weights are those of the last call.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what was found when they were last looked at."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as above
        """Restore :meth:`state_dict`."""

    def _open(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the shares of channels that are open before and behind each layer."""
        given, made = self.count.sides(state.kept).unbind(1)
        return given, made


class Macs(Cost):
    """Multiply-accumulates."""

    name = "macs"

    @staticmethod
    def dense(model: nn.Module, example_input: Tensor) -> float:
        """Count them for one image."""
        return cost.inspect(model, example_input[:1]).macs

    def layers(self, state: State) -> Tensor:
        """Count them without closed channels on either side."""
        given, made = self._open(state)
        return self.macs * given * made


class Bops(Macs):
    """Multiply-accumulates x weight bits x input bits."""

    name = "bops"

    @staticmethod
    def dense(model: nn.Module, example_input: Tensor) -> float:
        """Count them for one image, at 32 bits."""
        return cost.inspect(model, example_input[:1]).bops

    def layers(self, state: State) -> Tensor:
        """Count them without closed channels on either side."""
        return super().layers(state) * state.weights * state.inputs


class Energy(Cost):
    """Modelled joules of one inference (``secateur.cost.energy``)."""

    name = "energy"

    def __init__(self, count: BopCount, graph: ChannelGraph, overhead: int) -> None:
        super().__init__(count, graph, overhead)
        self.node = load_node(NODE)
        self.read = _column(each.inputs for each in count.products)
        self.written = _column(each.outputs for each in count.products)
        self.sizes = _column(each.weights for each in count.products)

    @staticmethod
    def dense(model: nn.Module, example_input: Tensor) -> float:
        """Model them for one image, at 32 bits."""
        return energy(model, example_input[:1]).joules

    def layers(self, state: State) -> Tensor:
        """Add arithmetic and traffic; which memory is used has no gradient."""
        given, made = self._open(state)
        product = state.weights * state.inputs
        pairs = zip(state.weights.tolist(), state.inputs.tolist(), strict=True)
        joules = _column(self.node.mac_joules(round(w), round(a)) for w, a in pairs)
        compute = self.macs * given * made * joules * (product / product.detach())
        stored = self.sizes * given * made * state.weights
        moved = (self.read * given + self.written * made) * state.inputs
        sizes = (stored.detach().sum(), moved.detach().max())
        weights, activations = (
            self.node.bit_joules(self.node.home(float(size) / 8)) for size in sizes
        )
        return compute + stored * weights + moved * activations


class File(Cost):
    """Bytes of the packed file.

    Levels take what the codec makes of them now, relative to what equally frequent ones would take;
    :meth:`measure` asks it.
    """

    name = "file"

    def __init__(self, count: BopCount, graph: ChannelGraph, overhead: int) -> None:
        super().__init__(count, graph, overhead)
        self.sizes = _column(each.weights for each in count.products)
        self.ratio = torch.ones(len(count.products), dtype=torch.float64)
        self.known: dict[tuple[int, int, bytes], float] = {}  # by row, bits and channels
        self.by_class = torch.zeros(count.classes, dtype=torch.float64)
        self.fixed = float(overhead) + len(TEXTS) + longest(graph.model)
        notes = sum(isinstance(each, LAYERS) for each in graph.model.modules())  # and a ";" of each
        self.fixed += notes + STEP_BYTES * len(count.products)
        layers = {each.name for each in count.products}
        for name, module in graph.model.named_modules():
            for leaf, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                classes = graph.sides.get((name, "out"))
                if tensor.ndim == 1 and classes is not None and len(classes) == len(tensor):
                    sizes = torch.full((len(classes),), float(tensor.element_size()))
                    self.by_class.index_add_(0, classes.cpu(), sizes.double())
                    self.fixed += 4
                elif not (name in layers and leaf == "weight"):
                    self.fixed += _entry(storage(tensor))

    @staticmethod
    def dense(model: nn.Module, example_input: Tensor) -> float:
        """Return the bytes of the state dict in float32."""
        return float(4 * sum(tensor.numel() for tensor in model.state_dict().values()))

    def layers(self, state: State) -> Tensor:
        """Return the bytes of each weight's entry."""
        _, made = self._open(state)
        return self._plain(state) * self.ratio + 4 * (self.rows * made).clamp_min(1)

    @cached_property
    def rows(self) -> Tensor:
        """Rows of each weight that have a step of their own, once gates and grids are there."""
        return _column(self._own_steps(each) for each in self.count.layers)

    @staticmethod
    def _own_steps(layer: nn.Module) -> int:
        """Count them: by channel, or since a row takes the multiplier of its gate."""
        quantizer = weight_quantizer(layer)
        several = quantizer is not None and (
            quantizer.log2_limit.numel() > 1 or hasattr(layer, PORT)
        )
        return len(layer.weight) if several else 0  # type: ignore[arg-type]

    def _plain(self, state: State) -> Tensor:
        """Return the bytes of all levels, one as frequent as another: -1, 0, 1 at 2 bits."""
        given, made = self._open(state)
        return self.sizes * given * made * torch.log2(torch.exp2(state.weights) - 1) / 8

    def rest(self, state: State) -> Tensor:
        """Return the bytes of biases, norms and grids of what is open, and of the container."""
        digits = torch.floor(state.inputs.detach() * math.log10(2)) + 1
        return self.by_class @ state.kept + self.fixed + (digits + 1).sum()  # as in s127

    @torch.no_grad()
    def measure(self, state: State, still: bool) -> None:
        """Encode all weights, without their closed channels."""
        if not still:
            self.known.clear()
        plain, kept = self._plain(state), state.kept.bool()
        for row, product in enumerate(self.count.products):
            if product.weights and float(plain[row]):
                bits = round(float(state.weights[row]))
                made, given = _among(kept, product.made), _among(kept, product.given)
                key = row, bits, torch.cat([made, given]).numpy().tobytes()
                if key not in self.known:
                    self.known[key] = self._bytes(product, made, given, bits)
                self.ratio[row] = self.known[key] / float(plain[row])

    def state_dict(self) -> dict[str, Any]:
        """Return bytes relative to bits, by layer, and of what was encoded at the start."""
        return {"ratio": self.ratio.clone(), "fixed": self.fixed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.ratio.copy_(state["ratio"])
        self.fixed = state["fixed"]

    def _bytes(self, product: Product, made: Tensor, given: Tensor, bits: int) -> float:
        """Return the bytes of what is left of a weight with these open channels, without steps."""
        layer = self.count.model.get_submodule(product.name)
        quantizer, weight = weight_quantizer(layer), layer.weight
        assert isinstance(weight, Tensor)
        step = torch.ones(()) if quantizer is None else quantizer.step.detach()
        live = (weight.detach() / step).cpu()
        if len(made) == len(live):
            live = live[made]
        if len(given) == live.shape[1]:
            live = live[:, given]
        if quantizer is None:
            return _entry(storage(live))
        levels = Quantized(live.round().to(torch.int16), 1.0, bits, zero=True)
        return _entry(storage(levels.levels.float(), levels))


def dense_costs(model: nn.Module, example_input: Tensor) -> Mapping[str, float]:
    """Return what a network costs in float32, by kind, for one image."""
    return {name: kind.dense(model, example_input) for name, kind in COSTS.items()}


def _entry(size: Storage) -> float:
    """Return the bytes of an entry of a packed file: a record behind its length."""
    record = size.total // 8
    return record + len(varint(record))


def _among(kept: Tensor, classes: Tensor | None) -> Tensor:
    """Return which channels of a layer's side are open; none where they do not count."""
    return kept[:0] if classes is None else kept[classes.cpu()]


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
