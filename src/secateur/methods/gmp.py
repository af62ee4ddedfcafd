"""Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878): the plain strong baseline.

Sparsity s rises from s_i to s_f in n updates, fast while weights are plentiful, slow at the end:

    s_t = s_f + (s_i - s_f) (1 - t/n)^3,   t = 0, 1, ..., n

At each update the smallest weights become zero until sparsity is s_t. Pruned weights get no
updates, so they never come back. What is left is then retrained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.methods.base import UPDATES, Phase, register
from secateur.methods.retrain import RetrainedMethod, RetrainOptions
from secateur.methods.support import FrozenSupport


class GMPOptions(RetrainOptions):
    """Options of gradual magnitude pruning; those it shares with ADMM have the same names."""

    epochs: int = Field(
        10, ge=0, description="epochs in which sparsity rises to the target; 0 prunes at once"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate while sparsity rises")
    interval: int | None = Field(
        None, ge=1, description="optimizer steps between prunings; by default 100 prunings"
    )
    initial_density: float | None = Field(
        None, gt=0, le=1, description="density to start from at once; by default the weights' own"
    )


@register
class GMP(RetrainedMethod):
    """Magnitude pruning along a cubic schedule of sparsity, then masked retraining.

    One exponent e relaxes the whole plan, so that a layer of final density d has d^e: the total
    density is that of the schedule if all layers share one target, and layers with targets of
    their own keep their order on the way. Levels wait for retraining.

    In a loop of your own there are 100 updates, ten optimizer steps apart by default.
    """

    name = "gmp"
    summary = "gradual magnitude pruning on a cubic schedule (Zhu & Gupta, arXiv 1710.01878)"
    Options = GMPOptions
    options: GMPOptions

    def attach(self, model: nn.Module) -> GMP:
        """Bind to a model; zeros that its planned weights already have will stay zero."""
        super().attach(model)
        self.plan = self.plan.within(self.weights)
        self.patterns = self.plan.without_levels()
        self.support = FrozenSupport(self.plan, model, self.options.scale == "trained")
        self._start(self.options.interval or 10, UPDATES)
        return self

    def phases(self) -> tuple[Phase, ...]:
        """Return the phase in which sparsity rises, and retraining at the target.

        Without the first, retraining is that of ASP (Mishra et al., arXiv 2104.08378).
        """
        o = self.options
        rising = [Phase("gmp", o.epochs, o.lr)] if o.epochs else []
        return (*rising, *self.retraining(0, self.quantizes))

    def begin(self, phase: Phase, steps: int) -> None:
        """Start the schedule, whose last update is within the phase, or retraining."""
        if phase.name == "gmp":
            total = phase.epochs * steps
            interval = min(self.options.interval or max(1, total // UPDATES), total)
            self._start(interval, total // interval)
            if self.options.initial_density:
                self.update()
        else:
            self.harden(phase.snap)

    def _start(self, interval: int, updates: int) -> None:
        self.interval, self.updates, self.count = interval, updates, 0
        self.hard = False
        pruned = self.patterns.project(self.weights, self.model)
        now = {name: self.weights[name].detach() for name in pruned}
        self.final = _density(pruned)
        self.initial = max(self.options.initial_density or _density(now), self.final)
        self.support.release_levels()
        self.support.freeze_zeros()

    def penalty(self) -> Tensor:
        """Return zero: magnitude pruning leaves the loss alone."""
        return torch.zeros(())

    def step(self, lr: float | None = None) -> None:
        """Keep zeros zero; every ``interval`` steps prune further, until the target is met."""
        self.support.hold()
        if not self.hard and self.count < self.interval * self.updates:
            self.count += 1
            if self.count % self.interval == 0:
                self.update()

    def update(self) -> None:
        """Prune to the density that the schedule has now, for good."""
        easier = self.patterns.relaxed(self._exponent())
        self.write(easier.project(self.weights, self.model))
        self.support.freeze_zeros()

    def _exponent(self) -> float:
        """Return e such that final density ** e is the schedule's density now; 1 at the end."""
        left = 1 - self.count / (self.interval * self.updates)
        density = self.final + (self.initial - self.final) * left**3
        return math.log(density) / math.log(self.final) if 0 < self.final < 1 else 1.0

    def metrics(self) -> dict[str, float]:
        """Return the density of all planned weights together."""
        return {"density": _density(self.weights)}

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule and the position in it, masks and latent values."""
        return {
            "interval": self.interval,
            "updates": self.updates,
            "count": self.count,
            "initial": self.initial,
            "final": self.final,
            "hard": self.hard,
            "support": self.support.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must hold its saved weights already."""
        self.interval, self.updates = state["interval"], state["updates"]
        self.count, self.hard = state["count"], state["hard"]
        self.initial, self.final = state["initial"], state["final"]
        self.support.load_state_dict(state["support"])


def _density(weights: Mapping[str, Tensor]) -> float:
    """Return the share of non-zeros in several tensors together; 1 for none."""
    total = sum(weight.numel() for weight in weights.values())
    kept = sum(int(weight.count_nonzero()) for weight in weights.values())
    return kept / total if total else 1.0
