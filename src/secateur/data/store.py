"""Where downloaded data sets live, and the raw files they must consist of."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import DataError, did_you_mean

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


@dataclass(frozen=True)
class IdxSet:
    """A data set of four IDX files: their SHA-256 when uncompressed, and the class names."""

    sha256: dict[str, str]
    classes: tuple[str, ...]


IDX_SETS = {
    "mnist": IdxSet(
        sha256={
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        classes=tuple("0123456789"),
    ),
    "fashion-mnist": IdxSet(
        sha256={
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        classes=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
}


def idx_set(name: str) -> IdxSet:
    """Look up a data set that can be fetched.

    Raises:
        DataError: there is none of this name.
    """
    if name not in IDX_SETS:
        raise DataError(
            f"data: '{name}' cannot be fetched; known: {', '.join(IDX_SETS)}."
            + did_you_mean(name, IDX_SETS)
        )
    return IDX_SETS[name]


def default_root() -> Path:
    """Return ``$SECATEUR_DATA``, or the folder where this platform keeps caches."""
    if chosen := os.environ.get("SECATEUR_DATA"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "secateur" / "data"


def read_checked(name: str, file: str, content: bytes, source: str) -> bytes:
    """Return ``content`` if it is byte for byte the file that the data set consists of.

    Raises:
        DataError: the checksum differs.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != IDX_SETS[name].sha256[file]:
        raise DataError(
            f"data: '{file}' of '{name}' from {source} is damaged: SHA-256 is {found[:12]}..., "
            f"it should be {IDX_SETS[name].sha256[file][:12]}....\n"
            f"Delete it and run: secateur data get {name}"
        )
    return content
