"""ADMM against gradual magnitude pruning on Fashion-MNIST: accuracy against file size.

    python benchmarks/fashion_curve.py lenet5 resnet8 resnet20 --jobs 2

Both methods start from the same dense network of each seed, prune to the same densities, quantize
to 4 bits, and train for the same epochs with the same learning rates. Resumable; writes
benchmarks/results/fashion-curve.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from runs import RESULTS, Run, finish_all, mean_and_deviation

SEEDS = (0, 1, 2)
DENSITIES = {
    "lenet5": (0.05, 0.02, 0.01, 0.005),
    "resnet8": (0.2, 0.1, 0.05, 0.025),
    "resnet20": (0.05,),
}
SAMPLES = {"lenet5": 20_000, "resnet8": 10_000, "resnet20": 10_000}
"""Training images: fewer than there are, so that all seeds fit into a few hours of two cores."""


def first(network: str, seed: int) -> Run:
    """Return the run that trains the dense network, which all others of its seed start from."""
    return _run(network, "admm", DENSITIES[network][0], seed, {})


def others(network: str, seed: int) -> Iterator[Run]:
    """Yield all other runs of a seed."""
    dense = first(network, seed).folder / "checkpoint" / "dense.safetensors"
    for density in DENSITIES[network]:
        for method in ("admm", "gmp"):
            if (method, density) != ("admm", DENSITIES[network][0]):
                yield _run(network, method, density, seed, {"weights": str(dense)})


def _run(network: str, method: str, density: float, seed: int, more: dict[str, Any]) -> Run:
    changes = {
        "train.seed": seed,
        "data.train_samples": SAMPLES[network],
        "stages.0.density": density,
        **more,
    }
    return Run(
        f"curve-{network}-{method}-{density:g}-seed{seed}", f"{network}-fashion-{method}", changes
    )


def point(network: str, method: str, density: float) -> dict[str, Any]:
    """Return one point of the curve: means and standard deviations over seeds."""
    reports = [_run(network, method, density, seed, {}).report() for seed in SEEDS]
    test = [report["accuracy"]["compressed"] for report in reports]
    size = [report["storage"]["file"]["packed"] for report in reports]
    return {
        "network": network,
        "method": method,
        "density": density,
        "test": test,
        "dense": [report["accuracy"]["dense"] for report in reports],
        "validation": [report["accuracy"]["validation"]["compressed"] for report in reports],
        "file": size,
        "weights": [report["storage"]["weights"]["kept"] for report in reports],
    }


def main() -> None:
    """Finish the runs of the networks named, then write and print the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="+", choices=list(DENSITIES))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    pairs = [(network, seed) for network in options.networks for seed in SEEDS]
    finish_all([first(*pair) for pair in pairs], options.jobs)
    finish_all([run for pair in pairs for run in others(*pair)], options.jobs)
    points = [
        point(network, method, density)
        for network in options.networks
        for density in DENSITIES[network]
        for method in ("admm", "gmp")
    ]
    (RESULTS / "fashion-curve.json").write_text(
        json.dumps({"samples": SAMPLES, "points": points}, indent=1)
    )
    print("| network | method | density | test, % | file, bytes |\n|---|---|---|---|---|")
    for each in points:
        accuracy = mean_and_deviation([100 * value for value in each["test"]])
        size = mean_and_deviation(each["file"])
        print(
            f"| {each['network']} | {each['method']} | {each['density']:.3g} | "
            f"{accuracy[0]:.2f} ± {accuracy[1]:.2f} | {size[0]:,.0f} ± {size[1]:.0f} |"
        )


if __name__ == "__main__":
    main()
