"""What the user asked for: a validated recipe, from YAML or from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.recipe.model import DataChoice, Export, Recipe, Train, parse_recipe, spelled_out
from secateur.recipe.source import apply_overrides, read_recipe_file
from secateur.recipe.stage import Stage

__all__ = ["DataChoice", "Export", "Recipe", "Stage", "Train", "load_recipe"]


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """Read and validate a recipe; every default is filled in.

    Args:
        source: path of a YAML file, or the same content as a mapping, or a recipe.
        overrides: ``key=value`` with dotted keys and list positions (``train.epochs=3``,
            ``stages.0.density=0.05``); the value is read as YAML.

    Raises:
        RecipeError: the first problem in at most three lines, and how many more there are.
    """
    if isinstance(source, Recipe):
        label, name, content = "recipe", source.name, source.to_dict()
    elif isinstance(source, Mapping):
        label, name, content = "recipe", None, dict(source)
    else:
        label, name, content = str(source), Path(source).stem, read_recipe_file(Path(source))
    return parse_recipe(apply_overrides(spelled_out(content), overrides), label, name)
