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
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.channels.trace import evaluating
from secateur.errors import RecipeError
from secateur.norms import restating
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
        error: ||X W^T - X V^T||^2 / ||X W^T||^2, means apart where something makes up for them.
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
        model: changed in place: weights of planned layers, and their biases, or else the running
            means of the BatchNorms behind them, which take over what the mean of the inputs leaves.
            Where weights became zero, statistics of all BatchNorms are then taken anew.
        inputs: batches; a few hundred samples are enough. They are read several times.
        target: a set for every convolution and linear layer, met in each, or a plan by layer.
        iterations: of ADMM for each layer; 0 projects.
        rho: its penalty, relative to the energy of each column of inputs.
        damping: share of the mean energy that is added to all columns, against inputs so few that
            they leave directions out.

    Returns:
        One entry for each planned layer, in the order in which they run.

    Raises:
        RecipeError: there is no input, or the model has no layer to plan.
        NonFiniteError: a weight holds NaN or infinity.
    """
    batches = batches_of(inputs)
    plan = target if isinstance(target, Plan) else build_plan(model, target, scope="layer")
    plan = plan.fitted(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    sets = plan.sets(plan.project({r.parameter: weights[r.parameter] for r in plan.compressed}))
    fits = []
    with evaluating(model):
        means = absorbers(model, list(sets), batches[0])
        for layers in steps(model, list(sets), batches[:1]):
            moments = collect(model, layers, batches)
            for name in layers:

                def solve(problem: Quadratic, target: ConstraintSet = sets[name]) -> Solution:
                    plain = target.project(problem.weight)
                    found = (
                        reconstruct_layer(problem, target, iterations, rho) if iterations else plain
                    )
                    return found, plain

                fits.append(fit(name, moments[name], solve, damping, means.get(name)))
    if any(target.split()[0] for target in sets.values()):
        reestimate(model, batches)
    return fits


def batches_of(inputs: Iterable[Batch]) -> list[Batch]:
    """Return all batches.

    Raises:
        RecipeError: there is none.
    """
    if batches := list(inputs):
        return batches
    raise RecipeError("inputs: there are none; a few hundred samples are enough.")


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Iterable[Batch]) -> None:
    """Set running statistics of BatchNorms to those of the network as it is now, in place.

    After channels were removed from a trained network (``sc.channels.shrink``), what its norms see
    has other means and variances than they were trained to expect.

    Args:
        model: changed in place.
        inputs: batches of any size; a few hundred samples are enough. Norms that are not called
            keep their statistics.
    """
    with restating(model):
        for batch in inputs:
            call(model, batch)


Solution = tuple[Tensor, Tensor]
"""Weights that were found, and those that they are to be compared with."""


def fit(
    name: str,
    seen: Moments,
    solve: Callable[[Quadratic], Solution],
    damping: float,
    absorber: Absorber | None,
    before: Tensor | None = None,
) -> Fit:
    """Change one layer, in place.

    Args:
        name: of the layer.
        seen: what it reads from now on.
        solve: finds its weights.
        damping: as :func:`reconstruct` takes it.
        absorber: what makes up for the mean, if anything does.
        before: the mean row that it read when it was trained, if that was another one.
    """
    layer: Any = seen.layer
    problem = Quadratic.damped(layer.weight, seen.centered if absorber else seen.gram, damping)
    found, plain = solve(problem)
    nothing = problem.loss(torch.zeros_like(found)) or 1.0
    error, projected = (problem.loss(each) / nothing for each in (found, plain))
    if absorber:
        after = problem.rows(found).double() @ seen.mean.mT
        was = problem.rows(problem.weight).double() @ (seen.mean if before is None else before).mT
        absorber.add((was - after).flatten())
    layer.weight.copy_(found)
    return Fit(name, seen.rows, error, projected)


@dataclass(frozen=True)
class Absorber:
    """What can make up for the mean of a layer's outputs.

    Attributes:
        tensor: a bias, or the running mean of the BatchNorm behind the layer.
        sign: 1 if outputs rise with it, else -1.
    """

    tensor: Tensor
    sign: int

    def add(self, change: Tensor) -> None:
        """Raise outputs by so much, ``(outputs,)``."""
        self.tensor.add_(change.to(self.tensor), alpha=self.sign)


def absorbers(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Absorber]:
    """Return, by layer, what can make up for the mean of its outputs, where there is something."""
    norms, found = norms_behind(model, names, batch), {}
    for name in names:
        bias = getattr(model.get_submodule(name), "bias", None)
        if isinstance(bias, Tensor):
            found[name] = Absorber(bias, 1)
        elif name in norms:
            found[name] = Absorber(model.get_buffer(f"{norms[name]}.running_mean"), -1)
    return found


def norms_behind(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, str]:
    """Return, by layer, the BatchNorm that reads nothing but what this layer returns."""
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    reads: dict[str, list[Tensor]] = {name: [] for name in norms}
    made: dict[str, list[Tensor]] = {name: [] for name in names}  # held on to, as ids are reused

    def keep(name: str) -> Any:
        return lambda module, given, output: made[name].append(output)

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with watching(model, norms, lambda name, tensor: reads[name].append(tensor)):
        call(model, batch)
    for handle in handles:
        handle.remove()
    behind = {id(read[0]): name for name, read in reads.items() if len(read) == 1}
    return {
        name: behind[id(outputs[0])]
        for name, outputs in made.items()
        if len(outputs) == 1 and id(outputs[0]) in behind
    }


def steps(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> list[list[str]]:
    """Return layers in the order in which they first run, those that read one tensor together.

    Layers that do not run come last.
    """
    reads: dict[str, Tensor] = {}

    def look(name: str, tensor: Tensor) -> None:
        reads.setdefault(name, tensor)  # held on to, so that no other tensor is at its place

    for batch in batches:
        with watching(model, names, look):
            call(model, batch)
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
        with watching(model, names, lambda name, tensor: moments[name].add(tensor)):
            call(model, batch)
    return moments


@contextlib.contextmanager
def watching(
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


def call(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        model(*batch)
