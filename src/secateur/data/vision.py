"""CIFAR-10 and ImageNet in the layouts that they come in, read by torchvision."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from secateur.data.splits import DataSplits, InMemory, Normalization
from secateur.data.store import default_root
from secateur.errors import DataError, MissingDependencyError

CIFAR_VALIDATION = 5_000
"""Images at the end of the 50,000 training images that are held out."""

CIFAR: Normalization = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}

IMAGENET: Normalization = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

FOLDERS = {"cifar10": ["cifar-10-batches-py"], "imagenet": ["train", "val"]}
"""What is in the folder of a data set."""

HELD_OUT = 50
"""One of so many training images of ImageNet is held out."""

SIDE, RESIZED = 224, 256
"""Pixels of what networks for ImageNet read, and of what its middle is cut from in evaluation."""


class Varied(Dataset[Any]):
    """Samples that are cropped and mirrored anew whenever they are read.

    Randomness is torch's own, so that it follows the seed of an epoch.

    Args:
        images: the samples as they are in evaluation.
        varied: the same samples in the same order, with random transforms.
    """

    def __init__(self, images: Dataset[Any], varied: Dataset[Any]) -> None:
        self.images, self.varied = images, varied

    def __len__(self) -> int:
        return len(self.varied)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.varied[index]

    def first(self, samples: int) -> Varied:
        """Return the first so many samples."""
        return Varied(*(Subset(each, range(samples)) for each in (self.images, self.varied)))


def cifar10(root: str | Path | None = None) -> DataSplits:
    """Load CIFAR-10: 45,000 / 5,000 / 10,000 images of shape 3x32x32.

    torchvision checks the MD5 of every file before it reads it.

    Raises:
        DataError: the files are not there, or are damaged.
        MissingDependencyError: torchvision is not installed.
    """
    folder = Path(root or default_root()) / "cifar10"
    kind = torchvision("datasets").CIFAR10
    try:
        train, test = (kind(folder, train=train) for train in (True, False))
    except RuntimeError as error:
        raise DataError(
            f"data: CIFAR-10 is not in {folder}, or is damaged.\n"
            "Get it with: secateur data get cifar10"
        ) from error
    mean, std = (torch.tensor(CIFAR[key]).view(3, 1, 1) for key in ("mean", "std"))

    def split(part: Any, chosen: slice) -> InMemory:
        inputs: Tensor = torch.from_numpy(part.data[chosen]).permute(0, 3, 1, 2).float().div_(255)
        return InMemory(inputs.sub_(mean).div_(std), torch.tensor(part.targets[chosen]))

    cut = len(train.targets) - CIFAR_VALIDATION
    return DataSplits(
        "cifar10",
        train=split(train, slice(cut)),
        validation=split(train, slice(cut, None)),
        test=split(test, slice(None)),
        classes=tuple(train.classes),
        normalization=CIFAR,
    )


def imagenet(root: str | Path | None = None) -> DataSplits:
    """Load ImageNet from ``imagenet/train`` and ``imagenet/val``, with a folder for each class.

    Training images are cropped and mirrored at random as usual, to 224 pixels; one in 50 of them is
    held out for validation, and ``val`` is the test set. Samples are in random order, always the
    same, since the first of them stand for all where statistics are taken.

    Raises:
        DataError: a folder is not there or holds no images.
        MissingDependencyError: torchvision is not installed.
    """
    folder = Path(root or default_root()) / "imagenet"
    transforms, folders = torchvision("transforms"), torchvision("datasets").ImageFolder
    end = [transforms.ToTensor(), transforms.Normalize(**IMAGENET)]
    still = transforms.Compose([transforms.Resize(RESIZED), transforms.CenterCrop(SIDE), *end])
    moving = transforms.Compose(
        [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), *end]
    )
    try:
        train, test = (folders(folder / part, still) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise DataError(
            f"data: ImageNet is not in {folder}: {str(error).partition(chr(10))[0]}\n"
            "It needs train/CLASS/*.JPEG and val/CLASS/*.JPEG; data.root says where 'imagenet' is."
        ) from error
    varied = copy.copy(train)
    varied.transform = moving
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held, kept = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    return DataSplits(
        "imagenet",
        train=Varied(Subset(train, kept), Subset(varied, kept)),
        validation=Subset(train, held),
        test=test,
        classes=tuple(train.classes),
        normalization=IMAGENET,
    )


def torchvision(part: str) -> Any:
    """Return a module of torchvision.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ImportError as error:
        raise MissingDependencyError(
            'data: images are read by torchvision.\nRemedy: pip install "secateur[vision]"'
        ) from error
