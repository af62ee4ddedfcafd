"""Layer-wise ADMM reconstruction: into the sets without training, from a few hundred inputs.

The mathematics is in :mod:`secateur.posttraining`. What is left of the weights may then be
retrained, as after any other method; by default it is not. With ``activation_bits`` layers also
read through integer grids, and nothing is retrained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.doctor import int8_profile
from secateur.errors import RecipeError
from secateur.methods.base import Phase, register
from secateur.methods.retrain import RetrainedMethod, RetrainOptions
from secateur.methods.support import FrozenSupport
from secateur.outcome import Outcome
from secateur.plan import Plan
from secateur.posttraining import (
    Calibration,
    deployable,
    quantize,
    reconstruct,
    require_int8,
)
from secateur.sets import ConstraintSet

BATCH = 32
"""Inputs that run at a time."""


class PostTrainingOptions(RetrainOptions):
    """Options of layer-wise reconstruction."""

    samples: int = Field(256, ge=1, description="training inputs that outputs are compared on")
    iterations: int = Field(
        40, ge=0, description="iterations of ADMM for each layer; 0 projects, or rounds to nearest"
    )
    rho: float = Field(0.1, gt=0, description="penalty relative to the energy of each input")
    damping: float = Field(0.01, gt=0, description="share of the mean energy added to all inputs")
    retrain_epochs: int = Field(0, ge=0, description="epochs of masked retraining")
    activation_bits: int | None = Field(
        None, ge=2, le=8, description="bits of what layers read; without, it stays in floats"
    )
    calibration: Calibration = Field("mse", description="how ranges of activations are chosen")
    percentile: float = Field(
        99.99, gt=0, le=100, description="of activations, for calibration: percentile"
    )
    equalize: bool = Field(
        False, description="balance the ranges of channels between layers before (arXiv 1906.04721)"
    )
    bias_correction: bool = Field(
        True, description="let biases make up for what quantizing does to the mean of outputs"
    )
    profile: Literal["machine", "vnni", "no_vnni"] = Field(
        "machine",
        description="how int8 is multiplied: exactly (vnni, ARM), or in pairs that saturate unless "
        "weights beside 8-bit activations have 7 bits (no_vnni); machine: as it is on this one",
    )


@register
class PostTraining(RetrainedMethod):
    """ADMM on the outputs of each layer instead of on the loss of the network.

    ``example_input`` is what outputs are compared on: give a few hundred samples.
    """

    name = "post_training"
    summary = "layer-wise ADMM reconstruction from a few hundred inputs, without training"
    Options = PostTrainingOptions
    options: PostTrainingOptions

    def __init__(self, target: ConstraintSet | Plan, *args: Any, **options: Any) -> None:
        super().__init__(target, *args, **options)
        if self.options.activation_bits is None:
            return
        if self.options.retrain_epochs:
            raise RecipeError(
                f"retrain_epochs: {self.options.retrain_epochs}, but with activation_bits nothing "
                "is retrained.\nRemedy: leave it out, or train a quantized network by djpq."
            )
        for each in [row.set for row in target.rows] if isinstance(target, Plan) else [target]:
            if each is not None:
                require_int8(each)

    def attach(self, model: nn.Module) -> PostTraining:
        """Bind to a model; zeros that its planned weights already have may move.

        Raises:
            RecipeError: there is no input.
        """
        if self.example_input is None:
            raise RecipeError(
                "post_training: it compares outputs, so it takes inputs.\n"
                "Remedy: give a few hundred samples as example_input."
            )
        super().attach(model)
        self.plan = self.plan.within(self.weights)
        o = self.options
        if o.activation_bits is not None:
            profile = int8_profile() if o.profile == "machine" else o.profile
            self.plan = deployable(self.plan, o.activation_bits, profile)
        self.support = FrozenSupport(self.plan, model, self.options.scale == "trained")
        self.hard = False
        self.errors: dict[str, float] = {}
        return self

    def phases(self) -> tuple[Phase, ...]:
        """Return reconstruction, which is no training, and retraining if that is asked for."""
        o = self.options
        return (
            Phase("reconstruct", 0),
            *(self.retraining(0, self.quantizes) if o.retrain_epochs else ()),
        )

    def begin(self, phase: Phase, steps: int) -> None:
        """Reconstruct all layers, or begin to retrain what is left of them."""
        self.harden(phase.snap)

    def _reconstruct(self) -> None:
        assert self.example_input is not None
        o = self.options
        device = next(self.model.parameters()).device
        batches = torch.split(self.example_input.to(device), BATCH)
        solver: dict[str, Any] = {"iterations": o.iterations, "rho": o.rho, "damping": o.damping}
        if o.activation_bits is None:
            fits = reconstruct(self.model, batches, self.plan, **solver)
        else:
            fits = quantize(
                self.model,
                batches,
                self.plan,
                activation_bits=o.activation_bits,
                calibration=o.calibration,
                percentile=o.percentile,
                equalize=o.equalize,
                bias_correction=o.bias_correction,
                profile="vnni",  # the plan has been narrowed
                **solver,
            ).fits
        self.errors = {
            "error": sum(each.error for each in fits) / len(fits),
            "projected_error": sum(each.projected for each in fits) / len(fits),
        }

    def penalty(self) -> Tensor:
        """Return zero: retraining leaves the loss alone."""
        return torch.zeros(())

    def step(self, lr: float | None = None) -> None:
        """Keep zeros zero and levels in place."""
        self.support.hold()

    def outcome(self) -> Outcome:
        """Return the levels of layers that read through grids."""
        layers: dict[str, dict[str, Any]] = {}
        for row in self.plan.compressed if self.options.activation_bits else ():
            assert row.set is not None
            patterns, levels = row.set.split()
            assert levels is not None
            layers[row.layer] = {"bits": levels.bits, "by_channel": not patterns}
        return {"layers": layers, "spent": {}}

    def harden(self, share: float = 1.0) -> None:
        """Reconstruct if that has not been done; freeze zeros and a share of the levels."""
        if not self.hard:
            self._reconstruct()
        if self.options.activation_bits is None:
            super().harden(share)
        self.hard = True

    def metrics(self) -> dict[str, float]:
        """Return the mean relative error of outputs of layers, and what projecting would cost."""
        return dict(self.errors)

    def state_dict(self) -> dict[str, Any]:
        """Return masks, latent values, errors, and whether reconstruction is done."""
        return {"hard": self.hard, "errors": self.errors, "support": self.support.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; the model must hold its saved weights already."""
        self.hard, self.errors = state["hard"], dict(state["errors"])
        self.support.load_state_dict(state["support"])
