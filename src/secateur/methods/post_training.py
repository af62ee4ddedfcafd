"""Layer-wise ADMM reconstruction: into the sets without training, from a few hundred inputs.

The mathematics is in :mod:`secateur.posttraining`. What is left of the weights may then be
retrained, as after any other method; by default it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods.base import Phase, register
from secateur.methods.retrain import RetrainedMethod, RetrainOptions
from secateur.methods.support import FrozenSupport
from secateur.posttraining import reconstruct

BATCH = 32
"""Inputs that run at a time."""


class PostTrainingOptions(RetrainOptions):
    """Options of layer-wise reconstruction."""

    samples: int = Field(256, ge=1, description="training inputs that outputs are compared on")
    iterations: int = Field(40, ge=1, description="iterations of ADMM for each layer")
    rho: float = Field(0.1, gt=0, description="penalty relative to the energy of each input")
    damping: float = Field(0.01, gt=0, description="share of the mean energy added to all inputs")
    retrain_epochs: int = Field(0, ge=0, description="epochs of masked retraining")


@register
class PostTraining(RetrainedMethod):
    """ADMM on the outputs of each layer instead of on the loss of the network.

    ``example_input`` is what outputs are compared on: give a few hundred samples.
    """

    name = "post_training"
    summary = "layer-wise ADMM reconstruction from a few hundred inputs, without training"
    Options = PostTrainingOptions
    options: PostTrainingOptions

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
        fits = reconstruct(
            self.model, batches, self.plan, iterations=o.iterations, rho=o.rho, damping=o.damping
        )
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

    def harden(self, share: float = 1.0) -> None:
        """Reconstruct if that has not been done; freeze zeros and a share of the levels."""
        if not self.hard:
            self._reconstruct()
        super().harden(share)

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
