"""How the command line shows what the library returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.artifact.packed import Header

PIPE_WIDTH = 120
"""Columns where there is no terminal, so that names of layers are whole in a pipe or a log."""


def console() -> Console:
    """Return the console for standard output."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def print_header(header: Header, names: Iterable[str], console: Console) -> None:
    """Print what a packed file says of itself, and how each of the named tensors is coded."""
    console.print(
        f"packed file: {header.file:,} bytes, format {header.version}, "
        f"architecture {header.reference or 'not named'}",
        highlight=False,
    )
    table = Table("stored tensor", "bytes", "coded as", box=None, padding=(0, 2))
    for name, entry in zip(names, header.entries, strict=True):
        table.add_row(escape(name), f"{entry.bytes:,}", escape(entry.coder))
    console.print(table)
    console.print()


def header_dict(header: Header) -> dict[str, Any]:
    """Return what a packed file says of itself as plain data."""
    return {
        "file": header.file,
        "version": header.version,
        "reference": header.reference,
        "arguments": dict(header.arguments),
        "metadata": dict(header.metadata),
        "entries": [{"bytes": each.bytes, "coder": each.coder} for each in header.entries],
    }


def print_catalogue(catalogue: dict[str, Any], console: Console) -> None:
    """Print methods and constraint sets, each with its options."""
    for title, entries in catalogue.items():
        for name, entry in entries.items():
            console.print(f"[bold]{name}[/bold] ({title[:-1]}): {escape(entry['summary'])}")
            table = Table("option", "default", "meaning", box=None, padding=(0, 2))
            for option in entry["options"]:
                default = "required" if option["required"] else str(option["default"])
                table.add_row(option["name"], default, escape(option["description"]))
            console.print(table)
            console.print()


def print_doctor(facts: dict[str, Any], console: Console) -> None:
    """Print the facts about this machine, and how to get what it lacks."""
    cpu = facts["cpu"]
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_row("secateur", facts["secateur"])
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "[red]missing: pip install secateur[/red]")
    table.add_row(
        "processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"
    )
    table.add_row("instructions", " ".join(cpu["instructions"]) or "unknown")
    widths = {"vnni": "exact", "no_vnni": "saturate beside 8-bit weights; 7 bits are safe"}
    table.add_row("int8 products", widths[facts["int8"]])
    table.add_row("torch on it", f"{cpu['torch_capability']}, {cpu['torch_threads']} threads")
    table.add_row("accelerators", ", ".join(facts["accelerators"]) or "none; the CPU is used")
    nm = facts["kernels"]["nm"]
    slow = f"[yellow]PyTorch, slower; with a C++ compiler here: {nm['install']}[/yellow]"
    table.add_row("N:M kernel", f"compiled, {nm['version']}" if nm["version"] else slow)
    for name, each in facts["optional"].items():
        missing = f"[yellow]not installed: {each['install'].replace('[', chr(92) + '[')}[/yellow]"
        table.add_row(name, each["version"] or missing)
    console.print(table)


def print_data(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the named data sets and whether they are here."""
    table = Table("name", "here", "where", box=None, padding=(0, 2))
    for row in rows:
        table.add_row(row["name"], "yes" if row["here"] else "no", row["where"])
    console.print(table)
