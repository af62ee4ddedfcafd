"""The data sets that have a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.data import store
from secateur.data.idx import parse_idx
from secateur.data.splits import DataSplits, InMemory, Normalization
from secateur.data.vision import cifar10, imagenet
from secateur.errors import DataError, MissingDependencyError

VALIDATION = 5_000
"""Images at the end of the 60,000 training images of an MNIST-like set that are held out."""

SIDE = 28

Pixels = np.ndarray[Any, np.dtype[Any]]


def digits(root: str | Path | None = None) -> DataSplits:
    """Load scikit-learn's 1,797 bundled 8x8 digits, resized bilinearly to 28x28.

    Sorted by class, of every ten images two go to test and one to validation. That gives
    1,257 / 180 / 360 images, stratified, and always the same ones.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "data: 'digits' needs scikit-learn.\nRemedy: pip install \"secateur[data]\""
        ) from error
    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16.0).float()[:, None]
    images = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
    labels = torch.from_numpy(bunch.target).long()
    by_class = np.argsort(bunch.target, kind="stable")
    turn = np.arange(len(by_class)) % 10
    parts = [np.sort(by_class[chosen]) for chosen in (turn > 2, turn == 2, turn < 2)]
    pixels = images[parts[0]].double()
    statistics = _normalization(float(pixels.mean()), float(pixels.std(correction=0)))
    train, validation, test = (
        InMemory(_normalise(images[part], statistics), labels[part]) for part in parts
    )
    return DataSplits("digits", train, validation, test, tuple("0123456789"), statistics)


def mnist_like(name: str, root: str | Path | None = None) -> DataSplits:
    """Load MNIST or Fashion-MNIST: 55,000 / 5,000 / 10,000 images of shape 1x28x28.

    Raises:
        DataError: the files are not there, or are damaged.
    """
    folder = Path(root or store.default_root()) / name

    def read(file: str) -> Pixels:
        path = folder / file
        if not path.is_file():
            raise DataError(f"data: '{name}' is not here; run: secateur data get {name}")
        content = store.read_checked(name, file, path.read_bytes(), str(path))
        return parse_idx(content, str(path))

    images, labels = read(store.TRAIN_IMAGES), read(store.TRAIN_LABELS)
    cut = len(images) - VALIDATION
    statistics = _byte_normalization(images[:cut])

    def split(pixels: Pixels, targets: Pixels) -> InMemory:
        # One copy into a float tensor that is then normalised in place: these are large.
        inputs = torch.from_numpy(pixels[:, None].astype(np.float32)).div_(255)
        return InMemory(_normalise(inputs, statistics), torch.from_numpy(targets.astype(np.int64)))

    return DataSplits(
        name,
        train=split(images[:cut], labels[:cut]),
        validation=split(images[cut:], labels[cut:]),
        test=split(read(store.TEST_IMAGES), read(store.TEST_LABELS)),
        classes=store.idx_set(name).classes,
        normalization=statistics,
    )


def _normalise(images: torch.Tensor, statistics: Normalization) -> torch.Tensor:
    return images.sub_(statistics["mean"][0]).div_(statistics["std"][0])


def _normalization(mean: float, std: float) -> Normalization:
    """Four decimals, so that the figures can be typed into a deployed program."""
    return {"mean": [round(mean, 4)], "std": [round(std, 4)]}


def _byte_normalization(pixels: Pixels) -> Normalization:
    """Mean and standard deviation of bytes in units of 255, exact because they are counted."""
    count = np.bincount(pixels.reshape(-1), minlength=256)
    value = np.arange(256) / 255
    mean = float((count * value).sum() / count.sum())
    variance = float((count * (value - mean) ** 2).sum() / count.sum())
    return _normalization(mean, variance**0.5)


NAMED: dict[str, Callable[[str | Path | None], DataSplits]] = {
    "digits": digits,
    "mnist": lambda root: mnist_like("mnist", root),
    "fashion-mnist": lambda root: mnist_like("fashion-mnist", root),
    "cifar10": cifar10,
    "imagenet": imagenet,
}
"""Every data set that a recipe can name without a path or a ``module:callable``."""
