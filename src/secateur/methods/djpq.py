"""DJPQ: joint pruning and mixed-precision quantization (Wang, Lu & Blankevoort, arXiv 2007.10463).

Every removable channel group has a gate z, every layer a quantizer of its weights and one of its
inputs, all trained together with the network:

    L = CE + beta sum_g KL_g + gamma BOP / BOP_fp32
    BOP = sum_l MAC_l (1 - p_in,l) (1 - p_out,l) b_w,l b_a,l

with KL_g = 1/2 sum_i log(1 + mu_i^2 / sigma_i^2), z = mu + sigma eps (``gates/vib.py``), bits
b = log2(q^t / d + 1) + 1 of step d, range q and power t (``quantizers/quantizer.py``), and p the
share of pruned channels on either side of a layer, in training by a sigmoid of
log(alpha / alpha_th). The paper adds raw BOPs, so that its gamma is tiny; here they are relative to
the fp32 total, and gamma means the same for every network. There is one joint run: no pruning
before, no fine-tuning after.

Weights have a power, activations do not. Bits may be restricted to some widths, or held fixed, in
which case and without gates this is plain quantization-aware training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from secateur.channels import ChannelGraph
from secateur.channels.trace import evaluating
from secateur.errors import RecipeError
from secateur.gates import Gate, HardConcreteGate, VIBGate, attach_gates, fold_gates
from secateur.methods.base import Method, MethodOptions, Phase, register
from secateur.methods.bops import FULL_BITS, BopCount
from secateur.methods.support import levels_of
from secateur.plan import Row
from secateur.quantizers import (
    Quantizer,
    attach_input,
    attach_weight,
    input_quantizer,
    settle_input,
    settle_weight,
    unsigned_inputs,
    weight_quantizer,
)

LEAST_BITS = 2


def _rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)) or any(not 2 <= each <= 16 for each in values):
        raise ValueError("should rise, from 2 or more to 16 or less, for example [2, 4, 8, 16]")
    return values


class DJPQOptions(MethodOptions):
    """Options of DJPQ."""

    epochs: int = Field(10, ge=1, description="epochs of joint training")
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    beta: float = Field(1e-3, ge=0, description="weight of the gates' KL term")
    gamma: float = Field(10.0, ge=0, description="weight of BOPs relative to fp32")
    gates: Literal["vib", "hard_concrete", "none"] = Field(
        "vib", description="what prunes channels"
    )
    threshold: float = Field(
        1e-3, gt=0, description="of VIB gates: mu^2/sigma^2 below which a channel goes"
    )
    quantizer: Literal["power", "linear", "lsq"] = Field(
        "power",
        description="of weights: with a trained power, without one, or one trained step per output "
        "channel (LSQ, which needs fixed bits)",
    )
    activation_bits: int = Field(8, ge=2, le=16, description="bits of layer inputs to start with")
    learn_bits: bool = Field(True, description="false keeps all bits as they start")
    widths: Annotated[tuple[int, ...], AfterValidator(_rising)] = Field(
        (), description="the only bits allowed, such as [2, 4, 8, 16]; empty for all"
    )
    quantizer_lr: float = Field(
        10.0, gt=0, description="learning rate of steps and ranges, as a multiple"
    )
    gate_lr: float = Field(20.0, gt=0, description="learning rate of gates, as a multiple")


@register
class DJPQ(Method):
    """Gates on channel groups and learned quantizers, trained with the loss and a price on BOPs.

    Each planned layer must have the set ``levels`` with zero: its ``bits`` are what its weights
    start with, and never exceed. ``finalize`` folds the gates into norms or weights, and leaves
    weights on their grids and fixed grids before layers that read through one. Closed channels are
    zero then; :func:`secateur.channels.compact` removes them. A layer without BatchNorm behind it
    takes the gate into its own rows, whose steps then differ (:attr:`steps`).

    In a loop of your own, train with Adam on :meth:`parameter_groups`:

        method = DJPQ(Levels(8, zero=True), example_input=images[:1]).attach(model)
        optimizer = torch.optim.Adam(method.parameter_groups(lr=1e-3))

    Attributes:
        notes: what stays dense, and why.
        widths: after ``finalize``, (weight bits, input bits) by layer.
        steps: after ``finalize``, by layer, what its weights are integers times of: a scalar, or
            one value per output channel in a shape that broadcasts.
    """

    name = "djpq"
    summary = "joint channel pruning and mixed-precision quantization (arXiv 2007.10463)"
    Options = DJPQOptions
    options: DJPQOptions
    unpackable = "quantized activations have no place in a packed file yet"
    default_sets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"levels": {"bits": 8, "zero": True}}

    def attach(self, model: nn.Module) -> DJPQ:
        """Add gates and quantizers to a model; ranges of inputs wait for the first batch.

        Raises:
            RecipeError: there is no example input, or a set is not ``levels`` with zero.
            ChannelError: the model cannot be traced.
        """
        super().attach(model)
        if self.example_input is None:
            raise RecipeError(
                "example_input: djpq follows the channels of the network and needs one batch.\n"
                "For example: DJPQ(Levels(8, zero=True), example_input=images[:1])"
            )
        self._check()
        self.levels = levels_of(self.plan)
        self.widths: dict[str, tuple[int, int]] = {}
        self.steps: dict[str, Tensor] = {}
        device = next(model.parameters()).device
        example = self.example_input.to(device)
        graph = ChannelGraph(model, example)
        self.bops = BopCount.of(graph)
        unsigned = unsigned_inputs(model, example)
        self.notes: list[str] = []
        self.layers = dict(self._layers(_called(model, example)))
        for row in self.layers.values():
            self._quantize(model.get_submodule(row.layer), row, row.layer not in unsigned)
        self.gates = [] if self.options.gates == "none" else attach_gates(graph, self._gate)
        self.bops.gates = self.gates
        return self

    def _check(self) -> None:
        for row in self.plan.compressed:
            patterns, levels = row.set.split() if row.set else ((), None)
            if patterns or levels is None or not levels.zero or levels.spacing != "uniform":
                raise RecipeError(
                    f"set: djpq cannot train {row.layer} into '{row.set}'; it learns bits and "
                    "channels.\nRemedy: set: levels, zero: true, and bits to start with."
                )
        if self.options.quantizer == "lsq" and self.options.learn_bits:
            raise RecipeError("quantizer: 'lsq' has fixed bits; give learn_bits: false with it.")
        widths, bits = self.options.widths, [self.options.activation_bits]
        bits += [levels.bits for levels in levels_of(self.plan).values()]
        if widths and min(bits) < widths[0]:
            raise RecipeError(
                f"widths: {list(widths)} has none for bits that start at {min(bits)}."
            )

    def _layers(self, called: set[str]) -> Iterator[tuple[str, Row]]:
        """Yield the layers to quantize; note the others."""
        owners: dict[int, str] = {}
        for row in self.plan.compressed:
            owner = owners.setdefault(id(self.weights[row.parameter]), row.layer)
            if row.layer not in called:
                self.notes.append(f"{row.layer}: stays dense, the network uses only its weight")
            elif owner != row.layer:
                self.notes.append(f"{row.layer}: stays dense, its weight is that of {owner}")
            else:
                yield row.layer, row

    def _quantize(self, layer: nn.Module, row: Row, signed: bool) -> None:
        o, levels = self.options, self.levels[row.parameter]
        channels = row.shape[0] if o.quantizer == "lsq" else None
        attach_weight(
            layer,
            Quantizer(
                levels.bits,
                power=o.quantizer == "power",
                widths=self._widths(levels.bits),
                channels=channels,
                dimensions=len(row.shape),
            ),
        )
        bits = o.activation_bits
        attach_input(layer, Quantizer(bits, signed, widths=self._widths(bits), waits=True))

    def _widths(self, bits: int) -> tuple[int, ...]:
        """Return what a quantizer that starts with so many bits may have."""
        if not self.options.learn_bits:
            return (bits,)
        return tuple(each for each in self.options.widths if each <= bits)

    def _gate(self, channels: int, makers: list[Tensor]) -> Gate:
        if self.options.gates == "vib":
            return VIBGate(channels, makers, self.options.threshold)
        return HardConcreteGate(channels, makers)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return weights, then steps and ranges, powers, and gates; only weights decay.

        Args:
            lr: learning rate of weights and powers; the others have multiples of it.
        """
        o = self.options
        gates = [p for gate, _, _ in self.gates for p in gate.parameters()]
        grids = [m for m in self.model.modules() if isinstance(m, Quantizer)]
        powers = [each.power for each in grids if each.power is not None]
        added = {id(p) for p in (*gates, *powers)}
        ranges = [p for each in grids for p in each.parameters() if id(p) not in added]
        added |= {id(p) for p in ranges}
        weights = [p for p in self.model.parameters() if id(p) not in added]
        groups = [(ranges, o.quantizer_lr), (powers, 1.0), (gates, o.gate_lr)]
        return [
            {"params": weights, "lr": lr, "lr_scale": 1.0},
            *(
                {"params": each, "lr": lr * scale, "lr_scale": scale, "weight_decay": 0.0}
                for each, scale in groups
                if each
            ),
        ]

    def phases(self) -> tuple[Phase, ...]:
        """Return the one phase of joint training."""
        return (Phase(self.name, self.options.epochs, self.options.lr),)

    def begin(self, phase: Phase, steps: int) -> None:
        """Do nothing: there is no schedule."""

    def penalty(self) -> Tensor:
        """Return beta sum KL + gamma BOP / BOP_fp32."""
        divergence = sum((gate.penalty() for gate, _, _ in self.gates), torch.zeros(()))
        return self.options.beta * divergence + self.options.gamma * self.bops.soft()

    def step(self, lr: float | None = None) -> None:
        """Keep bits and powers in their ranges, by moving steps."""
        for name, row in self.layers.items():
            layer = self.model.get_submodule(name)
            most = (self.levels[row.parameter].bits, self.options.activation_bits)
            for grid, bits in zip(
                (weight_quantizer(layer), input_quantizer(layer)), most, strict=True
            ):
                if isinstance(grid, Quantizer):
                    grid.bound(LEAST_BITS, bits)

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Fold gates, leave weights and what layers read on fixed grids; return the model."""
        if self.widths:
            return self.model
        widths = self.bops.widths()
        for name in self.layers:
            layer = self.model.get_submodule(name)
            quantizer = weight_quantizer(layer)
            assert quantizer is not None
            self.steps[name] = quantizer.step.detach().clone()
            settle_weight(layer)
            settle_input(layer)
            inputs = FULL_BITS if input_quantizer(layer) is None else widths[name][1]
            self.widths[name] = (widths[name][0], inputs)
        for name, scale in fold_gates(self.model).items():
            if name in self.steps:
                shape = (-1, *(1,) * (self.model.get_submodule(name).weight.ndim - 1))  # type: ignore[operator]
                self.steps[name] = self.steps[name] * scale.view(shape)
        return self.model

    @property
    def approximate(self) -> bool:
        """False: in evaluation the network is what it will be, on its grids and without noise."""
        return False

    def members(self) -> dict[str, Tensor]:
        """Return the planned weights as their layers use them."""
        return {
            row.parameter: self.model.get_submodule(row.layer).weight.detach()  # type: ignore[operator]
            for row in self.plan.compressed
        }

    def metrics(self) -> dict[str, float]:
        """Return BOPs relative to fp32 with whole bits and channels, and what they are made of."""
        pairs = [self.bops.widths()[name] for name in self.layers]
        opened = [gate.open() for gate, _, _ in self.gates]
        kept = sum(int(each.sum()) for each in opened)
        return {
            "bops": self.bops.hard() / self.bops.dense,
            "channels": kept / max(1, sum(map(len, opened))) if opened else 1.0,
            "weight_bits": sum(w for w, _ in pairs) / max(1, len(pairs)),
            "activation_bits": sum(a for _, a in pairs) / max(1, len(pairs)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: gates and quantizers are part of the model."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, see :meth:`state_dict`."""


def _called(model: nn.Module, example_input: Tensor) -> set[str]:
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
