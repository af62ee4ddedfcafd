"""BatchNorm statistics of a network as it is evaluated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from secateur.data import collate_fn, first
from secateur.norms import has_statistics, restating

SAMPLES = 2048
"""Training samples that statistics are taken over."""

BATCH = 256


@torch.no_grad()
def reestimate(model: nn.Module, train: Dataset[Any]) -> None:
    """Set the running statistics of all BatchNorms to those of the network without its noise.

    In training, gates are noisy and weights move, which moves what the norms behind them see.

    Args:
        model: changed in place.
        train: whose first samples are taken, as they are.
    """
    if not has_statistics(model):
        return
    some = first(train, SAMPLES)
    device = next(model.parameters()).device
    with restating(model):
        for batch, *_ in DataLoader(some, batch_size=BATCH, collate_fn=collate_fn(some)):
            model(batch.to(device))
