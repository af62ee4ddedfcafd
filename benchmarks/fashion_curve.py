"""ADMM against gradual magnitude pruning on Fashion-MNIST: accuracy against file size.

    python benchmarks/fashion_curve.py lenet5 resnet8 resnet20 --jobs 2

Both methods start from the same dense network of each seed, prune to the same densities, quantize
to 4 bits, and train for the same epochs with the same learning rates. Resumable; copies the
compare.json of each network to benchmarks/results/fashion-curve-NETWORK.json and prints a table.
"""

from __future__ import annotations

import argparse
import shutil

from rich.console import Console
from runs import RESULTS, ROOT, RUNS, percent

import secateur as sc

DENSITIES = {
    "lenet5": (0.05, 0.02, 0.01, 0.005),
    "resnet8": (0.2, 0.1, 0.05, 0.025),
    "resnet20": (0.05,),
}
SAMPLES = {"lenet5": 20_000, "resnet8": 10_000, "resnet20": 10_000}
"""Training images: fewer than there are, so that all seeds fit into a few hours of two cores."""


def recipe(network: str, method: str, density: float) -> sc.Recipe:
    """Return the recipe of one point of the curve."""
    changes = [f"data.train_samples={SAMPLES[network]}", f"stages.0.density={density}"]
    changes.append(f"name={method}-{density:g}")
    return sc.load_recipe(ROOT / "recipes" / f"{network}-fashion-{method}.yaml", changes)


def curve(network: str, jobs: int, seeds: list[int]) -> None:
    """Finish the runs of a network, then store and print its curve."""
    recipes = [
        recipe(network, method, density)
        for density in DENSITIES[network]
        for method in ("admm", "gmp")
    ]
    out = RUNS / f"curve-{network}"
    done = sc.compare(None, recipes, out=out, jobs=jobs, seeds=seeds, measure=0, console=Console())
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(out / "compare.json", RESULTS / f"fashion-curve-{network}.json")
    print("| network | recipe | test, % | file, bytes |\n|---|---|---|---|")
    for each in done.report["recipes"]:
        accuracy, size = percent(each["accuracy"]["values"]), each["costs"]["file"]
        print(
            f"| {network} | {each['name']} | {accuracy} | "
            f"{size['mean']:,.0f} ± {size['deviation']:.0f} |"
        )


def main() -> None:
    """Finish the curves of the networks named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="+", choices=list(DENSITIES))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for network in options.networks:
        curve(network, options.jobs, options.seeds)


if __name__ == "__main__":
    main()
