"""One layer's weights in a constraint set, its outputs on given inputs as near as can be: ADMM.

With inputs X (samples x inputs) and weights W (outputs x inputs) of a trained layer,

    minimize  ||X W^T - X V^T||^2 = <(W - V) H, W - V>  over V in S,     H = X^T X.

V is split into a free copy and a member Z of S, as in the first paper (arXiv 1907.02124), but the
loss is quadratic, so that the W-step of ADMM is a product with one inverse, found once:

    V <- (W H + rho (Z - U) D) (H + rho D)^-1
    Z <- project(V + U) in the metric D
    U <- U + V - Z

D is the diagonal of H: with columns scaled to unit energy rho means the same for every layer, and a
projection sees what a weight is worth to the outputs (Boza, arXiv 2401.02938). rho climbs a ladder,
one inverse a rung: low ones let the support look around, high ones make V and Z meet. At the end,
weights in the support of Z get their least-squares values by conjugate gradients, or levels their
least-squares scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.sets import ConstraintSet
from secateur.sets.levels import at_scale, storable_scale

RUNGS, RISE = 5, math.sqrt(10)
"""Values of rho on the way, and by what one is larger than the one before."""

ROUNDS, TOLERANCE = 100, 1e-5
"""Conjugate gradients end after so many rounds, or at so small a share of the gradient at zero."""


@dataclass(frozen=True)
class Quadratic:
    """How far outputs are from those of a trained layer, as a function of its weights.

    Attributes:
        weight: of the trained layer, ``(outputs, inputs / groups, ...)``.
        gram: H, ``(groups, d, d)``, positive definite, for the ``d`` elements of a filter; a
            convolution in groups has one for each of them.
    """

    weight: Tensor
    gram: Tensor

    @classmethod
    def damped(cls, weight: Tensor, gram: Tensor, damping: float) -> Quadratic:
        """Add a share of the mean diagonal to the diagonal, so that H has an inverse.

        Computation is in at least float32.

        Args:
            weight: as above.
            gram: X^T X, positive semidefinite, ``(groups, d, d)``.
            damping: the share, positive.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # with no input at all everything costs alike
        level = diagonal.mean() * damping if bool(diagonal.any()) else gram.new_ones(())
        return cls(weight.detach().to(dtype), (gram + level * eye).to(dtype))

    @property
    def energy(self) -> Tensor:
        """The diagonal of H, ``(groups, 1, d)``: what a column's square costs."""
        return self.gram.diagonal(dim1=1, dim2=2)[:, None]

    @property
    def metric(self) -> Tensor:
        """The diagonal of H in the shape of the weight."""
        return self.energy.expand_as(self.rows(self.weight)).reshape(self.weight.shape)

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight as ``(groups, outputs / groups, d)``."""
        return weight.reshape(len(self.gram), -1, self.gram.shape[1])

    def loss(self, weight: Tensor) -> float:
        """Return <(W - V) H, W - V>."""
        gap = self.rows(self.weight - weight)
        return float((gap @ self.gram * gap).sum())

    def inverse(self, rho: float) -> Tensor:
        """Return (H + rho D)^-1."""
        regular = self.gram.double() + rho * torch.diag_embed(self.energy[:, 0].double())
        return torch.cholesky_inverse(torch.linalg.cholesky(regular)).to(self.gram.dtype)


def reconstruct(
    problem: Quadratic, target: ConstraintSet, iterations: int = 40, rho: float = 0.1
) -> Tensor:
    """Return a member of a set whose outputs are near those of the trained layer.

    It is never farther away than the projection of the weights.

    Args:
        problem: the layer.
        target: the set.
        iterations: of ADMM, on all rungs together.
        rho: weight of the distance to the set on the first rung; 1 is as much as outputs count.
    """
    found = fitted(problem, admm(problem, target, iterations, rho), target)
    return min(found, target.project(problem.weight), key=problem.loss)


class Projection(Protocol):
    """What ADMM has to know of a set."""

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest member."""


def admm(problem: Quadratic, target: Projection, iterations: int, rho: float) -> Tensor:
    """Return Z after so many iterations."""
    shape, metric, energy = problem.weight.shape, problem.metric, problem.energy
    product = problem.rows(problem.weight) @ problem.gram
    z, u = problem.weight, torch.zeros_like(problem.weight)
    for rung in range(RUNGS):
        inverse = problem.inverse(rho)
        for _ in range(math.ceil(iterations / RUNGS)):
            pull = rho * energy * problem.rows(z - u)
            v = ((product + pull) @ inverse).reshape(shape)
            z = target.project(v + u, metric)
            u = u + v - z
        if rung < RUNGS - 1:
            rho, u = rho * RISE, u / RISE
    return z


def fitted(problem: Quadratic, member: Tensor, target: ConstraintSet) -> Tensor:
    """Return the best member with the same support, or the same levels at the best scale."""
    quantized = target.quantized(member)
    if quantized is None:
        return least_squares(problem, member != 0, member)
    assert isinstance(quantized.scale, float)  # sets that a recipe asks for have one
    rows = problem.rows(member)
    image = rows @ problem.gram
    along = float((image * problem.rows(problem.weight)).sum())
    if along <= 0:
        return member
    scale = quantized.scale * along / float((image * rows).sum())
    return at_scale(quantized.levels, storable_scale(scale, member.dtype), member.dtype)


def least_squares(problem: Quadratic, support: Tensor, start: Tensor) -> Tensor:
    """Return the best weights in a support: conjugate gradients, all outputs side by side.

    Args:
        problem: the layer.
        support: bool, in the shape of the weight.
        start: weights in the support.
    """
    keep, energy = problem.rows(support), problem.energy
    v = problem.rows(start).clone()
    full = problem.rows(problem.weight) @ problem.gram * keep
    residual = full - v @ problem.gram * keep
    direction = residual / energy
    size = (residual * direction).sum(-1, keepdim=True)
    small = TOLERANCE**2 * (full.square() / energy).sum(-1, keepdim=True)
    for _ in range(ROUNDS):
        if bool((size <= small).all()):
            break
        image = direction @ problem.gram * keep
        step = _ratio(size, (direction * image).sum(-1, keepdim=True))
        v += step * direction
        residual = residual - step * image
        scaled = residual / energy
        size, before = (residual * scaled).sum(-1, keepdim=True), size
        direction = scaled + _ratio(size, before) * direction
    return torch.where(support, v.reshape(start.shape), torch.zeros_like(start))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 for rows that are solved."""
    safe = denominator > 0
    return torch.where(safe, numerator / denominator.masked_fill(~safe, 1), 0.0)
