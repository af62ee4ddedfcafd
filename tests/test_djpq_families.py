"""DJPQ on narrow members of torchvision's families: attached, trained, folded, cut, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from families import djpq, lively, relative

models = pytest.importorskip("torchvision.models")

NARROW: dict[str, tuple[Any, dict[str, Any]]] = {
    "mobilenet_v2": (
        models.MobileNetV2,
        {"inverted_residual_setting": [[1, 8, 1, 1], [6, 16, 2, 2]]},
    ),
    "densenet": (
        models.DenseNet,
        {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16},
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


@pytest.mark.parametrize("name", NARROW)
def test_gated_folded_and_cut_networks_agree(name: str, tmp_path: Path) -> None:
    builder, arguments = NARROW[name]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    done = djpq(lively(builder, **arguments), images)
    assert done.closed > 0
    assert relative(done.after, done.before) < 1e-5
    exact = [copy.deepcopy(each).double()(images.double()) for each in (done.whole, done.small)]
    assert relative(exact[1], exact[0]) < 1e-5
    assert sc.export_onnx(done.small, images, tmp_path / "model.onnx").stat().st_size > 0
    linear = {n for n, m in done.small.named_modules() if isinstance(m, torch.nn.Linear)}
    named = {note.partition(":")[0] for note in done.method.notes}
    assert linear <= named | set(done.method.widths)
