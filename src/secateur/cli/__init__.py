"""The command line. Thin: each command parses, calls one public function, prints.

Nothing heavy is imported before a command runs, so that ``--help`` and completion are quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from secateur._version import __version__
from secateur.cli import modelled
from secateur.cli.shared import (
    ActivationBits,
    AsJson,
    FirstLastBits,
    InputShape,
    Target,
    Trust,
    WeightBits,
    examples,
    print_json,
)
from secateur.errors import SecateurError

# Threads that wait by spinning starve each other on a shared machine. OpenMP reads this once, when
# torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


class Group(TyperGroup):
    """Turns errors that a user can cause into a short message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command. With SECATEUR_DEBUG=1 errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            compressing = ctx.invoked_subcommand == "compress"
            hint = " Continue with the same command and --resume." if compressing else ""
            typer.echo(f"\nsecateur: interrupted.{hint}", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except (SecateurError, OSError) as error:
            if os.environ.get("SECATEUR_DEBUG") == "1":
                raise
            typer.echo(f"secateur: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "secateur compress recipes/lenet5-digits.yaml --out runs/demo",
        "secateur inspect runs/demo",
        "secateur inspect torchvision.models:resnet18 --input 1x3x224x224",
        "secateur doctor",
    ),
)
data_app = typer.Typer(no_args_is_help=True, help="Fetch and list the named data sets.")
app.add_typer(data_app, name="data")
app.add_typer(modelled.app)

Root = Annotated[
    Path | None,
    typer.Option(help="Folder of data sets; by default $SECATEUR_DATA or the user's cache."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def secateur(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Make a trained PyTorch network really smaller by joint pruning and quantization."""


@app.command(
    epilog=examples(
        "secateur compress recipes/lenet5-digits.yaml",
        "secateur compress my.yaml --out runs/try --set stages.0.density=0.05 --set train.seed=1",
        "secateur compress my.yaml --out runs/try --resume",
    )
)
def compress(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; by default runs/NAME of the recipe.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run in the same folder.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable."
        ),
    ] = None,
) -> None:
    """Train a network into its constraint sets, write the artifacts, and check them."""
    from secateur.cli.tables import console
    from secateur.compression import compress as run
    from secateur.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    run(None, loaded, out=out or Path("runs") / loaded.name, resume=resume, console=console())


@app.command(
    epilog=examples(
        "secateur inspect runs/demo",
        "secateur inspect runs/demo --encodings",
        "secateur inspect torchvision.models:resnet18 --input 1x3x224x224 --json",
        "secateur inspect my_models:net --input 1x3x32x32 --weight-bits 4 --activation-bits 8",
    )
)
def inspect(
    target: Target,
    encodings: Annotated[
        bool,
        typer.Option("--encodings", help="Also what its weights take as platforms encode them."),
    ] = False,
    input_shape: InputShape = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = 32,
    first_last_bits: FirstLastBits = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what a network costs: parameters, MACs, BOPs and bytes, by layer and in total."""
    from secateur import cost
    from secateur.artifact.architecture import Architecture
    from secateur.cli import tables
    from secateur.cli.target import open_target
    from secateur.report.storage import storage_tables
    from secateur.report.terminal import cost_table

    opened = open_target(target, trust)
    example, bits = opened.example(input_shape), opened.bits(weight_bits, activation_bits)
    measured = cost.inspect(opened.model, example, bits, first_last_bits, opened.weight_bits)
    storage = cost.storage_table(opened.model, opened.quantized).to_dict() if encodings else None
    if as_json:
        packed = tables.header_dict(opened.header) if opened.header else None
        parts = {"packed": packed, "encodings": storage}
        print_json(measured.to_dict() | {key: part for key, part in parts.items() if part})
        return
    console = tables.console()
    if opened.header:
        tables.print_header(opened.header, Architecture.of(opened.model).tensors, console)
    console.print(cost_table(measured, target))
    if storage:
        console.print("", storage_tables(storage))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods and constraint sets that a recipe can name, with their options."""
    from secateur.catalogue import catalogue
    from secateur.cli.tables import console, print_catalogue

    found = catalogue()
    if as_json:
        print_json(found)
    else:
        print_catalogue(found, console())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has: versions, cores, instruction sets, optional packages."""
    from secateur.cli.tables import console, print_doctor
    from secateur.doctor import doctor as examine

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        print_doctor(facts, console())


@data_app.command("get", epilog=examples("secateur data get mnist"))
def data_get(
    name: Annotated[str, typer.Argument(help="mnist or fashion-mnist.", show_default=False)],
    root: Root = None,
) -> None:
    """Bring a data set to this machine, check it, and say where it came from."""
    from secateur.data import get

    typer.echo(get(name, root))


@data_app.command("list")
def data_list(root: Root = None, as_json: AsJson = False) -> None:
    """List the named data sets and whether they are on this machine."""
    from secateur.cli.tables import console, print_data
    from secateur.data import available

    found = available(root)
    if as_json:
        print_json(found)
    else:
        print_data(found, console())


def main() -> None:
    """Run the command line; the entry point of the ``secateur`` program."""
    app()
