"""What pruning pays on this machine, from layers that were timed on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.comparison.figures import Seed
from secateur.comparison.verdict import Pruning, uncut
from secateur.cost.platforms import first_paying
from secateur.cost.workload import LayerWork
from secateur.files import atomic
from secateur.measure import BreakEven, breakeven
from secateur.task import Task

ANYWHERE = ("csr", "scipy")
"""Forms that run zeros in any place; the fastest counts."""

SMALLER = "smaller"


@dataclass(frozen=True)
class Here:
    """This machine. Layers are 32 bits wide; what else a network does takes no time here."""

    found: BreakEven
    name: str = "here"

    @property
    def about(self) -> str:
        """What was measured, and what disturbed it."""
        found = self.found
        threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
        busy = "; other programs were busy meanwhile" if found.load.busy else ""
        return f"Measured: {found.machine}, {threads}, layers of 32 bits at batch 1{busy}."

    def speedup(self, form: Pruning, seed: Seed) -> float:
        """Return the gain of smaller layers; or of sparse ones, where zeros are anywhere."""
        left = {layer.name: layer.weights for layer in seed.network}
        cut = {
            layer.name: 1 - left.get(layer.name, 0) / layer.weights for layer in self._timed(seed)
        }
        smaller = self.found.speedup(SMALLER, cut)
        return smaller if form == "structured" else max(smaller, self.by_zeros(seed))

    def by_zeros(self, seed: Seed) -> float:
        """Return the gain of the fastest sparse form."""
        return self._sparse(uncut(seed))

    def needed(self, seed: Seed) -> float | None:
        """Return the sparsity from which a sparse form pays, layers as sparse as in proportion."""
        return first_paying(self._sparse, seed.dense, uncut(seed))

    def with_levels(self, seed: Seed) -> None:
        """Return None: integers narrower than 8 bits have no kernels here."""

    def _sparse(self, network: Sequence[LayerWork]) -> float:
        timed = {name for layer in self.found.layers for name in layer.names}
        sparsity = {layer.name: 1 - layer.density for layer in network if layer.name in timed}
        forms = [form for form in ANYWHERE if form in self.found.forms]
        return max(self.found.speedup(form, sparsity) for form in forms)

    def _timed(self, seed: Seed) -> list[LayerWork]:
        timed = {name for layer in self.found.layers for name in layer.names}
        return [layer for layer in seed.dense if layer.name in timed]


def measured(task: Task, seconds: float, path: Path) -> Here:
    """Return what the file says, or else measure and write the file.

    Args:
        task: whose model is timed, one sample at a time.
        seconds: to spend on timing.
        path: of the file.

    Raises:
        SecateurError: the model has no layer that could be timed, or the file is of another form.
    """
    if path.exists():
        return Here(BreakEven.from_dict(json.loads(path.read_text(encoding="utf-8"))))
    found = breakeven(task.model, task.example_input, seconds=seconds)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")
    return Here(found)
