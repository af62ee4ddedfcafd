"""What pages of reports are made of; each is self-contained: no network, no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def document(title: str, body: str) -> str:
    """Return a whole page with its style in it; the body is HTML already."""
    style = files("secateur.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def swatch(colour: int) -> str:
    """Return a small square of a colour class, counted from 1."""
    return f'<i class="swatch c{colour}"></i>'


def legend(labels: Sequence[str]) -> str:
    """Return the labels of the first colours; they are HTML already."""
    return "".join(
        f"<span>{swatch(number)}{label}</span>" for number, label in enumerate(labels, start=1)
    )


def figure(caption: str, chart: str) -> str:
    """Return a chart under its caption; both are HTML already."""
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def facts(rows: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Return a list of terms and values; both are HTML already."""
    items = "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in rows)
    return f'<dl class="{kind}">{items}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: range) -> str:
    """Return a table whose first column names the rows; every cell is text, not HTML."""
    styles = [' class="n"' if column in numeric else "" for column in range(len(head))]
    top = "".join(
        f'<th scope="col"{style}>{escape(cell)}</th>'
        for style, cell in zip(styles, head, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f"<td{style}>{escape(cell)}</td>" for style, cell in zip(styles[1:], cells, strict=True)
        )
        + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
