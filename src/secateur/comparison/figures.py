"""What finished runs cost: read from their reports, and modelled for machines that are not here."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from secateur.artifact import packed
from secateur.comparison.fairness import DENSE
from secateur.comparison.jobs import Job
from secateur.comparison.statistics import Statistic
from secateur.compression import REPORT
from secateur.cost.energy import energy_of
from secateur.cost.node import load_node
from secateur.cost.platforms import Platform, timing
from secateur.cost.workload import LayerWork, workload
from secateur.engine import checkpoint
from secateur.finish import PACKED, dense_copy
from secateur.quantizers import activation_bits
from secateur.recipe import Recipe
from secateur.report.comparison import TIME
from secateur.sets import SETS, Pattern, Unstructured
from secateur.task import Task

Form = Literal["non-structured", "structured", "unpruned"]
Which = Literal["dense", "compressed"]
Network = tuple[LayerWork, ...]

DEPLOYED_BITS = 16
"""Bits of activations, and of weights without levels, on modelled machines: half precision, which
is taken to cost no accuracy. Some machines multiply nothing wider."""

NODE = "45nm"


@dataclass(frozen=True)
class Seed:
    """One finished run.

    Attributes:
        report: what it wrote.
        dense: the layers of the dense network that it started from, as machines see them.
        network: the layers of the compressed one, with the bits of its levels.
    """

    report: Mapping[str, Any]
    dense: Network
    network: Network


@dataclass(frozen=True)
class Entry:
    """One recipe, or the dense network, over all seeds that finished.

    Attributes:
        name: of the recipe.
        form: which zeros its patterns make.
        accuracy: on the test set, as a fraction of 1.
        loss: of accuracy on the validation set against the dense network of the same seed.
        costs: by name, see docs/compare.md.
        seeds: what the figures are from, by seed.
    """

    name: str
    form: Form
    accuracy: Statistic
    loss: Statistic
    costs: dict[str, Statistic]
    seeds: Mapping[int, Seed]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "name": self.name,
            "form": self.form,
            "seeds": list(self.seeds),
            "accuracy": asdict(self.accuracy),
            "loss": asdict(self.loss),
            "costs": {name: asdict(each) for name, each in self.costs.items()},
        }


def form_of(recipe: Recipe) -> Form:
    """Say where a recipe puts zeros: anywhere if any stage does, else in groups, else nowhere."""
    names = {name for stage in recipe.stages for name in stage.sets}
    if Unstructured.name in names:
        return "non-structured"
    in_groups = any(issubclass(SETS[name], Pattern) for name in names)
    gated = any(stage.options.removes_channels for stage in recipe.stages)
    return "structured" if in_groups or gated else "unpruned"


def read_seed(job: Job, task: Task) -> Seed:
    """Read a finished run.

    Args:
        job: the run.
        task: whose model is of the recipe's architecture; it is not changed.

    Raises:
        ArtifactError: the packed file is damaged.
    """
    report = json.loads((job.folder / REPORT).read_text(encoding="utf-8"))
    dense = dense_copy(task.model, job.folder / checkpoint.FOLDER / checkpoint.DENSE)
    model = packed.load(job.folder / PACKED, copy.deepcopy(task.model))
    bits = {layer["name"]: int(layer["bits"]) for layer in report["layers"]}
    inputs = activation_bits(model)
    work = [
        replace(
            layer,
            weight_bits=min(bits.get(layer.name, DEPLOYED_BITS), DEPLOYED_BITS),
            activation_bits=inputs.get(layer.name, DEPLOYED_BITS),
        )
        for layer in _work(model, task)
    ]
    return Seed(report, _work(dense, task), tuple(work))


def _work(model: nn.Module, task: Task) -> Network:
    return workload(model.cpu(), task.example_input, bits=(DEPLOYED_BITS, DEPLOYED_BITS))


def entries(
    finished: Sequence[Job], task: Task, platforms: Sequence[Platform]
) -> tuple[Entry, dict[str, Entry]]:
    """Return what the dense network and each recipe reached, from runs that have finished.

    Raises:
        ArtifactError: a packed file is damaged.
    """
    found: dict[str, dict[int, Seed]] = {}
    recipes = {job.recipe.name: job.recipe for job in finished}
    for job in finished:
        found.setdefault(job.recipe.name, {})[job.recipe.train.seed] = read_seed(job, task)
    any_of = {number: seed for seeds in found.values() for number, seed in seeds.items()}
    dense = _entry(DENSE, "unpruned", any_of, platforms)
    return dense, {
        name: _entry(name, form_of(recipes[name]), seeds, platforms)
        for name, seeds in found.items()
    }


def _entry(
    name: str, form: Form, seeds: Mapping[int, Seed], platforms: Sequence[Platform]
) -> Entry:
    which: Which = "dense" if name == DENSE else "compressed"
    accuracies = [seed.report["accuracy"] for seed in seeds.values()]
    valid = [each["validation"] for each in accuracies]
    costs = [_costs(seed, which, platforms) for seed in seeds.values()]
    return Entry(
        name,
        form,
        Statistic.of(each[which] for each in accuracies),
        Statistic.of(each["dense"] - each[which] for each in valid),
        {cost: Statistic.of(each[cost] for each in costs) for cost in costs[0]},
        seeds,
    )


def _costs(seed: Seed, which: Which, platforms: Sequence[Platform]) -> dict[str, float]:
    """Return what one network costs.

    Counted: ``weights`` (non-zeros), ``bits`` (of these, with their indices), ``file`` (bytes),
    ``macs`` and ``bops`` (zeros that are left are multiplied). Modelled: ``energy`` (joules),
    ``energy if zeros are skipped``, and the seconds of one inference on each platform.
    """
    dense = which == "dense"
    network = seed.dense if dense else seed.network
    storage, node = seed.report["storage"], load_node(NODE)
    bits = storage["bits"]
    return {
        "weights": storage["weights"]["dense" if dense else "kept"],
        "bits": bits["dense"] if dense else bits["values"] + bits["index"] + bits["metadata"],
        "file": storage["file"]["dense" if dense else "packed"],
        "macs": seed.report["cost"][which]["macs"],
        "bops": seed.report["cost"][which]["bops"],
        "energy": energy_of(network, node).joules,
        "energy if zeros are skipped": energy_of(network, node, skip_zeros=True).joules,
        **{f"{TIME}{each.name}": timing(each, network).seconds for each in platforms},
    }
