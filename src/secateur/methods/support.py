"""Masked retraining: weights that were pruned stay zero, quantized ones stay on their levels.

The weights themselves are corrected after every optimizer step, so neither momentum nor Adam's
moments nor weight decay can bring a pruned weight back, and every forward pass sees a member of
the constraint set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.plan import Plan, Row
from secateur.sets import ConstraintSet, Levels
from secateur.sets.levels import at_scale, best_scale, nearest_levels, refine_scale


class LatentLevels:
    """Quantized weights with the full-precision values that gradients are added to.

    The optimizer moves the quantized weight by some step; the same step is added to the latent
    value, whose nearest level is the new weight: the straight-through estimator, for any
    optimizer. The scale follows by one round of least squares per step.

    State: one value per non-zero weight.
    """

    def __init__(self, weight: Tensor, levels: Levels) -> None:
        self.levels = levels
        self.index = weight.flatten().nonzero().squeeze(1)
        self.latent = weight.flatten()[self.index].clone()
        self.scale = best_scale(self.latent, levels.grid)
        self.snapped = self.latent.clone()

    def hold(self, weight: Tensor) -> None:
        """Carry the optimizer's step over to the latent values and snap the weight again."""
        self.latent += weight.flatten()[self.index] - self.snapped
        self.scale = refine_scale(self.latent, self.scale, self.levels.grid)
        integers = nearest_levels(self.latent, self.scale, self.levels.grid)
        self.snapped = at_scale(integers, self.scale, weight.dtype)
        held = weight.new_zeros(weight.numel())
        held[self.index] = self.snapped
        weight.copy_(held.view(weight.shape))


class FrozenSupport:
    """Holds the planned weights of a model, and the biases of their dead outputs, in place.

    Args:
        plan: whose rows are to be held once they are frozen.
        model: the network, changed in place.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.rows: tuple[Row, ...] = plan.compressed
        self.parameters = dict(model.named_parameters())
        self.dead: dict[str, Tensor] = {}
        self.latent: dict[str, LatentLevels] = {}

    def freeze_zeros(self) -> None:
        """Keep every weight zero that is zero now, and the bias of every output without weights.

        The last layer keeps its biases: a class without weights still has a prior.
        """
        for row in self.rows:
            dead = self.parameters[row.parameter].detach() == 0
            if not bool(dead.any()):
                continue
            self.dead[row.parameter] = dead
            if row.bias in self.parameters and row is not self.rows[-1]:
                self.dead[row.bias] = dead.flatten(1).all(dim=1)
        self.hold()

    def freeze_levels(self, sets: Mapping[str, ConstraintSet]) -> None:
        """Also keep the non-zeros of every layer whose set has levels on these levels."""
        for row in self.rows:
            levels = sets[row.layer].split()[1] if row.layer in sets else None
            if levels:
                weight = self.parameters[row.parameter].detach()
                self.latent[row.parameter] = LatentLevels(weight, levels)

    def release_levels(self) -> None:
        """Let values move freely again; zeros stay."""
        self.latent.clear()

    @torch.no_grad()
    def hold(self) -> None:
        """Restore what is frozen; call it after every optimizer step."""
        for name, dead in self.dead.items():
            if name not in self.latent:
                self.parameters[name].masked_fill_(dead, 0)
        for name, latent in self.latent.items():
            latent.hold(self.parameters[name])

    def state_dict(self) -> dict[str, Any]:
        """Return masks, latent values and scales."""
        return {
            "dead": dict(self.dead),
            "latent": {
                name: {"latent": held.latent, "scale": held.scale, "snapped": held.snapped}
                for name, held in self.latent.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], sets: Mapping[str, ConstraintSet]) -> None:
        """Restore :meth:`state_dict` for weights that already hold their saved values."""
        self.dead = dict(state["dead"])
        self.freeze_levels({layer: sets[layer] for layer in sets})
        for name, saved in state["latent"].items():
            held = self.latent[name]
            held.latent, held.scale, held.snapped = (
                saved["latent"].clone(),
                saved["scale"],
                saved["snapped"].clone(),
            )
