"""One stage of a recipe: a method, the constraint sets it trains into, and options of both.

Nothing here knows the options of a method or a set: they are read from the registries.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from secateur.errors import SecateurError, did_you_mean
from secateur.methods import METHODS
from secateur.recipe.problems import Problems, join, kind, show
from secateur.recipe.set_options import option_names, options_model
from secateur.sets import SETS, ConstraintSet, Levels, Pattern, Unstructured

FIXED = ("method", "set", "scope", "layers")
TARGETS = ("density", "keep")
"""Two ways to say how much stays; one replaces the other."""
DEFAULT_DENSITY = 0.1
SCOPES = ("global", "layer")

SetOptions = dict[str, dict[str, Any]]
"""Options by the name of their constraint set; several sets together are an intersection."""


class Stage(BaseModel):
    """One method run into one kind of constraint set.

    Attributes:
        method: name of the method.
        options: the method's own options, an instance of its ``Options``.
        sets: constraint sets by name, patterns first, each with its options.
        scope: ``global`` spends one target over all layers, ``layer`` meets it in each.
        layers: exceptions by pattern (a name, a glob or a module type): set options that replace
            those of the stage, or ``dense``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: SerializeAsAny[BaseModel]
    sets: SetOptions
    scope: Literal["global", "layer"] = "global"
    layers: dict[str, dict[str, Any] | Literal["dense"]] = {}

    @property
    def target(self) -> ConstraintSet:
        """The constraint set of every layer that ``layers`` does not mention."""
        built = [SETS[name](**options) for name, options in self.sets.items()]
        return functools.reduce(operator.and_, built)

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as a recipe states it, with every option."""
        names = list(self.sets)
        return {
            "method": self.method,
            "set": names[0] if len(names) == 1 else names,
            **{key: value for options in self.sets.values() for key, value in options.items()},
            "scope": self.scope,
            "layers": dict(self.layers),
            **self.options.model_dump(mode="json"),
        }


def parse_stage(raw: Any, path: str, problems: Problems) -> Stage | None:
    """Validate one stage; None when something is wrong, which is then noted in ``problems``."""
    before = len(problems.found)
    if not isinstance(raw, Mapping):
        problems.not_a_map(path, raw, (*FIXED, *TARGETS))
        return None
    method = _known(raw.get("method"), METHODS, join(path, "method"), "method", problems)
    names = _set_names(raw.get("set", Unstructured.name), join(path, "set"), problems)
    scope = _known(raw.get("scope", "global"), SCOPES, join(path, "scope"), "scope", problems)
    if method is None or names is None or scope is None:
        return None
    method_keys = METHODS[method].Options.model_fields
    for key in raw:
        if key not in (*FIXED, *method_keys, *_set_keys()):
            problems.unknown(path, key, (*FIXED, *method_keys, *_set_keys()))
    options = problems.validate(
        METHODS[method].Options, {key: raw[key] for key in raw if key in method_keys}, path
    )
    chosen = {key: raw[key] for key in raw if key in _set_keys()}
    if Levels.name not in names and any(key in option_names(Levels.name) for key in chosen):
        names.append(Levels.name)
    sets = _resolve_sets(names, chosen, path, problems)
    if len(problems.found) > before or options is None:
        return None
    layers = _parse_layers(raw.get("layers"), sets, join(path, "layers"), problems)
    if len(problems.found) > before:
        return None
    return Stage.model_construct(
        method=method, options=options, sets=sets, scope=scope, layers=layers
    )


def _parse_layers(
    raw: Any, sets: SetOptions, path: str, problems: Problems
) -> dict[str, dict[str, Any] | Literal["dense"]]:
    """Check the exceptions: each must make good sets together with the stage's options."""
    if raw is not None and not isinstance(raw, Mapping):
        problems.add(
            path,
            f"{show(raw)} is {kind(raw)}, but a map belongs here.\n"
            "For example: {conv1: dense, fc*: {density: 0.05}}",
        )
        return {}
    layers: dict[str, dict[str, Any] | Literal["dense"]] = {}
    for pattern, change in (raw or {}).items():
        where = join(path, str(pattern))
        if change == "dense":
            layers[str(pattern)] = "dense"
        elif not isinstance(change, Mapping):
            problems.add(
                where, f"{show(change)} should be 'dense' or a map such as {{density: 0.05}}."
            )
        else:
            for key in change:
                if key not in _set_keys():
                    problems.unknown(where, key, _keys_of(sets))
            own = {key: change[key] for key in change if key in _set_keys()}
            replaced = TARGETS if any(key in TARGETS for key in own) else ()
            kept = {
                key: value
                for options in sets.values()
                for key, value in options.items()
                if key not in replaced
            }
            resolved = _resolve_sets(list(sets), {**kept, **own}, where, problems)
            layers[str(pattern)] = {
                key: options[key] for options in resolved.values() for key in options if key in own
            }
    return layers


def _resolve_sets(
    names: Sequence[str], chosen: Mapping[str, Any], path: str, problems: Problems
) -> SetOptions:
    """Hand each option to its set, and check it by building the set."""
    for key in chosen:
        if key not in _keys_of(names):
            owner = next(name for name in SETS if key in option_names(name))
            problems.add(
                join(path, key),
                f"{show(chosen[key])} is an option of {owner}, not of {' and '.join(names)}.\n"
                f"Remedy: remove it, or add {owner} to the 'set' of the stage.",
            )
    if all(key in chosen for key in TARGETS):
        first, second = TARGETS
        problems.add(
            join(path, second),
            f"{show(chosen[second])} stands beside {first}: {show(chosen[first])}; give only one.",
        )
        return {}
    sets: SetOptions = {}
    for name in names:
        options = {key: value for key, value in chosen.items() if key in option_names(name)}
        if set(TARGETS) <= set(option_names(name)) and not any(key in options for key in TARGETS):
            options["density"] = DEFAULT_DENSITY
        checked = problems.validate(options_model(name), options, path)
        if checked is None:
            continue
        sets[name] = {key: getattr(checked, key) for key in options}
        try:
            SETS[name](**sets[name])
        except SecateurError as error:
            separator = "." if str(error).partition(":")[0] in options else ": "
            problems.add("", f"{path}{separator}{error}")
    return sets


def _set_names(raw: Any, path: str, problems: Problems) -> list[str] | None:
    """Check the names of sets and put patterns before levels, as intersections want them."""
    names = [raw] if isinstance(raw, str) else raw
    if not isinstance(names, list | tuple) or not names:
        problems.add(path, f"{show(raw)} should be a name or a list of names: {', '.join(SETS)}.")
        return None
    checked = [_known(name, SETS, path, "constraint set", problems) for name in names]
    if None in checked:
        return None
    patterns = [name for name in names if issubclass(SETS[name], Pattern)]
    values = [name for name in names if name not in patterns]
    for group, what in ((patterns, "patterns"), (values, "sets of levels")):
        if len(group) > 1:
            problems.add(path, f"{show(names)} names two {what}; a stage takes one.")
            return None
    return patterns + values


def _known(
    value: Any, known: Iterable[str], path: str, what: str, problems: Problems
) -> str | None:
    names = list(known)
    if isinstance(value, str) and value in names:
        return value
    if value is None:
        problems.add(path, f"is missing; one of {', '.join(names)}.")
    else:
        near = did_you_mean(str(value), names)
        problems.add(path, f"there is no {what} {show(value)}; one of {', '.join(names)}.{near}")
    return None


def _set_keys() -> set[str]:
    return {key for name in SETS for key in option_names(name)}


def _keys_of(names: Iterable[str]) -> list[str]:
    return [key for name in names for key in option_names(name)]
