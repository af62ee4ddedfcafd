"""N:M on Fashion-MNIST: SR-STE, plain STE and ASP beside the dense network, at equal epochs.

    python benchmarks/nm_tables.py resnet8 --jobs 2     3 seeds: all patterns, all trainings
    python benchmarks/nm_tables.py resnet8-long --jobs 2    SR-STE for 30 epochs instead of 12
    python benchmarks/nm_tables.py resnet20 --jobs 2    1 seed: SR-STE at 2:4 and 1:4
    python benchmarks/nm_tables.py lenet5 --jobs 2      5 seeds: SAD of SR-STE and STE at 2:4

srste, ste: from scratch, for as many epochs as the dense network. STE is SR-STE without its decay:
what is left is the weight decay, which reaches pruned weights as it does all others (so in the
paper; the optimizer here sees only weights in use). asp: the mask of a dense network, frozen, and
retraining; the epochs are halved, and the learning rate starts anew. (In its literature the dense
network is fully trained before, for twice the epochs in all.) Layers without a group (the first, of
one input channel) and the classifier stay dense.

Resumable; writes benchmarks/results/nm-tables-TABLE.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from runs import RESULTS, RUNS, percent

import secateur as sc

WEIGHT_DECAY = 1e-4
DECAY = 2e-4
"""Lambda of the paper."""

SHARED_DECAY = 6e-3
"""Where rows share a choice; of 2e-4, 2e-3, 6e-3 and 2e-2 the best on validation data of seed 0."""

PATTERNS = ((2, 4), (1, 4), (1, 16))
SEEDS = {
    "resnet8": (0, 1, 2),
    "resnet8-long": (0, 1, 2),
    "resnet20": (0,),
    "lenet5": (0, 1, 2, 3, 4),
}
EPOCHS = {"resnet8": 12, "resnet8-long": 30, "resnet20": 12, "lenet5": 10}
RATES = {"resnet8": 0.1, "resnet20": 0.1, "lenet5": 0.02}
LAST = {"resnet8": "fc", "resnet20": "fc", "lenet5": "fc2"}
SAMPLES = 10_000
"""Training images: fewer than there are, so that all runs fit into a few hours of two cores."""


def stages(training: str, epochs: int, pattern: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of a training, which all train for so many epochs."""
    if training in ("srste", "ste"):
        decay = SHARED_DECAY if pattern["rows"] > 1 else DECAY
        decay = WEIGHT_DECAY + (decay if training == "srste" else 0)
        return [{"method": "srste", **pattern, "epochs": epochs, "decay": decay}]
    one_shot = {"method": "gmp", **pattern, "epochs": 0}
    first = epochs // 2
    dense = {**one_shot, "n": pattern["m"], "retrain_epochs": first}  # m of m: no zeros
    return [dense, {**one_shot, "retrain_epochs": epochs - first}]


def recipe(network: str, training: str, n: int, m: int, epochs: int, rows: int = 1) -> sc.Recipe:
    """Return the recipe of one row of the table."""
    shared = f"-{rows}rows" if rows > 1 else ""
    pattern = {"set": "nm", "n": n, "m": m, "rows": rows, "layers": {LAST[network]: "dense"}}
    return sc.load_recipe(
        {
            "name": f"{n}x{m}{shared}-{training}",
            "model": f"secateur.zoo:{network}",
            "data": {"name": "fashion-mnist", "train_samples": SAMPLES},
            "train": {
                "epochs": epochs,
                "optimizer": "sgd",
                "lr": RATES[network],
                "weight_decay": WEIGHT_DECAY,
                "threads": 1,
            },
            "scratch": True,
            "stages": stages(training, epochs, pattern),
            "export": {"onnx": False},
        }
    )


def recipes(which: str, epochs: int) -> list[sc.Recipe]:
    """Return all rows of a table."""
    network = network_of(which)
    if which == "lenet5":
        return [recipe(network, training, 2, 4, epochs) for training in ("srste", "ste")]
    if which in ("resnet20", "resnet8-long"):
        patterns = PATTERNS[:2] if which == "resnet20" else PATTERNS
        return [recipe(network, "srste", *nm, epochs) for nm in patterns]
    trainings = ("srste", "ste", "asp")
    shared = recipe(network, "srste", 1, 4, epochs, rows=16)
    return [recipe(network, each, *nm, epochs) for nm in PATTERNS for each in trainings] + [shared]


def network_of(which: str) -> str:
    """Return the network that a table is about."""
    return which.removesuffix("-long")


def divergence(run: Path) -> dict[str, float]:
    """Return the SAD of a finished run over its masked weights, and the mean flip rate of a step.

    The flip rate is that of the last step of each epoch.
    """
    history = json.loads((run / "report.json").read_text())["history"]
    logged = [entry for entry in history if "sad" in entry]
    if not logged:
        return {}
    flips = sum(entry["flip_rate"] for entry in logged) / len(logged)
    return {"sad": logged[-1]["sad"], "flip_rate": flips}


def table(which: str, jobs: int, seeds: Sequence[int], epochs: int | None) -> None:
    """Finish the runs of a table, then store and print it."""
    network = network_of(which)
    out = RUNS / (f"nm-{which}-{epochs}" if epochs else f"nm-{which}")
    report = sc.compare(
        None,
        recipes(which, epochs or EPOCHS[which]),
        out=out,
        seeds=seeds,
        jobs=jobs,
        measure=0,
        console=Console(),
    ).report
    dense = report["dense"]["accuracy"]
    print("| network | pattern and training | epochs | test, % | below dense, points | SAD |")
    print("|---|---|---|---|---|---|")
    print(f"| {network} | dense | {report_epochs(report)} | {percent(dense['values'])} | | |")
    for each in report["recipes"]:
        found = [divergence(out / "runs" / f"{each['name']}-seed{seed}") for seed in each["seeds"]]
        each["divergence"] = found = [one for one in found if one]
        below = 100 * (dense["mean"] - each["accuracy"]["mean"])
        sad = f"{sum(one['sad'] for one in found) / len(found):,.0f}" if found else ""
        print(
            f"| {network} | {each['name']} | {each['epochs']} | "
            f"{percent(each['accuracy']['values'])} | {below:.2f} | {sad} |"
        )
    RESULTS.mkdir(exist_ok=True)
    if not epochs:
        (RESULTS / f"nm-tables-{which}.json").write_text(json.dumps(report, indent=1))


def report_epochs(report: Mapping[str, Any]) -> int:
    """Return for how long the dense network was trained."""
    trained: int = report["recipes"][0]["recipe"]["train"]["epochs"]
    return trained


def main() -> None:
    """Finish the tables named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than those above")
    parser.add_argument(
        "--epochs", type=int, help="a trial of so many, in a folder of its own; nothing is stored"
    )
    options = parser.parse_args()
    for which in options.tables:
        table(which, options.jobs, options.seeds or SEEDS[which], options.epochs)


if __name__ == "__main__":
    main()
