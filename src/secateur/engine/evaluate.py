"""Forward passes over a whole data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from secateur.data import collate_fn
from secateur.task import Task

BATCH = 500


@torch.no_grad()
def outputs(
    model: nn.Module | Callable[[Tensor], Tensor], dataset: Dataset[Any]
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the targets of every sample, on the CPU, in order.

    A module is put in evaluation mode meanwhile; any other callable takes batches on the CPU.
    """
    device = torch.device("cpu")
    training = False
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), device)
        training = model.training
        model.eval()
    results, targets = [], []
    for batch, target in DataLoader(dataset, batch_size=BATCH, collate_fn=collate_fn(dataset)):
        results.append(model(batch.to(device)).cpu())
        targets.append(target)
    if isinstance(model, nn.Module):
        model.train(training)
    return torch.cat(results), torch.cat(targets)


def mean_score(task: Task, dataset: Dataset[Any]) -> float:
    """Return the mean score of the task's model over a data set, in [0, 1]."""
    return float(task.score(*outputs(task.model, dataset)).double().mean())
