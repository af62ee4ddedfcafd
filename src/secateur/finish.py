"""After training: settle the last bits, write the artifacts, prove parity, gather the report."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur import data
from secateur._version import __version__
from secateur.artifact import onnx, packed
from secateur.artifact.export import Source, write_onnx
from secateur.artifact.integers import fits
from secateur.artifact.products import with_products
from secateur.artifact.saturation import saturation
from secateur.attention import separate, separated
from secateur.channels import widths
from secateur.codec import Quantized
from secateur.engine.evaluate import mean_score, outputs
from secateur.engine.trainer import Trainer
from secateur.errors import MembershipError, ParityError, RecipeError
from secateur.files import atomic
from secateur.plan import BIAS, Plan, Row
from secateur.quantizers import grids, regrid
from secateur.recipe import Recipe
from secateur.reference import is_known
from secateur.report import gather
from secateur.sets import ConstraintSet
from secateur.sets.levels import at_half
from secateur.task import Task

PACKED = "model.secateur"
ONNX = "model.onnx"
CLASSES = "classes"
"""Metadata key of ``model.onnx``: the names of the classes by label, as JSON."""

SIMULATED = "simulated"
"""The network that an ONNX file computes if it rounds more than the trained one does."""

GRIDS, SEPARATED = "activations", "attention"
"""Metadata keys of kept weights: :func:`secateur.quantizers.grids` of their network, and whether
its attention has linear layers of its own."""

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


def save_dense(model: nn.Module, path: Path) -> None:
    """Keep all weights of a network as they are, and the grids through which layers read."""
    with atomic(path) as temporary:
        metadata = {GRIDS: grids(model), SEPARATED: "1" * separated(model)}
        safetensors.torch.save_model(model, str(temporary), metadata=metadata)


def load_dense(model: nn.Module, path: Path) -> None:
    """Load trained weights from a ``.safetensors`` state dict or a packed file.

    Raises:
        RecipeError: the file is not one, or belongs to another architecture.
    """
    if path.suffix == ".secateur":
        packed.load(path, model)
        return
    if path.suffix != ".safetensors":
        raise RecipeError(
            f"weights: {path} is neither .safetensors nor .secateur; nothing else is read, as it "
            "could run code.\nRemedy: safetensors.torch.save_model(model, 'weights.safetensors')."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
        if noted.get(SEPARATED):
            separate(model)
        regrid(model, noted.get(GRIDS, ""))
        safetensors.torch.load_model(model, str(path))
    except Exception as error:  # the parser and torch each raise kinds of their own
        raise RecipeError(f"weights: {path} does not fit the model: {error}") from error


def dense_copy(model: nn.Module, path: Path) -> nn.Module:
    """Return a copy of the model with the weights that :func:`save_dense` kept."""
    dense = copy.deepcopy(model)
    load_dense(dense, path)
    return dense


def final_sets(model: nn.Module, plans: Sequence[Plan]) -> dict[str, ConstraintSet]:
    """Return, by layer, the set that the last stage to plan it asked for.

    Raises:
        MembershipError: a weight is not in its set: the method did not do its work.
    """
    named = model.named_parameters(remove_duplicate=False)
    weights = {name: weight.detach() for name, weight in named}
    sets: dict[str, ConstraintSet] = {}
    for plan in plans:
        sets.update(plan.fitted(model).within(weights).sets(weights))
    for layer, target in sets.items():
        if not target.contains(weights[f"{layer}.weight" if layer else "weight"]):
            raise MembershipError(f"{layer}: its weight is not in {target}.")
    return sets


@dataclass(frozen=True)
class Settled:
    """What a trained network has become.

    Attributes:
        rows: one per layer of the model.
        sets: by layer, the set its weight is a member of.
        quantized: by tensor name, the levels and the scale of weights and biases.
        notes: channels that could not be removed though nothing depends on them, and why.
    """

    rows: Sequence[Row]
    sets: Mapping[str, ConstraintSet]
    quantized: Mapping[str, Quantized]
    notes: Sequence[str]


@torch.no_grad()
def settle(model: nn.Module, plans: Sequence[Plan], notes: Sequence[str] = ()) -> Settled:
    """Round scales to float16 and biases of compressed layers to 8 bits, in place.

    A weight with another scale is still a member of its set. Where layers read through grids,
    nothing is rounded after training: the least change may move an activation by a whole step.

    Args:
        model: the trained network, moved to the CPU and put in evaluation mode.
        plans: of its stages, in order.
        notes: handed on.

    Raises:
        MembershipError: a weight is not in its set.
    """
    model.cpu().eval().to(memory_format=torch.contiguous_format)
    rows, sets = plans[0].rows, final_sets(model, plans)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    exact = bool(grids(model))
    quantized: dict[str, Quantized] = {}
    for row in rows:
        if row.layer not in sets:
            continue
        found = {row.parameter: sets[row.layer].quantized(parameters[row.parameter])}
        if exact:
            quantized |= {name: levels for name, levels in found.items() if levels is not None}
            continue
        if row.bias in parameters:
            found[row.bias] = BIAS.quantized(BIAS.project(parameters[row.bias]))
        for name, levels in found.items():
            if levels is not None:
                quantized[name] = at_half(levels)
                weight = parameters[name]
                weight.copy_(quantized[name].weight(weight.dtype))
    return Settled(rows, sets, quantized, notes)


def finish(
    task: Task, dense: nn.Module, recipe: Recipe, settled: Settled, trainer: Trainer, folder: Path
) -> dict[str, Any]:
    """Write the artifacts of a settled network, check them, and return the report.

    Args:
        task: whose model is the settled network.
        dense: the trained network before the first stage.
        recipe: what was asked.
        settled: what the network has become.
        trainer: that trained it.
        folder: for the artifacts.

    Raises:
        ParityError: an artifact does not compute what the trained network computes.
    """
    model = task.model
    size = packed.save(
        folder / PACKED,
        model,
        settled.quantized,
        reference=task.reference,
        arguments=task.arguments,
        widths=widths(model, dense),
        metadata=task.metadata,
    )
    runners: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense,
        "compressed": model,
        "decoded": _decoded(task, dense, folder / PACKED),
    }
    if recipe.export.onnx:
        batch, levels = recipe.export.batch, settled.quantized
        described = {**task.metadata, CLASSES: json.dumps(list(task.classes))}
        write_onnx(Source(model, task.example_input, levels, described, batch), folder)
        runners["onnx"] = onnx.OnnxModel(folder / ONNX)
        if batch is not None:
            runners[SIMULATED] = with_products(model, levels, task.example_input, batch)[0]
    logits = {name: outputs(runner, task.test) for name, runner in runners.items()}
    accuracy: dict[str, Any] = {
        name: float(task.score(*result).double().mean())
        for name, result in logits.items()
        if name != SIMULATED
    }
    accuracy.setdefault("onnx", None)
    accuracy["validation"] = {
        "dense": float(task.score(*outputs(dense, task.validation)).double().mean()),
        "compressed": mean_score(task, task.validation),
    }
    parity = compare({name: result[0] for name, result in logits.items()}, bool(grids(model)))
    notes = list(settled.notes)
    if recipe.export.onnx:
        notes += left_in_floats(levels)
    if recipe.export.onnx and grids(model):
        parity["saturation"] = _saturation(folder / ONNX, task.test, logits["dense"][0], notes)
    layers = gather.layers(
        dense, model, task.example_input, settled.rows, settled.sets, size.tensors
    )
    storage = gather.storage(layers, dense, size.file, folder / ONNX)
    encodings = gather.encodings(model, settled.quantized)
    cost = gather.cost(layers)
    return {
        "schema": 1,
        "secateur": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "name": task.name,
        "recipe": recipe.to_dict(),
        "environment": gather.environment(str(trainer.accelerator.device)),
        "accuracy": accuracy,
        "ratio": gather.ratios(storage, cost),
        "storage": storage | encodings,
        "cost": cost,
        **gather.modelled(dense, model, task.example_input, settled.quantized),
        "parity": parity,
        "layers": layers,
        "notes": notes,
        "history": trainer.history,
    }


def left_in_floats(quantized: Mapping[str, Quantized]) -> list[str]:
    """Return a note on weights whose levels no integer of an ONNX file holds, if there are any."""
    beyond = [name for name, each in quantized.items() if each.levels.ndim > 1 and not fits(each)]
    if not beyond:
        return []
    return [
        f"onnx: {', '.join(beyond)} stay floats, since int8 does not hold levels beyond 127; "
        "with zero: true it does"
    ]


def _saturation(
    path: Path, test: Dataset[Any], dense: Tensor, notes: list[str]
) -> dict[str, float | None]:
    """Return what integers of this machine do to an ONNX file's outputs; note it if it matters."""
    inputs = data.inputs(test, SATURATION_SAMPLES)
    found = saturation(path, inputs, dense[: len(inputs)])
    assert found.noise is not None
    if found.error > SATURATES * found.noise:
        notes.append(
            f"onnx: integers of this machine move outputs by {found.error:.2%}, quantizing as such "
            f"by {found.noise:.2%}; with weights of 7 bits (profile: no_vnni) they should not"
        )
    return asdict(found)


