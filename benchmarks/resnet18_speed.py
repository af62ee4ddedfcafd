"""ResNet-18 at 224 with half of its channels in int8, beside the dense network in float32.

    python benchmarks/resnet18_speed.py                # refuses while other programs run
    python benchmarks/resnet18_speed.py --shared       # processor time, whatever else runs

torchvision's network with random weights, which time and sizes do not depend on. The least
important half of each channel group goes, widths in multiples of 8; statistics of BatchNorms are
taken anew from four inputs, and weights, activations and sums are rounded to int8 on the same ones.
Measured are the sizes of files, and one inference on one thread in each runtime, against the
dense network in the same one. Writes benchmarks/results/resnet18-speed.json.
"""

from __future__ import annotations

import argparse
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
from interleaved import interleaved
from operators import operators
from runs import RESULTS
from torch import Tensor, nn

import secateur as sc
from secateur.artifact import packed
from secateur.artifact.onnx import OnnxModel
from secateur.channels import shrink, widths
from secateur.doctor import doctor, int8_profile
from secateur.measure import RUNTIMES, bench
from secateur.measure.runtimes import feeds_of
from secateur.posttraining import reestimate

SIDE, INPUTS, DENSITY, ROUND_TO = 224, 4, 0.5, 8
BATCHES = (1, 8)
REFERENCE = "torchvision.models:resnet18"


def build(folder: Path) -> dict[str, Any]:
    """Write dense.onnx and small.onnx, and return what is known without a clock."""
    torch.manual_seed(0)
    dense, images = torchvision.models.resnet18().eval(), torch.randn(INPUTS, 3, SIDE, SIDE)
    reestimate(dense, [images])
    plain = sc.export_onnx(dense, images, folder / "dense.onnx")
    small = shrink(dense, images[:1], DENSITY, ROUND_TO)
    reestimate(small, [images])
    cut = outputs(small, images)
    started = time.process_time()
    found = sc.quantize(small, [images], iterations=0)
    seconds = time.process_time() - started
    path = sc.export_onnx(small, images, folder / "small.onnx", found.quantized)
    size = packed.save(
        folder / "small.secateur",
        small,
        found.quantized,
        reference=REFERENCE,
        widths=widths(small, dense),
    )
    saturation = sc.saturation(path, images, cut)
    raw = sum(each.nbytes for each in dense.state_dict().values())
    return {
        "parameters": {"dense": parameters(dense), "small": parameters(small)},
        "bytes": {
            "state_dict": raw,
            "packed": size.file,
            "onnx": path.stat().st_size,
            "dense_onnx": plain.stat().st_size,
        },
        "ratio": {
            "packed": raw / size.file,
            "onnx": plain.stat().st_size / path.stat().st_size,
        },
        "quantize_seconds": seconds,
        "moved": {"by_quantizing": saturation.noise, "by_integers": saturation.error},
        "operators": operators(path, folder / "optimized.onnx"),
        "decoded_equal": bool(
            torch.equal(
                outputs(packed.load(folder / "small.secateur"), images), outputs(small, images)
            )
        ),
        "onnx_error": relative(OnnxModel(path)(images), outputs(small, images)),
    }


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shared(small: Path, dense: Path, rounds: int) -> dict[str, Any]:
    """Time both files in turn in the processor time of one thread, on a machine in use."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        feeds = feeds_of(small, batch)
        for name, runtime in RUNTIMES.items():
            runs = {
                "dense": runtime.prepare(dense, feeds, 1),
                "small": runtime.prepare(small, feeds, 1),
            }
            seen = interleaved(runs, rounds, time.process_time)
            found[f"{name} {batch}"] = {
                "seconds": seen["seconds"],
                "speedup": 1 / seen["ratio"]["small"],
            }
            print(name, batch, found[f"{name} {batch}"], file=sys.stderr, flush=True)
    return {"clock": "processor time, other programs ran", "rounds": rounds, "figures": found}


def main() -> None:
    """Build, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", action="store_true", help="measure though other programs run")
    parser.add_argument("--rounds", type=int, default=15, help="of measuring, with --shared")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, without")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = build(folder)
        print(json.dumps(result, indent=1), file=sys.stderr, flush=True)
        files = folder / "small.onnx", folder / "dense.onnx"
        if arguments.shared:
            speed = shared(*files, arguments.rounds)
        else:
            speed = bench(*files, batches=BATCHES, seconds=arguments.seconds).to_dict()
    packages = ("torch", "torchvision", "onnx", *RUNTIMES)
    head = {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "processor": doctor()["cpu"]["name"],
        "int8_profile": int8_profile(),
        "input": [3, SIDE, SIDE],
        "density": DENSITY,
        "round_to": ROUND_TO,
    }
    path = RESULTS / "resnet18-speed.json"
    path.write_text(json.dumps({**head, **result, "speed": speed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
