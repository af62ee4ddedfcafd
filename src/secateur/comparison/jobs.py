"""The jobs of a comparison: a dense network for each seed, and the runs that start from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.comparison.fairness import epochs_of
from secateur.compression import RECIPE, REPORT, dense_part
from secateur.engine import checkpoint
from secateur.errors import SecateurError
from secateur.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """Something to train, in a folder of its own.

    Attributes:
        name: unique among jobs.
        folder: where everything is written; that of a run is what ``compress`` leaves.
        recipe: as it is run.
        dense: whether only the recipe's dense network is trained.
        needs: the job whose dense network the recipe starts from.
    """

    name: str
    folder: Path
    recipe: Recipe
    dense: bool = False
    needs: Job | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / (checkpoint.DENSE if self.dense else REPORT)).exists()

    @property
    def epochs(self) -> int:
        """How many epochs it trains."""
        return self.recipe.train.epochs if self.dense else epochs_of(self.recipe)

    @property
    def log(self) -> Path:
        """File that its output is appended to, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def require_own(self) -> None:
        """Check that what is in the folder, if anything, is of the same recipe.

        Raises:
            SecateurError: it is of another one.
        """
        asked = dense_part(self.recipe) if self.dense else self.recipe.to_yaml()
        path = self.folder / RECIPE
        if path.exists() and path.read_text(encoding="utf-8") != asked:
            raise SecateurError(
                f"out: {self.folder} was made by another recipe or another version.\n"
                f"Choose another --out, or delete that folder to train '{self.name}' afresh."
            )


def plan_jobs(recipes: Sequence[Recipe], seeds: Sequence[int], out: Path) -> list[Job]:
    """Return what is to be trained, in order: dense networks, then all recipes seed by seed.

    Recipes that state ``weights`` start from those.
    """
    dense: dict[int, Job] = {}
    runs = []
    for seed in seeds:
        for recipe in recipes:
            own = _changed(recipe, train=recipe.train.model_copy(update={"seed": seed}))
            if recipe.weights is None:
                first = dense.setdefault(
                    seed, Job(f"dense-seed{seed}", out / "dense" / f"seed{seed}", own, dense=True)
                )
                own = _changed(own, weights=str(first.folder / checkpoint.DENSE))
            name = f"{recipe.name}-seed{seed}"
            runs.append(Job(name, out / "runs" / name, own, needs=dense.get(seed)))
    return [*dense.values(), *runs]


def _changed(recipe: Recipe, **values: object) -> Recipe:
    return recipe.model_copy(update=values)
