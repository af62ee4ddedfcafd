"""Families of torchvision with 30 % of their channels removed, against the same channels masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from families import lively, masked_outputs
from secateur.artifact.onnx import INPUT_NAME, export_onnx
from secateur.attention import Attention, separate
from secateur.channels import shrink_to
from secateur.measure import RUNTIMES

models = pytest.importorskip("torchvision.models")

TRANSFORMER = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 4}
TRANSFORMER |= {"hidden_dim": 64, "mlp_dim": 128}

RESNET = {"block": models.resnet.Bottleneck, "layers": [1, 2, 1, 1]}
"""A bottleneck of each kind; the families have more of the same."""


def narrow_head(builder: Any) -> Any:
    """Return a builder of the same network whose classifier is 256 and not 4096 wide."""

    def build(**arguments: Any) -> nn.Module:
        model: nn.Module = builder(**arguments)
        linear = [i for i, m in enumerate(model.classifier) if isinstance(m, nn.Linear)]  # type: ignore[arg-type]
        sizes = [model.classifier[linear[0]].in_features, 256, 256, 10]  # type: ignore[index, union-attr]
        for at, given, made in zip(linear, sizes, sizes[1:], strict=False):
            model.classifier[at] = nn.Linear(given, made)  # type: ignore[index, operator]
        return model

    return build


FAMILIES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "alexnet": (narrow_head(models.alexnet), 64, {}),
    "vgg16_bn": (narrow_head(models.vgg16_bn), 32, {}),
    "resnet18": (models.resnet18, 64, {}),
    "resnet50": (models.resnet50, 64, {}),
    "resnext50": (models.ResNet, 64, {**RESNET, "groups": 32, "width_per_group": 4}),
    "wide_resnet50": (models.ResNet, 64, {**RESNET, "width_per_group": 128}),
    "mobilenet_v2": (models.mobilenet_v2, 64, {}),
    "mobilenet_v3_large": (models.mobilenet_v3_large, 64, {}),
    "efficientnet_b0": (models.efficientnet_b0, 64, {}),
    "densenet121": (models.densenet121, 64, {}),
    "regnet_y_400mf": (models.regnet_y_400mf, 64, {}),
    "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 64, {}),
    "convnext_tiny": (models.convnext_tiny, 64, {}),
    "vit": (models.VisionTransformer, 32, TRANSFORMER),  # vit_b_16 is this class, 65 times larger
    "swin_t": (models.swin_t, 64, {}),
}

WHOLE = {
    "shufflenet_v2_x1_0": {"live and die together"},
    "convnext_tiny": {"normalizes over channels"},
    "vit": {"cat needs all channels", "joins them with what is not followed"},
    "swin_t": {"normalizes over channels", "joins them with what is not followed"},
}
"""Why channels stay, where some do: all that a layer normalization reads, heads that positions add
something to one by one, and what shuffling mixes until every channel of a stage depends on every
other."""


EXPORTED = ("alexnet", "resnext50", "shufflenet_v2_x1_0", "vit")
"""A chain, groups, shuffling, attention; ``benchmarks/families.py`` exports them all."""


@pytest.mark.parametrize("name", FAMILIES)
def test_families_without_30_percent_of_their_channels(name: str, tmp_path: Path) -> None:
    builder, size, arguments = FAMILIES[name]
    model = separate(lively(builder, **arguments))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    small = shrink_to(model, images, density=0.7, round_to=1)
    expected = masked_outputs(model, small.kept, images)
    with torch.no_grad():
        found = small.model(images)
        untouched = model(images)
    largest = float(expected.abs().max())
    assert float((expected - found).abs().max()) <= 1e-5 * largest
    assert float((expected - untouched).abs().max()) > 1e-2 * largest, "the mask did something"
    reasons = WHOLE.get(name, set())
    assert all(any(reason in note for reason in reasons) for note in small.notes)
    assert all(any(reason in note for note in small.notes) for reason in reasons)
    if not reasons:
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small.model))
        assert after < 0.6 * before
    for layer, module in model.named_modules():
        if layer.endswith(("mlp.0", "block.3")) and isinstance(module, nn.Linear):
            hidden = small.model.get_submodule(layer).out_features
            assert hidden == round(0.7 * module.out_features), "hidden channels of perceptrons go"
        if isinstance(module, Attention):
            left = small.model.get_submodule(layer).out_proj.in_features  # type: ignore[union-attr]
            heads = module.out_proj.in_features // module.head_size
            assert left == round(0.7 * heads) * module.head_size, "heads go"
    if name in EXPORTED:
        path = export_onnx(small.model, images, tmp_path / "small.onnx")
        for runtime in RUNTIMES.values():
            pytest.importorskip(runtime.package)
            (ran,) = runtime.prepare(path, {INPUT_NAME: images.numpy()}, threads=1)()
            assert np.abs(ran - found.numpy()).max() <= 1e-4 * largest, runtime.title


@pytest.mark.parametrize("multiple", [4, 8])
def test_widths_become_multiples(multiple: int) -> None:
    model = lively(models.mobilenet_v2)
    images = torch.randn(1, 3, 32, 32)
    small = shrink_to(model, images, density=0.6, round_to=multiple).model
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % multiple == 0, name
