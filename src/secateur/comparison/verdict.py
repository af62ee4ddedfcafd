"""Whether pruning pays on a platform, at equal accuracy, in words and the numbers behind them.

The question and its terms are those of X. Ma et al., "Non-Structured DNN Weight Pruning: Is It
Beneficial in Any Platform?", arXiv 1907.02124: at equal accuracy and equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal, Protocol

from secateur.comparison.figures import DEPLOYED_BITS, Entry, Network, Seed
from secateur.comparison.statistics import Statistic
from secateur.cost.platforms import Platform, break_even, compare
from secateur.report import numbers

Pruning = Literal["non-structured", "structured"]

GAIN = 1.005
"""Smallest speed-up that is called one: what two digits still show."""


class Judge(Protocol):
    """A platform that can say what pruning gains there."""

    @property
    def name(self) -> str:
        """How texts call it."""

    @property
    def about(self) -> str:
        """What it is, and how its figures came about."""

    def speedup(self, form: Pruning, seed: Seed) -> float:
        """Return how many times faster than dense a network is, all weights of equal bits."""

    def by_zeros(self, seed: Seed) -> float:
        """Return the same for zeros alone: had no channel been cut out that they emptied."""

    def needed(self, seed: Seed) -> float | None:
        """Return the sparsity from which zeros alone pay; None if they never do."""

    def with_levels(self, seed: Seed) -> float | None:
        """Return the speed-up with the bits of the levels; None where that is not known."""


@dataclass(frozen=True)
class Modelled:
    """A platform that is not here."""

    platform: Platform

    @property
    def name(self) -> str:
        """The platform's name."""
        return self.platform.name

    @property
    def about(self) -> str:
        """The platform's summary."""
        return f"Modelled: {self.platform.summary}; {DEPLOYED_BITS} bits."

    def speedup(self, form: Pruning, seed: Seed) -> float:
        """Return the ratio of modelled times, all weights of equal bits."""
        cut = [replace(layer, weight_bits=DEPLOYED_BITS) for layer in seed.network]
        return compare(self.platform, seed.dense, cut).speedup

    def by_zeros(self, seed: Seed) -> float:
        """Return the ratio of modelled times had no channel been cut out."""
        return compare(self.platform, seed.dense, uncut(seed)).speedup

    def needed(self, seed: Seed) -> float | None:
        """Return the modelled break-even sparsity of zeros alone."""
        return break_even(self.platform, seed.dense, uncut(seed))

    def with_levels(self, seed: Seed) -> float:
        """Return the ratio of modelled times with the bits of the levels."""
        return compare(self.platform, seed.dense, seed.network).speedup


def uncut(seed: Seed) -> Network:
    """Return the dense network with the zeros of the pruned one, none of its channels cut out."""
    kept = {layer.name: layer for layer in seed.network}
    return tuple(
        replace(
            layer,
            nonzeros=kept[layer.name].nonzeros if layer.name in kept else 0,
            index_bits=kept[layer.name].index_bits if layer.name in kept else 0,
            pattern="unstructured",
        )
        if layer.weights
        else layer
        for layer in seed.dense
    )


@dataclass(frozen=True)
class Side:
    """The recipe of a kind that is fastest on a platform, of those as accurate as dense.

    Attributes:
        recipe: its name.
        loss: of validation accuracy against dense.
        sparsity: share of the dense network's weights that it lacks.
        speedup: against dense at equal bits.
        by_zeros: the same had no channel been cut out that zeros emptied.
    """

    recipe: str
    loss: Statistic
    sparsity: Statistic
    speedup: Statistic
    by_zeros: Statistic


@dataclass(frozen=True)
class Verdict:
    """What pruning does on a platform.

    Attributes:
        platform: its name; "here" is measured, all others are modelled.
        about: what it is, and how the figures came about.
        text: some sentences with the numbers that carry them.
        break_even: mean sparsity from which the non-structured recipe is faster than dense; None if
            it never is, or there is no such recipe.
        non_structured: the best recipe with zeros anywhere; None if none is accurate enough.
        structured: the best recipe with zeros in groups.
    """

    platform: str
    about: str
    text: str
    break_even: float | None
    non_structured: Side | None
    structured: Side | None

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return asdict(self)


def judge(platform: Judge, entries: Sequence[Entry], margin: float) -> Verdict:
    """Return the verdict on a platform.

    Args:
        platform: what is judged.
        entries: the recipes, without the dense network.
        margin: validation accuracy that a recipe may lose against dense, as a fraction of 1.
    """
    anywhere, groups = (
        _fastest(platform, kind, entries, margin) for kind in ("non-structured", "structured")
    )
    needed = _needed(platform, entries, anywhere)
    sentences = (
        _about_anywhere(anywhere, needed) if anywhere else _absent("non-structured", entries),
        _about_groups(groups) if groups else _absent("structured", entries),
        _conclusion(anywhere, groups),
        _with_levels(platform, entries, margin),
    )
    text = " ".join(sentence for sentence in sentences if sentence)
    return Verdict(platform.name, platform.about, text, needed, anywhere, groups)


