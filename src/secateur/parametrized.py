"""Parametrized tensors made plain again, without harm to copies of their module."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize


@torch.no_grad()
def settle(module: nn.Module, tensor: str = "weight") -> None:
    """Leave a parametrized tensor as it is now, a parameter of its module and the first of them.

    ``remove_parametrizations`` alone takes the tensor's property off a class that copies of the
    module share, and puts the parameter last, where ``state_dict`` did not have it.
    """
    shared = type(module)
    own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    for name in [name for name in module._parameters if name != tensor]:
        module._parameters[name] = module._parameters.pop(name)
