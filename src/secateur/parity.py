"""Whether the artifacts compute what the trained network computes, in each runtime that is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import data
from secateur.artifact.saturation import saturation
from secateur.engine.evaluate import mean_score, outputs
from secateur.errors import ArtifactError, MissingDependencyError, ParityError
from secateur.measure.runtimes import RUNTIMES, Runtime, RuntimeModel, holds_integers
from secateur.quantizers import grids
from secateur.task import Task

SIMULATED = "simulated"
"""The network that an ONNX file computes if it rounds more than the trained one does."""

DECODED_TOLERANCE = 1e-6
"""Largest logit difference of the decoded network, relative to the largest logit."""

ONNX_TOLERANCE = 1e-4
"""Largest logit difference of the ONNX network, relative to the largest logit."""

SATURATION_SAMPLES = 500
"""Test samples that integer arithmetic is checked on."""

SATURATES = 2.0
"""How far outputs may move in integers, in units of what quantizing moves them by."""

ROUNDED_TOLERANCES, ROUNDED_SAMPLES, ROUNDED_CHANGES = (1e-3, 2e-2), 0.5, (1e-3, 1e-2)
"""Where layers read through grids: largest logit difference for at least this share of the samples,
and the share of them (one at least) that may change class. A sum in another order may end beside
another level, which moves the logits of that sample by more than any tolerance, and in a deep
network meets more levels on its way. So both are half of what compression itself has done to the
dense network, if that is between these two. What a runtime gets wrong moves all.
"""

PROVEN = "in ONNX Runtime, in which it is proven"
"""The remedy where another runtime computes something else."""

Results = Mapping[str, tuple[Tensor, Tensor]]
"""Outputs and targets of all test samples, by the name of what computed the outputs."""


@dataclass(frozen=True)
class Proof:
    """What running the artifacts on the test data has shown.

    Attributes:
        accuracy: as it stands in the report.
        parity: likewise.
        notes: what a runtime of this machine does otherwise, and the remedy.
    """

    accuracy: dict[str, Any]
    parity: dict[str, Any]
    notes: list[str]


def prove(
    task: Task, networks: Mapping[str, Callable[[Tensor], Tensor]], path: Path | None
) -> Proof:
    """Run all networks on the test data and hold the artifacts to the trained one.

    Args:
        task: what the networks are judged on; its model is the trained network.
        networks: by the names that :func:`compare` takes.
        path: the ONNX file, if there is one.

    Raises:
        ParityError: an artifact does not compute the same. Other runtimes than ONNX Runtime, in
            which the file is proven, cause a note instead.
    """
    results = {name: outputs(network, task.test) for name, network in networks.items()}
    logits = {name: result[0] for name, result in results.items()}
    rounds = bool(grids(task.model))
    parity = compare(logits, rounds)
    notes: list[str] = []
    if path is not None:
        parity["runtimes"], notes = _in_runtimes(task, path, results, rounds)
    if path is not None and rounds:
        parity["saturation"], saturated = _saturation(task, path, logits["dense"])
        notes += saturated
    return Proof(_accuracy(task, networks["dense"], results), parity, notes)


def _accuracy(task: Task, dense: Callable[[Tensor], Tensor], results: Results) -> dict[str, Any]:
    """Return the mean score of each network on the test data, and of two on the validation data."""
    shown = {name: _score(task, *results[name]) for name in results if name != SIMULATED}
    return {
        "onnx": None,
        **shown,
        "validation": {
            "dense": _score(task, *outputs(dense, task.validation)),
            "compressed": mean_score(task, task.validation),
        },
    }


def _score(task: Task, found: Tensor, targets: Tensor) -> float:
    return float(task.score(found, targets).double().mean())


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from what is expected.

    Attributes:
        difference: of a sample, relative to the largest logit of all.
        share: of the samples, that is to be within it.
        changes: number of samples that may be of another class.
    """

    difference: float
    share: float = 1.0
    changes: float = math.inf

    @classmethod
    def of_rounding(cls, logits: Mapping[str, Tensor]) -> Tolerance:
        """Return what a network that rounds may be off by: half of what compression did to it."""
        dense, compressed = logits["dense"], logits["compressed"]
        moved = float(_relative(dense, compressed).median()) / 2
        turned = _changed(dense, compressed) / 2
        samples = len(compressed)
        return cls(
            _within(moved, *ROUNDED_TOLERANCES),
            ROUNDED_SAMPLES,
            max(1.0, _within(turned / samples, *ROUNDED_CHANGES) * samples),
        )

    def met(self, found: Tensor, expected: Tensor) -> bool:
        """Return whether outputs are near enough."""
        near = float((_relative(found, expected) <= self.difference).double().mean())
        return near >= self.share and _changed(found, expected) <= self.changes


