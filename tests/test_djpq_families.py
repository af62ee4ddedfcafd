"""DJPQ on narrow members of torchvision's families: attached, trained, folded, cut, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from families import djpq, lively, relative
from onnx_count import bops_of
from secateur.artifact.onnx import export_onnx
from secateur.finish import settle
from secateur.outcome import finished

models = pytest.importorskip("torchvision.models")

NARROW: dict[str, tuple[Any, dict[str, Any]]] = {
    "resnet": (models.ResNet, {"block": models.resnet.BasicBlock, "layers": [1, 1, 1, 1]}),
    "mobilenet_v2": (
        models.MobileNetV2,
        {"inverted_residual_setting": [[1, 8, 1, 1], [6, 16, 2, 2]]},
    ),
    "efficientnet": (
        models.EfficientNet,
        {
            "inverted_residual_setting": [
                models.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
                models.efficientnet.MBConvConfig(6, 5, 2, 8, 16, 2),
            ],
            "dropout": 0.0,
        },
    ),
    "densenet": (
        models.DenseNet,
        {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16},
    ),
    "regnet_x": (
        models.RegNet,
        {"block_params": models.regnet.BlockParams.from_init_params(4, 16, 16.0, 2.0, 8)},
    ),
    "convnext": (
        models.ConvNeXt,
        {
            "block_setting": [
                models.convnext.CNBlockConfig(16, 32, 1),
                models.convnext.CNBlockConfig(32, None, 1),
            ]
        },
    ),
    "vit": (
        models.VisionTransformer,
        {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 32,
            "mlp_dim": 64,
        },
    ),
}
"""A small member of each; ``benchmarks/djpq_families.py`` takes the ones that people use."""

MULTIPLIED = {"convnext", "vit"}
"""Families whose linear layers are no ``Gemm`` in ONNX."""


@pytest.mark.parametrize("name", NARROW)
def test_gated_folded_and_cut_networks_agree(name: str, tmp_path: Path) -> None:
    builder, arguments = NARROW[name]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    done = djpq(lively(builder, **arguments), images)
    assert done.closed > 0
    assert relative(done.after, done.before) < 1e-5
    exact = [copy.deepcopy(each).double()(images.double()) for each in (done.whole, done.small)]
    assert relative(exact[1], exact[0]) < 1e-5
    plans = [finished(done.method.plan, done.method.outcome())]
    levels = settle(done.small, plans, images).quantized
    path = export_onnx(done.small, images, tmp_path / "model.onnx", levels)
    weights, inputs = (
        {layer: pair[side] for layer, pair in done.method.widths.items()} for side in (0, 1)
    )
    cost = sc.inspect(done.small, images[:1], weight_bits=weights, activation_bits=inputs)
    if name not in MULTIPLIED:
        # a few layers lose their largest levels with a channel, and then seem to have a bit less
        assert bops_of(path) == pytest.approx(cost.bops, rel=1e-3)
    linear = {n for n, m in done.small.named_modules() if isinstance(m, torch.nn.Linear)}
    named = {note.partition(":")[0] for note in done.method.notes}
    assert linear <= named | set(done.method.widths)
