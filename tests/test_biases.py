"""Biases of layers that run in integers: multiples of what these hold, in the network itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.artifact.onnx import OnnxModel, export_onnx
from secateur.artifact.packed import unpack
from secateur.codec import Quantized
from secateur.posttraining import round_biases
from secateur.quantizers import FixedQuantizer, attach_input
from secateur.sets import Levels

STEP = 0.021


def on_levels(layer: Any, bits: int, by_row: bool) -> Quantized:
    """Put the weight of a layer on levels, which are returned."""
    most = 2 ** (bits - 1) - 1
    levels = torch.randint(-most, most + 1, layer.weight.shape, dtype=torch.int16)
    scales = tuple((torch.rand(len(levels)) / 4 / most + 0.01).tolist())
    found = Quantized(levels, scales if by_row else scales[0], bits, True)
    layer.weight.data = found.weight(torch.float32)
    return found


def lively(norm: Any) -> nn.Module:
    """Give a BatchNorm statistics, and a scale of either sign where it has one."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 4)
    if norm.affine:
        norm.weight.data.uniform_(0.3, 2).mul_(
            torch.where(torch.rand(len(norm.weight)) < 0.3, -1, 1)
        )
        norm.bias.data.normal_()
    return norm


def unit_of(model: nn.Module, levels: Quantized) -> Tensor:
    """Return what an integer of a bias stands for behind the BatchNorm, by its definition."""
    scale = levels.scales().flatten().expand(len(levels.levels)) * STEP
    if len(model) == 1:  # type: ignore[arg-type]
        return scale
    norm: Any = model[1]  # type: ignore[index]
    gamma = norm.weight.detach() if norm.affine else 1.0
    return scale * gamma / (norm.running_var + norm.eps).sqrt()


def require_multiples(added: Tensor, unit: Tensor) -> None:
    """Check that all are whole numbers of a unit, as nearly as float32 holds a running mean."""
    whole = added.detach().double() / unit.detach()
    assert float((whole - whole.round()).abs().max()) < 0.02


