"""What training makes of a data set: fewer samples, augmented ones, whole batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from secateur.data.augment import Augmented
from secateur.data.splits import DataSplits, InMemory
from secateur.data.vision import Varied
from secateur.errors import DataError


def _as_is(batch: Any) -> Any:
    return batch


def collate_fn(dataset: Dataset[Any]) -> Callable[[Any], Any] | None:
    """Return the ``collate_fn`` a ``DataLoader`` of this data set needs (None is torch's own)."""
    return _as_is if isinstance(dataset, InMemory | Augmented) else None


def first(dataset: Dataset[Any], samples: int) -> Dataset[Any]:
    """Return the first so many samples as they are, or all if there are fewer."""
    if isinstance(dataset, Augmented | Varied):
        return first(dataset.images, samples)
    if isinstance(dataset, InMemory):
        return InMemory(dataset.inputs[:samples], dataset.targets[:samples])
    return Subset(dataset, range(min(samples, len(dataset))))  # type: ignore[arg-type]


def in_memory(dataset: Dataset[Any], samples: int) -> InMemory:
    """Return the first so many samples as they are, read once."""
    some = first(dataset, samples)
    if isinstance(some, InMemory):
        return some
    batch, targets = next(iter(DataLoader(some, samples)))
    return InMemory(batch, targets)


def inputs(dataset: Dataset[Any], samples: int) -> Tensor:
    """Return the inputs of the first so many samples, as they are, as one batch."""
    return in_memory(dataset, samples).inputs


def fewer(splits: DataSplits, samples: int) -> DataSplits:
    """Return the same data set with only the first so many samples to train on.

    Raises:
        DataError: there are not so many.
    """
    available = len(splits.train)  # type: ignore[arg-type]
    if samples > available:
        raise DataError(
            f"data.train_samples: {samples:,} of {splits.name}, which has {available:,}."
        )
    whole = splits.train
    return replace(
        splits, train=whole.first(samples) if isinstance(whole, Varied) else first(whole, samples)
    )


def augmented(splits: DataSplits, shift: int, flip: bool) -> DataSplits:
    """Return the same data set, its training images moved and mirrored (:class:`Augmented`).

    Raises:
        DataError: the training data are no images in memory.
    """
    if not isinstance(splits.train, InMemory):
        raise DataError(
            f"data.{'shift' if shift else 'flip'}: {splits.name} is read by code of its own.\n"
            "Remedy: move and mirror images there."
        )
    return replace(splits, train=Augmented(splits.train, shift, flip))
