"""What ADMM adds to a training step: interleaved medians against the same step without it.

    python benchmarks/epoch_cost.py [lenet5] [resnet20] [--rounds 15]

A block is as many steps as lie between two updates of Z and U in an ADMM phase of 8 epochs of
55,000 images (34 steps at batch 128, one projection), so a block costs what the same share of an
epoch does. Writes benchmarks/results/epoch-cost.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from interleaved import interleaved
from runs import RESULTS
from torch import nn

from secateur.methods import ADMM, METHODS, Method, Phase
from secateur.plan import build_plan
from secateur.sets import ConstraintSet, Filter, Levels, Unstructured
from secateur.zoo import lenet5, resnet20

NETWORKS = {"lenet5": lenet5, "resnet20": resnet20}
BATCH, IMAGES, EPOCHS = 128, 55_000, 8
STEPS = -(-IMAGES // BATCH)  # per epoch
BLOCK = EPOCHS * STEPS // 100
TARGETS: dict[str, ConstraintSet] = {
    "unstructured": Unstructured(density=0.05),
    "unstructured and 4 bits": Unstructured(density=0.05) & Levels(4),
    "filter": Filter(density=0.5),
}
PATH_AWARE = "unstructured, path-aware"


def stepper(
    build: Callable[[], nn.Module], target: ConstraintSet | None, path_aware: bool = False
) -> Callable[[], None]:
    """Return a function that trains one block as the engine does, with ADMM if given a target."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    method: Method | None = None
    if target is not None:
        plan = build_plan(model, target, path_aware=images[:1] if path_aware else None)
        method = METHODS["admm"](plan).attach(model)
        assert isinstance(method, ADMM)
        method.begin(Phase("admm", EPOCHS), STEPS)

    def block() -> None:
        for _ in range(BLOCK):
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss + method.penalty() if method else loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if method:
                method.step(1e-3)

    return block


def measure(build: Callable[[], nn.Module], rounds: int) -> dict[str, Any]:
    """Return the median seconds of a block, dense and by target, and the ratios to dense."""
    blocks = {"dense": stepper(build, None)}
    blocks |= {name: stepper(build, target) for name, target in TARGETS.items()}
    blocks[PATH_AWARE] = stepper(build, TARGETS["unstructured"], path_aware=True)
    return interleaved(blocks, rounds)


def main() -> None:
    """Measure networks, print the ratios and keep them beside those of others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = RESULTS / "epoch-cost.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.networks:
        found = measure(NETWORKS[name], options.rounds)
        print(name, {target: round(value, 3) for target, value in found["ratio"].items()})
        how = {"threads": options.threads, "rounds": options.rounds, "block": BLOCK}
        path.write_text(json.dumps(results := results | {name: how | found}, indent=1))


if __name__ == "__main__":
    main()
