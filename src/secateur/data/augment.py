"""Images that are moved and mirrored a little at every epoch, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from secateur.data.splits import InMemory
from secateur.errors import DataError


class Augmented(Dataset[tuple[Tensor, ...]]):
    """The samples of a data set, each moved and mirrored anew whenever it is read.

    Randomness is torch's own, so that it follows the seed of an epoch.

    Args:
        images: inputs of shape (samples, channels, height, width).
        shift: pixels by which an image moves at most, each way; its border is repeated.
        flip: whether half of the images are mirrored left to right.

    Raises:
        DataError: the inputs are no images, or the shift is as large as they are.
    """

    def __init__(self, images: InMemory, shift: int, flip: bool) -> None:
        shape = images.inputs.shape
        if len(shape) != 4 or shift >= min(shape[2:]):
            raise DataError(
                f"data.shift: {shift} pixels of inputs of shape {tuple(shape[1:])}; "
                "only images (channels, height, width) that are larger can be moved."
            )
        self.images, self.shift, self.flip = images, shift, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(each[0] for each in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return a whole batch."""
        images, *others = self.images.__getitems__(indices)
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return (moved(images, self.shift) if self.shift else images, *others)


def moved(images: Tensor, shift: int) -> Tensor:
    """Return images each moved by up to ``shift`` pixels, ``(batch, channels, height, width)``."""
    batch, channels, height, width = images.shape
    padded = functional.pad(images, [shift] * 4, mode="replicate")
    down, across = torch.randint(0, 2 * shift + 1, (2, batch, 1))
    rows = (down + torch.arange(height)).view(batch, 1, height, 1)
    columns = (across + torch.arange(width)).view(batch, 1, 1, width)
    each = torch.arange(batch).view(-1, 1, 1, 1)
    return padded[each, torch.arange(channels).view(1, -1, 1, 1), rows, columns]
