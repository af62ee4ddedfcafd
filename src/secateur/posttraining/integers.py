"""Weights and activations of a trained network on integer grids, from a few hundred inputs.

Layer after layer: the range of what a layer reads is chosen from a histogram, in the network whose
earlier layers are quantized already; then its weights are rounded so that outputs on these inputs,
as the layer reads them through its grid, stay what they are; then biases make up for the mean. In
the end they become what integers hold (:mod:`secateur.posttraining.biases`).
Sums and means are taken of what is rounded, too (:mod:`secateur.posttraining.sums`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.channels.trace import evaluating
from secateur.codec import Quantized
from secateur.doctor import Profile, int8_profile
from secateur.errors import RecipeError
from secateur.plan import PRUNABLE, Plan, Row, build_plan
from secateur.posttraining.biases import round_biases
from secateur.posttraining.equalization import equalize as balance
from secateur.posttraining.moments import columns
from secateur.posttraining.quadratic import Quadratic
from secateur.posttraining.quadratic import reconstruct as reconstruct_layer
from secateur.posttraining.ranges import CALIBRATIONS, Calibration, Histogram
from secateur.posttraining.rounding import rounded
from secateur.posttraining.sequence import (
    Batch,
    Fit,
    Solution,
    absorbers,
    batches_of,
    call,
    collect,
    fit,
    steps,
    watching,
)
from secateur.posttraining.sums import Sums, sites, watching_outputs
from secateur.quantizers import FixedQuantizer, attach_input, detach_input, detach_output
from secateur.sets import ConstraintSet, Levels, Pattern, join
from secateur.sets.base import require_finite

INT8 = 127
"""Largest magnitude of a level that is deployed."""

WHOLE = 8
"""Bits of activations that runtimes multiply and add as bytes; fewer run in floats."""

SAFE_BITS = 7
"""Of weights beside 8-bit activations: 2 x 255 x 64 fits 16 signed bits, 2 x 255 x 127 does not."""


@dataclass(frozen=True)
class Quantization:
    """What quantizing a network has come to.

    Attributes:
        fits: one for each planned weight, in the order in which layers run.
        quantized: by parameter name, levels and scales of its weights, as ``export_onnx`` and
            packed files take them.
    """

    fits: list[Fit]
    quantized: dict[str, Quantized]


@torch.no_grad()
def quantize(
    model: nn.Module,
    inputs: Iterable[Batch],
    target: ConstraintSet | Plan | None = None,
    *,
    activation_bits: int = 8,
    calibration: Calibration = "mse",
    percentile: float = 99.99,
    equalize: bool = False,
    bias_correction: bool = True,
    profile: Profile | None = None,
    iterations: int = 40,
    rho: float = 0.1,
    damping: float = 0.01,
) -> Quantization:
    """Bring weights and activations of a trained network to integers, without training it.

    Args:
        model: changed in place: weights, biases (or else the running means of BatchNorms), and
            layers read through fixed grids. Where layers read 8 bits, so do sums and means of what
            convolutions make, which then run in integers.
        inputs: batches; a few hundred samples are enough. They are read several times.
        target: levels for every convolution and linear layer, or a plan by layer; by default 8 bits
            with zero. Levels alone get one scale for each output channel, beside patterns one.
        activation_bits: of what these layers read, 2 to 8; without sign where nothing negative was
            read.
        calibration: how ranges of activations are chosen: least squared error (``mse``), least KL
            divergence (``entropy``), a ``percentile`` of magnitudes, or the largest (``minmax``).
        percentile: of the values on each side of zero.
        equalize: whether ranges of channels are balanced between layers before
            (:mod:`secateur.posttraining.equalization`); the model must take one tensor.
        bias_correction: whether biases make up for what quantizing does to the mean of outputs.
        profile: ``no_vnni`` keeps weights beside 8-bit activations within 7 bits, ``vnni`` takes
            them as they are asked for; by default what this machine needs (``doctor``).
        iterations: of ADMM for each layer; 0 rounds weights to the nearest levels.
        rho: as :func:`secateur.posttraining.reconstruct` takes it.
        damping: likewise.

    Raises:
        RecipeError: there is no input, an option is out of range, the model has no layer to plan,
            or a layer is planned without levels of at most 8 bits with zero.
        ChannelError: it cannot be traced, and is to be equalized.
        NonFiniteError: a weight holds NaN or infinity.
    """
    batches = batches_of(inputs)
    if not 2 <= activation_bits <= WHOLE:
        raise RecipeError(f"activation_bits: {activation_bits} is not in 2..{WHOLE}.")
    if calibration not in CALIBRATIONS:
        raise RecipeError(f"calibration: {calibration!r} is none of {', '.join(CALIBRATIONS)}.")
    target = Levels(8, zero=True) if target is None else target
    plan = target if isinstance(target, Plan) else build_plan(model, target, scope="layer")
    plan = deployable(plan.fitted(model), activation_bits, profile or int8_profile())
    sets = plan.sets(_members(model, plan))
    for row in plan.rows:
        if row.owner in sets and isinstance(model.get_submodule(row.layer), PRUNABLE):
            sets[row.layer] = sets[row.owner]
    for name in sets:  # grids of an earlier stage
        detach_input(model.get_submodule(name))
    for module in model.modules():
        detach_output(module)
    if equalize:
        balance(model, _tensor(batches[0]))

    def grid(values: Histogram) -> FixedQuantizer:
        return values.grid(activation_bits, calibration, percentile)

    fits: list[Fit] = []
    quantized: dict[str, Quantized] = {}
    solvers: dict[Any, Solver] = {}
    with evaluating(model):
        means = absorbers(model, list(sets), batches[0]) if bias_correction else {}
        sums = Sums(model, sites(model, sets, batches[0]) if activation_bits == WHOLE else ())
        for layers in [*steps(model, list(sets), batches[:1]), []]:
            read, made = look(model, layers, sums.due(layers), batches)
            sums.attach({name: grid(values) for name, values in made.items()})
            for name in layers:
                if read[name].rows:
                    own = sums.grids.get(name) or grid(read[name].histogram)
                    attach_input(model.get_submodule(name), copy.deepcopy(own))
            moments = collect(model, layers, batches)
            for name in layers:
                weight = model.get_submodule(name).weight
                if weight not in solvers:  # else it is shared with a layer before
                    solvers[weight] = Solver(sets[name], iterations, rho)
                    given = solvers[weight], damping, means.get(name), read[name].mean
                    fits.append(fit(name, moments[name], *given))
                quantized[f"{name}.weight" if name else "weight"] = solvers[weight].quantized
        round_biases(model, quantized, batches[0])
    return Quantization(fits, quantized)


def deployable(plan: Plan, activation_bits: int, profile: Profile) -> Plan:
    """Return a plan whose levels int8 holds, and whose products do not saturate.

    Raises:
        RecipeError: a row has no levels, or levels that int8 does not hold.
    """

    def narrowed(row: Row) -> Row:
        if row.set is None:
            return row
        patterns, levels = require_int8(row.set)
        exact = profile == "vnni" or activation_bits < WHOLE
        if exact or levels.magnitudes[-1] <= 2**SAFE_BITS // 2:
            return row
        return replace(row, set=join(patterns, replace(levels, bits=SAFE_BITS)))

    return replace(plan, rows=tuple(narrowed(row) for row in plan.rows))


def require_int8(target: ConstraintSet) -> tuple[tuple[Pattern, ...], Levels]:
    """Return the patterns and the levels of a set of weights that can be deployed in int8.

    Raises:
        RecipeError: it has no levels, or some that int8 does not hold.
    """
    patterns, levels = target.split()
    if levels is None or levels.magnitudes[-1] > INT8 or not (patterns or levels.zero):
        raise RecipeError(
            f"set: with activation_bits weights are int8, which '{target}' is not.\n"
            "Remedy: levels of at most 8 bits with zero: {set: levels, bits: 8, zero: true}."
        )
    return patterns, levels


def _tensor(batch: Batch) -> Tensor:
    """Return the one tensor of a batch.

    Raises:
        RecipeError: it has several.
    """
    if isinstance(batch, Tensor):
        return batch
    raise RecipeError(
        "equalize: it follows channels through models that take one tensor.\n"
        "Remedy: leave it out, or wrap the model."
    )


def _members(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return the projected weights that a plan divides a common budget by, if it has one."""
    if not any(row.pooled for row in plan.compressed):
        return {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    return plan.project({row.parameter: weights[row.parameter] for row in plan.compressed}, model)


class Solver:
    """Finds the levels of one layer, and keeps them.

    Attributes:
        quantized: what it found last.
    """

    quantized: Quantized

    def __init__(self, target: ConstraintSet, iterations: int, rho: float) -> None:
        self.target, self.iterations, self.rho = target, iterations, rho

    def __call__(self, problem: Quadratic) -> Solution:
        """Return the weights, and what they would be without regard to outputs."""
        patterns, levels = self.target.split()
        assert levels is not None
        require_finite(problem.weight)
        dtype = problem.weight.dtype
        if not patterns:
            self.quantized = rounded(problem, levels, self.iterations, self.rho)
            return self.quantized.weight(dtype), rounded(problem, levels, 0, self.rho).weight(dtype)
        plain = self.target.project(problem.weight)
        found = plain
        if self.iterations:
            found = reconstruct_layer(problem, self.target, self.iterations, self.rho)
        member = self.target.quantized(found)
        assert member is not None
        self.quantized = member
        return found, plain


class Reading:
    """What a layer reads: how large, and what in the mean.

    Attributes:
        histogram: of magnitudes.
        rows: how often its filters were multiplied.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.histogram, self.rows = layer, Histogram(), 0
        self.total: Tensor | float = 0.0

    def add(self, inputs: Tensor) -> None:
        """Count one more batch."""
        self.histogram.add(inputs)
        rows = columns(self.layer, inputs.detach())
        self.total = self.total + rows.sum(1, keepdim=True, dtype=torch.float64)
        self.rows += rows.shape[1]

    @property
    def mean(self) -> Tensor | None:
        """The mean row, ``(groups, 1, d)``; None if there was none."""
        return self.total / self.rows if isinstance(self.total, Tensor) else None


def look(
    model: nn.Module, layers: Sequence[str], modules: Sequence[str], batches: Sequence[Batch]
) -> tuple[dict[str, Reading], dict[str, Histogram]]:
    """Return what some layers read, and what some modules return."""
    read = {name: Reading(model.get_submodule(name)) for name in layers}
    made = {name: Histogram() for name in modules}
    for batch in batches if layers or modules else ():
        with (
            watching(model, layers, lambda name, tensor: read[name].add(tensor)),
            watching_outputs(model, modules, lambda name, tensor: made[name].add(tensor)),
        ):
            call(model, batch)
    return read, made
