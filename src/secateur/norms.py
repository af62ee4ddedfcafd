"""BatchNorms: how much each filter in front of one counts, and statistics taken anew.

A filter in front of one may have any norm: the BatchNorm divides by the deviation of its output and
multiplies by gamma. What reaches the next layer is the filter times gamma / sqrt(var + eps), so
filters are compared by that product, and squared distances are weighed by its square.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def following(model: nn.Module) -> dict[str, str]:
    """Return the BatchNorm that directly follows a layer, both by name.

    The rule: both are children of the same module, the norm is registered right after the layer, it
    keeps running statistics, and it has one feature for each output of the layer. What ``forward``
    does is not looked at, so the plan shows each pair that was found.
    """
    found = {}
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for (first, layer), (second, norm) in itertools.pairwise(parent.named_children()):
            weight = getattr(layer, "weight", None)
            if (
                isinstance(norm, _BatchNorm)
                and norm.running_var is not None
                and isinstance(weight, Tensor)
                and weight.dim() > 1
                and len(weight) == norm.num_features
            ):
                found[prefix + first] = prefix + second
    return found


def metric(norm: nn.Module, dimensions: int) -> Tensor:
    """Return gamma^2 / (var + eps) as it is now, of shape (outputs, 1, ...).

    Args:
        norm: a BatchNorm with running statistics; without gamma that is 1.
        dimensions: of the weight that it follows.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    scale = 1 / (norm.running_var.double() + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.detach().double().square()
    return scale.view(-1, *[1] * (dimensions - 1))


def has_statistics(model: nn.Module) -> bool:
    """Say whether a model has BatchNorms with running statistics."""
    return any(True for _ in _with_statistics(model))


def _with_statistics(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield module


@contextmanager
def restating(model: nn.Module) -> Iterator[None]:
    """Set running statistics of BatchNorms to those of what the model is called with inside.

    They are over all samples, however these are batched: each batch goes on with the statistics of
    all that were seen so far, itself included. Norms that are not called keep theirs. All is in
    evaluation mode; each module comes back in its own mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    handles = [
        norm.register_forward_pre_hook(_Statistics(), with_kwargs=True)
        for norm in _with_statistics(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


class _Statistics:
    """What one BatchNorm has read so far: a hook in front of it, which writes them into it."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0  # of deviations from the mean, summed up

    def __call__(self, norm: nn.Module, given: Sequence[Tensor], named: Mapping[str, Any]) -> None:
        read = given[0] if given else named["input"]
        count = read.numel() // max(1, read.shape[1])
        if not count:
            return
        others = [dim for dim in range(read.ndim) if dim != 1]
        mean = read.detach().mean(others, keepdim=True)
        # to float32's precision, in less time than torch.var_mean over several dimensions
        var = (read.detach() - mean).square_().mean(others).double()
        before, self.count = self.count, self.count + count
        gap = mean.double().flatten() - self.mean
        self.mean = self.mean + gap * (count / self.count)
        self.squares = self.squares + var * count + gap.square() * (before * count / self.count)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        if self.count > 1:  # one value has no variance: the norm keeps its own
            norm.running_var.copy_(self.squares / (self.count - 1))
