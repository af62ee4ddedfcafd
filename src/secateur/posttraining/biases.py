"""Biases that integers hold: a deployed layer adds exactly what the network was judged with.

Where a layer multiplies integers, runtimes add its bias to their sums, as an integer in steps of
(input step) x (weight step), BatchNorm folded into both. That is coarse where weights have few
bits, and layers of few bits behind it turn the least change into whole steps of theirs. So the
network takes the rounded bias itself, and what is exported from it needs no rounding any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact.integers import adds_integers, by_every_name
from secateur.channels.surgery import CONVOLUTIONS
from secateur.codec import Quantized
from secateur.posttraining.sequence import Batch, norms_behind


@torch.no_grad()
def round_biases(model: nn.Module, quantized: Mapping[str, Quantized], inputs: Batch) -> None:
    """Round biases of layers that run in integers to what these hold, in place.

    Where a BatchNorm behind a convolution is folded into it, what both add is rounded, by the
    running mean of the norm. A second call changes no more than last bits.

    Args:
        model: a plain network in evaluation mode; layers may read through fixed grids.
        quantized: levels of weights, by name of the tensor.
        inputs: any batch, which tells where BatchNorms are.
    """
    named = by_every_name(model, quantized)
    layers = {
        name: levels
        for name, module in model.named_modules()
        if (levels := named.get(f"{name}.weight" if name else "weight")) is not None
        and adds_integers(module, levels)
    }
    behind = norms_behind(model, list(layers), inputs) if layers else {}
    for name, levels in layers.items():
        layer: Any = model.get_submodule(name)
        step = layer.input_quantizer.step.double() * levels.scales().flatten()
        alive = levels.levels.flatten(1).any(1)  # a row of zeros takes any step
        norm: Any = model.get_submodule(behind[name]) if name in behind else None
        if isinstance(layer, CONVOLUTIONS) and norm is not None and _multiplies(norm):
            added = _added(norm) + (0.0 if layer.bias is None else layer.bias)
            norm.running_mean.sub_(alive * _missing(added, step))
        elif layer.bias is not None:
            layer.bias.add_(alive * _missing(layer.bias.double(), step))


def _multiplies(norm: Any) -> bool:
    """Say whether no channel of a BatchNorm is a constant, so that it can be folded."""
    return not norm.affine or bool(norm.weight.all())


def _added(norm: Any) -> Tensor:
    """Return what a BatchNorm adds before it multiplies, ``(channels,)``."""
    shift: Tensor = -norm.running_mean.double()
    if norm.affine:
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        shift += norm.bias.double() * deviation / norm.weight.double()
    return shift


def _missing(bias: Tensor, step: Tensor) -> Tensor:
    """Return what a bias lacks to the nearest multiple of a step."""
    return (bias / step).round() * step - bias
