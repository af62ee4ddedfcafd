"""A whole network into its constraint sets, layer after layer, from a few hundred inputs.

Each layer is fitted to what it reads in the network whose earlier layers are compressed already, so
that errors do not add up unseen. Layers that read the very same tensor, such as the queries, keys
and values of attention, go together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.channels.trace import evaluating
from secateur.plan import Plan, build_plan
from secateur.posttraining.moments import Moments
from secateur.posttraining.quadratic import Quadratic
from secateur.posttraining.quadratic import reconstruct as reconstruct_layer
from secateur.sets import ConstraintSet

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: its argument, its arguments, or those with names."""


@dataclass(frozen=True)
class Fit:
    """How well one layer came through.

    Attributes:
        layer: its name.
        rows: inputs of its filters that it was fitted to; 0 if it is not called as a module, so
            that nothing but its weights is known.
        error: ||X W^T - X V^T||^2 / ||X W^T||^2, means apart where the layer has a bias.
        projected: the same if the weights were only projected.
    """

    layer: str
    rows: int
    error: float
    projected: float


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    inputs: Iterable[Batch],
    target: ConstraintSet | Plan,
    *,
    iterations: int = 40,
    rho: float = 0.1,
    damping: float = 0.01,
) -> list[Fit]:
    """Bring a trained network into its constraint sets without training it.

    Args:
        model: changed in place: weights of planned layers, and their biases, which take over what
            the mean of the inputs leaves.
        inputs: batches; a few hundred samples are enough. They are read several times.
        target: a set for every convolution and linear layer, met in each, or a plan by layer.
        iterations: of ADMM for each layer.
        rho: its penalty, relative to the energy of each column of inputs.
        damping: share of the mean energy that is added to all columns, against inputs so few that
            they leave directions out.

    Returns:
        One entry for each planned layer, in the order in which they run.

    Raises:
        RecipeError: the model has no layer to plan.
        NonFiniteError: a weight holds NaN or infinity.
    """
    batches = list(inputs)
    plan = target if isinstance(target, Plan) else build_plan(model, target, scope="layer")
    plan = plan.fitted(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    sets = plan.sets(plan.project({r.parameter: weights[r.parameter] for r in plan.compressed}))
    fits = []
    with evaluating(model):
        for layers in steps(model, list(sets), batches[:1]):
            moments = collect(model, layers, batches)
            for name in layers:
                fits.append(_fit(name, moments[name], sets[name], iterations, rho, damping))
    return fits


def _fit(
    name: str, seen: Moments, target: ConstraintSet, iterations: int, rho: float, damping: float
) -> Fit:
    """Change one layer."""
    layer: Any = seen.layer
    gram = seen.gram if layer.bias is None else seen.centered
    problem = Quadratic.damped(layer.weight, gram, damping)
    found = reconstruct_layer(problem, target, iterations, rho)
    nothing = problem.loss(torch.zeros_like(found)) or 1.0
    error, projected = (
        problem.loss(each) / nothing for each in (found, target.project(problem.weight))
    )
    if layer.bias is not None:
        change = problem.rows(problem.weight - found) @ seen.mean.to(found).transpose(1, 2)
        layer.bias += change.flatten()
    layer.weight.copy_(found)
    return Fit(name, seen.rows, error, projected)


def steps(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> list[list[str]]:
    """Return layers in the order in which they first run, those that read one tensor together.

    Layers that do not run come last.
    """
    reads: dict[str, Tensor] = {}

    def look(name: str, tensor: Tensor) -> None:
        reads.setdefault(name, tensor)  # held on to, so that no other tensor is at its place

    for batch in batches:
        with _watching(model, names, look):
            _call(model, batch)
    found: list[list[str]] = []
    for name, tensor in reads.items():
        if found and reads[found[-1][-1]] is tensor:
            found[-1].append(name)
        else:
            found.append([name])
    return found + [[name] for name in names if name not in reads]


def collect(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Return what some layers read."""
    moments = {name: Moments(model.get_submodule(name)) for name in names}
    for batch in batches:
        with _watching(model, names, lambda name, tensor: moments[name].add(tensor)):
            _call(model, batch)
    return moments


@contextlib.contextmanager
def _watching(
    model: nn.Module, names: Sequence[str], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show what layers read, call by call."""

    def hook(name: str) -> Any:
        return lambda module, given, named: look(name, given[0] if given else named["input"])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        model(*batch)
