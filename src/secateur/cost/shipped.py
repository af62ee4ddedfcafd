"""Descriptions of hardware in YAML: those that come with the package, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from secateur.documents import parse_yaml
from secateur.errors import SecateurError, did_you_mean

_SUFFIX = ".yaml"


def shipped(folder: str) -> list[str]:
    """Return the names of the descriptions in a folder of this package, sorted."""
    files = resources.files("secateur.cost").joinpath(folder).iterdir()
    return sorted(each.name[: -len(_SUFFIX)] for each in files if each.name.endswith(_SUFFIX))


def read(choice: str | Path, folder: str) -> tuple[str, dict[str, Any]]:
    """Read a description.

    Args:
        choice: a name that :func:`shipped` returns, or the path of a YAML file.
        folder: what is described, which is also the name of the folder here.

    Returns:
        What error messages call it, and its content.

    Raises:
        SecateurError: no such name or file, or not a YAML map.
    """
    source, text = str(choice), _text(choice, folder)
    content = parse_yaml(text, source, SecateurError)
    if not isinstance(content, Mapping):
        raise SecateurError(f"{source}: a map of keys belongs here, see docs/platforms.md.")
    return source, {str(key): value for key, value in content.items()}


def _text(choice: str | Path, folder: str) -> str:
    if str(choice) in shipped(folder):
        home = resources.files("secateur.cost").joinpath(folder)
        return home.joinpath(f"{choice}{_SUFFIX}").read_text(encoding="utf-8")
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = shipped(folder)
        raise SecateurError(
            f"{folder}: '{choice}' is neither known nor a readable file."
            f"{did_you_mean(str(choice), known)}\n"
            f"Known: {', '.join(known)}; your own: path of a YAML file, see docs/platforms.md."
        ) from error
