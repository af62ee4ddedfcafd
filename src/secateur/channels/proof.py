"""Whether two networks compute the same, on an example and on noise."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.channels.trace import evaluating

TOLERANCE = 1e-4
"""Largest difference of a cut network's outputs, relative to the largest output."""


def make_probes(example_input: Tensor, rounds: bool) -> list[Tensor]:
    """Return the example and, since that may be all zeros, noise of its shape.

    Where the network rounds, both are in double precision: a sum over fewer channels differs in its
    last digit, and may then fall to the other side of a step.
    """
    if not example_input.is_floating_point():
        return [example_input]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example_input.shape, generator=generator)
    probes = [example_input, noise.to(example_input)]
    return [probe.double() for probe in probes] if rounds else probes


def run(model: nn.Module, probe: Tensor, weights: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Return the outputs in evaluation mode, in the precision of the probe.

    Args:
        weights: tensors to use instead of the model's own.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **(weights or {})}
    if probe.dtype == torch.float64:
        tensors = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    with evaluating(model):
        outputs = pytree.tree_leaves(torch.func.functional_call(model, tensors, (probe,)))
    return [output for output in outputs if isinstance(output, Tensor)]


def difference(expected: list[list[Tensor]], found: list[list[Tensor]]) -> str:
    """Return what is wrong with the outputs found, empty if nothing is."""
    for one, other in zip(chain(*expected), chain(*found), strict=True):
        if one.shape != other.shape:
            return f"an output is {tuple(other.shape)} instead of {tuple(one.shape)}"
        if not bool(torch.isfinite(one).all()):
            return "its outputs are not finite, so nothing can be checked"
        gap, largest = float((one - other).abs().max()), float(one.abs().max())
        if not gap <= TOLERANCE * max(largest, 1e-30):
            return f"outputs differ by {gap:.3g} of {largest:.3g}"
    return ""
