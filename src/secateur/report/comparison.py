"""A comparison (docs/compare.md) as a self-contained page and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape as plain_markup
from rich.table import Table

from secateur.cost.energy import CAVEAT
from secateur.files import atomic
from secateur.report import numbers
from secateur.report.charts import Mark, scatter_chart
from secateur.report.elements import document, facts, figure, swatch, table

_COLOURS = 5
TIME = "time on "
"""What the name of a cost begins with that is a modelled time."""

_TITLES = {
    "weights": "Weights that are not zero",
    "bits": "Bits of weights and indices",
    "file": "Packed file, whole",
    "macs": "MACs (zeros that are left are multiplied)",
    "bops": "BOPs (MACs x weight bits x activation bits)",
    "energy": "Energy of one inference, modelled",
    "energy if zeros are skipped": "Energy if zeros are skipped, modelled",
}

_SHOWN = ("weights", "bits", "file", "macs", "bops")
"""Costs that a terminal has room for."""

_WIDE = 110
"""Columns of a terminal from which on it has room for what is pruned and for losses, too."""


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a comparison."""
    parts = (_headline, _verdicts, _charts, _table, _origin)
    return document(
        f"{_names(report)} – secateur comparison", "".join(part(report) for part in parts)
    )


def print_comparison(report: Mapping[str, Any], console: Console) -> None:
    """Print what each recipe reached and costs, the verdicts, and what failed."""
    shown = Table(title=f"means of {_seeds(report)}", title_justify="left", box=None)
    wide = console.width >= _WIDE
    for text in ("recipe", "prunes") if wide else ("recipe",):
        shown.add_column(text, overflow="fold")
    for number in ("test accuracy", *(("validation loss",) if wide else ()), *_SHOWN):
        shown.add_column(number, justify="right", no_wrap=True)
    for each in _entries(report):
        costs = (writer(name)(each["costs"][name]["mean"]) for name in _SHOWN)
        name, form = map(plain_markup, (each["name"], each["form"]))
        words = (name, form, _accuracy(each), _loss(each)) if wide else (name, _accuracy(each))
        shown.add_row(*words, *costs)
    console.print()
    console.print(shown)
    for verdict in report["verdicts"]:
        console.print(f"\n[bold]{plain_markup(verdict['platform'])}[/bold]", highlight=False)
        console.print(verdict["about"], highlight=False, markup=False, style="dim")
        console.print(verdict["text"], highlight=False, markup=False)
    for note in report["notes"]:
        console.print(f"\nnote: {note}", style="yellow", markup=False)
    for name, reason in report["failed"].items():
        console.print(f"\n{name} failed: {reason}", style="red", markup=False)


def writer(cost: str) -> Callable[[float], str]:
    """Return how values of a cost are written."""
    if cost == "file":
        return numbers.size
    if cost.startswith("energy"):
        return lambda joules: numbers.small(joules, "J")
    if cost.startswith(TIME):
        return lambda seconds: numbers.small(seconds, "s")
    return numbers.count


def _headline(report: Mapping[str, Any]) -> str:
    made = f"secateur {report['secateur']}, {report['created']}, {_seeds(report)}"
    epochs = sorted({each["epochs"] for each in report["recipes"]})
    trained = f"{epochs[0]} epochs each, dense training included"
    if not report["equal_epochs"]:
        trained = f"not trained equally long: {epochs[0]} to {epochs[-1]} epochs"
    failed = (f"{name} failed: {reason}" for name, reason in report["failed"].items())
    items = "".join(f"<li>{escape(line)}</li>" for line in (*report["notes"], *failed))
    return (
        f'<header><h1>{escape(_names(report))}</h1><p class="soft">{escape(made)}; '
        f"{escape(trained)}</p></header><ul>{items}</ul>"
    )


def _verdicts(report: Mapping[str, Any]) -> str:
    cards = "".join(
        f"<section><h3>{escape(each['platform'])}</h3>"
        f'<p class="soft">{escape(each["about"])}</p><p>{escape(each["text"])}</p></section>'
        for each in report["verdicts"]
    )
    margin = f"{100 * report['margin']:g}"
    return (
        "<h2>Does pruning pay?</h2>"
        f'<p class="soft">Equal accuracy: at most {margin} points of mean validation accuracy '
        "below the dense network of the same seed. Losses and speed-ups are mean ± standard "
        "deviation over seeds. Speed-ups are against dense at equal bits, unless said otherwise."
        f'</p><div class="cards">{cards}</div>'
    )


