"""What every data set becomes: three ``torch.utils.data.Dataset`` objects and a few facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset

from secateur.errors import DataError


class Normalization(TypedDict):
    """Per channel, on pixel values in [0, 1]: ``(pixel - mean) / std``."""

    mean: list[float]
    std: list[float]


class InMemory(Dataset[tuple[torch.Tensor, ...]]):
    """Tensors with the same first dimension; a batch is one ``index_select`` of each.

    Args:
        inputs: float tensor of shape (samples, ...), already normalised.
        targets: int64 tensor of shape (samples,).
        more: tensors of shape (samples, ...) that each sample brings along.

    Attributes:
        variants: forms that a sample can take; this is the only one.

    Raises:
        DataError: the lengths differ, or there is no sample at all.
    """

    variants = 1

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, *more: torch.Tensor) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"data: {len(inputs)} inputs but {len(targets)} targets.")
        if len(inputs) == 0:
            raise DataError("data: a split holds no samples.")
        self.inputs = inputs
        self.targets = targets
        self.more = more

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(each[index] for each in (self.inputs, self.targets, *self.more))

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return a whole batch. ``DataLoader`` calls this instead of one call per sample."""
        chosen = torch.as_tensor(indices)
        tensors = (self.inputs, self.targets, *self.more)
        return tuple(each.index_select(0, chosen) for each in tensors)

    def variant(self, number: int) -> InMemory:
        """Return all samples in one of their forms."""
        return self

    def joined(self, goals: torch.Tensor) -> InMemory:
        """Return the same samples, which bring more along: ``goals`` (samples, variants, ...)."""
        return InMemory(self.inputs, self.targets, *self.more, goals[:, 0])


@dataclass(frozen=True)
class DataSplits:
    """One data set, split.

    Attributes:
        name: how the recipe names it.
        train, validation, test: choices are made on validation; test is read once, at the end.
        classes: names of the classes by label; empty when unknown.
        normalization: what was already done to the pixels; None when the user's code did it.
        labelled: whether targets mean anything; if not, they are zeros.
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...] = ()
    normalization: Normalization | None = None
    labelled: bool = True
