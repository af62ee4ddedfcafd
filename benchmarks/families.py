"""Families of torchvision without 30 % of their channels: what stays, and whether runtimes agree.

    python benchmarks/families.py --threads 1

Networks are built at full size with random weights, scales and statistics, so that the least
important 30 % of each channel group are random ones. The cut network is compared with the whole
one whose removed channels are masked, and its ONNX file in ONNX Runtime and OpenVINO with torch:
largest difference of the outputs on two random images, relative to the largest output.
Writes benchmarks/results/families.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from runs import RESULTS
from torch import nn

import secateur as sc
from secateur.artifact.onnx import INPUT_NAME
from secateur.attention import separate
from secateur.channels import shrink_to
from secateur.measure import RUNTIMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import lively, masked_outputs

FAMILIES = (
    *("alexnet", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    *("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "regnet_y_400mf"),
    *("shufflenet_v2_x1_0", "convnext_tiny", "vit_b_16", "swin_t"),
)
DENSITY, SIDE = 0.7, 224


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Cut one family and return what became of it."""
    model = separate(lively(getattr(torchvision.models, name)))
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    small = shrink_to(model, images, DENSITY, round_to=1)
    masked = masked_outputs(model, small.kept, images).numpy()
    with torch.no_grad():
        found = small.model(images).numpy()
    errors = {"masked": relative(found, masked)}
    path = sc.export_onnx(small.model, images, folder / f"{name}.onnx")
    for package, runtime in RUNTIMES.items():
        (ran,) = runtime.prepare(path, {INPUT_NAME: images.numpy()}, torch.get_num_threads())()
        errors[package] = relative(np.array(ran), found)
    return {
        "parameters": {"before": parameters(model), "after": parameters(small.model)},
        "onnx_bytes": path.stat().st_size,
        "errors": errors,
        "whole": list(small.notes),
    }


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Return the largest difference in units of the largest value that is expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Examine all families and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    packages = ("torch", "torchvision", "onnx", *RUNTIMES)
    families: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FAMILIES:
            families[name] = examine(name, Path(folder))
            print(name, families[name]["errors"], file=sys.stderr, flush=True)
    result = {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "density": DENSITY,
        "input": [2, 3, SIDE, SIDE],
        "families": families,
    }
    (RESULTS / "families.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
