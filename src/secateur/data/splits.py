"""What every data set becomes: three ``torch.utils.data.Dataset`` objects and a few facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch.utils.data import Dataset, Subset

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

    Raises:
        DataError: the lengths differ, or there is no sample at all.
    """

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

    def joined(self, *more: torch.Tensor) -> InMemory:
        """Return the same samples, which bring more tensors along."""
        return InMemory(self.inputs, self.targets, *self.more, *more)


def _as_is(batch: Any) -> Any:
    return batch


def collate_fn(dataset: Dataset[Any]) -> Callable[[Any], Any] | None:
    """Return the ``collate_fn`` a ``DataLoader`` of this data set needs (None is torch's own)."""
    return _as_is if isinstance(dataset, InMemory) else None


def first(dataset: Dataset[Any], samples: int) -> Dataset[Any]:
    """Return the first so many samples of a data set, or all if it has fewer."""
    if isinstance(dataset, InMemory):
        return InMemory(dataset.inputs[:samples], dataset.targets[:samples])
    return Subset(dataset, range(min(samples, len(dataset))))  # type: ignore[arg-type]


@dataclass(frozen=True)
class DataSplits:
    """One data set, split.

    Attributes:
        name: how the recipe names it.
        train, validation, test: choices are made on validation; test is read once, at the end.
        classes: names of the classes by label; empty when unknown.
        normalization: what was already done to the pixels; None when the user's code did it.
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...] = ()
    normalization: Normalization | None = None

    def with_fewer(self, samples: int) -> DataSplits:
        """Return the same data set with only the first so many samples to train on.

        Raises:
            DataError: there are not so many.
        """
        available = len(self.train)  # type: ignore[arg-type]
        if samples > available:
            raise DataError(
                f"data.train_samples: {samples:,} of {self.name}, which has {available:,}."
            )
        return replace(self, train=first(self.train, samples))