@settings(max_examples=40)
@given(
    bits=st.integers(2, 8),
    bias=st.booleans(),
    norm=st.sampled_from(["none", "affine", "plain"]),
    ends=st.sampled_from([(0, 255), (-127, 127)]),
    by_row=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_is_added_becomes_whole(
    bits: int, bias: bool, norm: str, ends: tuple[int, int], by_row: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(32, 6, 3, bias=bias))
    if norm != "none":
        model.append(lively(nn.BatchNorm2d(6, affine=norm == "affine")))
    levels = on_levels(model[0], bits, by_row)
    attach_input(model[0], FixedQuantizer(STEP, *ends))
    nothing = torch.zeros(1, 32, 3, 3)

    def added() -> Tensor:
        return copy.deepcopy(model).double()(nothing.double()).flatten().detach()

    model.eval()
    before, weight = added(), model[0].weight.clone()
    round_biases(model, {"0.weight": levels}, nothing)
    after, unit = added(), unit_of(model, levels)
    require_multiples(after, unit)
    assert bool(((after - before).abs() <= unit.abs() * 0.52).all())
    assert torch.equal(model[0].weight, weight)
    round_biases(model, {"0.weight": levels}, nothing)
    torch.testing.assert_close(added(), after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ends", [(0, 15), (-7, 7), None])
def test_layers_that_do_not_run_in_integers_are_left(ends: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 6, 3), lively(nn.BatchNorm2d(6))).eval()
    levels = on_levels(model[0], 4, True)
    if ends:
        attach_input(model[0], FixedQuantizer(STEP, *ends))
    before = copy.deepcopy(model.state_dict())
    round_biases(model, {"0.weight": levels}, torch.zeros(1, 16, 3, 3))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_norms_that_cannot_be_folded_are_left() -> None:
    """Of a linear layer, and with a channel that it makes a constant, a BatchNorm stays in ONNX."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 6), lively(nn.BatchNorm1d(6)))
    constant = nn.Sequential(nn.Conv2d(16, 6, 3), lively(nn.BatchNorm2d(6)))
    constant[1].weight.data[2] = 0
    for model, nothing in ((linear, torch.zeros(1, 64)), (constant, torch.zeros(1, 16, 3, 3))):
        levels = on_levels(model.eval()[0], 4, True)
        attach_input(model[0], FixedQuantizer(STEP, 0, 255))
        before = copy.deepcopy(model[1].state_dict())
        round_biases(model, {"0.weight": levels}, nothing)
        assert all(torch.equal(before[name], each) for name, each in model[1].state_dict().items())
        require_multiples(model[0](nothing).flatten(), levels.scales().flatten() * STEP)


def test_rows_of_zeros_keep_their_biases() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 6, 3)
    levels = on_levels(layer, 4, True)
    levels.levels[2] = 0
    before = layer.bias[2].item()  # type: ignore[index]
    attach_input(layer, FixedQuantizer(STEP, 0, 255))
    round_biases(layer, {"weight": levels}, torch.zeros(1, 16, 3, 3))
    assert layer.bias[2].item() == before  # type: ignore[index]


def test_layers_that_share_a_weight_each_have_such_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    levels = on_levels(model[0], 4, True)
    model[2].weight = model[0].weight
    for layer in (model[0], model[2]):
        attach_input(layer, FixedQuantizer(STEP, 0, 255))
    round_biases(model.eval(), {"0.weight": levels}, torch.zeros(1, 32))
    for layer in (model[0], model[2]):
        assert isinstance(layer.bias, Tensor)
        require_multiples(layer.bias, levels.scales().flatten() * STEP)


def deep() -> tuple[nn.Sequential, dict[str, Quantized]]:
    """Return a network whose depthwise layers read 8 bits, and whose others 3, all weights few."""
    torch.manual_seed(3)
    model, wide = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()), 24
    for _ in range(5):
        model.extend(
            [
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                lively(nn.BatchNorm2d(wide)), nn.ReLU(),
                nn.Conv2d(wide, wide, 1, bias=False), lively(nn.BatchNorm2d(wide)), nn.ReLU(),
            ]
        )  # fmt: skip
    model.extend([nn.Flatten(), nn.Linear(wide * 64, 10)])
    layers = [(name, each) for name, each in model.named_children() if hasattr(each, "weight")]
    quantized = {}
    for name, layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            continue
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        quantized[f"{name}.weight"] = on_levels(layer, 5 if depthwise else 3, True)
        if name != "0":
            attach_input(
                layer, FixedQuantizer(0.02 if depthwise else 0.6, 0, 255 if depthwise else 7)
            )
    return model.eval(), quantized


def test_files_of_deep_networks_of_few_bits_compute_what_the_network_does(tmp_path: Path) -> None:
    """Biases that only the file rounds end in every output, since layers behind amplify them."""
    model, quantized = deep()
    images = torch.randn(64, 1, 8, 8)
    sc.posttraining.reestimate(model, [images])

    def off() -> Tensor:
        path = export_onnx(model, images[:2], tmp_path / "m.onnx", quantized)
        expected = model(images).detach()
        return (OnnxModel(path)(images) - expected).abs().amax(1) / expected.abs().max()

    assert float(off().median()) > 1e-3
    round_biases(model, quantized, images[:2])
    assert float(off().median()) < 1e-6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, bias=False), lively(nn.BatchNorm2d(16)), nn.ReLU(),
        nn.Conv2d(16, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 10),
    ).eval()  # fmt: skip


def require_whole(model: Any, quantized: dict[str, Quantized]) -> None:
    """Check what each layer of :func:`network` adds, by what it returns for nothing."""
    for name, behind in (("0", "1"), ("3", ""), ("6", "")):
        layer: Any = model.get_submodule(name)
        nothing = torch.zeros(1, *layer.weight.shape[1:])
        added, gain = layer(nothing).flatten(), torch.ones(len(layer.weight))
        if behind:
            norm: Any = model.get_submodule(behind)
            added = norm(added.view(1, -1, 1, 1)).flatten()
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        scale = quantized[f"{name}.weight"].scales().flatten()
        unit = gain * layer.input_quantizer.step * scale
        require_multiples(added, unit)
        assert bool((added.abs() > unit.abs()).any())


def test_quantized_networks_have_such_biases() -> None:
    model = network()
    found = sc.posttraining.quantize(model, [torch.rand(64, 1, 28, 28)], Levels(4, zero=True))
    require_whole(model, found.quantized)


def test_trained_networks_have_such_biases(tmp_path: Path) -> None:
    splits = data.fewer(data.load("digits"), 320)
    task = sc.Task(network(), splits.train, splits.validation, splits.test)
    stage = {"method": "djpq", "quantizer": "lsq", "gates": "none", "learn_bits": False}
    recipe = {
        "train": {"epochs": 1, "threads": 1, "lr": 5e-3},
        "stages": [{**stage, "bits": 4, "activation_bits": 8, "epochs": 2, "lr": 1e-3}],
    }
    result = sc.compress(task, recipe, out=tmp_path)
    found = unpack(tmp_path / "model.secateur", network())
    require_whole(found.model, dict(found.quantized))
    assert result.report["accuracy"]["decoded"] == result.report["accuracy"]["compressed"]
    assert result.report["parity"]["agreement"]["onnx"] == 1
