"""Timing of several variants side by side, so that whatever else runs disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(
    blocks: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Run all blocks in each round; return median seconds and median ratios to ``dense``.

    With ``time.process_time`` on one thread other programs count less, but still share caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for number in range(rounds + 1):
        for name, block in blocks.items():
            start = clock()
            block()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, seconds["dense"], strict=True))
        for name, values in seconds.items()
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": ratios}
