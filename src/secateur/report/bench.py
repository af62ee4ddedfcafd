"""How fast a network runs beside another, in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from secateur.measure import RUNTIMES, Agreement, Bench, Spread
from secateur.report import numbers


def bench_table(found: Bench, network: str, against: str) -> Group:
    """Return a table of all figures, with how they were measured."""
    table = Table(
        *("runtime", "batch"),
        *(escape(network), "p10–p90", escape(against), "p10–p90"),
        *("speed-up", "p10–p90", "over the fastest"),
        box=None,
        padding=(0, 2, 0, 0),
    )
    for figure in found.figures:
        best = found.fastest[figure.batch] == figure.runtime
        table.add_row(
            RUNTIMES[figure.runtime].title,
            str(figure.batch),
            *_time(figure.seconds),
            *_time(figure.against),
            numbers.times(figure.speedup.median),
            f"{numbers.significant(figure.speedup.low)}–{numbers.times(figure.speedup.high)}",
            numbers.times(figure.speedup_over_fastest.median),
            style="bold" if best else "",
        )
    lines: list[RenderableType] = [table, ""]
    for batch, name in found.fastest.items():
        lines.append(Text(f"fastest at batch {batch}: {RUNTIMES[name].title}"))
    versions = ", ".join(f"{RUNTIMES[n].title} {version}" for n, version in found.versions.items())
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    lines.append(
        Text(
            f"{found.machine}, {versions}, {threads}, {found.clock}; medians of {found.rounds} "
            "rounds or more, in each of which everything of a batch size ran"
        )
    )
    if found.discarded:
        lines.append(Text(f"{found.discarded} sittings do not count: other programs ran meanwhile"))
    names = {"network": network, "against": against}
    lines += [_agreement(names[role], each) for role, each in found.agreement.items()]
    for name, install in found.missing.items():
        lines.append(Text(f"{RUNTIMES[name].title} is not here: {install}", style="yellow"))
    return Group(*lines)


def _agreement(name: str, found: Agreement) -> Text:
    """Say how near to each other the runtimes compute a file."""
    apart = f"{numbers.scientific(found.difference)} of the largest output, on random inputs"
    if found.met:
        return Text(f"{name}: the runtimes agree to {apart}")
    return Text(
        f"{name}: the runtimes differ by {apart}, more than the {found.tolerance:g} that order and "
        "rounding explain: one may be wrong. Compare their accuracy before the faster is chosen",
        style="yellow",
    )


def _time(seconds: Spread) -> tuple[str, str]:
    """Write a median, and the range around it in the same unit."""
    low, high = (numbers.small(value, "s") for value in (seconds.low, seconds.high))
    return numbers.small(seconds.median, "s"), f"{low}–{high}"
