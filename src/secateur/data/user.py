"""A user's own data: a function that returns it, a folder of images, or inputs in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from secateur.data.splits import DataSplits, InMemory
from secateur.data.vision import IMAGENET, torchvision
from secateur.errors import DataError, did_you_mean
from secateur.reference import resolve

UNLABELLED_MOST = 10_000
"""Inputs without labels that are read into memory; a few hundred are meant."""

HELD_OUT = 5
"""One of so many inputs without labels is kept for judging."""

FOLDER_SPLITS = ("train", "val", "test")


def from_callable(reference: str, options: Mapping[str, Any]) -> DataSplits:
    """Call a user's function and check that what comes back are three splits, or inputs alone.

    Raises:
        DataError: the function fails, or returns something else.
    """
    function = resolve(reference, "data")
    try:
        returned = function(**options)
    except Exception as error:  # a user's function may fail in any way
        message = str(error).partition("\n")[0]
        raise DataError(f"data: '{reference}' failed: {type(error).__name__}: {message}") from error
    if isinstance(returned, DataSplits):
        return returned
    if isinstance(returned, torch.Tensor | Dataset):
        return unlabelled(reference, returned)
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise DataError(
            f"data: '{reference}' returned {type(returned).__name__}, it should return "
            "(train, validation, test), or inputs alone (a tensor or Dataset) to calibrate with."
        )
    train, validation, test = (
        _as_dataset(part, f"'{reference}' ({split})")
        for part, split in zip(returned, ("train", "validation", "test"), strict=True)
    )
    classes = tuple(str(each) for each in getattr(train, "classes", ()))
    return DataSplits(reference, train, validation, test, classes)


def unlabelled(name: str, inputs: torch.Tensor | Dataset[Any]) -> DataSplits:
    """Split inputs without labels: every fifth judges, the others calibrate.

    Args:
        name: of the data set.
        inputs: a tensor ``(samples, ...)``, or a data set of tensors, of which those that come in a
            tuple come first.

    Raises:
        DataError: there are too few, too many, or they are no tensors of one shape.
    """
    count = len(inputs)  # type: ignore[arg-type]
    if not HELD_OUT <= count <= UNLABELLED_MOST:
        raise DataError(
            f"data: '{name}' holds {count:,} inputs without labels; {HELD_OUT} to "
            f"{UNLABELLED_MOST:,} can be used.\nRemedy: a few hundred are enough to calibrate with."
        )
    if not isinstance(inputs, torch.Tensor):
        samples = [inputs[i] for i in range(count)]
        try:
            inputs = torch.stack([each[0] if isinstance(each, tuple) else each for each in samples])
        except (TypeError, RuntimeError) as error:
            raise DataError(f"data: '{name}' is not of tensors of one shape: {error}") from error
    judges = torch.arange(count) % HELD_OUT == HELD_OUT - 1
    calibration, judged = (
        InMemory(part, torch.zeros(len(part), dtype=torch.int64))
        for part in (inputs[~judges], inputs[judges])
    )
    return DataSplits(name, calibration, judged, judged, labelled=False)


def from_array(file: Path) -> DataSplits:
    """Load inputs without labels from a ``.npy`` file of floats, ``(samples, ...)``.

    Raises:
        DataError: it is none.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"data: '{file}' cannot be read as a NumPy array ({error}).") from error
    if array.ndim < 2 or array.dtype.kind != "f":
        raise DataError(
            f"data: '{file}' holds {array.dtype} of shape {array.shape}, not floats of shape "
            "(samples, ...).\nRemedy: save inputs as the model takes them, float32."
        )
    return unlabelled(file.name, torch.from_numpy(array.astype(np.float32)))


def _as_dataset(part: Any, where: str) -> Dataset[Any]:
    if isinstance(part, Dataset):
        return part
    if isinstance(part, tuple | list) and len(part) == 2:
        inputs, targets = part
        if isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor):
            return InMemory(inputs, targets)
    raise DataError(f"data: {where} is neither a torch Dataset nor a pair of tensors.")


def from_folder(folder: Path, options: Mapping[str, Any]) -> DataSplits:
    """Load train/, val/ and test/ through torchvision's ``ImageFolder``.

    Images are resized and centre-cropped to ``size`` pixels and normalised as ImageNet is.

    Raises:
        DataError: a split is missing, holds no images, or has classes that train/ has not.
        MissingDependencyError: torchvision is not installed.
    """
    size = _size(options)
    datasets, transforms = torchvision("datasets"), torchvision("transforms")
    for split in FOLDER_SPLITS:
        if not (folder / split).is_dir():
            raise DataError(f"data: '{folder}' has no folder '{split}'; it needs train, val, test.")
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(**IMAGENET),
        ]
    )
    try:
        parts = [datasets.ImageFolder(folder / split, transform) for split in FOLDER_SPLITS]
    except FileNotFoundError as error:
        raise DataError(f"data: '{folder}': {str(error).partition(chr(10))[0]}") from error
    for split, part in zip(FOLDER_SPLITS, parts, strict=True):
        if part.classes != parts[0].classes:
            raise DataError(f"data: '{folder / split}' and train hold different classes.")
    train, validation, test = parts
    return DataSplits(str(folder), train, validation, test, tuple(train.classes), IMAGENET)


def _size(options: Mapping[str, Any]) -> int:
    unknown = [key for key in options if key != "size"]
    if unknown:
        raise DataError(
            f"data.args: '{unknown[0]}' is not known; a folder of images takes 'size'."
            + did_you_mean(unknown[0], ["size"])
        )
    size = options.get("size", 224)
    if not isinstance(size, int) or size < 1:
        raise DataError(f"data.args.size: {size!r} should be a positive number of pixels.")
    return size
