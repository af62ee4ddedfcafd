"""Where a budget went, layer by layer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.allocation.units import KINDS
from secateur.report import numbers

_WHY = {
    "magnitude": "One threshold for all layers: the largest weights stay, or the groups of most\n"
    "energy (squares) per weight, relative to their layer's.",
    "sensitivity": "Least sum of what each layer alone, projected at its old norm, adds to the "
    "loss;\n'saves' is what a budget larger by one would take off it.",
}


def allocation_table(allocation: Mapping[str, Any], title: str) -> Table:
    """Return a terminal table of an allocation (``Allocation.to_dict``)."""
    ((kind, asked),) = allocation["budget"].items()
    unit = KINDS[kind].name
    measured = allocation["by"] == "sensitivity"
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("layer", "becomes"):
        table.add_column(column)
    columns = ["density", unit, "share", "energy kept", *(["loss", "saves"] if measured else [])]
    for column in columns:
        table.add_column(column, justify="right")
    for layer in allocation["layers"]:
        shared = " (shared)" if layer["keep"] is None else ""
        why = (_signed(layer["loss"]), _signed(layer["price"])) if measured else ()
        table.add_row(
            *map(escape, (layer["layer"], layer["target"] + shared)),
            numbers.percent(layer["kept"] / layer["weights"]),
            f"{layer['cost']:,.0f}",
            numbers.percent(layer["share"], 1),
            numbers.percent(layer["energy"], 1),
            *why,
        )
    rest = sum(allocation["rest"].values())
    if rest:
        share = numbers.percent(rest / allocation["cost"], 1)
        table.add_row("", _listed(allocation["rest"]), "", f"{rest:,.0f}", share)
    table.caption = (
        f"budget: {kind} {asked}, at most {allocation['limit']:,.0f} {unit}; "
        f"{allocation['cost']:,.0f} spent, "
        f"{numbers.times(allocation['dense'] / allocation['cost'])} smaller than dense\n"
        + _WHY[allocation["by"]]
    )
    return table


def _listed(rest: Mapping[str, float]) -> str:
    """Name the largest of what is not planned."""
    names = sorted(rest, key=lambda name: -rest[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return escape("not planned: " + ", ".join(names[:3]) + more)


def _signed(loss: float | None) -> str:
    """Write a change of the loss: ``+0.0123``; a missing one as a dash."""
    return "–" if loss is None else f"{loss:+.3g}"