def _decoded(task: Task, dense: nn.Module, path: Path) -> nn.Module:
    """Load the packed file as a user would; into a blank copy where it cannot be named."""
    if task.reference and is_known(task.reference):
        return packed.load(path)
    blank = copy.deepcopy(dense)
    with torch.no_grad():
        for tensor in blank.state_dict().values():
            tensor.zero_()
    return packed.load(path, blank)


def compare(logits: Mapping[str, Tensor], rounds: bool = False) -> dict[str, Any]:
    """Compare artifacts with the trained network.

    Args:
        logits: outputs on the same samples, ``(samples, classes)``, by ``dense``, ``compressed``,
            ``decoded`` and, if exported, ``onnx``; ``simulated`` is what that is to be, if it is
            not ``compressed``.
        rounds: whether layers of the network read through grids.

    Raises:
        ParityError: an artifact does not compute the same.
    """
    reference = logits["compressed"]
    largest = float(reference.abs().max())
    parity: dict[str, Any] = {"samples": len(reference), "agreement": {}}
    for name in ("decoded", "onnx"):
        parity[name] = parity["agreement"][name] = None
        if name not in logits:
            continue
        expected = logits.get(SIMULATED, reference) if name == "onnx" else reference
        difference = _relative(logits[name], expected)
        same = logits[name].argmax(dim=1) == expected.argmax(dim=1)
        parity[name] = float((logits[name] - reference).abs().max())
        parity["agreement"][name] = _agreement(logits[name], reference)
        if name == "onnx" and (rounds or SIMULATED in logits):
            moved = _relative(logits["dense"], reference).median()
            tolerance = float(moved.div(2).clamp(*ROUNDED_TOLERANCES))
            near = float((difference <= tolerance).double().mean())
            turned = (logits["dense"].argmax(dim=1) != reference.argmax(dim=1)).double().mean()
            allowed = float(turned.div(2).clamp(*ROUNDED_CHANGES)) * len(same)
            good = near >= ROUNDED_SAMPLES and int((~same).sum()) <= max(1.0, allowed)
        else:
            tolerance = DECODED_TOLERANCE if name == "decoded" else ONNX_TOLERANCE
            good = bool((difference <= tolerance).all())
        if not good:
            raise ParityError(
                f"{name}: the artifact's outputs differ from the trained model's by up to "
                f"{parity[name]:.3g} (outputs reach {largest:.3g}).\n"
                "The files were written but must not be used; please report this as a bug."
            )
    return parity


def _agreement(one: Tensor, other: Tensor) -> float:
    """Return the share of samples of the same class."""
    return float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean())


def _relative(found: Tensor, reference: Tensor) -> Tensor:
    """Return the largest difference of each sample as a share of the largest logit, ``(n,)``."""
    largest = reference.abs().max().clamp_min(1e-30)
    return (found - reference).abs().flatten(1).amax(1) / largest
