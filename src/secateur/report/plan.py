"""The pre-flight table: what each layer will become, before anything trains."""

from __future__ import annotations

from rich.table import Table

from secateur.plan import Plan


def plan_table(plan: Plan, title: str) -> Table:
    """Return a terminal table of a plan, with a line for what stays dense and why."""
    table = Table(title=title, title_justify="left")
    for column in ("layer", "kind", "shape", "weights", "becomes"):
        table.add_column(column, justify="right" if column == "weights" else "left")
    for row in plan.rows:
        becomes = ", ".join(filter(None, (str(row.set or ""), row.note)))
        if row.pooled:
            becomes += " (shared)"
        if row.norm:
            becomes += f", filters weighed by {row.norm}"
        shape = "x".join(map(str, row.shape))
        table.add_row(row.layer, row.kind, shape, f"{row.weights:,}", becomes)
    if plan.keep:
        total = sum(row.weights for row in plan.rows if row.pooled)
        table.caption = f"shared budget: {plan.keep:,} of {total:,} weights stay"
        table.caption_justify = "left"
    return table
