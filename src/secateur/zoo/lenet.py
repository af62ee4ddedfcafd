"""LeNet-5 for 28x28 pixels, in the two sizes on which papers on compression report MNIST."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LeNet5(nn.Module):
    """Two 5x5 convolutions with a pool each, and two linear layers.

    Layers: ``conv1`` 5x5, pool, ``conv2`` 5x5, pool, ``fc1`` with ReLU, ``fc2``.

    Shapes: input ``(batch, 1, 28, 28)``, output logits ``(batch, classes)``.

    Args:
        classes: number of outputs.
        widths: outputs of the first three layers.
        rectified: whether a ReLU follows each convolution; Caffe has none.
    """

    def __init__(
        self,
        classes: int = 10,
        widths: tuple[int, int, int] = (20, 50, 500),
        rectified: bool = False,
    ) -> None:
        super().__init__()
        first, second, hidden = widths
        self.rectified = rectified
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self._pooled(self.conv1(images))
        hidden = self._pooled(self.conv2(hidden))
        return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))  # type: ignore[no-any-return]

    def _pooled(self, maps: Tensor) -> Tensor:
        return functional.max_pool2d(functional.relu(maps) if self.rectified else maps, 2)


def lenet5(classes: int = 10) -> LeNet5:
    """Build Caffe's LeNet-5, 20-50-500-10, for 28x28 single-channel images.

    430,500 weights and 580 biases; 2.35 GBOP at 32/32 bits.
    """
    return LeNet5(classes)


def lenet5_wide(classes: int = 10) -> LeNet5:
    """Build the LeNet-5 of Bayesian Bits (arXiv 2005.07093), 32-64-512-10, with ReLU throughout.

    581,408 weights and 618 biases; 4.37 GBOP at 32/32 bits.
    """
    return LeNet5(classes, (32, 64, 512), rectified=True)
