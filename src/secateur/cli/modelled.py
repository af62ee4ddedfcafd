"""Commands about machines that are not here: ``platforms``, ``energy``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.shared import (
    TARGET_HELP,
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

app = typer.Typer()


@app.command(
    epilog=examples(
        "secateur platforms",
        "secateur platforms runs/demo",
        "secateur platforms runs/demo --platform edge-cpu --platform my-board.yaml",
        "secateur platforms torchvision.models:resnet18 --input 1x3x224x224 --activation-bits 8",
    )
)
def platforms(
    target: Annotated[
        str | None,
        typer.Argument(help=f"{TARGET_HELP} Without it, platforms are listed."),
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Name, or YAML file of your own; repeatable. Shows layers too. All by default.",
        ),
    ] = None,
    arguments: Arguments = None,
    input_shape: InputShape = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = 32,
    first_last_bits: FirstLastBits = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """List models of machines, or show what a network would take there and what zeros gain it."""
    from secateur.cli.tables import console
    from secateur.cli.target import open_target
    from secateur.cost.platforms import assess, load_platform, platform_names
    from secateur.cost.workload import workload
    from secateur.report import modelled

    chosen = [load_platform(choice) for choice in platform or platform_names()]
    if target is None:
        if as_json:
            print_json([each.model_dump(mode="json") for each in chosen])
        else:
            console().print(modelled.platform_list(chosen))
        return
    opened = open_target(target, trust, arguments)
    example, dense = opened.example(input_shape), opened.dense()
    bits = opened.bits(weight_bits, activation_bits)
    own = opened.weight_bits, opened.activation_bits
    network = workload(opened.model, example, bits, first_last_bits, *own)
    origin = workload(dense, example) if dense else None
    found = [assess(each, network, origin) for each in chosen]
    if as_json:
        layers = [each.compressed.to_dict()["layers"] for each in found]
        rows = zip(found, layers, strict=True)
        print_json([each.to_dict() | {"layers": times} for each, times in rows])
        return
    console().print(modelled.assessment_table([each.to_dict() for each in found], target))
    for one, assessment in zip(chosen, found, strict=True) if platform else ():
        console().print("", modelled.timing_table(one, assessment.compressed))


@app.command(
    epilog=examples(
        "secateur energy runs/demo",
        "secateur energy runs/demo --skip-zeros --activation-bits 8",
        "secateur energy torchvision.models:resnet18 --input 1x3x224x224 --node my-node.yaml",
        "secateur energy runs/demo --measure",
    )
)
def energy(
    target: Target,
    node: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Technology node, or YAML file of your own.")
    ] = "45nm",
    skip_zeros: Annotated[
        bool, typer.Option("--skip-zeros", help="For hardware that skips zero weights.")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also run it here for ten seconds and read the counters."),
    ] = False,
    arguments: Arguments = None,
    input_shape: InputShape = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = 32,
    first_last_bits: FirstLastBits = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show the energy of one inference by layer: modelled, and measured if asked."""
    from secateur.cli.tables import console
    from secateur.cli.target import open_target
    from secateur.cost import meter
    from secateur.cost.energy import energy as model_energy
    from secateur.report.modelled import energy_table, measured_text

    opened = open_target(target, trust, arguments)
    example, bits = opened.example(input_shape), opened.bits(weight_bits, activation_bits)
    found = model_energy(
        opened.model,
        example,
        bits,
        first_last_bits,
        node,
        skip_zeros,
        opened.weight_bits,
        opened.activation_bits,
    )
    measured = meter.measure(opened.inference(input_shape)) if measure else None
    if as_json:
        print_json(found.to_dict() | {"measured": measured.to_dict() if measured else None})
        return
    console().print(energy_table(found))
    if measured:
        console().print(measured_text(measured))
