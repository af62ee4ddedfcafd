"""The weights of a module as it computes with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

_MASKED = "_orig"
"""What ``torch.nn.utils.prune`` appends to the name of a parameter that it masks."""


def matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own tensors of two or more dimensions, by name.

    A parametrized or masked parameter is given as the module sees it, under its usual name.
    """
    for parameter, _ in module.named_parameters(recurse=False):
        masked = parameter.removesuffix(_MASKED)
        name = masked if hasattr(module, f"{masked}_mask") else parameter
        yield from _matrix(module, name)
    for name in getattr(module, "parametrizations", {}):
        yield from _matrix(module, name)


def _matrix(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    tensor = held(module, name)
    if tensor.ndim >= 2:
        yield name, tensor


def held(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of a module as it computes with it in evaluation mode."""
    if parametrize.is_parametrized(module, name):
        module = copy.deepcopy(module).eval()  # some parametrizations keep state as they train
    return getattr(module, name)  # type: ignore[no-any-return]
