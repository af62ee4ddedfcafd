"""ADMM pruning and quantization (ADMM-NN-S, arXiv 1907.02124).

Minimize f(W) subject to W_i in S_i. With an auxiliary copy Z and the scaled dual U, alternate

    W: a few epochs of training on f(W) + sum_i rho/2 ||W_i - Z_i + U_i||^2
    Z: Z_i = project(W_i + U_i) onto S_i
    U: U_i = U_i + W_i - Z_i

while rho grows; then project W itself (hard pruning) and retrain what is left. Progressive steps
repeat both on the way to the target; the first and the last layer, which bear quantization least,
may get their levels in a step of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods.base import UPDATES, Phase, register
from secateur.methods.purify import purified
from secateur.methods.retrain import RetrainedMethod, RetrainOptions, RisingToOne, divided
from secateur.methods.rho import RUNGS, Schedule, first_rho, growth_factor, next_rho
from secateur.methods.support import FrozenSupport
from secateur.plan import Plan

FAR = 0.5
"""Primal residual, relative to the norm of W, above which a phase has not settled."""

Share = Annotated[float, Field(ge=0, le=1)]
"""An option that is a part of something, not percent."""


class ADMMOptions(RetrainOptions):
    """Options of ADMM; the defaults suit a few minutes of training on MNIST-sized data."""

    epochs: int = Field(10, ge=1, description="epochs of the ADMM phase, per progressive step")
    lr: float | None = Field(None, gt=0, description="peak learning rate of the ADMM phase")
    rho: float = Field(1e-3, gt=0, description="first penalty weight")
    rho_schedule: Schedule = Field(
        "grow", description="grow, constant, ladder (four restarts) or balanced (by residuals)"
    )
    rho_max: float = Field(
        0.3, gt=0, validate_default=True, description="penalty weight that growth ends at"
    )
    rho_growth: float | None = Field(
        None, ge=1, description="factor per update; by default such that rho_max is the last"
    )
    pull: Literal["penalty", "decoupled"] = Field(
        "penalty", description="rho through the loss, or as a step of its own beside the optimizer"
    )
    cycles: int = Field(
        1, ge=1, description="how often the learning rate restarts within an ADMM phase"
    )
    interval: int | None = Field(
        None, ge=1, description="optimizer steps between updates of Z and U; by default 100 updates"
    )
    steps: RisingToOne = Field(
        (1.0,),
        description="progressive steps, each of epochs and retrain_epochs: exponents e of the "
        "target, density**e; the last is 1",
    )
    purify: tuple[Share, Share] | None = Field(
        None,
        description="before retraining, drop input channels of which at least the first share of "
        "columns is empty and whose norm is below the second share of the mean, e.g. [0.7, 0.3]",
    )
    edges_last: bool = Field(
        False,
        description="whether the first and the last planned layer get their levels in one more "
        "step, of epochs and retrain_epochs again, after all others",
    )

    @field_validator("rho_schedule")
    @classmethod
    def _an_epoch_each_rung(cls, schedule: Schedule, info: ValidationInfo) -> Schedule:
        epochs = info.data.get("epochs", RUNGS)
        if schedule == "ladder" and epochs < RUNGS:
            raise ValueError(
                f"has {RUNGS} rungs, so epochs should be as many at least, not {epochs}"
            )
        return schedule

    @field_validator("rho_max")
    @classmethod
    def _room_to_grow(cls, last: float, info: ValidationInfo) -> float:
        first = info.data.get("rho", last)
        if first > last and info.data.get("rho_schedule") != "constant":
            raise ValueError(f"should be at least rho, {first}, or rho_schedule: constant")
        return last


@register
class ADMM(RetrainedMethod):
    """ADMM-regularized training, hard projection, masked retraining, in progressive steps."""

    name = "admm"
    summary = "ADMM pruning joined with quantization (ADMM-NN-S, arXiv 1907.02124)"
    Options = ADMMOptions
    options: ADMMOptions

    def attach(self, model: nn.Module) -> ADMM:
        """Bind to a model; zeros that its planned weights already have will stay zero."""
        super().attach(model)
        self.full_plan = self.plan.within(self.weights)
        self.support = FrozenSupport(self.full_plan, model, self.options.scale == "trained")
        self._start(step=0, interval=self.options.interval or UPDATES)
        return self

    def phases(self) -> tuple[Phase, ...]:
        """Return an ADMM phase and retraining for each progressive step."""
        o = self.options
        rungs = RUNGS if o.rho_schedule == "ladder" else 1
        easier = len(o.steps) - 1
        phases = []
        for step in range(len(o.steps) + self.edges_last):
            for rung, epochs in enumerate(divided(o.epochs, rungs)):
                phases.append(Phase("admm", epochs, o.lr, step, rung, o.cycles))
            phases += self.retraining(step, self.quantizes and step >= easier)
        return tuple(phases)

    @property
    def edges_last(self) -> bool:
        """Whether there is a step for the levels of the first and the last layer."""
        return self.options.edges_last and self.quantizes

    def begin(self, phase: Phase, steps: int) -> None:
        """Start the ADMM phase from Z = project(W), U = 0, or retraining from hard weights."""
        if phase.name == "admm":
            interval = self.options.interval or max(1, phase.epochs * steps // UPDATES)
            updates = phase.epochs * steps // interval
            self._start(phase.step, interval, updates, phase.rung)
        else:
            self.harden(phase.snap)

    def _start(self, step: int, interval: int, updates: int = 0, rung: int = 0) -> None:
        o = self.options
        self.progressive_step, self.plan = step, self._plan_of(step)
        if step < len(o.steps):
            self.support.release_levels()
        self.support.freeze_zeros()
        self.interval, self.count = interval, 0
        self.rho = first_rho(o.rho_schedule, o.rho, o.rho_max, rung)
        self.growth = o.rho_growth or growth_factor(o.rho_schedule, o.rho, o.rho_max, updates)
        self.u: dict[str, Tensor] = {}
        self.z = self._project()
        self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self.residuals: dict[str, float] = {}

    def _plan_of(self, step: int) -> Plan:
        """Return what a progressive step aims at: the full target in the last one."""
        o = self.options
        if step < len(o.steps) - 1:
            return self.full_plan.relaxed(o.steps[step])
        if step == len(o.steps) or not self.edges_last:
            return self.full_plan
        names = [row.layer for row in self.full_plan.compressed]
        rows = zip(self.full_plan.rows, self.full_plan.without_levels().rows, strict=True)
        edges = (names[0], names[-1])
        return replace(
            self.full_plan, rows=tuple(free if row.layer in edges else row for row, free in rows)
        )

    def _project(self) -> dict[str, Tensor]:
        """Return project(W + U) for the weights of this step's plan that are not on levels yet."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        shifted = weights | {name: weights[name] + u for name, u in self.u.items()}
        projected = self.plan.project(shifted, self.model)
        return {name: z for name, z in projected.items() if name not in self.support.latent}

    def penalty(self) -> Tensor:
        """Return sum_i rho/2 ||W_i - Z_i + U_i||^2; zero while retraining or if decoupled."""
        coupled = self.options.pull == "penalty"
        terms = [
            Proximity.apply(self.weights[name], z, self.u[name], self.rho)
            for name, z in self.z.items()
            if coupled
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def step(self, lr: float | None = None) -> None:
        """Keep zeros zero; every ``interval`` steps update Z, U and rho.

        Raises:
            RecipeError: the pull is decoupled and ``lr`` is not given.
        """
        if self.z and self.options.pull == "decoupled":
            self._pull(lr)
        self.support.hold()
        if self.z:
            self.count += 1
            if self.count % self.interval == 0:
                self.update()

    @torch.no_grad()
    def _pull(self, lr: float | None) -> None:
        """Take the proximal step W = argmin 1/(2 lr) ||X - W||^2 + rho/2 ||X - Z + U||^2.

        It goes past the optimizer's own scaling, so rho means the same under SGD and AdamW.
        """
        if lr is None:
            raise RecipeError("pull: decoupled needs the learning rate; call step(lr).")
        share = lr * self.rho / (1 + lr * self.rho)
        for name, z in self.z.items():
            self.weights[name].lerp_(z - self.u[name], share)

    @torch.no_grad()
    def update(self) -> None:
        """Do the Z-step and the U-step, then let rho grow, rescaling U to the new rho."""
        weights = {name: self.weights[name].detach() for name in self.z}
        z = self._project()
        norm = _norm(weights.values())
        primal = _norm(w - z[name] for name, w in weights.items())
        dual = _norm(z[name] - self.z[name] for name in z)
        self.residuals = {"rho": self.rho, "primal": primal / norm, "dual": dual / norm}
        self.z = z
        o = self.options
        following = next_rho(o.rho_schedule, self.rho, self.growth, o.rho_max, primal, dual)
        for name, weight in weights.items():
            self.u[name].add_(weight).sub_(z[name]).mul_(self.rho / following)
        self.rho = following

    def harden(self, share: float = 1.0) -> None:
        """Project W itself, freeze its zeros and levels, and drop Z and U."""
        super().harden(share)
        self.z, self.u, self.residuals = {}, {}, {}

    def finalize(self) -> nn.Module:
        """Project onto the full target if training has not yet ended there; return the model."""
        if self.approximate or self.plan is not self.full_plan:
            self.plan = self.full_plan
            self.harden()
        self.support.unhook()
        return self.model

    def members(self) -> dict[str, Tensor]:
        """Return the planned weights as members of their sets, purified if that is asked for."""
        members = super().members()
        if self.options.purify is None:
            return members
        return {name: purified(value, *self.options.purify) for name, value in members.items()}

    @property
    def approximate(self) -> bool:
        """True in the ADMM phase, and in retraining until all levels are in place."""
        return bool(self.z) or self.support.partial

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
            "progressive_step": self.progressive_step,
            "interval": self.interval,
            "count": self.count,
            "support": self.support.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must hold its saved weights already."""
        self.z, self.u = dict(state["z"]), dict(state["u"])
        self.rho, self.growth = state["rho"], state["growth"]
        self.interval, self.count = state["interval"], state["count"]
        self.progressive_step, self.plan = (
            state["progressive_step"],
            self._plan_of(state["progressive_step"]),
        )
        self.residuals = {}
        self.support.load_state_dict(state["support"])


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


def unsettled(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say, for the report, which ADMM phases ended with weights still far from their sets.

    Projection then undoes much of what the phase has trained.

    Args:
        history: rows of a run's epochs, in order, with the residuals of :meth:`ADMM.metrics`.
    """
    last = {(row["stage"], row["step"]): row for row in history if row.get("phase") == "admm"}
    return [
        f"stage {stage}, step {step}: ADMM ended {row['primal']:.0%} of the weights' norm away "
        "from their sets; a larger rho_max or more epochs may give a better network"
        for (stage, step), row in last.items()
        if row.get("primal", 0.0) > FAR
    ]


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of several tensors together."""
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
