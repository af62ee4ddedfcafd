"""Several recipes on one task with equal training: what each costs, and what pays where."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur._version import __version__
from secateur.artifact import onnx
from secateur.comparison import fairness
from secateur.comparison.crew import run_all
from secateur.comparison.figures import DEPLOYED_BITS, NODE, Entry, entries
from secateur.comparison.here import measured
from secateur.comparison.jobs import plan_jobs
from secateur.comparison.statistics import pareto_front
from secateur.comparison.verdict import Judge, Modelled, Verdict, judge
from secateur.compression import build_task, completed
from secateur.cost.platforms import Platform, load_platform, platform_names
from secateur.errors import SecateurError
from secateur.files import atomic
from secateur.recipe import Recipe, load_recipe
from secateur.report.comparison import print_comparison, write_page
from secateur.task import Task

SCHEMA = 1
JSON, HTML, MEASURED = "compare.json", "compare.html", "breakeven.json"
SEEDS = (0, 1, 2)
MARGIN = 0.5
MEASURE = 90.0


@dataclass(frozen=True)
class Comparison:
    """What a comparison left behind.

    Attributes:
        folder: holds ``compare.html``, ``compare.json``, and the folders of all runs.
        report: the content of ``compare.json`` (docs/compare.md).
    """

    folder: Path
    report: dict[str, Any]

    @property
    def failed(self) -> dict[str, str]:
        """Why each run failed that did, by name."""
        failed: dict[str, str] = self.report["failed"]
        return failed


def compare(
    task: Task | None,
    recipes: Sequence[Recipe | Mapping[str, Any] | str | Path],
    *,
    out: str | Path,
    seeds: Sequence[int] = SEEDS,
    jobs: int | None = None,
    margin: float = MARGIN,
    platforms: Sequence[str | Path] = (),
    measure: float = MEASURE,
    allow_unequal: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Run several recipes on one task and compare what comes out.

    For each seed one dense network is trained, from which all recipes start. Called again with the
    same recipes and folder, what is finished is kept and what was stopped goes on. One run that
    fails does not end the others.

    Args:
        task: model and data; None builds both from the recipes, with weights of each seed. The
            weights of a given model are the same for every seed, whatever its ``weights``.
        recipes: two or more, as ``compress`` takes them; their ``train.seed`` is not used.
        out: folder for everything that is written.
        seeds: of the runs; figures are means over them.
        jobs: runs at a time; by default as many as there are cores.
        margin: points of validation accuracy that count as equal to dense.
        platforms: names or YAML files of further platforms to judge.
        measure: seconds to spend on timing layers on this machine, once; 0 for not at all.
        allow_unequal: whether recipes may train for different numbers of epochs.
        console: where progress and the result are printed; None prints nothing.

    Raises:
        RecipeError: a recipe asks for what cannot be.
        MissingDependencyError: Ray is not installed.
        SecateurError: the recipes cannot be compared, or no run has finished.
    """
    console = console or Console(quiet=True)
    loaded = [load_recipe(completed(recipe, task)) for recipe in recipes]
    _check(loaded, seeds, margin, allow_unequal)
    machines = [load_platform(each) for each in dict.fromkeys((*platform_names(), *platforms))]
    own = task or build_task(loaded[0])
    todo = plan_jobs(loaded, seeds, Path(out))
    failed = run_all(todo, jobs=jobs, task=task, console=console)
    finished = [job for job in todo if job.finished and not job.dense]
    if not finished:
        name, reason = next(iter(failed.items()))
        raise SecateurError(f"compare: no run has finished. {name}: {reason}")
    dense, found = entries(finished, own, machines)
    judges, notes = _judges(machines, own, measure, Path(out))
    verdicts = [judge(each, list(found.values()), margin / 100) for each in judges]
    report = _report(loaded, dense, found, verdicts)
    report |= {"seeds": list(seeds), "margin": margin / 100, "failed": failed, "notes": notes}
    _publish(report, Path(out), console)
    return Comparison(Path(out), report)


def _check(
    recipes: Sequence[Recipe], seeds: Sequence[int], margin: float, allow_unequal: bool
) -> None:
    """Refuse, before anything trains, what could not be compared."""
    fairness.require_names(recipes)
    fairness.require_one_task(recipes)
    if not allow_unequal:
        fairness.require_equal_epochs(recipes)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        given = ", ".join(map(str, seeds)) or "none"
        raise SecateurError(f"seeds: {given}: give different whole numbers from 0, as in 0,1,2.")
    if not margin >= 0:
        raise SecateurError(f"margin: {margin} should be 0 or more points of accuracy.")
    if any(recipe.export.onnx for recipe in recipes):
        onnx.require()


def _judges(
    platforms: Sequence[Platform], task: Task, seconds: float, folder: Path
) -> tuple[list[Judge], list[str]]:
    """Return this machine, if it is to be measured, and all modelled ones; and why it is not."""
    judges: list[Judge] = [Modelled(each) for each in platforms]
    if not seconds:
        return judges, []
    try:
        return [measured(task, seconds, folder / MEASURED), *judges], []
    except SecateurError as error:
        return judges, [f"nothing was measured here: {error}"]


def _report(
    recipes: Sequence[Recipe], dense: Entry, found: Mapping[str, Entry], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    epochs = {recipe.name: fairness.epochs_behind(recipe) for recipe in recipes}
    shown = [found[recipe.name] for recipe in recipes if recipe.name in found]
    originals = {recipe.name: recipe.to_dict() for recipe in recipes}
    return {
        "schema": SCHEMA,
        "secateur": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "equal_epochs": len(set(epochs.values())) == 1,
        "assumed": {"bits": DEPLOYED_BITS, "node": NODE},
        "environment": next(iter(dense.seeds.values())).report["environment"],
        "dense": dense.to_dict(),
        "recipes": [
            each.to_dict()
            | {
                "epochs": epochs[each.name],
                "seconds": [seed.report["seconds"] for seed in each.seeds.values()],
                "recipe": originals[each.name],
            }
            for each in shown
        ],
        "fronts": _fronts([dense, *shown]),
        "verdicts": [asdict(each) for each in verdicts],
    }


def _fronts(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Return, by cost, the names on the Pareto front of mean cost and mean test accuracy."""
    return {
        cost: [
            entries[at].name
            for at in pareto_front(
                [(each.costs[cost].mean, each.accuracy.mean) for each in entries]
            )
        ]
        for cost in entries[0].costs
    }


def _publish(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    write_page(report, folder / HTML)
    with atomic(folder / JSON) as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print_comparison(report, console)
