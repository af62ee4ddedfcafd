"""What was kept, and its replay on a network: the parameters become smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ChannelError, did_you_mean

Kept = dict[str, dict[str, Any]]
"""By module: the indices kept on its ``in`` and ``out`` side, and ``bias`` if it is given one."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Take = Callable[[nn.Module, str, int, list[int]], None]


@torch.no_grad()
def replay(kept: Mapping[str, Mapping[str, Any]], model: nn.Module) -> nn.Module:
    """Cut a network down to what was kept of another like it.

    Its tensors are sliced, so a freshly built network gets the shapes of the compacted one (load
    its state dict next), and a trained one keeps the values of what stays.

    Args:
        kept: of :func:`~secateur.channels.compact`; plain data that JSON can hold.
        model: changed in place.

    Returns:
        The model.

    Raises:
        ChannelError: it was not kept of this network.
    """
    modules = dict(model.named_modules())
    for name, entry in kept.items():
        if name not in modules:
            raise ChannelError(
                f"kept: the model has no module '{name}'.{did_you_mean(name, modules)}"
            )
        _check(name, entry, _widths(name, modules[name]))
    cut: dict[tuple[int, int], tuple[nn.Parameter, nn.Parameter]] = {}

    def take(module: nn.Module, leaf: str, dim: int, kept: list[int]) -> None:
        old = getattr(module, leaf)
        if old is None:
            return
        index = torch.tensor(kept, device=old.device)
        if not isinstance(old, nn.Parameter):
            setattr(module, leaf, old.index_select(dim, index))
            return
        if (id(old), dim) not in cut:  # a weight that two modules share stays shared
            new = nn.Parameter(old.index_select(dim, index), requires_grad=old.requires_grad)
            cut[id(old), dim] = (old, new)
        setattr(module, leaf, cut[id(old), dim][1])

    for name, entry in kept.items():
        _cut(modules[name], entry, take)
    return model


def _widths(name: str, module: nn.Module) -> dict[str, int]:
    """Return how many indices each side of a module has."""
    if isinstance(module, CONVOLUTIONS):
        return {"in": module.in_channels, "out": module.out_channels}
    if isinstance(module, nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, NORMS):
        return {"out": module.num_features}
    if isinstance(module, nn.PReLU):
        return {"out": module.num_parameters}
    raise ChannelError(f"kept.{name}: a {type(module).__name__} has no channels to cut.")


def _check(name: str, entry: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    for side, kept in entry.items():
        if side == "bias" and kept is True and "in" in widths:
            continue
        if side not in widths:
            raise ChannelError(f"kept.{name}.{side}: a side is one of {', '.join(widths)}.")
        sound = isinstance(kept, list) and len(kept) > 0 and all(type(i) is int for i in kept)
        if not sound or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < widths[side]:
            raise ChannelError(
                f"kept.{name}.{side}: not a rising list of indices below {widths[side]}.\n"
                "It belongs to another network."
            )


def _cut(module: Any, entry: Mapping[str, Any], take: Take) -> None:
    out, given = entry.get("out"), entry.get("in")
    if entry.get("bias") and module.bias is None:
        rows = module.weight.shape[0]
        module.bias = nn.Parameter(module.weight.new_zeros(rows))
    if out is not None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(module, leaf):
                take(module, leaf, 0, out)
    if isinstance(module, CONVOLUTIONS):
        if given is not None:
            _cut_inputs(module, given, take)
        module.out_channels = len(module.weight)
    elif isinstance(module, nn.Linear):
        if given is not None:
            take(module, "weight", 1, given)
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, NORMS) and out is not None:
        module.num_features = len(out)


def _cut_inputs(module: Any, given: list[int], take: Take) -> None:
    """Cut the inputs of a convolution: of all its groups alike, or whole groups if depthwise."""
    width = module.in_channels // module.groups
    if module.groups == 1:
        take(module, "weight", 1, given)
    elif width == 1:
        module.groups = len(given)
    else:
        local = sorted({index % width for index in given})
        take(module, "weight", 1, local)
        if len(local) * module.groups != len(given):
            raise ChannelError("kept: the groups of a grouped convolution differ in size.")
    module.in_channels = len(given)


def kept_of(sides: Mapping[tuple[str, str], Tensor], removed: Tensor) -> Kept:
    """Return what removing channel classes keeps; modules that keep everything are left out.

    Args:
        sides: channel classes by module name and side.
        removed: bool by class.
    """
    kept: Kept = {}
    for (module, side), classes in sides.items():
        gone = removed[classes]
        if bool(gone.any()):
            kept.setdefault(module, {})[side] = (~gone).nonzero().flatten().tolist()
    return kept
