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

With a budget there is no gamma. The search is held to a path that ends at the budget
(``pressure.py``) while gates may close before bits go below 4, then the network is put onto the
budget exactly (``landing.py``), bits and channels are frozen, and it is fine-tuned. Neither is from
the paper, which tunes gamma.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.channels import ChannelGraph
from secateur.errors import RecipeError
from secateur.gates import Gate, HardConcreteGate, VIBGate, attach_gates, fold_gates
from secateur.methods.base import Method, Phase, register
from secateur.methods.bops import FULL_BITS, BopCount, called
from secateur.methods.costs import COSTS
from secateur.methods.djpq_options import DJPQOptions
from secateur.methods.landing import Landing, approach, knobs_of
from secateur.methods.ledger import Ledger
from secateur.methods.pressure import Pressure
from secateur.methods.support import levels_of
from secateur.outcome import Outcome
from secateur.plan import Row
from secateur.quantizers import (
    Quantizer,
    attach_input,
    attach_weight,
    detach_input,
    input_quantizer,
    settle_input,
    settle_weight,
    unsigned_inputs,
    weight_quantizer,
)

TUNE = "tune"
"""Name of the phase with bits and channels frozen."""

LEAST_BITS = 2
MOST_INPUT_BITS = 16
"""Bits of activations that a loose budget may be spent on."""

SEARCH_FLOOR, RELEASED = 4, 0.5
"""Fewest bits in the first part of a search with gates, and the share of it that this part is."""

HALFWAY = 0.5
"""Share of the way to the budget, in logs of cost, that bits go before the search: in a few hundred
steps training alone moves them by one."""

