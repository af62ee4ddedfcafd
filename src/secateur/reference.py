"""References of the form ``module:callable``, the way a model or data set is named in text."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import SecateurError, did_you_mean

KNOWN_MODULES = ("secateur.zoo", "torchvision.models")
"""Modules whose public callables a packed file may name and have built without ``trust=True``."""


def fetches_weights(key: str) -> bool:
    """Say whether an argument of a known architecture is about weights to download."""
    return key.startswith(("weights", "pretrained"))


def resolve(reference: str, what: str = "model") -> Callable[..., Any]:
    """Import ``module:callable`` and return the callable.

    The current directory counts as importable, so that a user's own ``my_models.py`` works.

    Args:
        reference: for example ``secateur.zoo:lenet5`` or ``torchvision.models:resnet18``.
        what: the field that holds the reference, for the error message.

    Raises:
        SecateurError: the reference is malformed, or its module or callable cannot be had.
    """
    module_name, separator, attribute = reference.partition(":")
    if not (separator and module_name and attribute):
        raise SecateurError(
            f"{what}: '{reference}' is not of the form module:callable, "
            "for example secateur.zoo:lenet5 or torchvision.models:resnet18."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise SecateurError(
            f"{what}: cannot import '{module_name}' ({type(error).__name__}: {error}).\n"
            "Check the spelling, or install the package that holds it."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise SecateurError(
            f"{what}: '{module_name}' has no callable '{attribute}'."
            + did_you_mean(attribute, public)
        )
    return found  # type: ignore[no-any-return]


def build(reference: str, arguments: Mapping[str, Any], what: str = "model") -> nn.Module:
    """Call what a reference names and return the network it builds.

    Raises:
        SecateurError: the call fails, or returns something else.
    """
    builder = resolve(reference, what)
    try:
        model = builder(**arguments)
    except Exception as error:  # a user's function may fail in any way
        reason = str(error).partition("\n")[0]
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise SecateurError(
            f"{what}: {reference}({given}) failed: {type(error).__name__}: {reason}\n"
            "Check its arguments, or name a function that builds the network."
        ) from error
    if not isinstance(model, nn.Module):
        raise SecateurError(
            f"{what}: '{reference}' returned {type(model).__name__}, not a torch.nn.Module."
        )
    return model


def is_known(reference: str) -> bool:
    """Say whether a file may name this architecture and have it built without further trust."""
    module_name, _, attribute = reference.partition(":")
    if module_name not in KNOWN_MODULES or attribute.startswith("_"):
        return False
    if module_name == "torchvision.models":
        import torchvision.models as catalogue
        from torchvision.models import list_models

        return attribute in list_models(module=catalogue)
    import secateur.zoo

    return attribute in secateur.zoo.__all__
