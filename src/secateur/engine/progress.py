"""Progress on the terminal: a bar with time left, and a line for every finished epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console


class Progress:
    """Shows a run's epochs on a console; silent with ``Console(quiet=True)``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=console,
        )

    @contextmanager
    def running(self, epochs: int, done: int) -> Iterator[None]:
        """Show the bars of a run of ``epochs`` epochs, ``done`` of which are finished."""
        self.whole = self.bar.add_task("epochs", total=epochs, completed=done)
        self.steps = self.bar.add_task("steps", total=None)
        with self.bar:
            yield

    def begin(self, label: str, steps: int | None = None) -> None:
        """Start the bar of one epoch, or of other work, whose number of steps nobody knows."""
        self.bar.reset(self.steps, total=steps, description=label)

    def advance(self) -> None:
        """Count one step of what was begun last: of the optimizer, in an epoch."""
        self.bar.advance(self.steps)

    def epoch(self, entry: dict[str, Any], epochs: int) -> None:
        """Print the line of a finished epoch and advance the run."""
        self.bar.advance(self.whole)
        parts = [
            f"{entry['phase']:>8} {entry['epoch'] + 1:>3}/{epochs}",
            f"loss {entry['loss']:.4f}",
            f"validation {entry['accuracy']:.2%}",
        ]
        if "projected_accuracy" in entry:
            parts.append(f"if projected {entry['projected_accuracy']:.2%}")
        if "primal" in entry:
            parts.append(
                f"primal {entry['primal']:.3f} dual {entry['dual']:.3f} rho {entry['rho']:.2g}"
            )
        if "density" in entry:
            parts.append(f"density {entry['density']:.2%}")
        if "flip_rate" in entry:
            parts.append(f"SAD {entry['sad']:,} flips {entry['flip_rate']:.3%}")
        self.console.print("  ".join(parts), highlight=False)
