"""What a layer reads, as second moments: all that a quadratic loss has to know of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Moments:
    """Sums over all that a layer has read.

    Each batch is counted without its mean (T. F. Chan, G. H. Golub and R. J. LeVeque, 1979): rows
    that hardly differ would leave nothing but rounding of the difference of two large sums.

    Args:
        layer: a convolution or linear layer.

    Attributes:
        centered: X^T X of the rows without their mean, float64, ``(groups, d, d)`` for filters of
            ``d`` elements: what a bias cannot make up for.
        mean: the mean row of X, float64, ``(groups, 1, d)``.
        rows: of X: how often the layer multiplied its filters.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        groups, width = getattr(layer, "groups", 1), weight[0].numel()
        zeros = weight.new_zeros
        self.layer, self.rows = layer, 0
        self.centered = zeros(groups, width, width, dtype=torch.float64)
        self.mean = zeros(groups, 1, width, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Count one more batch that the layer reads."""
        read = columns(self.layer, inputs.detach())
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        if not (count := read.shape[1]):
            return
        mean = read.mean(1, keepdim=True, dtype=torch.float64)
        apart, gap = read - mean.to(read.dtype), mean - self.mean
        rows = self.rows + count
        self.centered += apart.mT @ apart + gap.mT @ gap * (self.rows * count / rows)
        self.mean += gap * (count / rows)
        self.rows = rows

    @property
    def gram(self) -> Tensor:
        """X^T X, float64, ``(groups, d, d)``."""
        return self.centered + self.rows * self.mean.mT @ self.mean


def columns(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the rows that filters are multiplied with, ``(groups, rows, d)``.

    Args:
        layer: a linear layer, or a convolution in any number of dimensions.
        inputs: what it reads.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    spatial = len(layer.kernel_size)
    batched = inputs if inputs.ndim == spatial + 2 else inputs[None]
    # torch's own layers pad by this too; it knows what 'same' means
    windows = functional.pad(batched, layer._reversed_padding_repeated_twice, mode)
    sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    for dim, (size, dilation, stride) in enumerate(sizes, start=2):
        windows = windows.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    by_place = windows.movedim(1, spatial + 1)  # batch, places, channels, kernel
    width = layer.weight[0].numel()
    return by_place.reshape(-1, layer.groups, width).transpose(0, 1)
