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
from secateur.cli import deployed, modelled
from secateur.cli.shared import (
    ActivationBits,
    Arguments,
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
from secateur.memory import keep_freed

# Threads that wait by spinning starve each other on a shared machine. OpenMP reads this once, when
# torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""

FAILED = 1
"""Exit code of a comparison of which some run failed."""

_HOW_TO_CONTINUE = {
    "compress": " Continue with the same command and --resume.",
    "compare": " Continue with the same command.",
}


class Group(TyperGroup):
    """Turns errors that a user can cause into a short message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command. With SECATEUR_DEBUG=1 errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            hint = _HOW_TO_CONTINUE.get(ctx.invoked_subcommand or "", "")
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
app.add_typer(deployed.app)

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
    keep_freed()


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
        "secateur compare recipes/compare/*.yaml --out runs/compare",
        "secateur compare admm.yaml gmp.yaml --out runs/two --seeds 0,1 --jobs 2 --margin 1",
        "RAY_ADDRESS=auto secateur compare admm.yaml gmp.yaml --out /shared/two",
    )
)
def compare(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipe files (YAML), two or more.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write; give it again to continue.", show_default=False)
    ],
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Seeds that each recipe is run with.")
    ] = "0,1,2",
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time; by default one for each core.", show_default=False),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Points of validation accuracy that count as equal to dense.")
    ] = 0.5,
    platforms: Annotated[
        list[str] | None,
        typer.Option("--platform", help="YAML file of one more platform to judge; repeatable."),
    ] = None,
    measure: Annotated[
        float, typer.Option(help="Seconds to time layers on this machine; 0 for not at all.")
    ] = 90.0,
    allow_unequal: Annotated[
        bool, typer.Option("--allow-unequal", help="Compare recipes of different total epochs.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one key of every recipe; repeatable."
        ),
    ] = None,
) -> None:
    """Run several recipes on one task, trained alike, and say what pays where."""
    from secateur.cli.tables import console
    from secateur.cli.target import whole_numbers
    from secateur.comparison.compare import compare as run
    from secateur.recipe import load_recipe

    done = run(
        None,
        [load_recipe(each, overrides or ()) for each in recipes],
        out=out,
        seeds=whole_numbers(seeds, "--seeds"),
        jobs=jobs,
        margin=margin,
        platforms=platforms or (),
        measure=measure,
        allow_unequal=allow_unequal,
        console=console(),
    )
    if done.failed:
        raise typer.Exit(FAILED)


@app.command(
    epilog=examples(
        "secateur inspect runs/demo",
        "secateur inspect runs/demo --encodings",
        "secateur inspect torchvision.models:resnet18 --input 1x3x224x224 --json",
        "secateur inspect secateur.zoo:vgg7 --set channels=3 --input 1x3x32x32 --weight-bits 4",
    )
)
def inspect(
    target: Target,
    encodings: Annotated[
        bool,
        typer.Option("--encodings", help="Also what its weights take as platforms encode them."),
    ] = False,
    arguments: Arguments = None,
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

    opened = open_target(target, trust, arguments)
    example, bits = opened.example(input_shape), opened.bits(weight_bits, activation_bits)
    own = opened.weight_bits, opened.activation_bits
    measured = cost.inspect(opened.model, example, bits, first_last_bits, *own)
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


@app.command(
    epilog=examples(
        "secateur breakeven torchvision.models:resnet18 --input 1x3x224x224",
        "secateur breakeven runs/demo --threads 2 --out breakeven.html",
    )
)
def breakeven(
    target: Target,
    arguments: Arguments = None,
    input_shape: InputShape = None,
    threads: Annotated[
        int, typer.Option(help="Threads of each form; 1 is disturbed least by other programs.")
    ] = 1,
    seconds: Annotated[float, typer.Option(help="Time to spend on measuring.")] = 90.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write, with a chart.", metavar="FILE.html", show_default=False),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure from which sparsity pruned and quantized layers are faster on this machine."""
    from secateur import measure
    from secateur.cli.tables import console
    from secateur.cli.target import example_input, open_target
    from secateur.report.breakeven import breakeven_tables, write_page

    opened = open_target(target, trust, arguments)
    inputs = example_input(input_shape or opened.input_shape)
    found = measure.breakeven(opened.model, inputs, threads, seconds)
    if out is not None:
        write_page(found, target, out)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(breakeven_tables(found, target))


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
    name: Annotated[
        str, typer.Argument(help="mnist, fashion-mnist or cifar10.", show_default=False)
    ],
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
