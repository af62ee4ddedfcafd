"""From which sparsity each form pays on this machine, in a terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape as plain
from rich.table import Table
from rich.text import Text

from secateur.files import atomic
from secateur.measure import DENSITIES, BreakEven, Layer
from secateur.report import charts, elements, numbers

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
"""Where the tables show the curve."""

_Row = tuple[str, ...]


def breakeven_tables(found: BreakEven, title: str) -> Group:
    """Return tables of the whole model and of its layers, with what they leave out."""
    parts: list[RenderableType] = [
        _table(f"{title}: speed-up over dense (pruning rate / speed-up)", *_network(found)),
        "",
        _table("layers: sparsity from which a form is faster than dense", *_layers(found)),
        "",
        *(Text(f"{name}: {about}", style="dim") for name, about in found.forms.items()),
        Text(_how(found)),
        *(Text(line, style="yellow") for line in _notes(found)),
    ]
    return Group(*parts)


def write_page(found: BreakEven, title: str, path: Path) -> None:
    """Write one self-contained page, whole or not at all."""
    notes = "".join(f"<p>{escape(line)}</p>" for line in _notes(found))
    forms = elements.facts((escape(name), escape(about)) for name, about in found.forms.items())
    body = (
        f"<header><h1>{escape(title)}: where sparsity starts to pay</h1>"
        f'<p class="soft">{escape(_how(found))}</p></header>{notes}'
        f"<h2>Whole network: speed-up over dense (pruning rate / speed-up)</h2>"
        f'<figure style="max-width: 640px">{_chart(found)}</figure>'
        f"{_html_table(*_network(found))}"
        f"<h2>Layers: sparsity from which a form is faster than dense</h2>"
        f"{_html_table(*_layers(found))}"
        f"<h2>Forms</h2><details open><summary>what ran</summary>{forms}</details>"
    )
    with atomic(path) as temporary:
        page = elements.document(f"{title} – secateur breakeven", body)
        temporary.write_text(page, encoding="utf-8")


def _network(found: BreakEven) -> tuple[_Row, list[_Row]]:
    """Return the head and the rows of the table of the whole model, one row a form."""
    head = ("form", "starts to pay", *(numbers.percent(at, 0) for at in SPARSITIES), "of the time")
    rows = []
    for form in found.forms:
        points = [layer.curves[form] for layer in found.layers if form in layer.curves]
        if all(len(curve) == 1 for curve in points):  # not a form that prunes
            cells = [numbers.times(found.speedup(form, 0.0)) if points else "–"]
            cells += [""] * (len(SPARSITIES) - 1)
        else:
            cells = [_speedup(found, form, at) for at in SPARSITIES]
        share = numbers.percent(found.covered(form), 0)
        rows.append((form, _pays(found.starts_to_pay(form)), *cells, share))
    return head, rows


def _speedup(found: BreakEven, form: str, sparsity: float) -> str:
    """Write a speed-up with its pruning-to-performance ratio: ``2.22x (1.80)``."""
    ppr = numbers.significant(found.ppr(form, sparsity))
    return f"{numbers.times(found.speedup(form, sparsity))} ({ppr})"


def _layers(found: BreakEven) -> tuple[_Row, list[_Row]]:
    head = ("layer", "shape", "dense", "p10–p90", *found.forms)
    rows = []
    for layer in found.layers:
        more = len(layer.names) - 1
        spread = (numbers.small(value, "s") for value in (layer.low, layer.high))
        rows.append(
            (
                (layer.names[0] or "(model)") + (f" + {more}" if more else ""),
                layer.shape,
                numbers.small(layer.seconds, "s"),
                "–".join(spread),
                *(_cell(layer, form) for form in found.forms),
            )
        )
    return head, rows


def _cell(layer: Layer, form: str) -> str:
    return "–" if form in layer.missing else _pays(layer.starts_to_pay(form))


def _pays(sparsity: float | None) -> str:
    if sparsity is None:
        return "never"
    return "at once" if sparsity == 0 else numbers.percent(sparsity, 1)


def _how(found: BreakEven) -> str:
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    return (
        f"{found.machine}, torch {found.torch}, {threads}, {found.clock}; "
        f"medians of {found.rounds} rounds or more; all dense layers take "
        f"{numbers.small(found.seconds, 's')}"
    )


def _notes(found: BreakEven) -> list[str]:
    """Return what a reader must know: the load, the forms that layers lack, what was not timed."""
    notes = []
    if found.load.busy:
        notes.append(
            f"Other programs used {found.load.others:.1f} of {found.load.cores} cores meanwhile: "
            "figures may be off; repeat on a quiet machine."
        )
    for form in found.forms:
        reasons = dict.fromkeys(each.missing[form] for each in found.layers if form in each.missing)
        for reason in reasons:
            names = [each.names[0] for each in found.layers if each.missing.get(form) == reason]
            notes.append(f"{form} (–, stays dense): {', '.join(names)}: {reason}.")
    for other in found.untimed:
        size = "" if other.macs is None else f" ({numbers.count(other.macs)} MACs)"
        notes.append(f"Not timed: {other.operation}{size}.")
    return notes


def _chart(found: BreakEven) -> str:
    """Draw the speed-up of the model over its pruning rate, a line for each form that prunes."""
    curves = []
    for colour, form in enumerate(found.forms, start=1):
        if any(len(layer.curves.get(form, ())) > 1 for layer in found.layers):
            points = [(1 / density, found.speedup(form, 1 - density)) for density in DENSITIES]
            curves.append(charts.Curve(form, points, colour))
    if not curves:
        return ""
    curves.sort(key=lambda curve: curve.points[-1][1])
    return charts.curve_chart("Speed-up over dense", "weights per non-zero", curves, numbers.ratio)


def _table(title: str, head: _Row, rows: Iterable[_Row]) -> Table:
    table = Table(title=plain(title), title_justify="left", title_style="bold", box=None)
    for position, column in enumerate(head):
        text = column in ("layer", "shape", "form")
        table.add_column(
            column,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text or not position,
        )
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _html_table(head: _Row, rows: Sequence[_Row]) -> str:
    return elements.table(head, rows, range(1, len(head)))
