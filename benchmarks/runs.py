"""Runs of recipes with several seeds, side by side, resumable; and where their results are kept.

    python benchmarks/runs.py lenet5-mnist-348x lenet5-mnist-binary --seeds 0 1 2 --jobs 2

runs each recipe with each seed in runs/RECIPE-seedN, skips what is finished, continues what was
stopped, and copies report and packed file to benchmarks/results. Unlike `secateur compare` it takes
any recipes, of whatever task and length, and each run trains its own dense network.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur.comparison.crew import run_all
from secateur.comparison.jobs import Job
from secateur.comparison.statistics import Statistic
from secateur.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"


def job(recipe: str, seed: int) -> Job:
    """Return the run of a file in ``recipes``, named without its ending, with a seed."""
    name = f"{recipe}-seed{seed}"
    changes = [f"train.seed={seed}", "train.threads=1"]
    return Job(name, RUNS / name, load_recipe(ROOT / "recipes" / f"{recipe}.yaml", changes))


def keep(run: Job) -> dict[str, Any]:
    """Copy a finished run's report and packed file to the results; return the report."""
    RESULTS.mkdir(exist_ok=True)
    report: dict[str, Any] = json.loads((run.folder / "report.json").read_text())
    (RESULTS / f"{run.name}.json").write_text(json.dumps(report, indent=1))
    shutil.copyfile(run.folder / "model.secateur", RESULTS / f"{run.name}.secateur")
    return report


def percent(values: Sequence[float]) -> str:
    """Write fractions of 1 as percent: their mean and standard deviation."""
    found = Statistic.of(100 * value for value in values)
    return f"{found.mean:.2f} ± {found.deviation:.2f}"


def row(name: str, reports: Sequence[dict[str, Any]]) -> str:
    """Return the line of a Markdown table for a recipe over its seeds."""
    dense, compressed = (
        percent([report["accuracy"][network] for report in reports])
        for network in ("dense", "compressed")
    )
    weights, file = (
        Statistic.of(report["ratio"][kind] for report in reports).mean
        for kind in ("weights", "file")
    )
    sizes = ", ".join(f"{report['storage']['file']['packed']:,}" for report in reports)
    return (
        f"| {name} | {len(reports)} | {dense} | {compressed} | {weights:.4g}x | {sizes} | "
        f"{file:.4g}x |"
    )


def main() -> None:
    """Run the recipes named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="names of files in recipes/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    runs = {recipe: [job(recipe, seed) for seed in options.seeds] for recipe in options.recipes}
    everything = [each for several in runs.values() for each in several]
    failed = run_all(everything, jobs=options.jobs, console=Console())
    print(
        "| recipe | seeds | dense, test % | compressed, test % | weights | file, bytes | file |\n"
        "|---|---|---|---|---|---|---|"
    )
    for recipe, several in runs.items():
        reports = [keep(each) for each in several if each.finished]
        if reports:
            print(row(recipe, reports))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
