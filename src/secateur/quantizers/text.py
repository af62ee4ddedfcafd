"""The fixed grids of a network's activations as a line of text, for files that hold its tensors."""

from __future__ import annotations

import re

from torch import nn

from secateur.errors import SecateurError
from secateur.quantizers.attach import (
    CONTAINERS,
    attach_input,
    attach_output,
    detach_input,
    detach_output,
    input_quantizer,
    output_quantizer,
)
from secateur.quantizers.quantizer import FixedQuantizer, Quantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules that may read through a grid."""

MOST_LEVEL = 2**16 - 1
"""Largest level that a text may state."""

_OUTPUTS = "/"  # in front of what modules return
_WITHOUT = (*CONTAINERS, FixedQuantizer)  # modules without outputs of their own

_ENTRY = re.compile(r"([us])([1-9]\d{0,4})|(-[1-9]\d{0,4}):(0|[1-9]\d{0,4})")


def grids(model: nn.Module) -> str:
    """Say through which fixed grids the layers of a network read, and which modules return on one.

    Returns:
        One entry per convolution and linear layer, in the order of ``named_modules()``, joined by
        ``;``: empty if nothing is quantized, ``u`` (from 0) or ``s`` (symmetric) and the largest
        level, or both ends as in ``-128:127``. Then, if a module rounds what it returns, ``/`` and
        ``NAME=GRID`` of each such module, in the same order and joined by ``;``. Empty if there is
        no grid at all.
    """
    entries = [_entry(input_quantizer(layer)) for _, layer in _layers(model)]
    named = ((name, _entry(output_quantizer(module))) for name, module in model.named_modules())
    outputs = ";".join(f"{name}={entry}" for name, entry in named if entry)
    inputs = ";".join(entries) if any(entries) else ""
    return f"{inputs}{_OUTPUTS}{outputs}" if outputs else inputs


def has_outputs(text: str) -> bool:
    """Say whether a text of :func:`grids` states what modules return."""
    return _OUTPUTS in text


def regrid(model: nn.Module, text: str) -> nn.Module:
    """Give a network the fixed grids that :func:`grids` says and no others; load steps next.

    Args:
        model: changed in place, and returned.
        text: of :func:`grids`; empty takes all grids off.

    Raises:
        SecateurError: the text is malformed or of another network.
    """
    inputs, _, outputs = text.partition(_OUTPUTS)
    layers = _layers(model)
    entries = inputs.split(";") if inputs else [""] * len(layers)
    if len(entries) != len(layers):
        raise SecateurError(f"activations: {len(entries)} entries for {len(layers)} layers.")
    for (name, layer), entry in zip(layers, entries, strict=True):
        if not entry:
            detach_input(layer)
        elif _entry(input_quantizer(layer)) != entry:
            attach_input(layer, FixedQuantizer(1.0, *_ends(name, entry)))
    _regrid_outputs(model, dict(_named(each) for each in outputs.split(";") if each))
    return model


def _regrid_outputs(model: nn.Module, entries: dict[str, str]) -> None:
    modules = dict(model.named_modules())
    for name in entries:
        if not isinstance(modules.get(name, nn.Sequential()), _WITHOUT):
            continue
        raise SecateurError(f"activations: the network has no module '{name[:40]}' with an output.")
    like = next(model.parameters(), None)
    for name, module in modules.items():
        entry = entries.get(name, "")
        if not entry:
            detach_output(module)
        elif _entry(output_quantizer(module)) != entry:
            grid = FixedQuantizer(1.0, *_ends(name, entry))
            attach_output(module, grid if like is None else grid.to(like))


def _named(entry: str) -> tuple[str, str]:
    name, equals, grid = entry.rpartition("=")
    if not equals:
        raise SecateurError(f"activations: '{entry[:20]}' is no module and its grid.")
    return name, grid


def activation_bits(model: nn.Module) -> dict[str, int]:
    """Return, by layer that reads through a fixed grid, the bits of what it reads."""
    found = ((name, input_quantizer(layer)) for name, layer in _layers(model))
    return {name: grid.width for name, grid in found if isinstance(grid, FixedQuantizer)}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, each) for name, each in model.named_modules() if isinstance(each, LAYERS)]


def _ends(name: str, entry: str) -> tuple[int, int]:
    """Return the smallest and the largest level that an entry states."""
    found = _ENTRY.fullmatch(entry)
    least = most = 0
    if found and found[1]:
        most = int(found[2])
        least = -most if found[1] == "s" else 0
    elif found:
        least, most = int(found[3]), int(found[4])
    if not 0 < most - least <= 2 * MOST_LEVEL or max(-least, most) > MOST_LEVEL:
        raise SecateurError(f"activations: '{entry[:20]}' is not the grid of {name}.")
    return least, most


def _entry(grid: Quantizer | FixedQuantizer | None) -> str:
    if not isinstance(grid, FixedQuantizer):
        return ""
    if grid.least == 0:
        return f"u{grid.most}"
    return f"s{grid.most}" if grid.least == -grid.most else f"{grid.least}:{grid.most}"
