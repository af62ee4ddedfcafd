"""What models of machines say, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from secateur.cost.energy import Energy
from secateur.cost.meter import Measured
from secateur.cost.platforms import Platform, Timing
from secateur.report import numbers

PLATFORMS = ("platform", "dense", "time", "faster", "by size and bits", "by zeros", "waits for")
"""What the columns of :func:`platform_rows` are."""

ENERGY = ("network", "arithmetic", "weights", "activations", "joules", "less")
"""What the columns of :func:`energy_rows` are."""

_JOULES = ("compute", "weights", "activations", "joules")
_NETWORKS = {
    "dense": "dense",
    "compressed": "compressed",
    "zeros_skipped": "compressed, zeros skipped",
}


def platform_rows(assessments: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Write what compression pays, a row for each platform (``Assessment.to_dict``)."""
    return [
        [
            each["platform"],
            *(_seconds(each["seconds"][network]) for network in ("dense", "compressed")),
            *(numbers.times(each["speedup"][by]) for by in ("whole", "size", "zeros")),
            each["waits_for"],
        ]
        for each in assessments
    ]


def energy_rows(energy: Mapping[str, Any]) -> list[list[str]]:
    """Write the energy of a report (docs/report.md), a row for each network."""
    return [
        [
            label,
            *(numbers.small(energy[network][part], "J") for part in _JOULES),
            numbers.times(energy["dense"]["joules"] / energy[network]["joules"]),
        ]
        for network, label in _NETWORKS.items()
    ]


def platform_list(platforms: Sequence[Platform]) -> Group:
    """Return what platforms are: peak, bandwidth, which zeros they skip, and their sources."""
    table = _table("platforms (modelled)", "name", "peak", "memory", "skips zeros")
    for each in platforms:
        skips = ", ".join(each.skips) or "nowhere"
        table.add_row(*map(escape, (each.name, _peak(each), _bandwidth(each), skips)))
    sources = (Text(f"{x.name}: {x.summary}. {x.source}", style="dim") for x in platforms)
    return Group(table, "", *sources)


def assessment_table(assessments: Sequence[Mapping[str, Any]], title: str) -> Group:
    """Return what compression pays by platform (``Assessment.to_dict``), and that in words."""
    table = _table(f"{title}: one inference (modelled)", PLATFORMS[0])
    for column in PLATFORMS[1:]:
        table.add_column(column, justify="right")
    for row in platform_rows(assessments):
        table.add_row(*map(escape, row))
    return Group(table, *(Text(each["text"]) for each in assessments))


def energy_summary(energy: Mapping[str, Any]) -> Group:
    """Return the energy of a report: dense, compressed, and with zeros skipped."""
    table = _table(f"energy of one inference, {energy['node']} (modelled)", ENERGY[0])
    for column in ENERGY[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in energy_rows(energy):
        table.add_row(*row)
    return Group(table, Text(energy["caveat"], style="yellow"))


def measured_text(measured: Measured) -> Text:
    """Return what counters saw, in words."""
    dynamic, total = (
        numbers.small(each, "J") for each in (measured.dynamic_joules, measured.total_joules)
    )
    return Text(
        f"Measured on {', '.join(measured.counters)}, {measured.calls:,} inferences of "
        f"{numbers.small(measured.seconds, 's')}: {dynamic} each above idle power, {total} with it "
        f"({measured.idle_watts:.1f} W idle, {measured.run_watts:.1f} W running)."
    )


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
        table.add_row(
            escape(layer.name or "(model)"),
            *(numbers.small(getattr(layer, part), "J") for part in _JOULES),
            _share(layer.joules, energy.joules),
        )
    table.add_section()
    sums = (numbers.small(getattr(energy.total, part), "J") for part in _JOULES)
    table.add_row("total", *sums, "", style="bold")
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


def _peak(platform: Platform) -> str:
    rates = platform.compute.macs_per_second
    if rates is None:
        return f"{numbers.count(platform.compute.bops_per_second or 0)}BOP/s"
    return "\n".join(f"{numbers.count(rates[bits])}MAC/s at {bits} bits" for bits in sorted(rates))


def _bandwidth(platform: Platform) -> str:
    memory = platform.memory
    held = f"\n{numbers.size(memory.on_chip_bytes)} on chip" if memory.on_chip_bytes else ""
    return f"{numbers.size(memory.bytes_per_second)}/s{held}"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else numbers.small(seconds, "s")


def _share(part: float, whole: float) -> str:
    return numbers.percent(part / whole, 1) if whole else "–"


def _memory(home: int | None) -> str:
    return "DRAM" if home is None else f"{home // 1024:,} KiB of SRAM"
