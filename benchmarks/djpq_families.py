"""Families of torchvision under DJPQ: what has gates and grids, and whether the parts agree.

    python benchmarks/djpq_families.py --side 64

Networks are built at full width with random weights, scales and statistics, for images of the side
given. Gates and quantizers are attached, two steps are trained, every fourth channel of each gate
is closed, and the network is finalized, cut and exported with integer weights. Compared, as the
largest difference relative to the largest output on two random images:

- folded: the gated network in evaluation mode with the finalized one
- sliced: that one with the cut network, in double precision, since a sum in another order may end
  on the other side of a step
- onnxruntime: the exported file with the cut network, whose biases are those of integers by then;
  one value that ends beside another level shows here

Writes benchmarks/results/djpq-families.json, with what stays dense and why.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from runs import RESULTS

import secateur as sc
from secateur.artifact.onnx import INPUT_NAME
from secateur.finish import settle
from secateur.measure import RUNTIMES
from secateur.outcome import finished

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import djpq, lively, relative

FAMILIES = (
    *("resnet18", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_x_400mf"),
    *("convnext_tiny", "vit_b_16"),
)


def examine(name: str, side: int, folder: Path) -> dict[str, Any]:
    """Take one family through all steps and return what became of it."""
    arguments = {"image_size": side} if name.startswith("vit") else {}
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    done = djpq(lively(getattr(torchvision.models, name), **arguments), images)
    with torch.no_grad():
        exact = [copy.deepcopy(each).double()(images.double()) for each in (done.whole, done.small)]
    plan = finished(done.method.plan, done.method.outcome())
    levels = settle(done.small, [plan], images).quantized
    with torch.no_grad():
        found = done.small(images)
    path = sc.export_onnx(done.small, images, folder / f"{name}.onnx", levels)
    runtime = RUNTIMES["onnxruntime"]
    (ran,) = runtime.prepare(path, {INPUT_NAME: images.numpy()}, torch.get_num_threads())()
    return {
        "seconds": time.perf_counter() - began,
        "quantized": len(done.method.widths),
        "gates": len(done.method.gates),
        "closed": done.closed,
        "dense": list(done.method.notes),
        "whole": list(done.notes),
        "onnx_bytes": path.stat().st_size,
        "errors": {
            "folded": relative(done.after, done.before),
            "sliced": relative(exact[1], exact[0]),
            "onnxruntime": relative(torch.from_numpy(ran), found),
        },
    }


def main() -> None:
    """Examine the families and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=FAMILIES, help="all by default")
    parser.add_argument("--side", type=int, default=224, help="pixels of the images, each way")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = RESULTS / "djpq-families.json"
    stored = json.loads(path.read_text())["families"] if path.exists() else {}
    packages = ("torch", "torchvision", "onnx", "onnxruntime")
    for name in options.families:
        with tempfile.TemporaryDirectory() as folder:
            found = {"side": options.side, **examine(name, options.side, Path(folder))}
        print(name, found["errors"], *found["dense"], sep="\n  ", file=sys.stderr, flush=True)
        stored[name] = found
        result = {
            "python": platform.python_version(),
            "versions": {package: version(package) for package in packages},
            "families": stored,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
