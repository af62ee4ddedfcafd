"""Problems of a document that a user wrote: collected by key, the first one reported in full."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from secateur.errors import RecipeError, SecateurError, did_you_mean

AnyModel = TypeVar("AnyModel", bound=BaseModel)

KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "dict_type": "a map of key: value",
    "model_type": "a map of key: value",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list with more in it",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "of the form module:callable",
}
"""What a value should have been, by pydantic's name for the error."""


class Section(BaseModel):
    """A map of a document: no unknown keys, no conversions, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass
class Problems:
    """Collects what is wrong with a document, in the order in which it was found.

    Attributes:
        source: what messages call the document.
        found: the messages.
        error: class of the error that is raised about them.
    """

    source: str
    found: list[str] = field(default_factory=list)
    error: type[SecateurError] = RecipeError

    def add(self, path: str, text: str) -> None:
        """Note a problem at a key, such as ``stages[0].density``; empty means the whole of it."""
        self.found.append(f"{self.source}: {path}: {text}" if path else f"{self.source}: {text}")

    def unknown(self, path: str, key: object, known: Iterable[str]) -> None:
        """Note a key that does not exist."""
        known = sorted(known)
        near = did_you_mean(str(key), known)
        self.add(join(path, key), f"unknown key '{key}'.{near}\nKnown here: {', '.join(known)}.")

    def raise_if_any(self) -> None:
        """Raise ``error`` about the first problem, with the number of the others."""
        if self.found:
            more = len(self.found) - 1
            tail = f"\nand {more} more problem{'s' if more > 1 else ''}." if more else ""
            raise self.error(self.found[0] + tail)

    def validate(self, model: type[AnyModel], values: Any, path: str) -> AnyModel | None:
        """Validate against a pydantic model and note what is wrong; None if anything is."""
        if not isinstance(values, Mapping):
            self.not_a_map(path, values, model.model_fields)
            return None
        values = {str(key): value for key, value in values.items()}
        try:
            instance = model.model_validate(values)
        except ValidationError as error:
            # A misspelt key explains the key that is missing, so it comes first.
            for each in sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden"):
                self._add_pydantic(each, path, model)
            return None
        # Python counts True as the number 1, and so does pydantic; nobody who writes it means that.
        taken = [
            key
            for key, value in values.items()
            if isinstance(value, bool) and not isinstance(getattr(instance, key), bool)
        ]
        for key in taken:
            self.add(join(path, key), f"{show(values[key])} should be a number.")
        return None if taken else instance

    def not_a_map(self, path: str, value: Any, known: Iterable[str]) -> None:
        """Note a value that stands where a map of keys belongs."""
        self.add(
            path, f"{show(value)} is {kind(value)}, but a map belongs here.\n{keys_hint(known)}"
        )

    def _add_pydantic(self, error: ErrorDetails, path: str, model: type[BaseModel]) -> None:
        name, kind_of_error = error["loc"][0], error["type"]
        if kind_of_error == "extra_forbidden":
            self.unknown(path, name, model.model_fields)
            return
        about = _about(model, str(name))
        if kind_of_error == "missing":
            text = "is missing."
        elif kind_of_error == "literal_error":
            known = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            near = did_you_mean(str(error["input"]), known)
            text = f"{show(error['input'])} is not known; one of {', '.join(known)}.{near}"
        elif kind_of_error in KINDS:
            text = f"{show(error['input'])} should be {KINDS[kind_of_error]}."
        else:  # the limits of numbers: pydantic says "Input should be greater than 0"
            limit = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
            text = f"{show(error['input'])} {limit}."
        self.add(join(path, *error["loc"]), f"{text}{about}")


def _about(model: type[BaseModel], name: str) -> str:
    """Say what a key means and what it is by default, as far as that is known."""
    about = model.model_fields[name]
    default = "" if about.is_required() else f"; {show(about.default)} by default"
    return f"\nIt is: {about.description}{default}." if about.description else ""


def join(path: str, *keys: object) -> str:
    """Extend a key path: names after a dot, positions in brackets."""
    for key in keys:
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else str(key)
    return path


def show(value: Any) -> str:
    """Write a value as the user did, on one line and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def kind(value: Any) -> str:
    """Name the YAML kind of a value, with its article."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "a map"
    return "text" if isinstance(value, str) else "empty" if value is None else "a single value"


def keys_hint(known: Iterable[str]) -> str:
    """Say which keys a map may hold."""
    return f"Its keys: {', '.join(known)}."
