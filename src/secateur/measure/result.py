"""What was measured, and what follows: from which sparsity each form pays, and how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from secateur.errors import SecateurError, did_you_mean
from secateur.measure.clock import Load
from secateur.measure.shapes import Untimed

_STEPS, _DIGITS = 40, 6


@dataclass(frozen=True)
class Point:
    """A form of a layer at one sparsity.

    Attributes:
        sparsity: share of the dense layer's weights that it lacks, in [0, 1).
        seconds: of one call, median over the rounds.
        speedup: time of the dense layer per time of this one, each next to the other in the same
            round; median over the rounds.
        low: tenth percentile of that ratio.
        high: ninetieth percentile.
    """

    sparsity: float
    seconds: float
    speedup: float
    low: float
    high: float

    @property
    def ppr(self) -> float:
        """Pruning-to-performance ratio: pruning rate per speed-up; 1 is ideal."""
        return pruning_to_performance(self.sparsity, self.speedup)


@dataclass(frozen=True)
class Layer:
    """A shape of the model, timed.

    Attributes:
        names: layers that have it, one for each time that one is executed.
        kind: what it is.
        shape: its sizes in words.
        weights: number of its weights.
        macs: multiply-accumulates of one call.
        seconds: of one call of the dense layer, median.
        low: tenth percentile of that.
        high: ninetieth percentile.
        curves: form -> points, from dense to sparse.
        missing: form -> why there are none.
    """

    names: tuple[str, ...]
    kind: Literal["convolution", "linear"]
    shape: str
    weights: int
    macs: int
    seconds: float
    low: float
    high: float
    curves: dict[str, tuple[Point, ...]]
    missing: dict[str, str]

    def speedup(self, form: str, sparsity: float) -> float:
        """Return how many times faster than dense a form is; 1 where the layer lacks it.

        Between points, and before the densest two, log(speed-up) is linear in log(density), which
        is exact where time is a power of the density. Beyond the sparsest it stays what it is
        there. Sparser is never slower but by noise: neighbours that say so are averaged.
        """
        points = self.curves.get(form, ())
        if not points:
            return 1.0
        values = ascending([math.log(point.speedup) for point in points])
        if len(points) == 1 or sparsity >= points[-1].sparsity:
            return math.exp(values[-1])
        places = [-math.log1p(-point.sparsity) for point in points]
        where = -math.log1p(-sparsity)
        right = next(at for at in range(1, len(places)) if where <= places[at])
        share = (where - places[right - 1]) / (places[right] - places[right - 1])
        return math.exp(values[right - 1] + share * (values[right] - values[right - 1]))

    def starts_to_pay(self, form: str) -> float | None:
        """Return the sparsity from which on a form is faster than dense; None if it never is."""
        return crossing(lambda at: self.speedup(form, at), self.sparsities(form))

    def sparsities(self, form: str) -> list[float]:
        """Return where the form was timed, ascending; empty where the layer lacks it."""
        return [point.sparsity for point in self.curves.get(form, ())]


@dataclass(frozen=True)
class BreakEven:
    """From which sparsity each way to run a model pays on this machine.

    Attributes:
        layers: distinct shapes in the order of execution.
        forms: name -> what it is and what runs it.
        untimed: what else multiplies; its time is in no figure.
        machine: the processor.
        torch: version of torch.
        threads: that each form could use.
        clock: what was measured, "processor time" or "wall time".
        rounds: fewest rounds behind a median.
        load: what the machine did meanwhile.
    """

    layers: tuple[Layer, ...]
    forms: dict[str, str]
    untimed: tuple[Untimed, ...]
    machine: str
    torch: str
    threads: int
    clock: str
    rounds: int
    load: Load

    @property
    def seconds(self) -> float:
        """Time of the dense layers, each as often as it is executed."""
        return sum(layer.seconds * len(layer.names) for layer in self.layers)

    def speedup(self, form: str, sparsity: float | Mapping[str, float]) -> float:
        """Return how many times faster the layers are together if they run in a form.

        A layer that lacks the form stays dense. What is not in ``layers`` takes no time here.

        Args:
            form: one of ``forms``.
            sparsity: of every layer; or by the name of a layer, where one without a name stays
                dense.

        Raises:
            SecateurError: the form or a layer is unknown.
        """
        self._check(form)
        if isinstance(sparsity, Mapping):
            self._check_names(sparsity)
        spent = 0.0
        for layer in self.layers:
            for name in layer.names:
                at = sparsity.get(name) if isinstance(sparsity, Mapping) else sparsity
                spent += layer.seconds / (1.0 if at is None else layer.speedup(form, at))
        return self.seconds / spent

    def starts_to_pay(self, form: str) -> float | None:
        """Return the sparsity of all layers from which on a form is faster; None if it never is.

        Raises:
            SecateurError: the form is unknown.
        """
        self._check(form)
        measured = {at for layer in self.layers for at in layer.sparsities(form)}
        return crossing(lambda at: self.speedup(form, at), sorted(measured))

    def ppr(self, form: str, sparsity: float) -> float:
        """Return the pruning-to-performance ratio: pruning rate per speed-up; 1 is ideal.

        X. Ma et al., "Non-Structured DNN Weight Pruning: Is It Beneficial in Any Platform?",
        arXiv 1907.02124.

        Raises:
            SecateurError: the form is unknown.
        """
        return pruning_to_performance(sparsity, self.speedup(form, sparsity))

    def covered(self, form: str) -> float:
        """Return the share of the dense time in layers that have the form.

        Raises:
            SecateurError: the form is unknown.
        """
        self._check(form)
        held = (each.seconds * len(each.names) for each in self.layers if form in each.curves)
        return sum(held) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, with what follows from the figures under ``network``."""
        network = {
            form: {"starts_to_pay": self.starts_to_pay(form), "covered": self.covered(form)}
            for form in self.forms
        }
        plain = asdict(self)
        for layer, row in zip(self.layers, plain["layers"], strict=True):
            row["starts_to_pay"] = {form: layer.starts_to_pay(form) for form in layer.curves}
            for form, points in layer.curves.items():
                for point, cell in zip(points, row["curves"][form], strict=True):
                    cell["ppr"] = point.ppr
        return {**plain, "seconds": self.seconds, "network": network, "busy": self.load.busy}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BreakEven:
        """Return what :meth:`to_dict` wrote, as it is or through JSON.

        Raises:
            SecateurError: a key is missing or of another type.
        """
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise SecateurError(
                f"break-even: {key}: {first['msg']}.\n"
                "Write the file again with: secateur breakeven MODEL --json"
            ) from error

    def _check(self, form: str) -> None:
        if form not in self.forms:
            raise SecateurError(
                f"form: there is no '{form}'.{did_you_mean(form, self.forms)}\n"
                f"Forms: {', '.join(self.forms)}."
            )

    def _check_names(self, sparsity: Mapping[str, float]) -> None:
        known = {name for layer in self.layers for name in layer.names}
        for name in sparsity:
            if name not in known:
                raise SecateurError(
                    f"sparsity: no layer '{name}' was timed.{did_you_mean(name, known)}"
                )


def pruning_to_performance(sparsity: float, speedup: float) -> float:
    """Return 1 / (1 - sparsity) per speed-up."""
    return 1 / (1 - sparsity) / speedup


def ascending(values: Sequence[float]) -> list[float]:
    """Return the nearest values that do not fall, by squares: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def crossing(speedup: Callable[[float], float], measured: Sequence[float]) -> float | None:
    """Return the sparsity from which on a speed-up is above 1; None if it never is.

    Args:
        speedup: of a sparsity; it does not fall.
        measured: where it was measured, ascending; the answer lies within.
    """
    if not measured or speedup(measured[-1]) <= 1:
        return None
    if speedup(measured[0]) > 1:
        return measured[0]
    dense, sparse = 1 - measured[0], 1 - measured[-1]
    for _ in range(_STEPS):
        middle = math.sqrt(dense * sparse)
        dense, sparse = (dense, middle) if speedup(1 - middle) > 1 else (middle, sparse)
    return round(1 - sparse, _DIGITS)