def accurate(entries: Sequence[Entry], margin: float) -> list[Entry]:
    """Return the recipes whose mean validation accuracy is at most the margin below dense."""
    return [each for each in entries if each.loss.mean <= margin]


def _fastest(
    platform: Judge, kind: Pruning, entries: Sequence[Entry], margin: float
) -> Side | None:
    sides = [
        Side(
            each.name,
            each.loss,
            Statistic.of(_sparsity(seed) for seed in each.seeds.values()),
            Statistic.of(platform.speedup(kind, seed) for seed in each.seeds.values()),
            Statistic.of(platform.by_zeros(seed) for seed in each.seeds.values()),
        )
        for each in accurate(entries, margin)
        if each.form == kind
    ]
    return max(sides, key=lambda side: side.speedup.mean, default=None)


def _needed(platform: Judge, entries: Sequence[Entry], side: Side | None) -> float | None:
    """Return the mean break-even sparsity over seeds; None if there is none for any of them."""
    seeds = [
        seed
        for each in entries
        if side and each.name == side.recipe
        for seed in each.seeds.values()
    ]
    found = [platform.needed(seed) for seed in seeds]
    known = [each for each in found if each is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _sparsity(seed: Seed) -> float:
    kept = sum(layer.nonzeros for layer in seed.network)
    return 1 - kept / sum(layer.weights for layer in seed.dense)


def _about_anywhere(side: Side, needed: float | None) -> str:
    needs = "Zeros in any place gain nothing by themselves, however many"
    if needed is not None:
        share = numbers.percent(needed, 1)
        needs = f"Non-structured pruning needs {share} sparsity to break even"
    emptied = ""
    if side.speedup.mean > GAIN * side.by_zeros.mean:
        alone = _times(side.by_zeros)
        emptied = f", {alone} by its zeros and the rest by channels that they emptied"
    return (
        f"{needs}; at equal accuracy '{side.recipe}' ({_lost(side)}) reaches "
        f"{_percent(side.sparsity)}: it {_pays(side)}{emptied}."
    )


def _about_groups(side: Side) -> str:
    return (
        f"Structured pruning, '{side.recipe}' ({_lost(side)}, {_percent(side.sparsity)} sparsity), "
        f"{_pays(side)}."
    )


def _absent(kind: Pruning, entries: Sequence[Entry]) -> str:
    """Say why there is no recipe of a kind to judge."""
    of_kind = [each for each in entries if each.form == kind]
    if not of_kind:
        return f"No {kind} recipe was compared."
    nearest = min(of_kind, key=lambda each: each.loss.mean)
    return (
        f"No {kind} recipe is as accurate as dense: the nearest, '{nearest.name}', loses "
        f"{_points(nearest.loss)} points."
    )


def _conclusion(anywhere: Side | None, groups: Side | None) -> str:
    if anywhere is None or groups is None:
        return ""
    if max(anywhere.speedup.mean, groups.speedup.mean) < GAIN:
        return "Neither pays."
    better = "non-structured" if anywhere.speedup.mean > groups.speedup.mean else "structured"
    return f"The faster one is {better}."


def _with_levels(platform: Judge, entries: Sequence[Entry], margin: float) -> str:
    """Name the fastest recipe if weights have the bits of their levels."""
    gains: dict[str, Statistic] = {}
    for each in accurate(entries, margin):
        found = [platform.with_levels(seed) for seed in each.seeds.values()]
        known = [gain for gain in found if gain is not None]
        if known:
            gains[each.name] = Statistic.of(known)
    if not gains:
        return ""
    best = max(gains, key=lambda name: gains[name].mean)
    return (
        f"Each with the bits of its levels, '{best}' is the fastest of all: {_times(gains[best])}."
    )


def _pays(side: Side) -> str:
    verb = "pays" if side.speedup.mean >= GAIN else "does not pay:"
    return f"{verb} {_times(side.speedup)}"


def _lost(side: Side) -> str:
    return f"{'gains' if side.loss.mean < 0 else 'loses'} {_points(side.loss)} points"


def _points(loss: Statistic) -> str:
    return _with_spread(100 * abs(loss.mean), 100 * loss.deviation)


def _times(gain: Statistic) -> str:
    return f"{_with_spread(gain.mean, gain.deviation)}x"


def _with_spread(mean: float, deviation: float) -> str:
    """Write a mean with its deviation, unless that is too small to be seen."""
    spread = f"{deviation:.2f}"
    return f"{mean:.2f}" if float(spread) == 0 else f"{mean:.2f} ± {spread}"


def _percent(share: Statistic) -> str:
    return numbers.percent(share.mean, 1)
