"""VGG7 for CIFAR-10, the network on which papers on quantization compare their BOPs.

Layers 2x(128-C3)-MP2-2x(256-C3)-MP2-2x(512-C3)-MP2-1024-FC-10 (F. Li et al., "Ternary weight
networks", arXiv 1605.04711). Two networks go by that name, and their figures must not be mixed:
in Bayesian Bits (arXiv 2005.07093) the first linear layer reads all 8192 pixels (12.97 M weights,
630.7 GBOP at 32/32 bits and 32x32 pixels), in GETA (arXiv 2502.16638) their 512 averages (5.11 M
weights, 622.7 GBOP).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from secateur.errors import SecateurError

Head = Literal["flatten", "average"]
WIDTHS = (128, 256, 512, 1024)
SIDE = 4
"""Pixels at which the last block ends, each way, from 25 to 32 pixels."""


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Return two 3x3 convolutions, then half the resolution, rounded up."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(outputs),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            bn2=nn.BatchNorm2d(outputs),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2, ceil_mode=True),
        )
    )


class VGG7(nn.Module):
    """Six convolutions and two linear layers, with BatchNorm after all but the last.

    Layers: ``block1`` to ``block3`` of ``conv1``, ``bn1``, ``conv2``, ``bn2`` and a pool each,
    ``fc1``, ``bn``, ``fc2``. Only ``fc2`` has a bias.

    Shapes: input ``(batch, channels, height, width)`` with sides of 25 to 32 pixels, any size with
    ``head="average"``; output logits ``(batch, classes)``.

    Args:
        classes: number of outputs.
        channels: of the input images.
        width: share of the published channels and units, such as 0.25; counts are rounded.
        head: what ``fc1`` reads: ``flatten`` for the 4x4 pixels of each channel, ``average`` for
            their average.

    Raises:
        SecateurError: there is no such head, or the width leaves no channels.
    """

    def __init__(self, classes: int, channels: int, width: float, head: Head) -> None:
        super().__init__()
        if head not in ("flatten", "average"):
            raise SecateurError(f"head: {head!r} is neither 'flatten' nor 'average'.")
        first, second, third, hidden = (round(width * each) for each in WIDTHS)
        if first < 1:
            raise SecateurError(f"width: {width} leaves no channels; give 1, 0.25 or 0.125.")
        self.block1 = _block(channels, first)
        self.block2 = _block(first, second)
        self.block3 = _block(second, third)
        self.average = head == "average"
        self.fc1 = nn.Linear(third if self.average else third * SIDE**2, hidden, bias=False)
        self.bn = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block3(self.block2(self.block1(images)))
        features = maps.mean(dim=(2, 3)) if self.average else maps.flatten(1)
        return self.fc2(self.bn(self.fc1(features)).relu())  # type: ignore[no-any-return]


def vgg7(classes: int = 10, channels: int = 1, width: float = 1.0, head: Head = "flatten") -> VGG7:
    """Build a VGG7 for images of 28 or 32 pixels."""
    return VGG7(classes, channels, width, head)
