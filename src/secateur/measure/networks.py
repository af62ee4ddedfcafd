"""Time a deployed network beside another in every runtime, all of them in each round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.doctor import doctor
from secateur.errors import BusyError, SecateurError
from secateur.measure.clock import LoadMeter, Run, Stopwatch, stopwatch
from secateur.measure.runtimes import RUNTIMES, Outputs, Runtime, feeds_of, holds_integers

SITTING = 2.0
"""Seconds of a sitting, after which the load by others is looked at; a busy one does not count."""

ENOUGH = 6
"""Rounds in quiet sittings that a figure takes."""

PATIENCE = 3.0
"""How many times the asked seconds may pass until enough sittings were quiet."""

APART = {False: 1e-3, True: 5e-2}
"""How far runtimes may be apart in a file of floats, and in one with integers: there a sum in
another order may end beside another level, and some runtimes round what meets integer weights."""


@dataclass(frozen=True)
class Spread:
    """A figure over all rounds.

    Attributes:
        median: of them.
        low: their tenth percentile.
        high: their ninetieth percentile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least two values."""
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Figure:
    """One network in one runtime at one batch size.

    Attributes:
        runtime: its name.
        batch: samples of an inference.
        seconds: of an inference.
        against: seconds of an inference of the other network.
        speedup: ``against`` per ``seconds``, round by round.
        speedup_over_fastest: the same against the other network where it runs fastest.
    """

    runtime: str
    batch: int
    seconds: Spread
    against: Spread
    speedup: Spread
    speedup_over_fastest: Spread


@dataclass(frozen=True)
class Agreement:
    """How near to each other runtimes compute one file, on random inputs.

    Attributes:
        difference: largest of any output, as a share of the largest output.
        tolerance: what sums in another order explain, and in files with integers other roundings.
    """

    difference: float
    tolerance: float

    @property
    def met(self) -> bool:
        """Whether the runtimes compute the same network."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        figures: by batch, then runtime.
        versions: of the runtimes.
        agreement: of the runtimes on ``network`` and ``against``; empty if one runtime ran.
        missing: runtimes that are not here, and the command that installs each.
        machine: name of the processor.
        threads: of an inference.
        clock: what was measured: processor time or wall time.
        rounds: fewest rounds that a figure comes from.
        others: cores that other programs used meanwhile, on average.
        discarded: sittings that do not count because others used too much.
    """

    figures: tuple[Figure, ...]
    versions: dict[str, str]
    agreement: dict[str, Agreement]
    missing: dict[str, str]
    machine: str
    threads: int
    clock: str
    rounds: int
    others: float
    discarded: int

    @property
    def fastest(self) -> dict[int, str]:
        """Return the runtime that takes the network the least time, by batch."""
        best: dict[int, Figure] = {}
        for figure in self.figures:
            rival = best.setdefault(figure.batch, figure)
            if figure.seconds.median < rival.seconds.median:
                best[figure.batch] = figure
        return {batch: figure.runtime for batch, figure in best.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "fastest": {str(k): name for k, name in self.fastest.items()}}


def bench(
    network: Path,
    against: Path,
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    threads: int = 1,
    seconds: float = 20.0,
) -> Bench:
    """Time an ONNX file beside another, and compare what the runtimes compute from each.

    Every round runs both files in all runtimes one after the other, so that whatever else the
    machine does disturbs all alike. One thread is measured in processor time, several in wall
    time. Sittings in which other programs use over a tenth of the cores do not count.

    Args:
        network: the file.
        against: the file to compare with; its inputs are the same.
        runtimes: names out of ``RUNTIMES``; by default all that are installed.
        batches: samples of an inference, one or more numbers.
        threads: of an inference.
        seconds: of quiet measuring, for each batch size.

    Raises:
        BusyError: the machine was never quiet for long enough.
        MissingDependencyError: a runtime that was asked for is not installed, or none is.
        ArtifactError: a runtime refuses a file.
        SecateurError: an argument is out of range.
    """
    _check(batches, threads, seconds)
    chosen, missing = _choose(runtimes)
    watch, clock = stopwatch(threads)
    paths = {"against": against, "network": network}
    figures, rounds, others, discarded = [], [], [], 0
    apart: dict[str, list[float]] = {name: [] for name in paths}
    for batch in batches:
        feeds = feeds_of(network, batch)
        runs = [
            runtime.prepare(path, feeds, threads)
            for runtime in chosen.values()
            for path in paths.values()
        ]
        for first, name in enumerate(paths):
            apart[name].append(_difference([run() for run in runs[first :: len(paths)]]))
        sat = sit(runs, watch, seconds)
        figures += _figures(list(chosen), batch, sat.rounds)
        rounds.append(len(sat.rounds))
        others.append(sat.others)
        discarded += sat.discarded
    return Bench(
        figures=tuple(figures),
        versions={name: each.version or "unknown" for name, each in chosen.items()},
        agreement={
            name: Agreement(max(each), APART[holds_integers(paths[name])])
            for name, each in apart.items()
            if len(chosen) > 1
        },
        missing=missing,
        machine=doctor()["cpu"]["name"],
        threads=threads,
        clock=clock,
        rounds=min(rounds),
        others=max(others),
        discarded=discarded,
    )


def _check(batches: Sequence[int], threads: int, seconds: float) -> None:
    for name, values in (("batch", batches), ("threads", [threads]), ("seconds", [seconds])):
        if not values or min(values) <= 0:
            raise SecateurError(f"{name}: {values} should be positive; give 1 or more.")


def _choose(names: Sequence[str]) -> tuple[dict[str, Runtime], dict[str, str]]:
    """Return the runtimes to use, and how to install those that are not here."""
    for name in names:
        if name not in RUNTIMES:
            raise SecateurError(f"runtime: there is no '{name}'; one of {', '.join(RUNTIMES)}.")
    if names:
        return {name: RUNTIMES[name] for name in names}, {}
    missing = {name: each.install for name, each in RUNTIMES.items() if each.version is None}
    found = {name: each for name, each in RUNTIMES.items() if name not in missing}
    return found or dict(RUNTIMES), missing  # with none at all, preparing says what is missing


def _difference(outputs: Sequence[Outputs]) -> float:
    """Return how far outputs of runtimes are from the first one's, as a share of its largest.

    What is no number is off by all.
    """
    first, *others = outputs
    largest = max(float(np.abs(each).max()) for each in first)
    gaps = [0.0] + [
        np.abs(found.astype(float) - expected).max() / max(largest, 1e-30)
        for each in others
        for found, expected in zip(each, first, strict=True)
    ]
    return float(np.nan_to_num(gaps, nan=1.0, posinf=1.0).max())


@dataclass(frozen=True)
class Sat:
    """Quiet sittings.

    Attributes:
        rounds: seconds of each run, round by round.
        others: cores that other programs used in them, on average.
        discarded: sittings that were not quiet.
    """

    rounds: list[list[float]]
    others: float
    discarded: int


def sit(runs: Sequence[Run], watch: Stopwatch, seconds: float) -> Sat:
    """Time runs side by side while the machine is quiet.

    Args:
        runs: what is timed.
        watch: what times.
        seconds: of quiet sittings; at least ``ENOUGH`` rounds even so.

    Raises:
        BusyError: the machine was not quiet for long enough.
    """
    rounds: list[list[float]] = []
    loads, quiet, discarded = [], 0.0, 0
    end = watch.wall() + PATIENCE * max(seconds, SITTING)
    while len(rounds) < ENOUGH or quiet < seconds:
        begin, load = watch.wall(), LoadMeter()
        found = list(watch.rounds(runs, min(SITTING, seconds)))
        state = load.read()
        if state.busy:
            discarded += 1
        else:
            rounds += found
            loads.append(state.others)
            quiet += watch.wall() - begin
        if watch.wall() >= end and (len(rounds) < ENOUGH or not loads):
            raise BusyError(
                f"machine: other programs use {state.others:.1f} of {state.cores} cores, so no "
                "figure would mean anything.\nStop them, or measure on another machine."
            )
        if watch.wall() >= end:
            break
    return Sat(rounds, statistics.mean(loads), discarded)


def _figures(names: Sequence[str], batch: int, rounds: Sequence[Sequence[float]]) -> list[Figure]:
    """Summarize rounds of (against, network) of each runtime in turn."""
    columns = list(zip(*rounds, strict=True))
    others: Mapping[str, Sequence[float]] = dict(zip(names, columns[::2], strict=True))
    own = dict(zip(names, columns[1::2], strict=True))
    fastest = others[min(others, key=lambda name: statistics.median(others[name]))]

    def ratio(values: Sequence[float], name: str) -> Spread:
        return Spread.of([a / b for a, b in zip(values, own[name], strict=True)])

    return [
        Figure(
            name,
            batch,
            Spread.of(own[name]),
            Spread.of(others[name]),
            ratio(others[name], name),
            ratio(fastest, name),
        )
        for name in names
    ]
