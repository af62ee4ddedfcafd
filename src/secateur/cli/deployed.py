"""Commands about networks in runtimes: ``export`` for them, ``bench`` in those of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.shared import (
    TARGET_HELP,
    AsJson,
    InputShape,
    Target,
    Trust,
    examples,
    print_json,
)

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
    """Time a network beside the dense one in the runtimes of this machine.

    What has no ONNX file yet is exported in the form for the least --batch, as secateur export
    --batch does.
    """
    import tempfile

    from secateur import measure
    from secateur.cli.tables import console
    from secateur.cli.target import dense_onnx_file, onnx_file, whole_numbers
    from secateur.report.bench import bench_table

    batches = whole_numbers(batch, "--batch")
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        least = max(1, min(batches))
        network = onnx_file(target, Path(scratch) / "network.onnx", input_shape, trust, least)
        if against == DENSE:
            other = dense_onnx_file(target, Path(scratch) / "dense.onnx", input_shape, trust)
        else:
            other = onnx_file(against, Path(scratch) / "other.onnx", input_shape, trust, least)
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


@app.command(
    epilog=examples(
        "secateur export runs/demo --out deploy",
        "secateur export runs/demo --out deploy --batch 1",
        "secateur export model.secateur --format qonnx --out fpga",
        "secateur export runs/vit --format compressed-tensors --out vllm --trust",
    )
)
def export(
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            help="onnx: ONNX Runtime, OpenVINO and others. qonnx: FPGA flows, any number of bits. "
            "compressed-tensors: vLLM and transformers, linear layers."
        ),
    ] = "onnx",
    batch: Annotated[
        int | None,
        typer.Option(
            help="onnx: samples of an inference, if linear layers with levels that read floats may "
            "round these to bytes, which makes them several times faster.",
            show_default=False,
            min=1,
        ),
    ] = None,
    input_shape: InputShape = None,
    trust: Trust = False,
) -> None:
    """Write a network for others to run, with the integers that it has.

    The folder of onnx needs nothing of secateur: python deploy/predict.py images.npy runs it where
    only numpy and onnxruntime are.
    """
    from secateur.artifact.export import Source, export
    from secateur.cli.target import notes_of, open_target
    from secateur.report.numbers import size

    opened = open_target(target, trust)
    notes, example = notes_of(target, opened), opened.example(input_shape)
    source = Source(opened.model, example, opened.quantized, notes, batch)
    for path in export(source, format, out):
        typer.echo(f"{path}  {size(path.stat().st_size)}")
