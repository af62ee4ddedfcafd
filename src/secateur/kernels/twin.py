"""N:M masks in plain PyTorch: the definition that the native kernel agrees with bit for bit.

Serves devices other than the CPU, groups larger than the kernel takes, and machines on which the
kernel was not built.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def nm_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Mark the n largest magnitudes of each m; see :func:`secateur.kernels.nm_mask`.

    An element is marked if fewer than n of its group come before it, which takes m (m - 1) / 2
    comparisons a group, and half the time of sorting them at m = 4.
    """
    length = weight.shape[axis]
    padded = functional.pad(weight.detach().abs().movedim(axis, -1), (0, -length % m))
    groups = torch.unflatten(padded, -1, (-1, m)).movedim(-1, 0).contiguous()
    largest = groups.isnan()
    before = torch.zeros_like(groups, dtype=torch.int16)
    for later in range(1, m):
        for earlier in range(later):
            first = (groups[earlier] >= groups[later]) | largest[earlier]
            before[later] += first
            before[earlier] += ~first
    mask = (before < n).movedim(0, -1).flatten(-2)[..., :length].movedim(-1, axis)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def nm_apply(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Return the weight with zeros elsewhere; see :func:`secateur.kernels.nm_apply`."""
    kept = nm_mask(weight, n, m, axis) & (weight != 0)  # what is kept may be -0.0
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def nm_decay_(target: Tensor, weight: Tensor, n: int, m: int, axis: int, decay: float) -> None:
    """Add ``decay * weight`` elsewhere; see :func:`secateur.kernels.nm_decay_`."""
    mask = nm_mask(weight, n, m, axis)
    target.copy_(torch.where(mask, target, target + decay * weight))


def nm_part_(
    weight: Tensor, rest: Tensor, mask: Tensor, n: int, m: int, axis: int, factor: float
) -> None:
    """Take ``weight + factor * rest`` apart; see :func:`secateur.kernels.nm_part_`."""
    whole = weight + factor * rest
    weight.copy_(nm_apply(whole, n, m, axis))
    mask.copy_(weight != 0)
    rest.copy_(whole.masked_fill_(mask, 0))
