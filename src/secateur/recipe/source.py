"""From a file and ``key=value`` overrides to the plain mapping that a recipe is."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.documents import parse_yaml
from secateur.errors import RecipeError, did_you_mean
from secateur.problems import kind, show

SMALLEST = "model: secateur.zoo:lenet5, data: digits, stages: [{method: admm, density: 0.1}]"


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read a recipe file as a mapping.

    Raises:
        RecipeError: not there, not readable, not YAML, or not a map.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = path.parent
        there = [each.name for each in folder.glob("[!.]*.y*ml")] if folder.is_dir() else []
        hint = did_you_mean(path.name, there) or (
            f"\nRecipes in {folder}: {', '.join(sorted(there)[:5])}." if there else ""
        )
        raise RecipeError(f"{path}: there is no such recipe file.{hint}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: is a folder; give the recipe file in it.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not a text file; a recipe is YAML in UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    content = parse_yaml(text, str(path))
    if content is None:
        raise RecipeError(f"{path}: is empty. The smallest recipe:\n{{{SMALLEST}}}")
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: {show(content)} is {kind(content)}, but a recipe is a map such as:\n"
            f"{{{SMALLEST}}}"
        )
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe with ``key=value`` settings applied.

    Raises:
        RecipeError: a setting is malformed or leads through something that is not a map or list.
    """
    result = copy.deepcopy(dict(content))
    for setting in overrides:
        key, separator, value = setting.partition("=")
        steps = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
        if not separator or not all(steps):
            raise RecipeError(f"--set: '{setting}' is not key=value, for example train.epochs=3.")
        _assign(result, steps, parse_yaml(value, f"--set {key}"), setting)
    return result


def _assign(target: Any, steps: list[str], value: Any, setting: str) -> None:
    for position, step in enumerate(steps):
        here = ".".join(steps[:position]) or "the recipe"
        last = position == len(steps) - 1
        key: Any = step
        if isinstance(target, list):
            if not step.isdigit() or int(step) >= len(target):
                raise RecipeError(
                    f"--set: '{setting}': {here} is a list of {len(target)}, "
                    f"so '{step}' should be a position from 0 to {len(target) - 1}."
                )
            key = int(step)
        elif not isinstance(target, dict):
            raise RecipeError(
                f"--set: '{setting}': {here} is {show(target)}, which has no key '{step}'.\n"
                f"Remedy: make it a map in the recipe first."
            )
        if last:
            target[key] = value
        else:
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
            target = target[key]
