"""YAML documents that people write: recipes, platforms."""

from __future__ import annotations

import re
from typing import Any

import yaml

from secateur.errors import RecipeError, SecateurError

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class Loader(yaml.SafeLoader):
    """YAML without its three traps.

    ``1e-3`` is a number here, ``2:4`` is text and not 124 seconds, and a key given twice is an
    error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute)
        first: [each for each in resolvers if each[0] != _INT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a map, refusing a second value for a key."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str, error: type[SecateurError] = RecipeError) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        source: what error messages call it.
        error: class of the errors.

    Raises:
        SecateurError: of that class: invalid YAML, with the number of the line.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as cause:
        line = f" in line {cause.problem_mark.line + 1}" if cause.problem_mark else ""
        tab = "\nYAML is indented with spaces, never tabs." if "'\\t'" in str(cause) else ""
        raise error(f"{source}: invalid YAML{line}: {cause.problem}.{tab}") from cause
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        reason = str(cause).partition("\n")[0]
        raise error(f"{source}: invalid YAML: {reason}.") from cause
