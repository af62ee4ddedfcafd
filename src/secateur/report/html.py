"""A report as one self-contained HTML page: no network, no scripts, no other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from secateur.files import atomic
from secateur.report import elsewhere, numbers, runtimes
from secateur.report.charts import Bar, Series, bar_chart, line_chart
from secateur.report.elements import document, facts, figure, legend, swatch, table

_KINDS = ("values", "index", "metadata")


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page for a report (docs/report.md) to ``path``, whole or not at all."""
    with atomic(Path(path)) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """Return the page for a report."""
    parts = (
        *(_headline, _accountings, _accuracy, _layers, _training),
        *(elsewhere.encodings, elsewhere.platforms, elsewhere.energy, _origin),
    )
    sections = "".join(part(report) for part in parts)
    return document(f"{report['name']} – secateur report", sections)


def _headline(report: Mapping[str, Any]) -> str:
    accuracy, ratio = report["accuracy"], report["ratio"]
    cost = report["cost"]
    skipped = numbers.times(cost["dense"]["macs"] / max(1, cost["compressed"]["effective_macs"]))
    change = numbers.points(accuracy["compressed"] - accuracy["dense"])
    tiles = [
        (numbers.times(ratio["file"]), "smaller file on disk"),
        (numbers.percent(accuracy["compressed"]), f"test accuracy, {change} points against dense"),
        (numbers.times(ratio["bops"]), "fewer BOPs (MACs x weight bits x activation bits)"),
        (
            numbers.times(ratio["macs"]),
            f"dense against compressed MACs; {skipped} if zeros are skipped",
        ),
    ]
    made = (
        f"secateur {report['secateur']}, {report['created']}, {numbers.duration(report['seconds'])}"
    )
    boxes = "".join(f'<div><b class="big">{big}</b>{label}</div>' for big, label in tiles)
    return (
        f'<header><h1>{escape(report["name"])}</h1><p class="soft">{escape(made)}</p></header>'
        f'<div class="tiles">{boxes}</div>'
    )


