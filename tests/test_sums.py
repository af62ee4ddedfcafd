"""Sums and means in integers: where grids go, what files hold, what runtimes make of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from runtime_graph import optimized
from secateur.artifact import packed
from secateur.artifact.onnx import OnnxModel
from secateur.codec import Quantized
from secateur.errors import SecateurError
from secateur.measure import RUNTIMES
from secateur.posttraining import quantize
from secateur.posttraining.sums import sites
from secateur.quantizers import grids, input_quantizer, output_quantizer, regrid
from secateur.zoo import resnet8

onnx = pytest.importorskip("onnx")


class Inverted(nn.Module):
    """A block of MobileNet V2: ReLU6, a linear bottleneck, a sum without anything behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), Inverted(8), Inverted(8),
        nn.Conv2d(8, 24, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class InPlace(nn.Module):
    """A residual block as torchvision writes it: in place, one ReLU for both places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


def torchvision_like() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), InPlace(8), InPlace(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """Return a network whose norms do something."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(-0.3, 0.3, generator=generator)
    return model.eval()


NETWORKS = {"resnet8": (resnet8, 3), "mobile": (mobile, 2), "torchvision": (torchvision_like, 2)}


@pytest.mark.parametrize("name", NETWORKS)
def test_residual_networks_run_in_integers_alone(name: str, tmp_path: Path) -> None:
    build, sums = NETWORKS[name]
    torch.manual_seed(0)
    model = lively(build())
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    images = torch.randn(16, convolutions[0].in_channels, 32, 32)
    with torch.no_grad():
        dense = model(images)
        found = quantize(model, [images], profile="no_vnni", iterations=0)
        expected = model(images)
    noise = float((expected - dense).norm() / dense.norm())
    assert noise < 0.05
    path = sc.export_onnx(model, images, tmp_path / "m.onnx", found.quantized)
    assert "Clip" not in {node.op_type for node in onnx.load(path).graph.node}
    inside = optimized(path)
    assert inside["QLinearConv"] == len(convolutions)
    assert inside["QLinearAdd"] == sums
    assert not inside.keys() & {"Conv", "FusedConv", "Add", "Gemm", "Relu", "Clip"}
    for runtime in RUNTIMES.values():
        (ran,) = runtime.prepare(path, {"input": images.numpy()}, 1)()
        error = np.linalg.norm(np.array(ran) - expected.numpy()) / float(expected.norm())
        assert error < 1.5 * noise, "some roundings end beside another level"
    packed.save(tmp_path / "m", model, found.quantized, reference=None)
    assert packed.read_header(tmp_path / "m").version == 3
    again = packed.load(tmp_path / "m", build())
    assert grids(again) == grids(model)
    with torch.no_grad():
        assert torch.equal(again(images), expected)


def test_rounding_is_where_what_is_added_is_returned() -> None:
    model, images = torchvision_like().eval(), torch.randn(2, 3, 32, 32)
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d)]
    found = {each.module: each.readers for each in sites(model, layers, images)}
    assert found == {"3": ("4.conv1",), "4.bn2": (), "4": ("5.conv1",), "5.bn2": (), "5": ()}
    some = [name for name in layers if name != "5.conv1"]
    assert "4" not in {each.module for each in sites(model, some, images)}, "a float layer reads it"
    linear = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert not sites(linear, ["0", "2"], torch.randn(2, 4))
    quantize(model, [images], activation_bits=4, iterations=0)
    assert "/" not in grids(model), "fewer bits run in floats"


def test_layers_that_read_a_sum_read_its_grid() -> None:
    torch.manual_seed(0)
    model, images = lively(torchvision_like()), torch.randn(8, 3, 32, 32)
    quantize(model, [images], iterations=0)
    reads, made = input_quantizer(model[5].conv1), output_quantizer(model[4])
    assert reads is not made
    assert (reads.least, reads.most, float(reads.step)) == (made.least, made.most, float(made.step))
    steps = made(torch.randn(1000)) / made.step
    assert torch.equal(reads(made(steps)), made(steps)), "rounding twice is rounding once"
    once = grids(model)
    quantize(model, [images], iterations=0)
    assert grids(model).count("=") == once.count("=") == 5


def test_grids_of_outputs_are_text(tmp_path: Path) -> None:
    text = "u255;;;u15;;;;/layer1.0=u255;layer1.0.bn2=-120:135"
    model = regrid(resnet8(), text)
    assert grids(model) == text
    assert grids(regrid(model, "")) == ""
    only = "/=s7"
    assert grids(regrid(resnet8(), only)) == only, "the network itself"
    for bad, message in (
        ("/layer1.0", "no module and its grid"),
        ("/nowhere=u255", "no module 'nowhere'"),
        ("/layer1=u255", "no module 'layer1'"),
        ("/layer1.0=u0", "not the grid"),
    ):
        with pytest.raises(SecateurError, match=message):
            regrid(resnet8(), bad)
    packed.save(tmp_path / "m", regrid(model, text), {}, reference="secateur.zoo:resnet8")
    assert grids(packed.load(tmp_path / "m")) == text
    packed.save(tmp_path / "m", regrid(model, "u255;;;;;;;"), {}, reference=None)
    assert packed.read_header(tmp_path / "m").version == 2, "older programs read what they can"


def stored(levels: Tensor) -> dict[str, Quantized]:
    return {"0.weight": Quantized(levels, (0.01,) * len(levels), bits=7, zero=True)}


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["s127", "-100:154", "u255", "-128:127", "u254"]))
def test_every_grid_of_bytes_is_what_the_file_computes(seed: int, text: str) -> None:
    """Values far outside the grid and on its borders."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 3)).eval()
    levels = torch.randint(-63, 64, (30, 40))
    model[0].weight.data.copy_(levels * 0.01)
    regrid(model, f"{text};")[0].input_quantizer.step.fill_(0.25)
    inputs = torch.randint(-600, 600, (20, 40)) / 8
    with tempfile.TemporaryDirectory() as folder:
        path = sc.export_onnx(model, inputs, Path(folder) / "m.onnx", stored(levels))
        made = OnnxModel(path, optimized=False)(inputs)
    torch.testing.assert_close(made, model(inputs).detach(), rtol=1e-5, atol=1e-4)


def test_symmetric_grids_of_8_bits_are_integers_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    images = torch.randn(4, 3, 12, 12)
    found = quantize(model, [images], iterations=0, profile="no_vnni").quantized
    regrid(model, "s127;u255")
    step: Any = model[0].input_quantizer.step
    step.fill_(0.01)
    path = sc.export_onnx(model, images, tmp_path / "m.onnx", found)
    assert optimized(path)["QLinearConv"] == 1, "the last one returns floats"
    torch.testing.assert_close(
        OnnxModel(path)(images), model(images).detach(), rtol=1e-2, atol=2e-2
    )


def test_clips_that_do_something_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU6(), nn.Conv2d(16, 8, 3)).eval()
    model[0].weight.data.uniform_(0, 1, generator=torch.Generator().manual_seed(0))
    images = torch.rand(8, 8, 8, 8) / 2
    found = quantize(model, [images], iterations=0).quantized
    kept = {}
    for step in (6 / 255, 12 / 255):
        model[2].input_quantizer.step.fill_(step)
        path = sc.export_onnx(model, images, tmp_path / "m.onnx", found)
        kept[step] = any(node.op_type == "Clip" for node in onnx.load(path).graph.node)
        made = OnnxModel(path, optimized=False)(images)
        torch.testing.assert_close(made, model(images).detach(), rtol=1e-3, atol=1e-3)
    assert list(kept.values()) == [False, True]
