"""One stage of a recipe: a method, the constraint sets it trains into, and options of both.

Nothing here knows the options of a method or a set: they are read from the registries.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from secateur.allocation import MEASURES, parse_budgets
from secateur.errors import RecipeError, SecateurError, did_you_mean
from secateur.methods import METHODS, MethodOptions
from secateur.problems import Problems, join, kind, show
from secateur.recipe.set_options import option_names, options_model
from secateur.sets import NM, SETS, ConstraintSet, Levels, Pattern, Unstructured

FIXED = (
    *("method", "set", "scope", "metric", "path_aware", "permute", "layers", "budget"),
    "allocation",
)
TARGETS = ("density", "keep")
"""Two ways to say how much stays; one replaces the other."""
DEFAULT_DENSITY = 0.1
SCOPES = ("global", "layer")
METRICS = ("plain", "batchnorm")

SetOptions = dict[str, dict[str, Any]]
"""Options by the name of their constraint set; several sets together are an intersection."""


class AllocationChoice(BaseModel):
    """How a budget is distributed over the layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["magnitude", "sensitivity", "training"] = Field(
        "magnitude",
        description="one threshold for all layers, measured losses, or as the method trains it",
    )
    bits: tuple[int, ...] = Field((), description="widths to choose from, by sensitivity")
    samples: int | None = Field(
        None,
        ge=1,
        description="training samples that losses are measured on; by default 2000, or in "
        "training 20,000 / layers if that is less, but at least 250",
    )


class Stage(BaseModel):
    """One method run into one kind of constraint set.

    Attributes:
        method: name of the method.
        options: the method's own options, an instance of its ``Options``.
        sets: constraint sets by name, patterns first, each with its options.
        scope: ``global`` spends one target over all layers, ``layer`` meets it in each; a set
            other than ``unstructured``, with or without ``levels``, is always met in each.
        metric: ``batchnorm`` compares filters by what they are worth after their BatchNorm,
            ``plain`` as they are.
        path_aware: whether budgets go past weights that do not matter to any output.
        permute: whether channels are put in another order when the stage begins, so that N:M keeps
            more.
        budget: of the whole network (``Budget.to_dict``), distributed over its layers when the
            stage begins, or met by the method in training; it replaces density and keep.
        allocation: how.
        layers: exceptions by pattern (a name, a glob or a module type): set options that replace
            those of the stage, or ``dense``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: SerializeAsAny[MethodOptions]
    sets: SetOptions
    scope: Literal["global", "layer"] = "global"
    metric: Literal["plain", "batchnorm"] = "plain"
    path_aware: bool = False
    permute: bool = False
    budget: dict[str, Any] | None = None
    allocation: AllocationChoice | None = None
    layers: dict[str, dict[str, Any] | Literal["dense"]] = {}

    @property
    def target(self) -> ConstraintSet:
        """The constraint set of every layer that ``layers`` does not mention."""
        built = [SETS[name](**options) for name, options in self.sets.items()]
        return functools.reduce(operator.and_, built)

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as a recipe states it, with every option."""
        names = list(self.sets)
        dropped = TARGETS if self.budget else ()
        options = {
            name: {key: value for key, value in self.sets[name].items() if key not in dropped}
            for name in names
        }
        written = _written(options, names)
        flat = {"set": names[0] if len(names) == 1 else names, **written}
        return {
            "method": self.method,
            **({"set": written} if _ambiguous(names) else flat),
            "scope": self.scope,
            "metric": self.metric,
            "path_aware": self.path_aware,
            "permute": self.permute,
            **self._budget(),
            "layers": dict(self.layers),
            **self.options.model_dump(mode="json"),
        }

    def _budget(self) -> dict[str, Any]:
        if self.budget is None or self.allocation is None:
            return {}
        return {"budget": self.budget, "allocation": self.allocation.model_dump(mode="json")}


