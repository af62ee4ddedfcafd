"""The residual networks that He et al. (arXiv 1512.03385, section 4.2) made for CIFAR-10.

Three groups of blocks, 16, 32 and 64 channels wide, the second and third at half the resolution;
6n + 2 layers with weights for n blocks a group. BOP totals that papers state for ResNet-20
(41.5 G at 32/32 bits) count shortcuts of kind A.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError

Kind = Literal["A", "B"]
WIDTHS = (16, 32, 64)


class Shortcut(nn.Module):
    """Kind A where the shape changes: every second pixel, and zeros for the new channels.

    It has no weights; input channel i is output channel i.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.extra = outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        return functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


def _shortcut(kind: Kind, inputs: int, outputs: int) -> nn.Module:
    if inputs == outputs:
        return nn.Identity()
    if kind == "A":
        return Shortcut(inputs, outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut before the last ReLU.

    Shapes: input ``(batch, inputs, height, width)``, output ``(batch, outputs, ...)`` at half the
    resolution if ``outputs`` differs from ``inputs``.
    """

    def __init__(self, inputs: int, outputs: int, kind: Kind) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(kind, inputs, outputs)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """A CIFAR residual network with ``depth`` = 6n + 2 layers with weights.

    Layers: ``conv1``, ``bn1``, ``layer1`` to ``layer3`` of n blocks each, global average, ``fc``.

    Shapes: input ``(batch, channels, height, width)``, any size; output logits
    ``(batch, classes)``.

    Args:
        depth: 8, 14, 20, ...
        classes: number of outputs.
        channels: of the input images.
        shortcut: where the shape changes: ``A`` for zero-padding without weights, as in the paper,
            or ``B`` for a 1x1 convolution with BatchNorm.

    Raises:
        SecateurError: there is no such kind of shortcut.
    """

    def __init__(self, depth: int, classes: int, channels: int, shortcut: Kind) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise SecateurError(f"shortcut: {shortcut!r} is neither 'A' nor 'B'.")
        blocks = (depth - 2) // 6
        first, second, third = WIDTHS
        self.conv1 = nn.Conv2d(channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _group(first, first, blocks, shortcut)
        self.layer2 = _group(first, second, blocks, shortcut)
        self.layer3 = _group(second, third, blocks, shortcut)
        self.fc = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.fc(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _group(inputs: int, outputs: int, blocks: int, kind: Kind) -> nn.Sequential:
    widths = [inputs] + [outputs] * (blocks - 1)
    return nn.Sequential(*[BasicBlock(width, outputs, kind) for width in widths])


def resnet8(classes: int = 10, channels: int = 1, shortcut: Kind = "A") -> ResNet:
    """Build a CIFAR ResNet-8, one block a group."""
    return ResNet(8, classes, channels, shortcut)


def resnet20(classes: int = 10, channels: int = 1, shortcut: Kind = "A") -> ResNet:
    """Build a CIFAR ResNet-20, three blocks a group."""
    return ResNet(20, classes, channels, shortcut)


def resnet56(classes: int = 10, channels: int = 1, shortcut: Kind = "A") -> ResNet:
    """Build a CIFAR ResNet-56, nine blocks a group."""
    return ResNet(56, classes, channels, shortcut)
