"""What weights take under each encoding, and when structure pays, as tables and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from secateur.cost import break_even, index_bits
from secateur.report import charts, numbers

RATIOS = [10 ** (exponent / 20) for exponent in range(6, 61)]  # 2x ... 1000x


def storage_tables(storage: Mapping[str, Any], title: str = "storage") -> Group:
    """Return terminal tables of ``StorageTable.to_dict()``: all layers under each encoding, and
    each layer under the shortest."""
    return Group(_by_encoding(storage["total"], title), "", _by_layer(storage["layers"]))


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


def _by_encoding(total: Mapping[str, Any], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None)
    table.add_column("encoding", no_wrap=True)
    columns = ("values", "index", "other", "size", "smaller", "per kept")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    rows = {**total["encodings"], "entropy bound": _as_storage(total["bound"])}
    for name, bits in rows.items():
        refused = total["refused"].get(name, 0)
        table.add_row(
            escape(name) + (" *" if refused else ""),
            *(f"{bits[kind]:,.0f}" for kind in ("values", "index", "metadata")),
            numbers.size(bits["total"] / 8),
            numbers.times(total["dense"] / bits["total"]) if bits["total"] else "",
            f"{bits['total'] / total['nonzeros']:.2f}" if total["nonzeros"] else "",
        )
    table.caption_justify = "left"
    table.caption = (
        f"bits, and bits per kept weight: {total['nonzeros']:,} of {total['weights']:,}; "
        f"smaller than {numbers.size(total['dense'] / 8)}, all in their dtype"
    )
    if any(total["refused"].values()):
        table.caption += "\n* layers that cannot be encoded so are stored as none"
    return table


def _by_layer(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="layers", title_justify="left", title_style="bold", box=None)
    for column in ("layer", "shape"):
        table.add_column(column, overflow="fold")
    for column in ("weights", "kept", "bits", "entropy bound", "shortest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("encoding", overflow="fold")
    for layer in layers:
        usable = {
            name: bits["total"]
            for name, bits in layer["encodings"].items()
            if name not in layer["refused"]
        }
        best = min(usable, key=lambda name: usable[name], default=None)
        table.add_row(
            escape(layer["name"]),
            numbers.shape(layer["shape"]),
            f"{layer['weights']:,}",
            f"{layer['nonzeros']:,}",
            numbers.bits(layer["bits"]),
            numbers.size(layer["bound"]["total"] / 8),
            numbers.size(usable[best] / 8) if best else "",
            escape(best or "none of these"),
        )
    return table


def _as_storage(bound: Mapping[str, float]) -> dict[str, float]:
    return {**bound, "index": bound["support"], "metadata": 0.0}
