"""Reports and costs as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from secateur.report import numbers, runtimes
from secateur.report.modelled import assessment_table, energy_summary
from secateur.report.storage import encoding_table, of_report

if TYPE_CHECKING:
    from secateur.cost import Cost


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a report (docs/report.md): headline, accountings, accuracy with parity, layers, and
    what the network takes elsewhere."""
    console.print("", _headline(report))
    for part in (
        _accountings(report),
        _accuracies(report),
        *_runtimes(report),
        _layers(report),
        encoding_table(of_report(report), "weights, as platforms encode them"),
        assessment_table(report["platforms"], "dense against compressed"),
        energy_summary(report["energy"]),
    ):
        console.print("", part)
    if found := report["parity"].get("saturation"):
        console.print(numbers.saturation(found), markup=False)
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False)


def cost_table(cost: Cost, title: str = "cost") -> Group:
    """Return the cost of each layer and of the whole, and which operations it leaves out."""
    figures = ("parameters", "MACs", "BOPs", "bytes")
    table = _table(title, "layer", "kind", "shape", "bits", numeric=figures)
    for layer in cost.layers:
        table.add_row(
            *map(escape, (layer.name or "(model)", layer.kind, numbers.shape(layer.shape))),
            f"{layer.weight_bits}/{layer.activation_bits}",
            *(f"{getattr(layer, figure.lower()):,.0f}" for figure in figures),
        )
    table.add_section()
    totals = (f"{getattr(cost, figure.lower()):,.0f}" for figure in figures)
    table.add_row("total", "", "", "", *totals, style="bold")
    if not cost.uncounted:
        return Group(table)
    names = ", ".join(cost.uncounted)
    return Group(table, Text(f"Not counted, for want of a formula: {names}", style="yellow"))


def _headline(report: Mapping[str, Any]) -> Text:
    accuracy, ratio, file = report["accuracy"], report["ratio"], report["storage"]["file"]
    return Text.assemble(
        (f"{report['name']}: ", "bold"),
        (f"{numbers.times(ratio['file'])} smaller file", "bold green"),
        f" ({numbers.size(file['dense'])} -> {numbers.size(file['packed'])}), test accuracy ",
        (f"{numbers.percent(accuracy['dense'])} -> ", ""),
        (numbers.percent(accuracy["compressed"]), "bold green"),
        f" in {numbers.duration(report['seconds'])}",
    )


def _accountings(report: Mapping[str, Any]) -> Table:
    ratio, storage, cost = report["ratio"], report["storage"], report["cost"]
    weights, bits, file = storage["weights"], storage["bits"], storage["file"]
    apart = ", ".join(f"{kind} {bits[kind]:,}" for kind in ("values", "index", "metadata"))
    compressed_bits = sum(bits[kind] for kind in ("values", "index", "metadata"))
    table = _table("what became smaller", "accounting", numeric=("dense", "compressed", "ratio"))
    table.add_column("made of")
    rows = [
        ("weights", f"{weights['dense']:,}", f"{weights['kept']:,}", "weights", "non-zeros"),
        ("bits of these", f"{bits['dense']:,}", f"{compressed_bits:,}", "bits", apart),
        ("whole file", *map(numbers.size, (file["dense"], file["packed"])), "file", "all of it"),
    ]
    skipped = f"{numbers.count(cost['compressed']['effective_macs'])} if zeros are skipped"
    for label, key, note in (("MACs", "macs", skipped), ("BOPs", "bops", "")):
        pair = (numbers.count(cost[network][key]) for network in ("dense", "compressed"))
        rows.append((label, *pair, key, note))
    for label, before, after, key, note in rows:
        table.add_row(label, before, after, numbers.times(ratio[key]), note)
    return table


def _accuracies(report: Mapping[str, Any]) -> Table:
    accuracy, parity = report["accuracy"], report["parity"]
    table = _table(
        f"accuracy and parity on {parity['samples']:,} test samples",
        "network",
        numeric=("test accuracy", "points", "logits differ by", "same class"),
    )
    for name in ("dense", "compressed", "decoded", "onnx"):
        if accuracy[name] is None:
            continue
        checked = name in ("decoded", "onnx")
        table.add_row(
            name,
            numbers.percent(accuracy[name]),
            "" if name == "dense" else numbers.points(accuracy[name] - accuracy["dense"]),
            numbers.scientific(parity[name]) if checked else "",
            numbers.percent(parity["agreement"][name]) if checked else "",
        )
    return table


def _runtimes(report: Mapping[str, Any]) -> list[Table]:
    """Return the table of runtimes, if the network was exported."""
    table = _table(runtimes.TITLE, runtimes.HEAD[0], numeric=runtimes.HEAD[1:])
    for row in runtimes.rows(report):
        table.add_row(*map(escape, row))
    return [table] if table.row_count else []


def _layers(report: Mapping[str, Any]) -> Table:
    table = _table(
        "layers", "layer", "shape", "set", numeric=("weights", "kept", "density", "bits", "MACs")
    )
    for layer in report["layers"]:
        note = f" ({layer['note']})" if layer["note"] else ""
        table.add_row(
            *map(escape, (layer["name"], numbers.shapes(layer), layer["set"] + note)),
            f"{layer['weights']:,}",
            f"{layer['kept']:,}",
            numbers.percent(layer["density"]),
            numbers.layer_bits(layer),
            numbers.count(layer["compressed_macs"]),
        )
    return table


def _table(title: str, *texts: str, numeric: tuple[str, ...]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None)
    for text in texts:
        table.add_column(text, overflow="fold")
    for number in numeric:
        table.add_column(number, justify="right", no_wrap=True)
    return table
