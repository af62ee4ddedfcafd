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
        goals: of shape (samples, variants, ...), what each form of a sample brings along.

    Attributes:
        variants: forms that a sample can take: every move, once more mirrored.

    Raises:
        DataError: the inputs are no images, or the shift is as large as they are.
    """

    def __init__(
        self, images: InMemory, shift: int, flip: bool, goals: Tensor | None = None
    ) -> None:
        shape = images.inputs.shape
        if len(shape) != 4 or shift >= min(shape[2:]):
            raise DataError(
                f"data.shift: {shift} pixels of inputs of shape {tuple(shape[1:])}; "
                "only images (channels, height, width) that are larger can be moved."
            )
        self.images, self.shift, self.flip, self.goals = images, shift, flip, goals
        self.steps = 2 * shift + 1
        self.variants = self.steps**2 * (2 if flip else 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(each[0] for each in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return a whole batch."""
        images, *others = self.images.__getitems__(indices)
        variants = torch.randint(0, self.variants, (len(images),))
        if self.goals is not None:
            others.append(self.goals[torch.as_tensor(indices), variants])
        return (self._take(images, variants), *others)

    def variant(self, number: int) -> InMemory:
        """Return all samples in one of their forms."""
        images = self.images
        variants = torch.full((len(images),), number)
        return InMemory(self._take(images.inputs, variants), images.targets, *images.more)

    def joined(self, goals: Tensor) -> Augmented:
        """Return the same samples, which bring more along: ``goals`` (samples, variants, ...)."""
        return Augmented(self.images, self.shift, self.flip, goals)

    def _take(self, images: Tensor, variants: Tensor) -> Tensor:
        """Return images ``(batch, channels, height, width)``, each in the variant given for it."""
        variants = variants.view(-1, 1)
        flipped, move = variants // self.steps**2, variants % self.steps**2
        mirrored = torch.where(flipped.view(-1, 1, 1, 1) == 1, images.flip(3), images)
        batch, channels, height, width = images.shape
        padded = functional.pad(mirrored, [self.shift] * 4, mode="replicate")
        rows = (move // self.steps + torch.arange(height)).view(batch, 1, height, 1)
        columns = (move % self.steps + torch.arange(width)).view(batch, 1, 1, width)
        each = torch.arange(batch).view(-1, 1, 1, 1)
        return padded[each, torch.arange(channels).view(1, -1, 1, 1), rows, columns]
