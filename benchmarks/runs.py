"""Runs of `secateur compress`, several side by side, resumable; and where their results are kept.

    python benchmarks/runs.py lenet5-mnist-348x lenet5-mnist-binary --seeds 0 1 2 --jobs 2

runs each recipe with each seed in runs/RECIPE-seedN, skips what is finished, continues what was
stopped, and copies report and packed file to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"


@dataclass(frozen=True)
class Run:
    """One run of a recipe.

    Attributes:
        name: of its folder in ``runs``.
        recipe: name of a file in ``recipes``, without the ending.
        changes: key of the recipe to value, as ``--set`` takes them.
    """

    name: str
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    def report(self) -> dict[str, Any]:
        """Return the report of a finished run."""
        content: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return content

    def finish(self) -> Path:
        """Run, go on where it was stopped, or do nothing if it is finished; return the folder."""
        if (self.folder / "report.json").exists():
            return self.folder
        command = [sys.executable, "-m", "secateur", "compress", f"recipes/{self.recipe}.yaml"]
        command += ["--out", str(self.folder)]
        for key, value in {"train.threads": 1, **self.changes}.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        if (self.folder / "checkpoint" / "state.pt").exists():
            command.append("--resume")
        RUNS.mkdir(exist_ok=True)
        with open(RUNS / f"{self.name}.log", "a") as log:
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"{self.name} failed, see {RUNS / self.name}.log")
        print(self.name, f"{self.report()['accuracy']['compressed']:.4f}", flush=True)
        return self.folder


def finish_all(runs: Sequence[Run], jobs: int) -> None:
    """Finish runs, ``jobs`` at a time, one thread each."""
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(Run.finish, runs):
            pass


def keep(run: Run, name: str) -> None:
    """Copy a finished run's report and packed file to the results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(run.report(), indent=1))
    shutil.copyfile(run.folder / "model.secateur", RESULTS / f"{name}.secateur")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(recipes: Mapping[str, Sequence[Run]]) -> str:
    """Return a Markdown table with one line per recipe, over its seeds."""
    lines = [
        "| recipe | seeds | dense, test % | compressed, test % | weights | file, bytes | file |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in recipes.items():
        reports = [run.report() for run in runs]
        cells = []
        for network in ("dense", "compressed"):
            scores = [100 * report["accuracy"][network] for report in reports]
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_deviation(scores)))
        ratios = [
            statistics.fmean(report["ratio"][kind] for report in reports)
            for kind in ("weights", "file")
        ]
        sizes = ", ".join(f"{report['storage']['file']['packed']:,}" for report in reports)
        lines.append(
            f"| {name} | {len(runs)} | {cells[0]} | {cells[1]} | {ratios[0]:.4g}x | {sizes} | "
            f"{ratios[1]:.4g}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the recipes named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="names of files in recipes/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    runs = {
        recipe: [Run(f"{recipe}-seed{s}", recipe, {"train.seed": s}) for s in options.seeds]
        for recipe in options.recipes
    }
    finish_all([each for several in runs.values() for each in several], options.jobs)
    for several in runs.values():
        for each in several:
            keep(each, each.name)
    print(table(runs))


if __name__ == "__main__":
    main()
