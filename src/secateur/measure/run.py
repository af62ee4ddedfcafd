"""Time every layer shape of a model in every form, and find where each form starts to pay."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.doctor import doctor
from secateur.errors import SecateurError
from secateur.measure.clock import LoadMeter, Run, Stopwatch, stopwatch, threads_set
from secateur.measure.forms import FORMS, Form, dense
from secateur.measure.prepared import UnsupportedError
from secateur.measure.result import BreakEven, Layer, Point
from secateur.measure.shapes import Linear, Shape, shapes

DENSITIES = (1.0, *(2.0**-power for power in range(1, 8)), 2.0**-9)
"""Where forms are timed: halved each time, as time is about a power of the density."""

HOPELESS = 5.0
"""A form that takes this many times the dense time is not timed at higher densities."""

_SEED = 0


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
        seconds: to spend on timing; each form of each shape gets at least seven rounds even so.
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
    share = seconds / (len(found.names) * len(forms))
    with threads_set(threads), torch.no_grad():
        meter = LoadMeter()
        timed = [
            time_layer(shape, tuple(names), forms, watch, share)
            for shape, names in found.names.items()
        ]
        load = meter.read()
    return BreakEven(
        layers=tuple(layer for layer, _ in timed),
        forms={name: form.about for name, form in forms.items()},
        untimed=tuple(found.untimed),
        machine=doctor()["cpu"]["name"],
        torch=torch.__version__,
        threads=threads,
        clock=clock,
        rounds=min(rounds for _, rounds in timed),
        load=load,
    )


def time_layer(
    shape: Shape,
    names: tuple[str, ...],
    forms: Mapping[str, Form],
    watch: Stopwatch,
    seconds: float,
) -> tuple[Layer, int]:
    """Time one shape in every form.

    Args:
        shape: what is timed.
        names: of the layers that have it.
        forms: by name.
        watch: what times.
        seconds: to spend on each form.

    Returns:
        The layer, and the fewest rounds that any of its figures comes from.
    """
    whole = dense(shape, 1.0, _generator()).run
    curves, missing = dict[str, tuple[Point, ...]](), dict[str, str]()
    dense_times, rounds = list[float](), list[int]()
    for name, form in forms.items():
        try:
            prepared = list(_prepared(shape, form, watch, HOPELESS * watch.once(whole)))
        except (UnsupportedError, RuntimeError, NotImplementedError) as error:
            missing[name] = " ".join(str(error).split())[:160]
            continue
        times = list(watch.rounds([whole, *(run for _, run in prepared)], seconds))
        dense_times += [sample[0] for sample in times]
        rounds.append(len(times))
        curves[name] = _curve(form, [density for density, _ in prepared], times)
    if not dense_times:  # it has no other form; how long it takes still matters
        dense_times = [sample[0] for sample in watch.rounds([whole], seconds)]
        rounds.append(len(dense_times))
    low, middle, high = _spread(dense_times)
    layer = Layer(
        names=names,
        kind="linear" if isinstance(shape, Linear) else "convolution",
        shape=str(shape),
        weights=shape.weights,
        macs=shape.macs,
        seconds=middle,
        low=low,
        high=high,
        curves=curves,
        missing=missing,
    )
    return layer, min(rounds)


def _prepared(
    shape: Shape, form: Form, watch: Stopwatch, hopeless: float
) -> Iterator[tuple[float, Run]]:
    """Yield (density, what runs) from sparse to dense, until it is too slow to pay.

    The weight as torch holds it is dropped, so that no more than one copy of it is alive.
    """
    last, slow = 0.0, None
    for density in sorted(DENSITIES if form.prunes else (1.0,)):
        if form.exact and density == 1:
            return
        layer = form.prepare(shape, density, _generator())
        if layer.density <= last or (form.exact and layer.density == 1):
            continue
        slow = watch.once(layer.run)
        if last and slow > hopeless:
            return
        last = layer.density
        yield last, layer.run


def _curve(
    form: Form, densities: Sequence[float], times: Sequence[Sequence[float]]
) -> tuple[Point, ...]:
    points = []
    for column, density in enumerate(densities, start=1):
        low, middle, high = _spread([sample[0] / sample[column] for sample in times])
        seconds = statistics.median(sample[column] for sample in times)
        points.append(Point(1 - density, seconds, middle, low, high))
    if form.exact:
        points.append(Point(0.0, statistics.median(sample[0] for sample in times), 1.0, 1.0, 1.0))
    return tuple(reversed(points))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the tenth percentile, the median and the ninetieth percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
