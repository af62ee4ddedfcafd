"""How near ONNX Runtime computes what was trained, beside PyTorch in double precision.

    python benchmarks/djpq_parity.py djpq-resnet8 djpq-vgg7

takes every finished run of those that djpq_tables.py left in runs, rounds its biases as runs do in
the end (which changes nothing in a run of this version), exports it, and compares outputs on the
first test images with those of PyTorch in float32: relative to the largest, how far off the median
image is and the worst, the share of images that are within 1e-3, and that of the same class. A
value that ends beside another level moves its image; in double precision so do others.

Writes benchmarks/results/djpq-parity.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import RESULTS, RUNS
from torch import Tensor

import secateur as sc
from secateur import data
from secateur.artifact.onnx import OnnxModel
from secateur.artifact.packed import unpack
from secateur.posttraining import round_biases

SAMPLES, BATCH, NEAR = 2_000, 250, 1e-3


def compare(folder: Path) -> dict[str, Any]:
    """Return how far ONNX Runtime and double precision are from a finished run's network."""
    given = json.loads((folder / "report.json").read_text())["recipe"]["data"]
    images = data.inputs(
        data.load(given if isinstance(given, str) else given["name"]).test, SAMPLES
    )
    found = unpack(folder / "model.secateur")
    model = found.model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_biases(model, found.quantized, images[:1])
    with tempfile.TemporaryDirectory() as scratch:
        path = sc.export_onnx(model, images[:1], Path(scratch) / "model.onnx", found.quantized)
        ran = _outputs(OnnxModel(path, torch.get_num_threads()), images)
    expected = _outputs(model, images)
    double = _outputs(copy.deepcopy(model).double(), images.double())
    state = model.state_dict()
    return {
        "biases": sum(not torch.equal(before[name], state[name]) for name in state),
        "onnxruntime": _figures(ran, expected),
        "double": _figures(double.float(), expected),
    }


@torch.no_grad()
def _outputs(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(batch) for batch in images.split(BATCH)])


def _figures(found: Tensor, expected: Tensor) -> dict[str, float]:
    off = (found - expected).abs().amax(1) / expected.abs().max()
    same = found.argmax(1) == expected.argmax(1)
    return {
        "median": float(off.median()),
        "largest": float(off.max()),
        "near": float((off <= NEAR).double().mean()),
        "same": float(same.double().mean()),
    }


def main() -> None:
    """Compare all runs, write the results and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="+", help="folders in runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = [
        report.parent
        for table in options.tables
        for report in sorted((RUNS / table / "runs").glob("*/report.json"))
    ]
    found = {}
    for folder in folders:
        name = f"{folder.parent.parent.name}/{folder.name}"
        found[name] = compare(folder)
        print(name, *found[name].items(), sep="\n  ", file=sys.stderr, flush=True)
    (RESULTS / "djpq-parity.json").write_text(json.dumps(found, indent=1) + "\n")
    for kind in ("onnxruntime", "double"):
        each = [entry[kind] for entry in found.values()]
        print(
            f"{kind}: {len(each)} runs, same class {min(e['same'] for e in each):.2%} at least, "
            f"within {NEAR:g} {min(e['near'] for e in each):.2%} at least, "
            f"largest median {max(e['median'] for e in each):.1e}"
        )


if __name__ == "__main__":
    main()
