"""Time every layer shape of a model in every form, and find where each form starts to pay."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.doctor import doctor
from secateur.errors import SecateurError
from secateur.measure.clock import LoadMeter, Stopwatch, stopwatch, threads_set
from secateur.measure.forms import FORMS, Form, dense
from secateur.measure.prepared import UnsupportedError
from secateur.measure.result import BreakEven, Layer, Point
from secateur.measure.shapes import Linear, Shape, shapes

DENSITIES = (1.0, *(2.0**-power for power in range(1, 7)), 2.0**-8)
"""Where forms are timed: mostly halved each time, as time is about a power of the density."""

HOPELESS = 4.0
"""A form that takes this many times the dense time is not timed at higher densities."""

SITTINGS, MIN_SITTINGS = 5, 2
"""Times that each layer has its turn, with memory of its own, so that no one moment decides."""


@dataclass
class _Trial:
    """What is known of a shape while it is timed.

    Attributes:
        densities: form -> what to ask it for, from sparse to dense.
        kept: form -> what it then keeps.
        rounds: form -> seconds of dense and of each density, round by round.
        missing: form -> why it is not timed.
    """

    densities: dict[str, list[float]] = field(default_factory=dict)
    kept: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def breakeven(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    threads: int = 1,
    seconds: float = 90.0,
    forms: Mapping[str, Form] = FORMS,
) -> BreakEven:
    """Measure from which sparsity each form pays for a model on this machine.

    Weights and inputs are random and float32; those of the model do not matter, nor do its other
    operations.

    Args:
        model: any module; it is not changed, and runs without data where it can.
        inputs: one batch, or the tuple of arguments; sizes of layers follow from it.
        threads: that each form may use. One is measured in processor time, more in wall time.
        seconds: to spend on timing; each figure comes from at least 6 rounds even so.
        forms: by name.

    Raises:
        SecateurError: threads or seconds are not positive, the model cannot run on the inputs, or
            it has no layer that could be timed.
    """
    if threads < 1:
        raise SecateurError(f"threads: {threads} is not positive; give a number of threads.")
    if not seconds > 0:
        raise SecateurError(f"seconds: {seconds} is not positive; give seconds to spend.")
    found = shapes(model, inputs if isinstance(inputs, tuple) else (inputs,))
    if not found.names:
        raise SecateurError("model: it runs no convolution and no linear layer, so none is timed.")
    watch, clock = stopwatch(threads)
    with threads_set(threads), torch.no_grad():
        meter = LoadMeter()
        layers, rounds = time_layers(found.names, forms, watch, seconds)
        load = meter.read()
    return BreakEven(
        layers=tuple(layers),
        forms={name: form.about for name, form in forms.items()},
        untimed=tuple(found.untimed),
        machine=doctor()["cpu"]["name"],
        torch=torch.__version__,
        threads=threads,
        clock=clock,
        rounds=rounds,
        load=load,
    )


def time_layers(
    names: Mapping[Shape, Sequence[str]],
    forms: Mapping[str, Form],
    watch: Stopwatch,
    seconds: float,
) -> tuple[list[Layer], int]:
    """Time shapes in every form.

    Args:
        names: shape -> names of the layers that have it.
        forms: by name.
        watch: what times.
        seconds: to spend on all of them.

    Returns:
        The layers, and the fewest rounds that any of their figures comes from.
    """
    trials = {shape: _try(shape, forms, watch) for shape in names}
    share = seconds / (SITTINGS * sum(max(1, len(each.densities)) for each in trials.values()))
    end = watch.wall() + seconds
    for seed in range(SITTINGS):
        if seed >= MIN_SITTINGS and watch.wall() >= end:
            break
        for shape, trial in trials.items():
            _sit(shape, trial, forms, watch, share, seed)
    rounds = [len(each) for trial in trials.values() for each in trial.rounds.values()]
    return [_layer(shape, names[shape], trials[shape], forms) for shape in names], min(rounds)


def _try(shape: Shape, forms: Mapping[str, Form], watch: Stopwatch) -> _Trial:
    """Find out which forms a shape has, and down to which sparsity they are worth timing."""
    trial = _Trial()
    hopeless = HOPELESS * watch.once(dense(shape, 1.0, _generator()).run)
    for name, form in forms.items():
        try:
            tried = list(_worthwhile(shape, form, watch, hopeless))
        except (UnsupportedError, RuntimeError, NotImplementedError) as error:
            trial.missing[name] = " ".join(str(error).split())[:160]
            continue
        trial.densities[name] = [asked for asked, _ in tried]
        trial.kept[name] = [kept for _, kept in tried]
    return trial


def _worthwhile(
    shape: Shape, form: Form, watch: Stopwatch, hopeless: float
) -> Iterator[tuple[float, float]]:
    """Yield densities to ask for, and what is then kept, from sparse to dense."""
    last = 0.0
    for density in sorted(DENSITIES if form.prunes else (1.0,)):
        layer = form.prepare(shape, density, _generator())
        if form.exact and layer.density == 1:
            return
        if layer.density <= last:
            continue
        if watch.once(layer.run) > hopeless and last:
            return
        last = layer.density
        yield density, last


def _sit(
    shape: Shape,
    trial: _Trial,
    forms: Mapping[str, Form],
    watch: Stopwatch,
    seconds: float,
    seed: int,
) -> None:
    """Add rounds of every form; of the dense layer alone if there is no form."""
    whole = dense(shape, 1.0, _generator(seed)).run
    for name, densities in (trial.densities or {"": []}).items():
        # only what runs is kept: the weight as torch holds it is needed no longer
        runs = [forms[name].prepare(shape, each, _generator(seed)).run for each in densities]
        trial.rounds.setdefault(name, []).extend(watch.rounds([whole, *runs], seconds))


def _layer(shape: Shape, names: Sequence[str], trial: _Trial, forms: Mapping[str, Form]) -> Layer:
    low, middle, high = _spread([each[0] for rounds in trial.rounds.values() for each in rounds])
    return Layer(
        names=tuple(names),
        kind="linear" if isinstance(shape, Linear) else "convolution",
        shape=str(shape),
        weights=shape.weights,
        macs=shape.macs,
        seconds=middle,
        low=low,
        high=high,
        curves={
            name: _curve(forms[name], kept, trial.rounds[name]) for name, kept in trial.kept.items()
        },
        missing=trial.missing,
    )


def _curve(
    form: Form, densities: Sequence[float], rounds: Sequence[Sequence[float]]
) -> tuple[Point, ...]:
    points = []
    for column, density in enumerate(densities, start=1):
        low, middle, high = _spread([sample[0] / sample[column] for sample in rounds])
        seconds = statistics.median(sample[column] for sample in rounds)
        points.append(Point(1 - density, seconds, middle, low, high))
    if form.exact:
        points.append(Point(0.0, statistics.median(sample[0] for sample in rounds), 1.0, 1.0, 1.0))
    return tuple(reversed(points))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the tenth percentile, the median and the ninetieth percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
