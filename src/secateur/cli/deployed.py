"""Commands about networks in the runtimes of this machine: ``bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.shared import TARGET_HELP, AsJson, InputShape, Trust, examples, print_json

app = typer.Typer()

DENSE = "dense"
"""What stands for the network that the target was made from."""


@app.command(
    epilog=examples(
        "secateur bench runs/demo",
        "secateur bench runs/demo --runtime openvino --batch 1,8 --json",
        "secateur bench small.onnx --against large.onnx --threads 2",
        "secateur bench runs/demo --against torchvision.models:resnet18 --input 1x3x224x224",
    )
)
def bench(
    target: Annotated[
        str, typer.Argument(help=f"ONNX file, or: {TARGET_HELP}", show_default=False)
    ],
    against: Annotated[
        str, typer.Option(help="'dense', the network it was made from, or another target.")
    ] = DENSE,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime or openvino; repeatable. By default all that are here."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="1,8", help="Samples of an inference.")] = "1",
    threads: Annotated[
        int, typer.Option(help="Threads of an inference; 1 is disturbed least by other programs.")
    ] = 1,
    seconds: Annotated[float, typer.Option(help="Time to measure, for each batch size.")] = 20.0,
    input_shape: InputShape = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Time a network beside the dense one in the runtimes of this machine."""
    import tempfile
    from pathlib import Path

    from secateur import measure
    from secateur.cli.tables import console
    from secateur.cli.target import dense_onnx_file, onnx_file, whole_numbers
    from secateur.report.bench import bench_table

    batches = whole_numbers(batch, "--batch")
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        network = onnx_file(target, Path(scratch) / "network.onnx", input_shape, trust)
        if against == DENSE:
            other = dense_onnx_file(target, Path(scratch) / "dense.onnx", input_shape, trust)
        else:
            other = onnx_file(against, Path(scratch) / "other.onnx", input_shape, trust)
        found = measure.bench(
            network,
            other,
            runtimes=runtime or (),
            batches=batches,
            threads=threads,
            seconds=seconds,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(bench_table(found, target, against))
