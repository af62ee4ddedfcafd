"""The dense network as a teacher, asked about every sample as rarely as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from secateur.data import Augmented, InMemory
from secateur.engine.evaluate import outputs


class Teacher:
    """The trained dense network, and what it says about training samples (its *goals*).

    A sample in memory takes few forms: one, or one per shift and mirroring. If it is seen more
    often than that, the goals of all forms are computed once, ahead of the first epoch.

    Args:
        network: returns the trained dense network, ready to be asked.
        train: the training samples.
        epochs: of the whole run in which goals are wanted.
    """

    def __init__(self, network: Callable[[], nn.Module], train: Dataset[Any], epochs: int) -> None:
        self.network, self.train, self.epochs = network, train, epochs
        self._ready: tuple[Dataset[Any], nn.Module | None] | None = None

    def ready(self) -> tuple[Dataset[Any], nn.Module | None]:
        """Return the samples to train on, and the network to ask if they bring no goals along."""
        if self._ready is None:
            self._ready = self._prepared()
        return self._ready

    def _prepared(self) -> tuple[Dataset[Any], nn.Module | None]:
        network, train = self.network(), self.train
        if not isinstance(train, InMemory | Augmented) or self.epochs < train.variants:
            return train, network
        goals = [outputs(network, train.variant(number))[0] for number in range(train.variants)]
        return train.joined(torch.stack(goals, 1)), None
