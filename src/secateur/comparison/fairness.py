"""What makes a comparison fair: one task, one dense network for each seed, equal training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from secateur.compression import DENSE_KEYS
from secateur.errors import SecateurError
from secateur.methods import METHODS, Phase
from secateur.problems import show
from secateur.recipe import Recipe

DENSE = "dense"
"""What the dense network is called beside the recipes."""

_OWN = (("train", "seed"), ("train", "threads"), ("train", "workers"))
"""What a comparison decides, and what does not decide a result."""


def epochs_of(recipe: Recipe) -> int:
    """Return how many epochs a recipe trains in all, dense training included."""
    dense = 0 if recipe.weights else recipe.train.epochs
    return dense + sum(phase.epochs for phase in _phases(recipe))


def epochs_behind(recipe: Recipe) -> int:
    """Return how many epochs went into the network that a recipe ends with.

    Dense training is one of them where stages start from it or distil from it, and not where they
    start from scratch and it is only there to compare with.
    """
    beside = recipe.scratch and not any(phase.distill for phase in _phases(recipe))
    return epochs_of(recipe) - (recipe.train.epochs if beside and not recipe.weights else 0)


def _phases(recipe: Recipe) -> list[Phase]:
    methods = (
        METHODS[stage.method](stage.target, **stage.options.model_dump()) for stage in recipe.stages
    )
    return [phase for method in methods for phase in method.phases()]


def require_names(recipes: Sequence[Recipe]) -> None:
    """Check that there is something to compare and that names tell recipes apart.

    Raises:
        SecateurError: fewer than two recipes, or two of one name.
    """
    if len(recipes) < 2:
        raise SecateurError(f"recipes: {len(recipes)} given, but a comparison takes two or more.")
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise SecateurError(
                f"recipes: {names.count(name)} are called '{name}'.\n"
                "Give each a 'name' of its own (by default that of its file)."
            )
        if "/" in name or name == DENSE:
            raise SecateurError(
                f"name: a recipe cannot be called '{name}' here; choose another name without '/'."
            )


def require_one_task(recipes: Sequence[Recipe]) -> None:
    """Check that all recipes start from the same dense network.

    Raises:
        SecateurError: model, data or dense training differ; the message names the first key.
    """
    first, *others = recipes
    expected = dict(_flat({key: first.to_dict()[key] for key in DENSE_KEYS}))
    for other in others:
        found = dict(_flat({key: other.to_dict()[key] for key in DENSE_KEYS}))
        for path in {**expected, **found}:
            here, there = expected.get(path), found.get(path)
            if here != there and path not in _OWN:
                raise SecateurError(
                    f"{'.'.join(path)}: {show(here)} in '{first.name}', {show(there)} in "
                    f"'{other.name}'.\n"
                    "Recipes are compared on one task and from one dense network: make them agree."
                )


def require_equal_epochs(recipes: Sequence[Recipe]) -> None:
    """Check that all recipes train equally long.

    Raises:
        SecateurError: they do not; the message lists the epochs of each.
    """
    epochs = {recipe.name: epochs_behind(recipe) for recipe in recipes}
    if len(set(epochs.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in epochs.items())
        raise SecateurError(
            f"epochs: these recipes do not train equally long: {listed}.\n"
            "Change 'epochs' or 'retrain_epochs' of their stages until the sums agree,\n"
            "or compare them all the same with --allow-unequal, which the report will say."
        )


def _flat(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield each value of nested maps with its path."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value
