"""Energy of one inference, measured where the machine has counters, and never guessed.

The protocol is that of P. Blouw et al., "Benchmarking keyword spotting efficiency on neuromorphic
hardware", arXiv 1812.01739: idle power first, then a loop of inferences; dynamic energy is what is
above idle. The counters (RAPL of the processor, NVML or AMD SMI of the graphics card) are read by
Zeus (ml.energy/zeus), which estimates nothing where there is no counter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import MissingDependencyError, SecateurError

_POWERCAP = Path("/sys/class/powercap")
_PACKAGES = "intel-rapl:[0-9]*/energy_uj"


@dataclass(frozen=True)
class Measured:
    """Energy of one call, as counters saw it.

    Attributes:
        counters: what was counted.
        calls: calls during the measurement.
        seconds: seconds of one call.
        idle_watts: power before the measurement.
        run_watts: power during it.
    """

    counters: tuple[str, ...]
    calls: int
    seconds: float
    idle_watts: float
    run_watts: float

    @property
    def total_joules(self) -> float:
        """Joules of one call, idle power included."""
        return self.run_watts * self.seconds

    @property
    def dynamic_joules(self) -> float:
        """Joules of one call above idle power."""
        return (self.run_watts - self.idle_watts) * self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain data."""
        figures = {"total_joules": self.total_joules, "dynamic_joules": self.dynamic_joules}
        return {**asdict(self), **figures}


def counters() -> tuple[str, ...]:
    """Name the energy counters that this machine exposes to this user; often there are none."""
    packages = sorted(_POWERCAP.glob(_PACKAGES))
    readable = [
        f"processor {path.parent.name}"
        for path in packages
        if path.parent.name.count(":") == 1 and os.access(path, os.R_OK)
    ]
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return (*readable, *cards)


def measure(call: Callable[[], Any], seconds: float = 10.0, idle_seconds: float = 10.0) -> Measured:
    """Measure the energy of one call. The machine should have nothing else to do.

    Args:
        call: one inference, such as ``lambda: model(batch)``.
        seconds: how long it is repeated, at least once.
        idle_seconds: how long idle power is measured before.

    Raises:
        SecateurError: this machine exposes no energy counter.
        MissingDependencyError: Zeus is not installed.
    """
    found = counters()
    if not found:
        raise SecateurError(
            "energy: not measured, because this machine exposes no energy counter to this user.\n"
            f"Looked for readable {_POWERCAP}/intel-rapl:*/energy_uj and for graphics cards.\n"
            f"Remedy: {_remedy()}; modelled figures need no counter."
        )
    monitor = _monitor()
    monitor.begin_window("idle")
    time.sleep(idle_seconds)
    idle = monitor.end_window("idle")
    call()  # the first call allocates and compiles
    calls, end = 0, time.monotonic() + seconds
    monitor.begin_window("run")
    while not calls or time.monotonic() < end:
        call()
        calls += 1
    run = monitor.end_window("run")
    return Measured(
        counters=found,
        calls=calls,
        seconds=run.time / calls,
        idle_watts=_joules(idle) / idle.time,
        run_watts=_joules(run) / run.time,
    )


def _remedy() -> str:
    if any(_POWERCAP.glob(_PACKAGES)):
        return f"sudo chmod a+r {_POWERCAP}/intel-rapl:*/energy_uj, which only root may read here"
    return "a machine that is not virtual, as virtual ones have no counters"


def _monitor() -> Any:
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError as error:
        raise MissingDependencyError(
            'energy: reading counters needs Zeus: pip install "secateur[energy]"'
        ) from error
    return ZeusMonitor()


def _joules(window: Any) -> float:
    """Add up what the counters of one window saw; memory has its own where it has one."""
    parts = (window.gpu_energy, window.cpu_energy, window.dram_energy)
    return float(sum(sum(part.values()) for part in parts if part))
