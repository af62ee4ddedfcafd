"""Every method and constraint set that a recipe can name, with their options, as plain data."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from secateur.methods import METHODS
from secateur.recipe.set_options import options_model
from secateur.sets import SETS


def catalogue() -> dict[str, dict[str, Any]]:
    """Return ``{"methods": {name: entry}, "sets": {name: entry}}``.

    An entry has a ``summary`` and a list of ``options`` with name, default, required, description.
    """
    return {
        "methods": {
            name: {"summary": method.summary, "options": _options(method.Options)}
            for name, method in METHODS.items()
        },
        "sets": {
            name: {
                "summary": (inspect.getdoc(kind) or "").partition("\n")[0],
                "options": _options(options_model(name)),
            }
            for name, kind in SETS.items()
        },
    }


def _options(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "required": info.is_required(),
            "default": None if info.is_required() else info.default,
            "description": info.description or "",
        }
        for name, info in model.model_fields.items()
    ]
