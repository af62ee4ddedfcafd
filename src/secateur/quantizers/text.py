"""The fixed grids of a network's activations as a line of text, for files that hold its tensors."""

from __future__ import annotations

import re

from torch import nn

from secateur.errors import SecateurError
from secateur.quantizers.attach import attach_input, detach_input, input_quantizer
from secateur.quantizers.quantizer import FixedQuantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules that may read through a grid."""

MOST_LEVEL = 2**16 - 1
"""Largest level that a text may state."""

_ENTRY = re.compile(r"([us])([1-9]\d{0,4})")


def grids(model: nn.Module) -> str:
    """Say through which fixed grids the layers of a network read.

    Returns:
        One entry per convolution and linear layer, in the order of ``named_modules()``, joined by
        ``;``: empty if nothing is quantized, else ``u`` (unsigned) or ``s`` (signed) and the
        largest level. Empty if there is no grid at all.
    """
    entries = [_entry(layer) for _, layer in _layers(model)]
    return ";".join(entries) if any(entries) else ""


def regrid(model: nn.Module, text: str) -> nn.Module:
    """Give a network the fixed grids that :func:`grids` says and no others; load steps next.

    Args:
        model: changed in place, and returned.
        text: of :func:`grids`; empty takes all grids off.

    Raises:
        SecateurError: the text is malformed or of another network.
    """
    layers = _layers(model)
    entries = text.split(";") if text else [""] * len(layers)
    if len(entries) != len(layers):
        raise SecateurError(f"activations: {len(entries)} entries for {len(layers)} layers.")
    for (name, layer), entry in zip(layers, entries, strict=True):
        found = _ENTRY.fullmatch(entry)
        if entry and (not found or int(found[2]) > MOST_LEVEL):
            raise SecateurError(f"activations: '{entry[:20]}' is not the grid of {name}.")
        if not found:
            detach_input(layer)
        elif _entry(layer) != entry:
            attach_input(layer, FixedQuantizer(1.0, int(found[2]), found[1] == "s"))
    return model


def activation_bits(model: nn.Module) -> dict[str, int]:
    """Return, by layer that reads through a fixed grid, the bits of what it reads."""
    found = ((name, input_quantizer(layer)) for name, layer in _layers(model))
    return {name: grid.width for name, grid in found if isinstance(grid, FixedQuantizer)}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, each) for name, each in model.named_modules() if isinstance(each, LAYERS)]


def _entry(layer: nn.Module) -> str:
    grid = input_quantizer(layer)
    if not isinstance(grid, FixedQuantizer):
        return ""
    return f"{'s' if grid.signed else 'u'}{grid.most}"
