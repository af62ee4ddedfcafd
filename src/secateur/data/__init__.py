"""Data sets: the named ones, a user's own, and how the named ones come to this machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateur.data.augment import Augmented
from secateur.data.batches import augmented, collate_fn, fewer, first, in_memory, inputs
from secateur.data.fetch import get
from secateur.data.named import NAMED
from secateur.data.splits import DataSplits, InMemory
from secateur.data.store import IDX_SETS, default_root
from secateur.data.user import from_array, from_callable, from_folder
from secateur.data.vision import FOLDERS
from secateur.errors import DataError, did_you_mean

__all__ = [
    "NAMED",
    "Augmented",
    "DataSplits",
    "InMemory",
    "augmented",
    "available",
    "collate_fn",
    "default_root",
    "fewer",
    "first",
    "get",
    "in_memory",
    "inputs",
    "load",
]


def available(root: str | Path | None = None) -> list[dict[str, Any]]:
    """Return name, whether it is here, and where (or how to get it) of each named data set."""
    found = []
    for name in NAMED:
        folder = Path(root or default_root()) / name
        if name == "digits":
            here, where = find_spec("sklearn") is not None, "comes with scikit-learn"
        else:
            files = IDX_SETS[name].sha256 if name in IDX_SETS else FOLDERS[name]
            here = all((folder / file).exists() for file in files)
            where = str(folder) if here else f"run: secateur data get {name}"
        found.append({"name": name, "here": here, "where": where})
    return found


def load(name: str, *, root: str | Path | None = None, **args: Any) -> DataSplits:
    """Load a data set.

    Args:
        name: one of ``NAMED``; or ``module:callable`` that returns
            (train, validation, test), each a torch ``Dataset`` or a pair of tensors
            (inputs float of shape (samples, ...), targets int64 of shape (samples,)); or the path
            of a folder that holds train/, val/ and test/ with one folder of images per class.
            Inputs without labels, to calibrate with: a callable that returns a tensor or a
            ``Dataset`` of them, or the path of a ``.npy`` file.
        root: where the folders of named sets are; by default ``default_root()``.
        args: keyword arguments for the callable; ``size`` (in pixels, by default 224) for a
            folder of images.

    Raises:
        DataError: no such data set, not on this machine, damaged, or of the wrong form.
        MissingDependencyError: an optional package is needed.
    """
    if name in NAMED:
        if args:
            raise DataError(f"data.args: '{name}' takes none, but '{next(iter(args))}' is set.")
        return NAMED[name](root)
    if Path(name).is_dir():
        return from_folder(Path(name), args)
    if name.endswith(".npy"):
        return from_array(Path(name))
    if ":" in name:
        return from_callable(name, args)
    raise DataError(
        f"data: '{name}' is none of {', '.join(NAMED)}, no folder, no .npy file, and not "
        "module:callable." + did_you_mean(name, NAMED)
    )
