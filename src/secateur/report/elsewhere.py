"""The sections of the page of a report about other machines: encodings, platforms, energy."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from secateur.report import storage
from secateur.report.charts import Bar, bar_chart
from secateur.report.elements import figure, legend, table
from secateur.report.modelled import ENERGY, PLATFORMS, energy_rows, platform_rows


def encodings(report: Mapping[str, Any]) -> str:
    """Return what the weights take as platforms encode them."""
    total = storage.of_report(report)
    bars, rows = [], []
    for name, bits in storage.with_bound(total).items():
        cells, refused = storage.row(name, bits, total), total["refused"].get(name, 0)
        rows.append([*cells, f"{refused} layers as none" if refused else ""])
        if not refused:
            parts = [bits[kind] for kind in ("values", "index", "metadata")]
            bars.append(Bar(name, parts, f"{cells[4]}, {cells[5]}"))
    chart = bar_chart("Bits of all weights by encoding", bars)
    caption = f"Bits of all weights {legend(storage.COLUMNS[1:4])}"
    return (
        "<h2>Weights, as platforms encode them</h2>"
        '<p class="soft">Weights only, as in the second accounting. Layers that an encoding '
        "refuses count as none. The entropy bound is for a code that knows only how many weights "
        "are zero and how often each value occurs.</p>"
        f'<div class="charts">{figure(caption, chart)}</div>'
        + table((*storage.COLUMNS, "refused"), rows, numeric=range(1, len(storage.COLUMNS)))
    )


def platforms(report: Mapping[str, Any]) -> str:
    """Return what compression pays on each platform."""
    rows = platform_rows(report["platforms"])
    words = "".join(f"<li>{escape(each['text'])}</li>" for each in report["platforms"])
    return (
        "<h2>Time on machines that are not here</h2>"
        '<p class="soft">One inference, modelled from peaks and bandwidths, not measured.</p>'
        f"{table(PLATFORMS, rows, numeric=range(1, 6))}<ul>{words}</ul>"
    )


def energy(report: Mapping[str, Any]) -> str:
    """Return the modelled energy of one inference."""
    found = report["energy"]
    return (
        f"<h2>Energy of one inference, {escape(found['node'])}</h2>"
        f'<p class="soft">{escape(found["caveat"])}</p>'
        + table(ENERGY, energy_rows(found), numeric=range(1, len(ENERGY)))
    )
