"""LeNet-5 as Caffe has it: the network on which pruning papers report MNIST."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LeNet5(nn.Module):
    """LeNet-5 (Caffe), 20-50-500-10: 430,500 weights and 580 biases.

    Layers: ``conv1`` 5x5, pool, ``conv2`` 5x5, pool, ``fc1`` with ReLU, ``fc2``. As in Caffe,
    there is no activation after the convolutions.

    Shapes: input ``(batch, 1, 28, 28)``, output logits ``(batch, classes)``.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.max_pool2d(self.conv1(images), 2)
        hidden = functional.max_pool2d(self.conv2(hidden), 2)
        return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))  # type: ignore[no-any-return]


def lenet5(classes: int = 10) -> LeNet5:
    """Build Caffe's LeNet-5 for 28x28 single-channel images."""
    return LeNet5(classes)
