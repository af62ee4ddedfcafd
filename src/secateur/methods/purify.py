"""Network purification (P-RM, arXiv 1905.00136): drop what structured pruning left almost empty.

ADMM ends in a local optimum of a non-convex problem, so some groups that a structured projection
keeps matter little. What reads or makes a channel that is dropped here is dead then, and leaves the
network when its stage ends.
"""

from __future__ import annotations

from torch import Tensor


def purified(weight: Tensor, emptiness: float, importance: float) -> Tensor:
    """Return the weight without input channels that are mostly empty and matter little.

    Args:
        weight: projected, ``(out, in, ...)``; one with fewer dimensions has no channels.
        emptiness: a channel goes only if at least this share of its GEMM columns is zero.
        importance: a channel goes only if its L2 norm is below this share of the mean norm of the
            channels that are not zero.
    """
    if weight.ndim < 2 or not bool(weight.any()):
        return weight
    columns = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach()[:, :, None]
    empty = (columns == 0).all(dim=0).double().mean(dim=1)
    norms = columns.double().square().sum(dim=(0, 2)).sqrt()
    gone = (empty >= emptiness) & (norms < importance * norms[norms > 0].mean())
    return weight.masked_fill(gone.view(1, -1, *[1] * (weight.ndim - 2)), 0.0)
