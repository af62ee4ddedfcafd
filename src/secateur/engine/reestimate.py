"""BatchNorm statistics of a network as it is evaluated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from secateur.data import collate_fn, first

SAMPLES = 2048
"""Training samples that statistics are taken over."""

BATCH = 256


@torch.no_grad()
def reestimate(model: nn.Module, train: Dataset[Any]) -> None:
    """Set the running statistics of all BatchNorms to those of the network without its noise.

    In training, gates are noisy and weights move, which moves what the norms behind them see. Only
    the norms are in training mode here, with cumulative averages. Each comes back in its own mode.

    Args:
        model: changed in place.
        train: whose first samples are taken, as they are.
    """
    norms = [
        each
        for each in model.modules()
        if isinstance(each, _BatchNorm) and each.track_running_stats
    ]
    if not norms:
        return
    training = [module for module in model.modules() if module.training]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    some, device = first(train, SAMPLES), norms[0].running_mean.device  # type: ignore[union-attr]
    for batch, *_ in DataLoader(some, batch_size=BATCH, collate_fn=collate_fn(some)):
        model(batch.to(device))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module in training:
        module.training = True
