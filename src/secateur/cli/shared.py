"""What several commands share: options, examples, JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

TARGET_HELP = "Folder of a run, packed file, or module:callable."

Target = Annotated[str, typer.Argument(help=TARGET_HELP, show_default=False)]
InputShape = Annotated[
    str | None,
    typer.Option("--input", metavar="1x3x224x224", help="Shape of one input batch."),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Argument of module:callable, such as width=0.25; repeatable.",
        show_default=False,
    ),
]
WeightBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of a weight, for networks that are not quantized; 32 if not given.",
        show_default=False,
    ),
]
ActivationBits = Annotated[int, typer.Option(help="Bits of an activation.")]
FirstLastBits = Annotated[
    int | None, typer.Option(help="Both bits of the first and last layer, where they differ.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import and run the module that a packed file names.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def examples(*lines: str) -> str:
    """Return the epilog of commands to copy, one a line."""
    return "\n\n".join(("Examples:", *lines))


def print_json(value: Any) -> None:
    """Print plain data."""
    typer.echo(json.dumps(value, indent=2))
