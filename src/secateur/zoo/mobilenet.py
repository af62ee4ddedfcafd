"""MobileNet-V2 (M. Sandler et al., arXiv 1801.04381) for small images: torchvision's own class."""

from __future__ import annotations

from torch import nn

from secateur.errors import MissingDependencyError

SETTING = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]
"""Expansion, channels, blocks and stride of each stage: table 2 of the paper, but for the second
stage, which has stride 2 there."""


def mobilenet_v2(classes: int = 10, channels: int = 1, width: float = 1.0) -> nn.Module:
    """Build a MobileNet-V2 that halves 28 or 32 pixels three times, where the paper halves 224 five
    times: the first convolution and the second stage keep the resolution.

    Layers are those of ``torchvision.models.MobileNetV2``, with its rounding of channels to
    multiples of 8.

    Shapes: input ``(batch, channels, height, width)``, any size; output logits
    ``(batch, classes)``.

    Args:
        classes: number of outputs.
        channels: of the input images.
        width: the paper's width multiplier, such as 0.25; the last 1280 channels stay below 1.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    try:
        from torchvision.models import MobileNetV2
    except ImportError:
        raise MissingDependencyError(
            'model: mobilenet_v2 needs torchvision: pip install "secateur[vision]"'
        ) from None
    model = MobileNetV2(classes, width, SETTING)
    stem = model.features[0]
    stem[0] = nn.Conv2d(channels, stem[0].out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")
    return model  # type: ignore[no-any-return]
