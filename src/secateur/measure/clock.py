"""Timing: interleaved, warm, in rounds; and what else the machine was doing meanwhile."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

Run = Callable[[], Any]

SAMPLE_SECONDS = 1e-3
"""Shorter calls are repeated until a sample takes this long."""

BUSY_SHARE = 0.1
"""Share of the cores that other programs may use before the machine counts as busy."""

_MIN_ROUNDS, _MAX_ROUNDS = 3, 8
_MAX_CALLS = 200


@dataclass(frozen=True)
class Stopwatch:
    """Times calls.

    Attributes:
        clock: what is measured, in seconds.
        wall: what limits how long measuring takes, in seconds.
    """

    clock: Callable[[], float]
    wall: Callable[[], float] = time.monotonic

    def once(self, run: Run, calls: int = 1) -> float:
        """Return the seconds of a call, after a call that warms caches."""
        run()
        begin = self.clock()
        for _ in range(calls):
            run()
        return (self.clock() - begin) / calls

    def rounds(self, runs: Sequence[Run], seconds: float) -> Iterator[list[float]]:
        """Yield the seconds of a call of each run, round by round, all runs in each round.

        Args:
            runs: what is timed, in this order, so that neighbours see the same machine.
            seconds: of ``wall``, after which no round begins once there are three.
        """
        end = self.wall() + seconds
        calls = [
            min(_MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(self.once(run), 1e-9))) for run in runs
        ]
        for number in range(_MAX_ROUNDS):
            if number >= _MIN_ROUNDS and self.wall() >= end:
                return
            yield [self.once(run, repeats) for run, repeats in zip(runs, calls, strict=True)]


def stopwatch(threads: int) -> tuple[Stopwatch, str]:
    """Return the clock for a number of threads, and what it measures.

    One thread is measured in the processor time that it used, which other programs disturb least;
    for several only the time that passes means anything.
    """
    if threads == 1:
        return Stopwatch(time.process_time), "processor time"
    return Stopwatch(time.perf_counter), "wall time"


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Have torch and the libraries under it use a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Load:
    """What the machine did while it was measured.

    Attributes:
        cores: that this process may use.
        others: cores that other programs used, on average.
    """

    cores: int
    others: float

    @property
    def busy(self) -> bool:
        """Whether others used so much that figures may be off."""
        return self.others > BUSY_SHARE * self.cores


class LoadMeter:
    """Measures the load by others from its creation to :meth:`read`."""

    def __init__(self) -> None:
        self._begin = self._now()

    def read(self) -> Load:
        """Return the load since the beginning."""
        passed, all_of_it, own = (
            after - before for after, before in zip(self._now(), self._begin, strict=True)
        )
        usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        return Load(usable or 1, max(0.0, all_of_it - own) / max(passed, 1e-9))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return time, processor time of everything, and that of this process."""
        times = psutil.cpu_times()._asdict()
        idle = sum(times.get(kind, 0.0) for kind in ("idle", "iowait"))
        inside = sum(times.get(kind, 0.0) for kind in ("guest", "guest_nice"))  # counted as user
        return time.monotonic(), sum(times.values()) - idle - inside, time.process_time()
