"""Whether pruning without structure pays on a platform, in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.cost.platforms.model import Platform
from secateur.cost.platforms.roofline import Comparison, compare
from secateur.cost.workload import LayerWork

_STEPS = 50
_SPARSEST = 64.0
_GAIN = 1 + 1e-9


@dataclass(frozen=True)
class Verdict:
    """What a dense, a non-structured and a structured network say about a platform.

    Attributes:
        text: one or two sentences with the numbers that carry them.
        non_structured: the non-structured network beside the dense one.
        structured: the structured network beside the dense one.
        break_even: sparsity from which the non-structured network is faster than the dense one;
            None if it never is.
        sparsity: sparsity of the non-structured network.
    """

    text: str
    non_structured: Comparison
    structured: Comparison
    break_even: float | None
    sparsity: float

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {
            "text": self.text,
            "break_even": self.break_even,
            "sparsity": self.sparsity,
            "non_structured": self.non_structured.to_dict(),
            "structured": self.structured.to_dict(),
        }


def verdict(
    platform: Platform,
    dense: Sequence[LayerWork],
    non_structured: Sequence[LayerWork],
    structured: Sequence[LayerWork],
) -> Verdict:
    """Judge two pruned networks on a platform.

    The comparison of arXiv 1907.02124 section 4 is at equal accuracy and equal bits. Both are the
    caller's to ensure: nothing here knows how good a network is.

    Raises:
        SecateurError: see :func:`secateur.cost.platforms.timing`.
    """
    anywhere = compare(platform, dense, non_structured)
    groups = compare(platform, dense, structured)
    needed = break_even(platform, dense, non_structured)
    reached = _sparsity(dense, non_structured)
    better = "non-structured" if anywhere.speedup > groups.speedup else "structured"
    text = (
        f"On {platform.name}, {_about(anywhere, needed, reached)}. "
        f"Structured {_outcome(groups)}: {better} pruning is the faster one here."
    )
    return Verdict(text, anywhere, groups, needed, reached)


def break_even(
    platform: Platform, dense: Sequence[LayerWork], pruned: Sequence[LayerWork]
) -> float | None:
    """Return the sparsity at which a pruned network becomes faster than the dense one.

    The densities d of all layers move together, as powers d^t: t is 0 for no zeros and 1 for the
    network given. An index keeps the bits per non-zero that it has there. None if no sparsity is
    enough.
    """
    return first_paying(lambda network: compare(platform, dense, network).speedup, dense, pruned)


def first_paying(
    speedup: Callable[[Sequence[LayerWork]], float],
    dense: Sequence[LayerWork],
    pruned: Sequence[LayerWork],
) -> float | None:
    """Return the sparsity at which a speed-up, given as a function, first exceeds 1.

    The way from the dense to the pruned network and beyond is that of :func:`break_even`.
    """

    def pays(exponent: float) -> bool:
        return speedup(_at(pruned, exponent)) > _GAIN

    low, high = 0.0, 1.0
    while not pays(high):
        low, high = high, 2 * high
        if high > _SPARSEST:
            return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return _sparsity(dense, _at(pruned, high))


def _at(network: Sequence[LayerWork], exponent: float) -> list[LayerWork]:
    layers = []
    for layer in network:
        nonzeros = round(layer.weights * layer.density**exponent)
        index = round(layer.index_bits * nonzeros / layer.nonzeros) if layer.nonzeros else 0
        layers.append(replace(layer, nonzeros=nonzeros, index_bits=index))
    return layers


def _sparsity(dense: Sequence[LayerWork], pruned: Sequence[LayerWork]) -> float:
    nonzeros = sum(layer.nonzeros for layer in pruned)
    return 1 - nonzeros / sum(layer.weights for layer in dense)


def _about(comparison: Comparison, needed: float | None, reached: float) -> str:
    outcome = _outcome(comparison)
    if needed is None:
        return f"zeros in any place gain nothing, however many: non-structured {outcome}"
    return (
        f"non-structured needs {100 * needed:.1f} % sparsity to break even and has "
        f"{100 * reached:.1f} %: it {outcome}"
    )


def _outcome(comparison: Comparison) -> str:
    pays = "pays" if comparison.speedup > _GAIN else "does not pay:"
    return (
        f"{pays} {comparison.speedup:.2f}x for {comparison.pruning_rate:.3g}x fewer weights "
        f"(PPR {comparison.ppr:.2f})"
    )
