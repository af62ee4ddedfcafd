"""Quantized weights in training: latent values, a scale that is fitted or trained, snapping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.sets import Levels
from secateur.sets.base import top_k
from secateur.sets.levels import (
    at_scale,
    find_scale,
    nearest_levels,
    refine_scale,
    storable_scale,
)

STATE = ("index", "latent", "snapped", "held", "scale")
"""What training changes in :class:`LatentLevels`."""

LARGEST_STEP = 0.5
"""Part of itself by which a trained scale changes at most in one step, so it stays positive."""


class LatentLevels:
    """The non-zeros of one weight, on levels, with the full-precision values behind them.

    **Straight-through.** The optimizer moves the quantized weight by some step; the same step is
    added to the latent value, whose nearest level is the new weight: the straight-through
    estimator, for any optimizer.

    **Scale.** It follows the latent values by one round of least squares per step, or it is
    trained (:func:`trained_scale`).

    **Snapping** (Zhou et al., INQ, arXiv 1702.03044, and ADMM-NN's code). While only a share of
    the values is on levels these are frozen, the others move freely, and the scale is fixed.

    State: two values, one position and one flag per non-zero weight.

    Args:
        free: the weight to start from.
        member: the same weight as a member of its set. Its zeros stay zero, its scale is taken.
        levels: whose levels these are.
    """

    def __init__(self, free: Tensor, member: Tensor, levels: Levels) -> None:
        scale = find_scale(member, levels)
        assert scale is not None, f"not on {levels}"
        self.levels, self.scale = levels, scale
        self.index = member.flatten().nonzero().squeeze(1)
        self.latent = free.flatten()[self.index]
        self.snapped = torch.zeros_like(self.latent, dtype=torch.bool)
        self.held = self.latent

    @property
    def partial(self) -> bool:
        """Whether some values are not on levels yet."""
        return not bool(self.snapped.all())

    def snap(self, share: float) -> None:
        """Put the values nearest to their levels on them, until ``share`` of all are there."""
        if self.partial:
            goal = self._nearest()
            distance = (self.latent.double() - goal.double()).abs().masked_fill(self.snapped, -1)
            self.snapped = top_k(-distance, round(share * len(distance)))
            self.latent = torch.where(self.snapped, goal, self.latent)

    def hold(self, weight: Tensor, gradient: Tensor | None = None, trained: bool = False) -> None:
        """Carry an optimizer step of the weight over to values and scale; write what they are.

        Args:
            weight: as the optimizer left it; changed in place.
            gradient: of the loss by the weight before that step.
            trained: whether the gradient trains the scale; if not, the scale is fitted.
        """
        values = weight.flatten()[self.index]
        if self.partial:
            self.latent = torch.where(self.snapped, self.latent, values)
        else:
            moved = values - self.held
            if gradient is not None:
                own = gradient.flatten()[self.index].double()
                self.scale = trained_scale(
                    self.scale, self.latent, own, moved.double(), self.levels.grid
                )
            self.latent = self.latent + moved
            if not trained:
                self.scale = refine_scale(self.latent, self.scale, self.levels.grid)
        self.write(weight)

    def write(self, weight: Tensor) -> None:
        """Write values and zeros into a weight."""
        self.held = self.latent if self.partial else self._nearest()
        weight.copy_(self._placed(self.held, weight))

    def member(self, weight: Tensor) -> Tensor:
        """Return the weight with all its values snapped."""
        return self._placed(self._nearest(), weight)

    def _placed(self, values: Tensor, weight: Tensor) -> Tensor:
        placed = weight.new_zeros(weight.numel())
        placed[self.index] = values
        return placed.view(weight.shape)

    def _nearest(self) -> Tensor:
        integers = nearest_levels(self.latent, self.scale, self.levels.grid)
        return at_scale(integers, self.scale, self.latent.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return what training changes."""
        return {name: getattr(self, name) for name in STATE}

    @classmethod
    def restored(cls, state: Mapping[str, Any], levels: Levels) -> LatentLevels:
        """Return the latent levels that :meth:`state_dict` was taken of."""
        made = cls.__new__(cls)
        made.levels = levels
        for name in STATE:
            setattr(made, name, state[name])
        return made


def trained_scale(
    scale: float, latent: Tensor, gradient: Tensor, moved: Tensor, grid: Sequence[int]
) -> float:
    """Return a scale after a step along LSQ's gradient of it (Esser et al., arXiv 1902.08153).

    That gradient is <gradient, slope> / sqrt(n * largest level) for n weights
    (:func:`scale_slope`). The scale is no parameter of the optimizer, so its learning rate is what
    the optimizer's step of the weights amounts to, ||moved|| / ||gradient||. Under plain SGD that
    is the learning rate itself, hence LSQ's own update.

    Args:
        scale: before.
        latent: values before quantization.
        gradient: of the loss by the quantized values, float64.
        moved: the optimizer's step of these values, float64.
        grid: increasing magnitudes, in multiples of the scale.
    """
    length = float(gradient.norm())
    if not length:
        return scale
    slope = scale_slope(latent, scale, grid)
    own = float(gradient @ slope) / math.sqrt(len(slope) * grid[-1])
    change, limit = -own * float(moved.norm()) / length, LARGEST_STEP * scale
    if not math.isfinite(change):
        return scale
    return storable_scale(scale + max(-limit, min(limit, change)), latent.dtype)


def scale_slope(latent: Tensor, scale: float, grid: Sequence[int]) -> Tensor:
    """Return the derivative of quantized values by their scale, as LSQ defines it (equation 3).

    Rounding counts as the identity, so it is nearest_level(v/q) - v/q inside the range and plus or
    minus the largest level outside. One magnitude alone rounds nothing but the sign, which is then
    the slope.

    Args:
        latent: values v before quantization, any shape.
        scale: q.
        grid: increasing magnitudes, in multiples of the scale.

    Returns:
        float64, the shape of ``latent``.
    """
    ratio = latent.double() / scale
    levels = nearest_levels(latent, scale, grid).double()
    return torch.where(ratio.abs() < grid[-1], levels - ratio, levels) if grid[1:] else levels