SOFTNESS = 5.0
"""Of the sigmoid whose slope stands in for that of an open or closed channel, in units of
certainty: gates start at 5 to 12."""


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

    With ``budget={"bops": "40x"}`` also tell it how to measure a loss, ``method.told(loss=...)``
    before ``attach``, and call ``begin`` with each of ``phases()``.

    Attributes:
        notes: what stays dense, and why.
        widths: after ``finalize``, (weight bits, input bits) by layer.
        spent: after ``finalize``, the share of each budget that the network takes.
        steps: after ``finalize``, by layer, what its weights are integers times of: a scalar, or
            one value per output channel in a shape that broadcasts.
    """

    name = "djpq"
    summary = "joint channel pruning and mixed-precision quantization (arXiv 2007.10463)"
    Options = DJPQOptions
    options: DJPQOptions
    meets = tuple(COSTS)
    reestimates = True
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
        self.positions: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.steps: dict[str, Tensor] = {}
        device = next(model.parameters()).device
        example = self.example_input.to(device)
        for row in self.plan.compressed:  # grids of an earlier stage would hide signs
            detach_input(model.get_submodule(row.layer))
        graph = ChannelGraph(model, example)
        self.bops = BopCount.of(graph)
        costs = {
            each.kind: COSTS[each.kind](self.bops, graph, self.overhead) for each in self.budgets
        }
        self.ledger = Ledger(self.bops, costs, self._limits())
        self.pressure, self.frozen = Pressure(), False
        self.spent: dict[str, float] = {}
        unsigned = unsigned_inputs(model, example)
        self.notes: list[str] = []
        self.layers = dict(self._layers(called(model, example)))
        for row in self.layers.values():
            self._quantize(model.get_submodule(row.layer), row, row.layer not in unsigned)
        self.gates = [] if self.options.gates == "none" else attach_gates(graph, self._gate)
        self.bops.gates = self.gates
        self.ledger.require(self.ledger.least(self.positions))
        return self

    def _limits(self) -> dict[str, float]:
        """Return the budget in units, of the dense network as it was told or as it is."""
        assert self.example_input is not None
        dense = self.dense or {
            each.kind: COSTS[each.kind].dense(self.model, self.example_input)
            for each in self.budgets
        }
        return {each.kind: each.limit(dense[each.kind]) for each in self.budgets}

    def _check(self) -> None:
        for row in self.plan.compressed:
            patterns, levels = row.set.split() if row.set else ((), None)
            if patterns or levels is None or not levels.zero or levels.spacing != "uniform":
                raise RecipeError(
                    f"set: djpq cannot train {row.layer} into '{row.set}'; it learns bits and "
                    "channels.\nRemedy: set: levels, zero: true, and bits to start with."
                )
        widths, bits = self.options.widths, [self.options.activation_bits]
        bits += [levels.bits for levels in levels_of(self.plan).values()]
        if widths and min(bits) < widths[0]:
            raise RecipeError(
                f"widths: {list(widths)} has none for bits that start at {min(bits)}."
            )

    def _layers(self, called: set[str]) -> Iterator[tuple[str, Row]]:
        """Yield the layers to quantize; note the others."""
        for row in self.plan.compressed:
            if row.layer not in called:
                self.notes.append(f"{row.layer}: stays dense, the network uses only its weight")
            else:
                yield row.layer, row

    def _quantize(self, layer: nn.Module, row: Row, signed: bool) -> None:
        o, levels = self.options, self.levels[row.parameter]
        most = MOST_INPUT_BITS if self.budgets else o.activation_bits
        own = (
            self._positions(levels.bits, levels.bits),
            self._positions(o.activation_bits, most),
        )
        self.positions[row.layer] = own
        weights, inputs = (each if o.widths or not o.learn_bits else () for each in own)
        channels = row.shape[0] if o.quantizer == "lsq" else None
        attach_weight(
            layer,
            Quantizer(
                levels.bits,
                power=o.quantizer == "power",
                widths=weights,
                channels=channels,
                dimensions=len(row.shape),
            ),
        )
        attach_input(layer, Quantizer(o.activation_bits, signed, widths=inputs, waits=True))

    def _positions(self, bits: int, most: int) -> tuple[int, ...]:
        """Return all widths that a quantizer may have which starts with so many bits."""
        if not self.options.learn_bits:
            return (bits,)
        if self.options.widths:
            return tuple(each for each in self.options.widths if each <= most)
        return tuple(range(LEAST_BITS, most + 1))

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
        grids = [each for each in self.model.modules() if isinstance(each, Quantizer)]
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
        """Return joint training and, if asked for, fine-tuning with bits and channels frozen."""
        o = self.options
        search = Phase(self.name, o.epochs, o.lr)
        if not o.tune_epochs:
            return (search,)
        return search, Phase(TUNE, o.tune_epochs, o.tune_lr, distill=o.distill, best=True)

    def begin(self, phase: Phase, steps: int) -> None:
        """Start the search for a budget, or land on it and freeze.

        Raises:
            RecipeError: there is a budget and no loss to measure steps by, or one of the file
                turns out to be below what these weights can be coded in.
        """
        if self.budgets and self.loss is None:
            raise RecipeError(
                "budget: djpq needs a loss on calibration data to spend it well.\n"
                "Remedy: method.told(loss=...) before attach."
            )
        if phase.name == TUNE:
            self._freeze()
        elif self.budgets:
            assert self.loss is not None
            half = self.ledger.now() * HALFWAY
            excess = functools.partial(self.ledger.now, still=True)
            ends = (lambda: excess() - half, lambda: self.ledger.guess() - half)
            approach(self.model, self.positions, *ends, self.loss, self._floor)
            self.pressure.begin(phase.epochs * steps, self.ledger.now())

    @property
    def _floor(self) -> int:
        """Fewest bits that layers may have at present."""
        early = self.budgets and self.gates and self.pressure.progress < RELEASED
        return SEARCH_FLOOR if early else LEAST_BITS

    def _freeze(self) -> None:
        """Freeze bits and channels, on the budget if there is one."""
        self.frozen = True
        knobs = knobs_of(self.model, self.gates, self.positions, self.loss or float)
        if self.budgets:
            assert self.loss is not None
            self.ledger.now()
            exact = functools.partial(self.ledger.now, still=True)
            if not Landing(knobs, exact, self.ledger.guess, self.loss).land():
                self.ledger.require(self.ledger.state())

    def penalty(self) -> Tensor:
        """Return beta sum KL + gamma BOP / BOP_fp32, or what holds the search to its path."""
        if self.frozen:
            return torch.zeros(())
        divergence = sum((gate.penalty() for gate, _, _ in self.gates), torch.zeros(()))
        if not self.budgets:
            return self.options.beta * divergence + self.options.gamma * self.bops.soft()
        excess = self.ledger.excess(self.ledger.trained(SOFTNESS)).to(divergence)
        return self.options.beta * divergence + self.pressure.penalty(excess)

    def step(self, lr: float | None = None) -> None:
        """Keep bits and powers in their ranges, by moving steps."""
        self.pressure.step()
        for name, allowed in self.positions.items():
            layer = self.model.get_submodule(name)
            pairs = zip((weight_quantizer(layer), input_quantizer(layer)), allowed, strict=True)
            for grid, widths in pairs:
                if isinstance(grid, Quantizer):
                    grid.bound(min(self._floor, widths[-1]), widths[-1])
        if not self.frozen and self.pressure.due():
            self.ledger.now()

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Fold gates, leave weights and what layers read on fixed grids; return the model."""
        if self.widths:
            return self.model
        if self.budgets:
            if not self.frozen or self.ledger.now() > 0:
                self._freeze()
            self.spent = self.ledger.spent(self.ledger.state())
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
        levels = {
            name: torch.round(_weight(self.model, name) / step) for name, step in self.steps.items()
        }
        for name, scale in fold_gates(self.model).items():
            if name in self.steps:
                weight = _weight(self.model, name)
                steps = self.steps[name] * scale.view(-1, *(1,) * (weight.ndim - 1))
                self.steps[name] = steps
                weight.copy_(levels[name] * steps)  # rounded once, as a reader of levels does
        return self.model

    def outcome(self) -> Outcome:
        """Return the bits of each layer's levels, why others stay dense, and what was spent."""
        layers: dict[str, dict[str, Any]] = {
            name: {"bits": bits, "by_channel": self.steps[name].numel() > 1}
            for name, (bits, _) in self.widths.items()
        }
        for note in self.notes:
            name, why = note.split(": ", 1)
            layers[name] = {"dense": why}
        return {"layers": layers, "spent": self.spent}

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
        spent = self.ledger.spent(self.ledger.state())
        return {
            "bops": self.bops.hard() / self.bops.dense,
            "soft_bops": float(self.bops.soft().detach()),
            **{f"{kind}_of_budget": share for kind, share in spent.items()},
            "channels": kept / max(1, sum(map(len, opened))) if opened else 1.0,
            "weight_bits": sum(w for w, _ in pairs) / max(1, len(pairs)),
            "activation_bits": sum(a for _, a in pairs) / max(1, len(pairs)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the search; gates and quantizers are part of the model."""
        costs = {kind: each.state_dict() for kind, each in self.ledger.costs.items()}
        return {"pressure": self.pressure.state_dict(), "frozen": self.frozen, "costs": costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.pressure.load_state_dict(state["pressure"])
        self.frozen = state["frozen"]
        for kind, each in state["costs"].items():
            self.ledger.costs[kind].load_state_dict(each)


def _weight(model: nn.Module, layer: str) -> Tensor:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight
