"""What finished runs cost: read from their reports, and modelled for machines that are not here."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from secateur.recipe import Recipe
from secateur.report.comparison import TIME
from secateur.sets import SETS, Pattern, Unstructured
from secateur.task import Task

Form = Literal["non-structured", "structured", "unpruned"]
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
        costs: by name, see :func:`costs_of`.
        seeds: what the figures are from.
    """

    name: str
    form: Form
    accuracy: Statistic
    loss: Statistic
    costs: dict[str, Statistic]
    seeds: tuple[Seed, ...]


def form_of(recipe: Recipe) -> Form:
    """Say where a recipe puts zeros: anywhere if any stage does, else in groups, else nowhere."""
    names = {name for stage in recipe.stages for name in stage.sets}
    if Unstructured.name in names:
        return "non-structured"
    return "structured" if any(issubclass(SETS[name], Pattern) for name in names) else "unpruned"


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
    work = [
        replace(layer, weight_bits=min(bits.get(layer.name, DEPLOYED_BITS), DEPLOYED_BITS))
        for layer in _work(model, task)
    ]
    return Seed(report, _work(dense, task), tuple(work))


def _work(model: nn.Module, task: Task) -> Network:
    return workload(model.cpu(), task.example_input, bits=(DEPLOYED_BITS, DEPLOYED_BITS))


def entry(recipe: Recipe, seeds: Sequence[Seed], platforms: Sequence[Platform]) -> Entry:
    """Return what a recipe reached over its seeds."""
    accuracies = [seed.report["accuracy"] for seed in seeds]
    lost = [each["validation"]["dense"] - each["validation"]["compressed"] for each in accuracies]
    costs = [_costs(seed.report, "compressed", seed.network, platforms) for seed in seeds]
    return Entry(
        recipe.name,
        form_of(recipe),
        Statistic.of(each["compressed"] for each in accuracies),
        Statistic.of(lost),
        _joined(costs),
        tuple(seeds),
    )


def dense_entry(seeds: Sequence[Seed], platforms: Sequence[Platform]) -> Entry:
    """Return the dense network over its seeds, one run of each."""
    costs = [_costs(seed.report, "dense", seed.dense, platforms) for seed in seeds]
    return Entry(
        DENSE,
        "unpruned",
        Statistic.of(seed.report["accuracy"]["dense"] for seed in seeds),
        Statistic.of(0.0 for _ in seeds),
        _joined(costs),
        tuple(seeds),
    )


def _joined(costs: Sequence[Mapping[str, float]]) -> dict[str, Statistic]:
    return {name: Statistic.of(each[name] for each in costs) for name in costs[0]}


def _costs(
    report: Mapping[str, Any],
    which: Literal["dense", "compressed"],
    network: Network,
    platforms: Sequence[Platform],
) -> dict[str, float]:
    """Return what one network costs.

    Counted: ``weights`` (non-zeros), ``bits`` (of these, with their indices), ``file`` (bytes),
    ``macs`` and ``bops`` (zeros that are left are multiplied). Modelled: ``energy`` (joules),
    ``energy if zeros are skipped``, and the seconds of one inference on each platform.
    """
    storage, dense = report["storage"], which == "dense"
    bits, node = storage["bits"], load_node(NODE)
    return {
        "weights": storage["weights"]["dense" if dense else "kept"],
        "bits": bits["dense"] if dense else bits["values"] + bits["index"] + bits["metadata"],
        "file": storage["file"]["dense" if dense else "packed"],
        "macs": report["cost"][which]["macs"],
        "bops": report["cost"][which]["bops"],
        "energy": energy_of(network, node).joules,
        "energy if zeros are skipped": energy_of(network, node, skip_zeros=True).joules,
        **{f"{TIME}{each.name}": timing(each, network).seconds for each in platforms},
    }
