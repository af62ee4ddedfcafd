"""Small networks and data on which tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.methods import Method

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


def small_model() -> nn.Sequential:
    """Build the same network of 128 + 48 weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def train(
    model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1
) -> None:
    """Train :func:`small_model` the way a loop of a user's own does."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(32, 8, generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))
        (loss + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step(optimizer.param_groups[0]["lr"])


def digits_network() -> nn.Module:
    """Build the same network for digits every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))


def digits_task() -> sc.Task:
    """Return a task of 20 steps an epoch at batch size 64."""
    splits = data.load("digits")
    return sc.Task(digits_network(), splits.train, splits.validation, splits.test, name="tiny")


class Calls(nn.Module):
    """A parameter and one function of it and the input."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.weight, images)
