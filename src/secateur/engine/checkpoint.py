"""Checkpoints: everything a killed run needs to end as if it had not been killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.files import atomic

FOLDER = "checkpoint"
NAME = "state.pt"
DENSE = "dense.safetensors"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; a reader finds the old file or the new one, never half."""
    with atomic(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path) -> dict[str, Any] | None:
    """Return the saved state, or None if there is none. Only tensors and plain values are read.

    Raises:
        SecateurError: the file cannot be read as a checkpoint.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch reports a damaged file in many ways
        raise SecateurError(
            f"checkpoint: {path} cannot be read ({type(error).__name__}).\n"
            "Delete it, or run without --resume to start afresh."
        ) from error
    return state
