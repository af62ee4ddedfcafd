"""What weights take under each encoding, and when structure pays, as tables and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from secateur.cost import break_even, index_bits
from secateur.report import charts, numbers

COLUMNS = ("encoding", "values", "index", "other", "size", "smaller", "per kept")
"""What the columns of :func:`row` are: bits by kind, bytes, and bits per kept weight."""

BOUND = "entropy bound"
"""What tables call the bound."""

RATIOS = [10 ** (exponent / 20) for exponent in range(6, 61)]  # 2x ... 1000x


def storage_tables(storage: Mapping[str, Any], title: str = "all weights") -> Group:
    """Return terminal tables of ``StorageTable.to_dict()``: each layer without the encodings that
    refuse it, then all of them."""
    parts: list[RenderableType] = []
    for layer in storage["layers"]:
        kept = f"{layer['nonzeros']:,} of {layer['weights']:,} kept"
        shape, bits = numbers.shape(layer["shape"]), numbers.bits(layer["bits"])
        table = _table(layer, f"{layer['name']}, {shape}, {bits} bits, {kept}")
        parts += [table, ""]
    return Group(*parts, encoding_table(storage["total"], title))


def encoding_table(total: Mapping[str, Any], title: str) -> Table:
    """Return a terminal table of ``StorageTable.to_dict()["total"]``."""
    stored_dense = {name: f"{name} *" for name, layers in total["refused"].items() if layers}
    encodings = {stored_dense.get(name, name): x for name, x in total["encodings"].items()}
    table = _table({**total, "encodings": encodings, "refused": ()}, title)
    table.caption = (
        f"bits, and bits per kept weight: {total['nonzeros']:,} of {total['weights']:,}; "
        f"smaller than {numbers.size(total['dense'] / 8)}, all in their dtype"
    )
    if stored_dense:
        table.caption += "\n* layers that cannot be encoded so are stored as none"
    return table


def break_even_chart(
    encoding: str = "relative_escape", widths: Sequence[int] = (1, 2, 4, 8, 32)
) -> str:
    """Return an SVG file: the structured ratio that ties, over the ratio without structure.

    Args:
        encoding: of the index; one that has a closed form for a random support.
        widths: bits of a value, one line each, at most five.

    Raises:
        SecateurError: the encoding is unknown or has no closed form.
    """
    curves = [
        charts.Curve(
            label=f"{bits} bit",
            points=[
                (ratio, break_even(ratio, bits, index_bits(ratio, encoding, bits)))
                for ratio in RATIOS
            ],
            colour=colour,
        )
        for colour, bits in enumerate(widths, start=1)
    ]
    title = f"Structured ratio needed to tie, index by {encoding}"
    across = "weights per non-zero without structure"
    return charts.standalone(charts.curve_chart(title, across, curves, numbers.ratio))


def of_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`encoding_table` takes of a report: dense is the network before."""
    storage = report["storage"]
    return {
        "weights": storage["weights"]["dense"],
        "nonzeros": storage["weights"]["kept"],
        "dense": storage["bits"]["dense"],
        "encodings": storage["encodings"],
        "refused": {name: bits["layers_refused"] for name, bits in storage["encodings"].items()},
        "bound": storage["bound"],
    }


def with_bound(storage: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the bits by kind of each encoding, and of the entropy bound."""
    bound = storage["bound"]
    return {**storage["encodings"], BOUND: {**bound, "index": bound["support"], "metadata": 0.0}}


def row(name: str, bits: Mapping[str, float], storage: Mapping[str, Any]) -> list[str]:
    """Write an encoding under the heads of :data:`COLUMNS`."""
    kept = storage["nonzeros"]
    return [
        name,
        *(f"{bits[kind]:,.0f}" for kind in ("values", "index", "metadata")),
        numbers.size(bits["total"] / 8),
        numbers.times(storage["dense"] / bits["total"] if bits["total"] else None),
        f"{bits['total'] / kept:.2f}" if kept else "–",
    ]


def _table(storage: Mapping[str, Any], title: str) -> Table:
    """Return the encodings that do not refuse, and the bound."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None)
    table.caption_justify = "left"
    table.add_column(COLUMNS[0], no_wrap=True)
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, bits in with_bound(storage).items():
        if name not in storage["refused"]:
            table.add_row(*map(escape, row(name, bits, storage)))
    return table
