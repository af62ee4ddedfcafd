"""The options of constraint sets, read from the dataclasses that the sets are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, create_model

from secateur.sets import SETS


@functools.cache
def options_model(name: str) -> type[BaseModel]:
    """Return a pydantic model with the fields of a constraint set, to check types with.

    What a field means is read from the ``Args:`` of the set's docstring.
    """
    kind: Any = SETS[name]
    hints = get_type_hints(kind)
    meanings = _meanings(inspect.getdoc(kind) or "")
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        default = ... if each.default is dataclasses.MISSING else each.default
        meaning = meanings.get(each.name)
        fields[each.name] = (hints[each.name], Field(default, description=meaning))
    return create_model(f"{name}_options", **fields)


def option_names(name: str) -> list[str]:
    """Return the option keys of a constraint set."""
    return list(options_model(name).model_fields)


def _meanings(docstring: str) -> dict[str, str]:
    _, _, rest = docstring.partition("Args:\n")
    arguments = rest.partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).rstrip(".") for name, text in found}
