"""ADMM pruning and quantization (ADMM-NN-S, arXiv 1907.02124).

Minimize f(W) subject to W_i in S_i. With an auxiliary copy Z and the scaled dual U, alternate

    W: a few epochs of training on f(W) + sum_i rho/2 ||W_i - Z_i + U_i||^2
    Z: Z_i = project(W_i + U_i) onto S_i
    U: U_i = U_i + W_i - Z_i

while rho grows; then project W itself (hard pruning) and retrain what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.methods.base import Method, MethodOptions, Phase, register
from secateur.methods.support import FrozenSupport
from secateur.sets import ConstraintSet


class ADMMOptions(MethodOptions):
    """Options of ADMM; the defaults suit a few minutes of training on MNIST-sized data."""

    epochs: int = Field(10, ge=1, description="epochs of the ADMM phase, per progressive step")
    retrain_epochs: int = Field(10, ge=0, description="epochs of masked retraining, per step")
    lr: float | None = Field(None, gt=0, description="peak learning rate of the ADMM phase")
    retrain_lr: float | None = Field(None, gt=0, description="peak learning rate of retraining")
    rho: float = Field(1e-3, gt=0, description="first penalty weight")
    rho_max: float = Field(0.3, gt=0, description="penalty weight that growth ends at")
    rho_growth: float | None = Field(
        None, ge=1, description="factor per update; by default such that rho_max is the last"
    )
    interval: int | None = Field(
        None, ge=1, description="optimizer steps between updates of Z and U; by default an epoch"
    )
    steps: tuple[float, ...] = Field(
        (1.0,),
        min_length=1,
        description="progressive steps: exponents e of the target, density**e; the last is 1",
    )


@register
class ADMM(Method):
    """ADMM-regularized training, hard projection, masked retraining, in progressive steps."""

    name = "admm"
    summary = "ADMM pruning joined with quantization (ADMM-NN-S, arXiv 1907.02124)"
    Options = ADMMOptions
    options: ADMMOptions

    def attach(self, model: nn.Module) -> ADMM:
        """Bind to a model; zeros that its planned weights already have will stay zero."""
        super().attach(model)
        self.full_plan = self.plan.within(self.weights)
        self.support = FrozenSupport(self.full_plan, model)
        self._start(exponent=self.options.steps[0], interval=self.options.interval or 100)
        return self

    def phases(self) -> tuple[Phase, ...]:
        """Return an ADMM phase and a retraining phase for each progressive step."""
        o = self.options
        return tuple(
            phase
            for step in range(len(o.steps))
            for phase in (
                Phase("admm", o.epochs, o.lr, step),
                Phase("retrain", o.retrain_epochs, o.retrain_lr, step),
            )
        )

    def begin(self, phase: Phase, steps: int) -> None:
        """Start the ADMM phase from Z = project(W), U = 0, or retraining from hard weights."""
        if phase.name == "admm":
            interval = self.options.interval or steps
            updates = phase.epochs * steps // interval
            self._start(self.options.steps[phase.step], interval, updates)
        else:
            self.harden()

    def _start(self, exponent: float, interval: int, updates: int = 0) -> None:
        o = self.options
        self.exponent = exponent
        self.plan = self.full_plan.relaxed(exponent)
        self.support.release_levels()
        self.support.freeze_zeros()
        self.interval, self.count, self.rho = interval, 0, o.rho
        if o.rho_growth is not None:
            self.growth = o.rho_growth
        else:
            self.growth = (o.rho_max / o.rho) ** (1 / (updates - 1)) if updates > 1 else 1.3
        weights = self._planned()
        self.z = self.plan.project(weights, self.model)
        self.u = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.residuals: dict[str, float] = {}

    def _planned(self) -> dict[str, Tensor]:
        """Return the weights of the present step's plan, detached."""
        return {row.parameter: self.weights[row.parameter].detach() for row in self.plan.compressed}

    def penalty(self) -> Tensor:
        """Return sum_i rho/2 ||W_i - Z_i + U_i||^2, zero while retraining."""
        terms = [
            Proximity.apply(self.weights[name], z, self.u[name], self.rho)
            for name, z in self.z.items()
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def step(self) -> None:
        """Keep zeros zero; every ``interval`` steps update Z, U and rho."""
        self.support.hold()
        if self.z:
            self.count += 1
            if self.count % self.interval == 0:
                self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Do the Z-step and the U-step, then let rho grow, rescaling U to the new rho."""
        weights = self._planned()
        z = self.plan.project({name: w + self.u[name] for name, w in weights.items()}, self.model)
        norm = _norm(weights.values())
        self.residuals = {
            "rho": self.rho,
            "primal": _norm(w - z[name] for name, w in weights.items()) / norm,
            "dual": _norm(z[name] - self.z[name] for name in z) / norm,
        }
        self.z = z
        rho = min(self.rho * self.growth, max(self.options.rho_max, self.rho))
        for name, weight in weights.items():
            self.u[name].add_(weight).sub_(z[name]).mul_(self.rho / rho)
        self.rho = rho

    def harden(self) -> None:
        """Project W itself, freeze its zeros and levels, and drop Z and U: W is feasible now."""
        self.write(self.plan.project(self._planned(), self.model))
        self.z, self.u, self.residuals = {}, {}, {}
        self.support.freeze_zeros()
        self.support.freeze_levels(self.sets())

    def finalize(self) -> nn.Module:
        """Project onto the full target if training has not yet ended there; return the model."""
        if self.z:
            self.plan = self.full_plan
            self.harden()
        return self.model

    def sets(self) -> dict[str, ConstraintSet]:
        """Return, by layer, the set that holds its weight now."""
        return self.plan.sets(self._planned())

    @property
    def approximate(self) -> bool:
        """True in the ADMM phase, False from hard projection on."""
        return bool(self.z)

    def metrics(self) -> dict[str, float]:
        """Return rho and the primal and dual residuals, each relative to the norm of W."""
        return dict(self.residuals)

    def state_dict(self) -> dict[str, Any]:
        """Return Z, U, rho, the position in the schedule, masks and latent values."""
        return {
            "z": self.z,
            "u": self.u,
            "rho": self.rho,
            "growth": self.growth,
            "exponent": self.exponent,
            "interval": self.interval,
            "count": self.count,
            "support": self.support.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must hold its saved weights already."""
        self.z, self.u = dict(state["z"]), dict(state["u"])
        self.rho, self.growth = state["rho"], state["growth"]
        self.interval, self.count = state["interval"], state["count"]
        self.exponent = state["exponent"]
        self.plan = self.full_plan.relaxed(self.exponent)
        self.residuals = {}
        self.support.load_state_dict(state["support"], {} if self.z else self.sets())


class Proximity(torch.autograd.Function):
    """rho/2 ||w - z + u||^2 with its gradient rho (w - z + u), at one pass over memory each."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, z: Tensor, u: Tensor, rho: float) -> Tensor:
        """Return the scalar and keep the difference for the backward pass."""
        difference = torch.sub(w, z).add_(u)
        ctx.save_for_backward(difference)
        ctx.rho = rho
        return difference.flatten().dot(difference.flatten()).mul_(rho / 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return rho (w - z + u) times the incoming gradient."""
        (difference,) = ctx.saved_tensors
        return difference.mul(gradients[0] * ctx.rho), None, None, None


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of several tensors together."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
