"""After training: settle the last bits, write the artifacts, prove parity, gather the report."""

from __future__ import annotations

import copy
import datetime
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from secateur._version import __version__
from secateur.artifact import onnx, packed
from secateur.artifact.export import Source, write_onnx
from secateur.artifact.integers import fits
from secateur.artifact.products import with_products
from secateur.attention import separate, separated
from secateur.channels import widths
from secateur.codec import Quantized
from secateur.engine.trainer import Trainer
from secateur.errors import MembershipError, RecipeError
from secateur.files import atomic
from secateur.parity import SIMULATED, prove
from secateur.plan import BIAS, Plan, Row
from secateur.posttraining import round_biases
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

GRIDS, SEPARATED = "activations", "attention"
"""Metadata keys of kept weights: :func:`secateur.quantizers.grids` of their network, and whether
its attention has linear layers of its own."""


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
        safetensors.torch.load_model(_Versioned(model), str(path))  # type: ignore[arg-type]
    except Exception as error:  # the parser and torch each raise kinds of their own
        raise RecipeError(f"weights: {path} does not fit the model: {error}") from error


class _Versioned:
    """A network for ``safetensors``, whose files lack the versions that modules may ask for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, given: Mapping[str, Any], strict: bool) -> Any:
        state: Any = OrderedDict(given)
        state._metadata = self.model.state_dict()._metadata  # type: ignore[attr-defined]
        return self.model.load_state_dict(state, strict)


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
def settle(
    model: nn.Module,
    plans: Sequence[Plan],
    example_input: Tensor | tuple[Tensor, ...],
    notes: Sequence[str] = (),
) -> Settled:
    """Round scales to float16 and biases of compressed layers to 8 bits, in place.

    A weight with another scale is still a member of its set. Where layers read through grids,
    the least change may move an activation by a whole step: of these networks only biases are
    rounded, of layers that run in integers, to what these hold.

    Args:
        model: the trained network, moved to the CPU and put in evaluation mode.
        plans: of its stages, in order.
        example_input: a batch, or the tuple of arguments.
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
    if exact:
        round_biases(model, quantized, example_input)
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
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense,
        "compressed": model,
        "decoded": _decoded(task, dense, folder / PACKED),
    }
    notes, path = list(settled.notes), None
    if recipe.export.onnx:
        networks |= _exported(task, settled.quantized, recipe.export.batch, folder)
        notes += left_in_floats(settled.quantized)
        path = folder / ONNX
    proof = prove(task, networks, path)
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
        "accuracy": proof.accuracy,
        "ratio": gather.ratios(storage, cost),
        "storage": storage | encodings,
        "cost": cost,
        **gather.modelled(dense, model, task.example_input, settled.quantized),
        "parity": proof.parity,
        "layers": layers,
        "notes": [*notes, *proof.notes],
        "history": trainer.history,
    }


def _exported(
    task: Task, quantized: Mapping[str, Quantized], batch: int | None, folder: Path
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Write the ONNX file; return it and, if it rounds more than the model, what it is to be."""
    example = task.example_input
    described = {**task.metadata, CLASSES: json.dumps(list(task.classes))}
    write_onnx(Source(task.model, example, quantized, described, batch), folder)
    networks: dict[str, Callable[[Tensor], Tensor]] = {"onnx": onnx.OnnxModel(folder / ONNX)}
    if batch is not None:
        networks[SIMULATED] = with_products(task.model, quantized, example, batch)[0]
    return networks


def left_in_floats(quantized: Mapping[str, Quantized]) -> list[str]:
    """Return a note on weights whose levels no integer of an ONNX file holds, if there are any."""
    beyond = [name for name, each in quantized.items() if each.levels.ndim > 1 and not fits(each)]
    if not beyond:
        return []
    return [
        f"onnx: {', '.join(beyond)} stay floats, since int8 does not hold levels beyond 127; "
        "with zero: true it does"
    ]


def _decoded(task: Task, dense: nn.Module, path: Path) -> nn.Module:
    """Load the packed file as a user would; into a blank copy where it cannot be named."""
    if task.reference and is_known(task.reference):
        return packed.load(path)
    blank = copy.deepcopy(dense)
    with torch.no_grad():
        for tensor in blank.state_dict().values():
            tensor.zero_()
    return packed.load(path, blank)
