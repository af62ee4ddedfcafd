"""Joint pruning and quantization beside uniform bits and two stages, at equal BOPs.

    python benchmarks/djpq_tables.py lenet5 resnet8 vgg7 resnet20 --jobs 2
    python benchmarks/djpq_tables.py resnet8-two-stage vgg7-two-stage --jobs 2

Recipes of recipes/djpq, at 6,000 training images and equal epochs, from the same dense network of
each of three seeds (one of ResNet-20, the slowest):

- joint: channels and bits learned together, for a budget of BOPs
- uniform: LSQ, the same bits everywhere, chosen so that BOPs are within the budget; where two
  choices of bits are near it, both run
- two-stage: channels are pruned for a budget of MACs, then bits are learned for what is left; in
  a table of its own, beside joint training

Every run with a budget should land in [target, 1.03 target]; those that do not are listed, and so
are LeNet-5's on MNIST, which are here for that alone. Resumable; copies the compare.json of each
to benchmarks/results/djpq-TABLE.json and prints it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from runs import RESULTS, ROOT, RUNS, percent

import secateur as sc

SAMPLES = 6_000
"""Training images: fewer than there are, so that all seeds fit into a few hours of two cores."""

DENSE, SEARCHED, TUNED = 12, 4, 10
"""Epochs of dense networks, of a search, and of what is trained with its bits and channels."""

SEEDS = {"resnet20": (0,)}
"""Of tables that have other seeds than 0, 1 and 2."""

TASKS: dict[str, list[str]] = {
    "lenet5": ["model=secateur.zoo:lenet5", "data.name=mnist"],
    "resnet8": [],
    "vgg7": ["model=secateur.zoo:vgg7", "model_args.width=0.125"],
    "resnet20": ["model=secateur.zoo:resnet20"],
}

BUDGETS: dict[str, dict[str, tuple[int, ...]]] = {
    "lenet5": {"joint": (10, 40, 100, 250)},
    "resnet8": {"joint": (10, 40, 100, 250)},
    "vgg7": {"joint": (10, 40, 100, 250)},
    "resnet20": {"joint": (250,)},
    "resnet8-two-stage": {"joint": (100,), "two-stage": (100,)},
    "vgg7-two-stage": {"joint": (100,), "two-stage": (100,)},
}
"""Times fewer BOPs that are asked for."""

UNIFORM: dict[str, tuple[tuple[int, int], ...]] = {
    "resnet8": ((5, 5), (3, 3), (2, 5), (2, 2)),
    "vgg7": ((5, 5), (3, 3), (2, 5), (2, 2)),
    "resnet20": ((2, 2),),
}
"""Bits of weights and of activations: 1024 / (5 x 5) = 40.96x, 113.8x, 102.4x, 256x."""

PRUNED = "1.5x"
"""Times fewer MACs that the first of two stages prunes to."""


def recipes(which: str) -> Iterator[sc.Recipe]:
    """Yield the recipes of a table, named by kind and BOPs or bits."""
    network = network_of(which)
    for kind, budgets in BUDGETS[which].items():
        for times in budgets:
            last = f"stages.{1 if kind == 'two-stage' else 0}"
            changes = [f"{last}.budget.bops={times}x", f"name={kind}-{times}x"]
            if kind == "two-stage":
                changes.append(f"stages.0.budget.macs={PRUNED}")
            yield recipe(network, kind, changes)
    for weights, inputs in UNIFORM.get(which, ()):
        bits = [f"stages.0.bits={weights}", f"stages.0.activation_bits={inputs}"]
        yield recipe(network, "uniform-lsq", [*bits, f"name=uniform-w{weights}a{inputs}"])


def network_of(which: str) -> str:
    """Return the network that a table is about."""
    return which.removesuffix("-two-stage")


def recipe(network: str, kind: str, changes: list[str]) -> sc.Recipe:
    """Return one of recipes/djpq with other settings, and the epochs of all."""
    stages = [{"epochs": SEARCHED, "tune_epochs": TUNED}]
    if kind == "two-stage":  # half of the search for channels, and as many epochs in all
        half = SEARCHED // 2 + 1
        stages = [{"epochs": half, "tune_epochs": 1}, {"epochs": half, "tune_epochs": TUNED - 3}]
    lengths = [f"stages.{i}.{key}={n}" for i, each in enumerate(stages) for key, n in each.items()]
    common = [f"data.train_samples={SAMPLES}", f"train.epochs={DENSE}", "export.onnx=false"]
    path = ROOT / "recipes" / "djpq" / f"{kind}.yaml"
    return sc.load_recipe(path, [*TASKS[network], *common, *lengths, *changes])


def table(report: Mapping[str, Any], network: str) -> None:
    """Print accuracies and ratios, then the runs that are not on their budgets."""
    print("| network | recipe | test, % | BOPs | MACs |\n|---|---|---|---|---|")
    missed = []
    for each in (report["dense"], *report["recipes"]):
        accuracy = percent(each["accuracy"]["values"])
        macs, bops = (ratios(report, each, cost) for cost in ("macs", "bops"))
        print(f"| {network} | {each['name']} | {accuracy} | {span(bops)} | {span(macs)} |")
        target = each.get("recipe", {}).get("stages", [{}])[-1].get("budget", {}).get("bops")
        if target and not all(1 <= ratio / float(target.rstrip("x")) <= 1.03 for ratio in bops):
            missed.append(f"{each['name']} {span(bops)}")
    print(f"off budget: {', '.join(missed) or 'none'}; failed: {report['failed'] or 'none'}")


def ratios(report: Mapping[str, Any], entry: Mapping[str, Any], cost: str) -> list[float]:
    """Return how many times less each seed of a recipe costs than the dense network."""
    dense = report["dense"]["costs"][cost]["mean"]
    return [dense / value for value in entry["costs"][cost]["values"]]


def span(values: list[float]) -> str:
    """Write the least and the largest of some ratios."""
    low, high = f"{min(values):.2f}x", f"{max(values):.2f}x"
    return low if low == high else f"{low} to {high}"


def compare(which: str, jobs: int) -> None:
    """Finish the runs of a table, then store and print them."""
    network = network_of(which)
    out = RUNS / f"djpq-{network}"
    done = sc.compare(
        None,
        list(recipes(which)),
        out=out,
        seeds=SEEDS.get(which, (0, 1, 2)),
        jobs=jobs,
        measure=0,
        console=Console(),
    )
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(out / "compare.json", RESULTS / f"djpq-{which}.json")
    table(done.report, network)


def main() -> None:
    """Finish the tables named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=list(BUDGETS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    for which in options.tables:
        compare(which, options.jobs)


if __name__ == "__main__":
    main()
