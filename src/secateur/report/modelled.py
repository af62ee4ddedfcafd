"""What models of machines say, as tables in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from secateur.cost.energy import Energy
from secateur.cost.platforms import Platform, Timing
from secateur.report import numbers


def timing_table(platform: Platform, timing: Timing) -> Group:
    """Return how long each layer takes on a platform, and what it waits for."""
    table = _table(f"one inference on {platform.name} (modelled)", "layer", "run as", "waits for")
    for column in ("arithmetic", "memory", "time", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in timing.layers:
        seconds = (layer.compute_seconds, layer.memory_seconds, layer.seconds)
        table.add_row(
            *map(escape, (layer.name or "(model)", layer.run_as, layer.bound)),
            *(numbers.small(each, "s") for each in seconds),
            _share(layer.seconds, timing.seconds),
        )
    table.add_section()
    total = numbers.small(timing.seconds, "s")
    table.add_row("total", "", timing.bound, "", "", total, "", style="bold")
    return Group(table, Text(f"{platform.summary}. {platform.source}", style="dim"))


def energy_table(energy: Energy) -> Group:
    """Return the joules of each layer and of what they are spent on, with the caveat."""
    table = _table(f"energy of one inference, {energy.node} (modelled)", "layer")
    for column in ("arithmetic", "weights", "activations", "joules", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in energy.layers:
        joules = (layer.compute, layer.weights, layer.activations, layer.joules)
        table.add_row(
            escape(layer.name or "(model)"),
            *(numbers.small(each, "J") for each in joules),
            _share(layer.joules, energy.joules),
        )
    table.add_section()
    total = energy.total
    sums = (total.compute, total.weights, total.activations, total.joules)
    table.add_row("total", *(numbers.small(each, "J") for each in sums), "", style="bold")
    zeros = "skipped" if energy.skip_zeros else "multiplied like any other weight"
    note = (
        f"Weights in {_memory(energy.weights_in)}, activations in "
        f"{_memory(energy.activations_in)}; zeros are {zeros}."
    )
    return Group(table, Text(note), Text(energy.caveat, style="yellow"))


def _table(title: str, *texts: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None)
    for text in texts:
        table.add_column(text, overflow="fold")
    return table


def _share(part: float, whole: float) -> str:
    return numbers.percent(part / whole, 1) if whole else "–"


def _memory(home: int | None) -> str:
    return "DRAM" if home is None else f"{home // 1024:,} KiB of SRAM"