def _accountings(report: Mapping[str, Any]) -> str:
    ratio, storage = report["ratio"], report["storage"]
    weights, bits, file = storage["weights"], storage["bits"], storage["file"]
    total = sum(bits[kind] for kind in _KINDS)
    shares = "".join(
        f'<i class="c{number}" style="flex:{bits[kind]}"></i>'
        for number, kind in enumerate(_KINDS, start=1)
    )
    bit_rows = [("dense", f"{bits['dense']:,}")]
    bit_rows += [
        (f"{swatch(number)}{kind}", f"{bits[kind]:,}")
        for number, kind in enumerate(_KINDS, start=1)
    ]
    file_rows = [
        ("fp32 state dict", numbers.size(file["dense"])),
        ("packed file", numbers.size(file["packed"])),
    ]
    if file.get("onnx") is not None:
        file_rows.append(("ONNX file (decoded weights)", numbers.size(file["onnx"])))
    cards = [
        _card(
            "Weights",
            ratio["weights"],
            "fewer weights: non-zeros against all, nothing else counted",
            facts([("dense", f"{weights['dense']:,}"), ("kept", f"{weights['kept']:,}")]),
        ),
        _card(
            "Bits of these weights",
            ratio["bits"],
            "fewer bits: values and the indices that place them, each counted",
            facts([*bit_rows, ("compressed", f"{total:,}")], "sum")
            + f'<div class="stack" aria-hidden="true">{shares}</div>',
        ),
        _card(
            "Whole file on disk",
            ratio["file"],
            "smaller: biases, norms, scales and header included",
            facts(file_rows),
        ),
    ]
    return (
        "<h2>Three accountings</h2>"
        '<p class="soft">Each ratio is of another thing; none stands for the others.</p>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _card(title: str, ratio: float, meaning: str, body: str) -> str:
    big = f'<b class="big">{numbers.times(ratio)}</b>'
    return f'<section><h3>{title}</h3>{big}<span class="soft">{meaning}</span>{body}</section>'


def _accuracy(report: Mapping[str, Any]) -> str:
    accuracy, parity = report["accuracy"], report["parity"]
    meanings = {
        "dense": "before compression",
        "compressed": "as trained",
        "decoded": "read back from the packed file",
        "onnx": "the ONNX file in ONNX Runtime",
    }
    rows = []
    for name, meaning in meanings.items():
        found, checked = accuracy[name], name in parity
        cells = [
            meaning if found is not None else "not exported",
            numbers.percent(found),
            "" if found is None else numbers.points(found - accuracy["dense"]),
            numbers.percent(accuracy["validation"].get(name)) if not checked else "",
            numbers.scientific(parity[name]) if checked else "",
            numbers.percent(parity["agreement"][name]) if checked else "",
        ]
        rows.append([name, *cells])
    head = (
        "network", "", "test accuracy", "points", "validation accuracy",
        "largest logit difference", "same class",
    )  # fmt: skip
    return (
        "<h2>Accuracy and parity</h2>"
        f'<p class="soft">On {parity["samples"]:,} test samples; differences are against the '
        f"compressed network as trained.</p>{table(head, rows, numeric=range(2, 7))}"
        f"{_runtimes(report)}{_saturation(parity.get('saturation'))}"
    )


def _runtimes(report: Mapping[str, Any]) -> str:
    rows = runtimes.rows(report)
    if not rows:
        return ""
    return f'<p class="soft">{runtimes.TITLE}.</p>{table(runtimes.HEAD, rows, range(1, 5))}'


def _saturation(found: Mapping[str, float] | None) -> str:
    return f'<p class="soft">{numbers.saturation(found).capitalize()}.</p>' if found else ""


def _layers(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    stored = [layer for layer in layers if layer["storage"]]
    charts = figure(
        "Density (share of non-zeros), and bits per weight",
        bar_chart("Density and bits per layer", [_density_bar(layer) for layer in stored]),
    )
    charts += figure(
        f"Stored bits {legend(_KINDS)}",
        bar_chart("Stored bits per layer", [_storage_bar(layer) for layer in stored]),
    )
    head = (
        "layer", "kind", "shape", "set", "weights", "kept", "density", "bits",
        "MACs", *(f"{kind} (bits)" for kind in _KINDS),
    )  # fmt: skip
    rows = table(head, [_layer_cells(layer) for layer in layers], numeric=range(4, len(head)))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f'<h2>Layers</h2><div class="charts">{charts}</div>{rows}<ul>{notes}</ul>'


def _layer_cells(layer: Mapping[str, Any]) -> list[str]:
    stored = layer["storage"]
    return [
        layer["name"],
        layer["kind"],
        numbers.shapes(layer),
        layer["set"] + (f" ({layer['note']})" if layer["note"] else ""),
        f"{layer['weights']:,}",
        f"{layer['kept']:,}",
        numbers.percent(layer["density"]),
        numbers.layer_bits(layer),
        numbers.count(layer["compressed_macs"]),
        *(f"{stored[kind]:,}" if stored else "–" for kind in _KINDS),
    ]


def _density_bar(layer: Mapping[str, Any]) -> Bar:
    text = f"{numbers.percent(layer['density'])}, {numbers.layer_bits(layer)} bits"
    return Bar(layer["name"], [layer["density"]], text)


def _storage_bar(layer: Mapping[str, Any]) -> Bar:
    amounts = [layer["storage"][kind] for kind in _KINDS]
    return Bar(layer["name"], amounts, f"{numbers.count(sum(amounts))} bits")


def _training(report: Mapping[str, Any]) -> str:
    history = report["history"]
    if not history:
        return ""

    def values(key: str) -> list[float | None]:
        return [epoch.get(key) for epoch in history]

    sections = _stretches(history)
    accuracies = [Series("validation accuracy", values("accuracy"), 1)]
    if any(value is not None for value in values("projected_accuracy")):
        label = "if projected now"
        accuracies.append(Series(label, values("projected_accuracy"), 2))
    residuals = [
        Series("primal residual", values("primal"), 1),
        Series("dual residual", values("dual"), 2),
    ]
    sad = [Series("SAD", values("sad"), 1)]
    flips = [Series("flip rate", values("flip_rate"), 1)]
    charts = [
        ("Training loss", [Series("loss", values("loss"), 1)], numbers.plain, False),
        ("Accuracy on the validation set", accuracies, lambda v: numbers.percent(v, 1), False),
        ("Residuals, relative to the weights", residuals, numbers.plain, True),
        ("SAD: weights kept now or at the start, not both", sad, numbers.plain, False),
        ("Masks that flip in a step", flips, lambda v: numbers.percent(v, 2), True),
    ]
    figures = []
    for title, series, write, logarithmic in charts:
        chart = line_chart(title, series, sections, write, logarithmic)
        names = legend([one.label for one in series]) if len(series) > 1 else ""
        if chart:
            figures.append(figure(f"{title} {names}", chart))
    return f'<h2>Training</h2><div class="charts">{"".join(figures)}</div>'


def _stretches(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return the first epoch and the name of each phase of each step of each stage."""
    stretches: list[tuple[int, str]] = []
    before = None
    for number, epoch in enumerate(history):
        stretch = (epoch["stage"], epoch["phase"], epoch.get("step"))
        if stretch != before:
            stretches.append((number, "dense" if epoch["stage"] is None else epoch["phase"]))
        before = stretch
    return stretches


def _origin(report: Mapping[str, Any]) -> str:
    rows = [(escape(key), escape(str(value))) for key, value in report["environment"].items()]
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    return (
        "<h2>How it was made</h2>"
        f"<details><summary>Environment</summary>{facts(rows)}</details>"
        f"<details><summary>Recipe, as resolved</summary><pre>{escape(recipe)}</pre></details>"
    )
