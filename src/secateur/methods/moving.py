"""Weights on levels while their support still moves: the error of rounding, and the scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.methods.latent import trained_scale
from secateur.sets import Levels
from secateur.sets.levels import at_scale, best_scale, nearest_levels, refine_scale


class MovingLevels:
    """The non-zeros of one weight rounded to levels, straight-through.

    The model has the rounded values, and this the error, so that a step of the optimizer from one
    is a step of both together. Between :meth:`lift` and :meth:`lower` others choose the support.

    Args:
        weight: to start from, changed in place.
        levels: whose levels these are.
    """

    def __init__(self, weight: Tensor, levels: Levels) -> None:
        self.levels = levels
        self.scale = best_scale(weight[weight != 0], levels.grid)
        self.error, self.held = torch.zeros_like(weight), weight.clone()
        self.lower(weight)

    def lift(self, weight: Tensor, gradient: Tensor | None = None) -> None:
        """Carry an optimizer step over to scale and values; the weight gets these unrounded.

        Args:
            weight: as the optimizer left it; changed in place.
            gradient: of the loss by the weight before that step, which trains the scale.
        """
        if gradient is not None:
            latent = self.held + self.error
            kept = latent != 0  # what is held there may be a level that is zero
            moved = (weight - self.held)[kept].double()
            self.scale = trained_scale(
                self.scale, latent[kept], gradient[kept].double(), moved, self.levels.grid
            )
        weight.add_(self.error)

    def lower(self, weight: Tensor, fit: bool = False) -> None:
        """Round the weight's non-zeros to levels, in place, and keep the error.

        Args:
            weight: on its support.
            fit: whether the scale follows the values, by one round of least squares.
        """
        kept = weight != 0
        values = weight[kept]
        if fit:
            self.scale = refine_scale(values, self.scale, self.levels.grid)
        integers = nearest_levels(values, self.scale, self.levels.grid)
        self.held = torch.zeros_like(weight)
        self.held[kept] = at_scale(integers, self.scale, weight.dtype)
        self.error = weight - self.held
        weight.copy_(self.held)

    def state_dict(self) -> dict[str, Any]:
        """Return what training changes; what is held is the weight."""
        return {"error": self.error, "scale": self.scale}

    @classmethod
    def restored(cls, state: Mapping[str, Any], weight: Tensor, levels: Levels) -> MovingLevels:
        """Return the moving levels of :meth:`state_dict`, for a weight that is on them."""
        made = cls.__new__(cls)
        made.levels, made.held = levels, weight.detach().clone()
        made.error, made.scale = state["error"], state["scale"]
        return made
