"""What a recipe says of single layers: patterns that mean them, and changes to their sets."""

from __future__ import annotations

import fnmatch
import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from secateur.errors import RecipeError, did_you_mean
from secateur.sets import ConstraintSet


def first_match(patterns: Iterable[str], name: str, module: nn.Module) -> str | None:
    """Return the pattern that counts for a layer: its name, else a glob, else a module type."""

    def rank(pattern: str) -> int:
        return 0 if pattern == name else 1 if any(c in pattern for c in "*?[") else 2

    matching = (pattern for pattern in patterns if matches(pattern, name, module))
    return min(matching, key=rank, default=None)


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Say whether a pattern means a layer."""
    return (
        pattern == name
        or fnmatch.fnmatchcase(name, pattern)
        or pattern in {kind.__name__ for kind in type(module).__mro__}
    )


def changed(target: ConstraintSet, change: Mapping[str, Any], pattern: str) -> ConstraintSet:
    """Return a set with some fields of its parts replaced.

    Args:
        change: fields by name, or by the name of the set they belong to and then by name.
        pattern: whose change it is, for errors.

    Raises:
        RecipeError: a field does not exist, or belongs to two parts of the set.
    """
    patterns, levels = target.split()
    parts = {part.name: part for part in (*patterns, *([levels] if levels else []))}
    known = {name: {f.name for f in fields(part)} for name, part in parts.items()}  # type: ignore[arg-type]
    own: dict[str, dict[str, Any]] = {name: {} for name in parts}
    settings = []  # path of the key, sets it may belong to, key, value
    for key, value in change.items():
        if key in parts and isinstance(value, Mapping):
            settings += [(f"{key}.{each}", [key], each, value[each]) for each in value]
        else:
            settings.append((key, list(parts), key, value))
    for path, among, key, value in settings:
        owners = [name for name in among if key in known[name]]
        if len(owners) > 1:
            raise RecipeError(
                f"layers.{pattern}.{path}: it is an option of {' and of '.join(owners)}.\n"
                f"Remedy: say of which, as in {{{owners[0]}: {{{key}: {value}}}}}."
            )
        if not owners:
            options = sorted(set().union(*(known[name] for name in among)))
            raise RecipeError(
                f"layers.{pattern}.{path}: no such option.{did_you_mean(key, options)}\n"
                f"Options here are {', '.join(options)}."
            )
        own[owners[0]][key] = value
    return functools.reduce(operator.and_, (parts[name].changed(**own[name]) for name in parts))
