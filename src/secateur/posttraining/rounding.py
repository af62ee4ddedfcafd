"""One layer's weights on integer levels with a scale for each output channel.

Rounding to nearest is not what keeps outputs: an error in one column can make up for one in
another. Scales are fixed first, each row's own; then the levels are found by the ADMM of
:mod:`secateur.posttraining.quadratic`, whose projection is rounding here; then scales get their
least-squares values; then levels are chosen one column at a time, given all others, for as long as
that helps. Rows do not depend on each other, so each takes the better of this and the nearest
levels. Weights that are 0 already, pruned, stay 0. AdaRound (arXiv 2004.10568) searches among the
two neighbouring levels by gradient descent; here the same quadratic loss is used as it is, and any
level may be taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.codec import Quantized
from secateur.posttraining.quadratic import Quadratic, admm
from secateur.sets import Levels
from secateur.sets.levels import nearest

SHARES = torch.linspace(0.3, 1.1, 81).tolist()
"""Ranges of a row that are tried, as shares of its largest magnitude."""

SWEEPS = 4
"""Times at most that every column is reconsidered."""


@dataclass(frozen=True)
class RowGrid:
    """Integer levels times a step for each row.

    Attributes:
        step: positive, ``(outputs, 1, ...)`` with as many dimensions as the weight.
        magnitudes: of all levels but 0, increasing.
        live: bool, in the shape of the weight: what may differ from 0.
    """

    step: Tensor
    magnitudes: tuple[int, ...]
    live: Tensor

    def levels(self, weight: Tensor) -> Tensor:
        """Return the nearest levels, in the dtype of the weight."""
        return self.nearest(weight / self.step) * self.live

    def nearest(self, multiples: Tensor) -> Tensor:
        """Return the levels nearest to multiples of the step."""
        most = self.magnitudes[-1]
        if most == len(self.magnitudes):
            return torch.round(multiples).clamp_(-most, most)
        return nearest(multiples.abs(), (0, *self.magnitudes)) * multiples.sign()

    def project(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest weights on the grid, whatever the metric: each is on its own."""
        return self.levels(weight) * self.step


def rounded(problem: Quadratic, target: Levels, iterations: int, rho: float) -> Quantized:
    """Return levels whose outputs are near those of the trained layer.

    No row is farther away than if it were rounded to the nearest levels.

    Args:
        problem: the layer.
        target: levels with zero.
        iterations: of ADMM; 0 rounds to the nearest levels.
        rho: as :func:`secateur.posttraining.quadratic.reconstruct` takes it.
    """
    magnitudes, live = target.magnitudes, problem.weight != 0
    grid = RowGrid(best_steps(problem, magnitudes), magnitudes, live)
    plain = grid.levels(problem.weight)
    if not iterations:
        return _quantized(plain, grid.step, target)
    found = grid.levels(admm(problem, grid, iterations, rho))
    moved = replace(grid, step=_fitted_steps(problem, found, grid.step))
    found = in_turns(problem, found, moved)
    better = _row_losses(problem, found * moved.step) < _row_losses(problem, plain * grid.step)
    better = better.view(grid.step.shape)
    levels = torch.where(better, found, plain)
    return _quantized(levels, torch.where(better, moved.step, grid.step), target)


def best_steps(problem: Quadratic, magnitudes: tuple[int, ...]) -> Tensor:
    """Return, by row, the step of least squared error, each column counting by its energy.

    Args:
        problem: the layer.
        magnitudes: of all levels but 0, increasing.

    Returns:
        ``(outputs, 1, ...)``, with as many dimensions as the weight; numbers that float32 holds.
    """
    rows, energy = problem.rows(problem.weight), problem.energy
    top = rows.abs().amax(-1, keepdim=True)
    best, least = top, torch.full_like(top, torch.inf)
    for share in SHARES:
        grid = RowGrid(_storable(top * (share / magnitudes[-1])), magnitudes, rows != 0)
        error = ((grid.project(rows) - rows).square_() * energy).sum(-1, keepdim=True)
        best = torch.where(error < least, grid.step, best)
        least = torch.minimum(error, least)
    return best.view(-1, *(1,) * (problem.weight.ndim - 1))


def _storable(step: Tensor) -> Tensor:
    """Round to positive numbers that float32 holds."""
    return step.float().clamp_min(torch.finfo(torch.float32).tiny).to(step)


def _fitted_steps(problem: Quadratic, levels: Tensor, step: Tensor) -> Tensor:
    """Return the least-squares step of each row of levels; the old one where that is none."""
    rows = problem.rows(levels)
    image = rows @ problem.gram
    along, size = ((image * each).sum(-1) for each in (problem.rows(problem.weight), rows))
    fitted = torch.where(along > 0, along / size, 0.0).view(step.shape)
    return torch.where(fitted > 0, _storable(fitted), step)


def in_turns(problem: Quadratic, levels: Tensor, grid: RowGrid) -> Tensor:
    """Choose the best level of each column given all others, in turn: the loss only falls.

    With R = (W - V) H the best free value of column j is V_j + R_j / H_jj.
    """
    step, live = grid.step.view(len(problem.gram), -1), problem.rows(grid.live)
    v = problem.rows(levels * grid.step).clone()
    residual = (problem.rows(problem.weight) - v) @ problem.gram
    for _ in range(SWEEPS):
        changed = False
        for column in range(v.shape[-1]):
            curvature = problem.gram[:, column, column, None]
            free = (v[..., column] + residual[..., column] / curvature) / step
            chosen = grid.nearest(free) * step * live[..., column]
            change = chosen - v[..., column]
            if bool(change.any()):
                v[..., column], changed = chosen, True
                residual -= change[..., None] * problem.gram[:, None, column]
        if not changed:
            break
    return grid.levels(v.view(levels.shape))


def _row_losses(problem: Quadratic, weight: Tensor) -> Tensor:
    gap = problem.rows(problem.weight - weight)
    return (gap @ problem.gram * gap).sum(-1).flatten()


def _quantized(levels: Tensor, step: Tensor, target: Levels) -> Quantized:
    scales = tuple(step.flatten().tolist())
    return Quantized(levels.to(torch.int16), scales, target.bits, target.zero, target.spacing)