def _charts(report: Mapping[str, Any]) -> str:
    entries = _entries(report)
    names = [each["name"] for each in entries]
    keys = "".join(
        f"<li>{swatch(_colour(at))}{at or ''} {escape(name)}</li>" for at, name in enumerate(names)
    )
    figures = []
    for cost, front in report["fronts"].items():
        if min(each["costs"][cost]["mean"] for each in entries) <= 0:
            continue  # nothing of it is left somewhere, which no logarithmic axis shows
        marks = [_mark(at, each, cost) for at, each in enumerate(entries)]
        title = _TITLES.get(cost, f"{cost.capitalize()}, modelled")
        chart = scatter_chart(
            title,
            marks,
            [names.index(name) for name in front],
            writer(cost),
            lambda share: numbers.percent(share, 1),
        )
        figures.append(figure(escape(title), chart))
    return (
        "<h2>Accuracy against each cost</h2>"
        '<p class="soft">Test accuracy, means over seeds with their standard deviations. The '
        "dashed line is the Pareto front: the highest accuracy that is to be had at each cost. "
        f'Energy: {escape(CAVEAT)}</p><ul class="keys">{keys}</ul>'
        f'<div class="charts">{"".join(figures)}</div>'
    )


def _mark(at: int, each: Mapping[str, Any], cost: str) -> Mark:
    spent, accuracy = each["costs"][cost], each["accuracy"]
    spread = (spent["deviation"], accuracy["deviation"])
    label = str(at) if at else "dense"
    return Mark(label, each["name"], spent["mean"], accuracy["mean"], spread, _colour(at))


def _colour(at: int) -> int:
    """Return the colour class of an entry; the dense network, which is the first, has ink."""
    return (at - 1) % _COLOURS + 1 if at else 0


def _table(report: Mapping[str, Any]) -> str:
    costs = list(report["dense"]["costs"])
    head = ("recipe", "prunes", "epochs", "test accuracy", "validation loss, points", *costs)
    rows = [
        [
            each["name"] if not at else f"{at} {each['name']}",
            each["form"],
            str(each.get("epochs", "")),
            _accuracy(each),
            _loss(each),
            *(_spread(each["costs"][cost], writer(cost)) for cost in costs),
        ]
        for at, each in enumerate(_entries(report))
    ]
    return f"<h2>All figures</h2>{table(head, rows, numeric=range(2, len(head)))}"


def _origin(report: Mapping[str, Any]) -> str:
    rows = [(escape(key), escape(str(value))) for key, value in report["environment"].items()]
    recipes = "".join(
        f"<details><summary>{escape(each['name'])}</summary><pre>"
        f"{escape(yaml.safe_dump(each['recipe'], sort_keys=False, allow_unicode=True))}"
        "</pre></details>"
        for each in report["recipes"]
    )
    return (
        "<h2>How it was made</h2><details><summary>Environment of the first run</summary>"
        f"{facts(rows)}</details>{recipes}"
    )


def _entries(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [report["dense"], *report["recipes"]]


def _names(report: Mapping[str, Any]) -> str:
    return " / ".join(each["name"] for each in report["recipes"])


def _seeds(report: Mapping[str, Any]) -> str:
    seeds: Sequence[int] = report["seeds"]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _accuracy(each: Mapping[str, Any]) -> str:
    return _spread(each["accuracy"], numbers.percent)


def _loss(each: Mapping[str, Any]) -> str:
    return _spread(each["loss"], lambda share: f"{100 * share:.2f}".replace("-", "−"))


def _spread(figures: Mapping[str, Any], write: Callable[[float], str]) -> str:
    """Write a mean, with its deviation if there is more than one value and they differ."""
    if not figures["deviation"]:
        return write(figures["mean"])
    return f"{write(figures['mean'])} ± {write(figures['deviation']).removesuffix(' %')}"