def compare(logits: Mapping[str, Tensor], rounds: bool = False) -> dict[str, Any]:
    """Compare artifacts with the trained network.

    Args:
        logits: outputs on the same samples, ``(samples, classes)`` or of any other shape with the
            samples first, by ``dense``, ``compressed``, ``decoded`` and, if exported, ``onnx``;
            ``simulated`` is what that is to be, if it is not ``compressed``.
        rounds: whether layers of the network read through grids.

    Raises:
        ParityError: an artifact does not compute the same.
    """
    reference = logits["compressed"]
    largest = float(reference.abs().max())
    parity: dict[str, Any] = {"samples": len(reference), "agreement": {}, "runtimes": {}}
    for name in ("decoded", "onnx"):
        parity[name] = parity["agreement"][name] = None
        if name not in logits:
            continue
        expected = logits.get(SIMULATED, reference) if name == "onnx" else reference
        if name == "onnx" and (rounds or SIMULATED in logits):
            tolerance = Tolerance.of_rounding(logits)
        else:
            tolerance = Tolerance(DECODED_TOLERANCE if name == "decoded" else ONNX_TOLERANCE)
        parity[name] = float((logits[name] - reference).abs().max())
        parity["agreement"][name] = _agreement(logits[name], reference)
        if not tolerance.met(logits[name], expected):
            raise ParityError(
                f"{name}: the artifact's outputs differ from the trained model's by up to "
                f"{parity[name]:.3g} (outputs reach {largest:.3g}).\n"
                "The files were written but must not be used; please report this as a bug."
            )
    return parity


def _in_runtimes(
    task: Task, path: Path, results: Results, rounds: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return how each runtime of this machine computes an ONNX file, and what is to be noted."""
    logits = {name: result[0] for name, result in results.items()}
    rounded = rounds or SIMULATED in logits or holds_integers(path)
    tolerance = Tolerance.of_rounding(logits) if rounded else Tolerance(ONNX_TOLERANCE)
    # a runtime that multiplies floats where the file rounds them computes the trained network
    right = [logits[name] for name in ("compressed", SIMULATED) if name in logits]
    found: dict[str, Any] = {}
    notes: list[str] = []
    for name, runtime in RUNTIMES.items():
        if runtime.version is None:
            continue
        try:
            ran = results["onnx"] if name == "onnxruntime" else _run(task, runtime, path, right[0])
        except (ArtifactError, MissingDependencyError) as error:
            reason = " ".join(str(error).split())
            notes.append(f"{name}: {reason} Run the file {PROVEN}")
            continue
        found[name] = _figures(task, runtime, ran, right[0])
        if name != "onnxruntime" and not any(tolerance.met(ran[0], each) for each in right):
            notes.append(_wrong(name, runtime, found[name], _score(task, *results["compressed"])))
    return found, notes


def _run(task: Task, runtime: Runtime, path: Path, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of all test samples in a runtime.

    Raises:
        MissingDependencyError: the runtime cannot be imported.
        ArtifactError: it refuses the file, or what it computes cannot be compared.
    """
    ran = outputs(RuntimeModel(runtime, path, torch.get_num_threads()), task.test)
    if ran[0].shape != expected.shape or not ran[0].isfinite().all():
        raise ArtifactError(f"{path}: outputs of {runtime.title} are no finite numbers.")
    return ran


def _figures(
    task: Task, runtime: Runtime, ran: tuple[Tensor, Tensor], reference: Tensor
) -> dict[str, Any]:
    """Return the entry of a runtime in the report; differences are from the trained network."""
    return {
        "version": runtime.version,
        "accuracy": _score(task, *ran),
        "difference": float(_relative(ran[0], reference).max()),
        "agreement": _agreement(ran[0], reference),
    }


def _wrong(name: str, runtime: Runtime, found: Mapping[str, Any], accuracy: float) -> str:
    """Say how far off a runtime is and what to do."""
    kept = found["agreement"]
    classes = "" if kept is None else f", {1 - kept:.2%} of the samples change class"
    return (
        f"{name}: {runtime.title} {runtime.version} does not compute from the ONNX file what was "
        f"trained: outputs differ by up to {found['difference']:.2%} of the largest{classes}, and "
        f"accuracy is {found['accuracy']:.2%} for {accuracy:.2%}; run the file {PROVEN}"
    )


def _saturation(task: Task, path: Path, dense: Tensor) -> tuple[dict[str, float | None], list[str]]:
    """Return what integers of this machine do to an ONNX file's outputs, and a note if it matters.

    Args:
        task: whose test data are read.
        path: the file.
        dense: outputs of the network before compression.
    """
    inputs = data.inputs(task.test, SATURATION_SAMPLES)
    found = saturation(path, inputs, dense[: len(inputs)])
    assert found.noise is not None
    if found.error <= SATURATES * found.noise:
        return asdict(found), []
    return asdict(found), [
        f"onnx: integers of this machine move outputs by {found.error:.2%}, quantizing as such "
        f"by {found.noise:.2%}; with weights of 7 bits (profile: no_vnni) they should not"
    ]


def _same_class(one: Tensor, other: Tensor) -> Tensor | None:
    """Return the share of each sample's classes (dimension 1) that are the same, ``(n,)``.

    None where outputs are one number, which is no class.
    """
    if one.ndim < 2 or one.shape[1] < 2:
        return None
    same = one.argmax(dim=1) == other.argmax(dim=1)
    return same.double().reshape(len(same), -1).mean(dim=1)


def _agreement(one: Tensor, other: Tensor) -> float | None:
    """Return the share of samples of the same class, if there are classes."""
    same = _same_class(one, other)
    return None if same is None else float(same.mean())


def _changed(one: Tensor, other: Tensor) -> float:
    """Return the number of samples of another class; 0 if there are no classes."""
    same = _same_class(one, other)
    return 0.0 if same is None else float((1 - same).sum())


def _relative(found: Tensor, reference: Tensor) -> Tensor:
    """Return the largest difference of each sample as a share of the largest logit, ``(n,)``."""
    largest = reference.abs().max().clamp_min(1e-30)
    return (found - reference).abs().reshape(len(found), -1).amax(dim=1) / largest


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