def parse_stage(raw: Any, path: str, problems: Problems) -> Stage | None:
    """Validate one stage; None when something is wrong, which is then noted in ``problems``."""
    before = len(problems.found)
    if not isinstance(raw, Mapping):
        problems.not_a_map(path, raw, (*FIXED, *TARGETS))
        return None
    method = _known(raw.get("method"), METHODS, join(path, "method"), "method", problems)
    default = METHODS[method].default_sets if method else {Unstructured.name: {}}
    names = _set_names(raw.get("set", list(default)), join(path, "set"), problems)
    scope = _known(raw.get("scope", "global"), SCOPES, join(path, "scope"), "scope", problems)
    metric = _known(raw.get("metric", "plain"), METRICS, join(path, "metric"), "metric", problems)
    switches = {key: raw.get(key, False) for key in ("path_aware", "permute")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            problems.add(join(path, key), f"{show(value)} should be true or false.")
    if method is None or names is None or scope is None or metric is None:
        return None
    method_keys = METHODS[method].Options.model_fields
    for key in raw:
        if key not in (*FIXED, *method_keys, *_set_keys()):
            problems.unknown(path, key, (*FIXED, *method_keys, *_set_keys()))
    options = problems.validate(
        METHODS[method].Options, {key: raw[key] for key in raw if key in method_keys}, path
    )
    chosen = {key: raw[key] for key in raw if key in _set_keys()}
    if isinstance(raw.get("set"), Mapping):
        for key, value in chosen.items():
            problems.add(
                join(path, key),
                f"{show(value)} stands beside a 'set' that is a map.\n"
                f"Remedy: move it into that map, as in {names[0]}: {{{key}: {value}}}.",
            )
        given = _nested_options(raw["set"], join(path, "set"), problems)
        places = {name: join(path, "set", name) for name in names}
    else:
        if Levels.name not in names and any(key in option_names(Levels.name) for key in chosen):
            names.append(Levels.name)
        given = _flat_options(names, chosen, path, problems)
        places = dict.fromkeys(names, path)
    stated = [key for options in given.values() for key in options if key in TARGETS]
    meets = METHODS[method].meets
    budget = _parse_budget(raw, stated, meets, path, problems)
    allocation = problems.validate(
        AllocationChoice, _allocation(raw.get("allocation", {}), meets), join(path, "allocation")
    )
    if allocation and (allocation.by == "training") != bool(meets):
        who = f"{method} {'meets budgets in training' if meets else 'is given what layers keep'}"
        problems.add(
            join(path, "allocation.by"), f"{show(allocation.by)}, but {who}; leave it out."
        )
    if switches["permute"] and NM.name not in names:
        problems.add(
            join(path, "permute"), f"it is for the set {NM.name}, here {', '.join(names)}."
        )
    given = {name: {**default.get(name, {}), **given.get(name, {})} for name in names}
    sets = _checked(given, places, problems)
    if len(problems.found) > before or options is None:
        return None
    layers = _parse_layers(raw.get("layers"), sets, join(path, "layers"), problems)
    if len(problems.found) > before:
        return None
    return Stage.model_construct(
        method=method,
        options=options,
        sets=sets,
        scope=scope,
        metric=metric,
        path_aware=switches["path_aware"],
        permute=switches["permute"],
        budget=budget,
        allocation=allocation,
        layers=layers,
    )


def _allocation(raw: Any, meets: Sequence[str]) -> Any:
    """Say by training where nothing is said and the method meets its budgets itself."""
    return {"by": "training", **raw} if meets and isinstance(raw, Mapping) else raw


def _parse_budget(
    raw: Mapping[str, Any],
    stated: Sequence[str],
    meets: Sequence[str],
    path: str,
    problems: Problems,
) -> dict[str, Any] | None:
    """Check a budget, which must be the only thing that says how much stays.

    Args:
        meets: kinds that the method meets in training, several at once; if none, one kind is
            distributed before.
    """
    if raw.get("budget") is None:
        if "allocation" in raw:
            problems.add(join(path, "allocation"), "there is no budget to distribute; give one.")
        return None
    if stated:
        problems.add(
            join(path, "budget"), f"{show(raw['budget'])} stands beside {stated[0]}; give only one."
        )
    try:
        budgets = parse_budgets(raw["budget"], meets or MEASURES)
        if budgets[1:] and not meets:
            raise RecipeError("budget: only one kind can be distributed over layers; give one.")
        return {kind: each for budget in budgets for kind, each in budget.to_dict().items()}
    except RecipeError as error:
        place, _, text = str(error).partition(": ")
        problems.add(join(path, place), text)
        return None


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
            layers[str(pattern)] = _parse_change(change, sets, where, problems)
    return layers


def _parse_change(
    change: Mapping[str, Any], sets: SetOptions, path: str, problems: Problems
) -> dict[str, Any]:
    """Check one exception; its options may stand alone or in a map under the name of their set."""
    nested = {name: change[name] for name in change if name in sets}
    for key in change:
        if key not in nested and key not in _set_keys():
            problems.unknown(path, key, [*_keys_of(sets), *sets] if nested else _keys_of(sets))
    flat = {key: change[key] for key in change if key in _set_keys()}
    own = _nested_options(nested, path, problems)
    places = {name: join(path, name) if name in nested else path for name in sets}
    for name, options in _flat_options(list(sets), flat, path, problems).items():
        own.setdefault(name, {}).update(options)
    merged = {}
    for name, options in sets.items():
        changed = own.get(name, {})
        replaced = TARGETS if any(key in TARGETS for key in changed) else ()
        kept = {key: value for key, value in options.items() if key not in replaced}
        merged[name] = {**kept, **changed}
    checked = _checked(merged, places, problems)
    changes = {
        name: {key: value for key, value in options.items() if key in own.get(name, {})}
        for name, options in checked.items()
    }
    return _written({name: options for name, options in changes.items() if options}, sets)


def _nested_options(raw: Mapping[str, Any], path: str, problems: Problems) -> SetOptions:
    """Take options from a map by set; a set without any may stand with nothing after it."""
    for name, options in raw.items():
        if not isinstance(options, Mapping | None):
            problems.not_a_map(join(path, name), options, option_names(name))
    return {name: dict(each) for name, each in raw.items() if isinstance(each, Mapping)}


def _flat_options(
    names: Sequence[str], chosen: Mapping[str, Any], path: str, problems: Problems
) -> SetOptions:
    """Hand each option to the one set that it can belong to."""
    given: SetOptions = {name: {} for name in names}
    for key, value in chosen.items():
        owners = [name for name in names if key in option_names(name)]
        if len(owners) == 1:
            given[owners[0]][key] = value
        elif owners:
            example = ", ".join(f"{name}: {{{key}: {value}}}" for name in owners)
            problems.add(
                join(path, key),
                f"{show(value)} could be of {' or of '.join(owners)}.\n"
                f"Remedy: say of which in a map by set: {{{example}}}.",
            )
        else:
            others = [name for name in SETS if key in option_names(name)]
            problems.add(
                join(path, key),
                f"{show(value)} is an option of {', '.join(others)}, not of {' and '.join(names)}."
                f"\nRemedy: remove it, or name {'one of these' if others[1:] else others[0]} "
                "in the 'set' of the stage.",
            )
    return given


def _checked(given: SetOptions, places: Mapping[str, str], problems: Problems) -> SetOptions:
    """Check the options of each set, which stand at its place, by building the set."""
    sets: SetOptions = {}
    for name, options in given.items():
        path, model = places[name], options_model(name)
        unknown = [key for key in options if key not in model.model_fields]
        for key in unknown:
            problems.unknown(path, key, model.model_fields)
        if unknown:
            continue
        if all(key in options for key in TARGETS):
            (_, first), (key, second) = ((key, options[key]) for key in TARGETS)
            problems.add(
                join(path, key),
                f"{show(second)} stands beside {TARGETS[0]}: {show(first)}; give only one.",
            )
            continue
        if set(TARGETS) <= set(model.model_fields) and not any(key in options for key in TARGETS):
            options = {"density": DEFAULT_DENSITY, **options}
        checked = problems.validate(model, options, path)
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
    if not isinstance(names, list | tuple | Mapping) or not names:
        problems.add(
            path,
            f"{show(raw)} should be a name, a list of names, or a map of names to options: "
            f"{', '.join(SETS)}.",
        )
        return None
    checked = [_known(name, SETS, path, "constraint set", problems) for name in names]
    if None in checked:
        return None
    for name in names:
        if list(names).count(name) > 1:
            problems.add(path, f"{show(raw)} names {name} twice; a stage takes one of each.")
            return None
    patterns = [name for name in names if issubclass(SETS[name], Pattern)]
    return patterns + [name for name in names if name not in patterns]


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


def _ambiguous(names: Iterable[str]) -> bool:
    """Say whether two of these sets have an option of the same name."""
    keys = _keys_of(names)
    return len(set(keys)) < len(keys)


def _written(given: SetOptions, names: Iterable[str]) -> dict[str, Any]:
    """Return options as a stage of these sets states them: flat where that is clear."""
    if _ambiguous(names):
        return {name: dict(options) for name, options in given.items()}
    return {key: value for options in given.values() for key, value in options.items()}
