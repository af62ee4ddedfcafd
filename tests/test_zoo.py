"""Residual networks of the zoo against published totals and closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import zoo
from secateur.cost import inspect
from secateur.errors import SecateurError
from secateur.zoo.resnet import ResNet, Shortcut

RESNETS = {8: zoo.resnet8, 20: zoo.resnet20, 56: zoo.resnet56}


@pytest.mark.parametrize(("depth", "published"), [(20, 41.5), (56, 128.5)])
def test_bops_at_32_bits_are_those_that_papers_state(depth: int, published: float) -> None:
    images = torch.zeros(1, 3, 32, 32)
    assert inspect(RESNETS[depth](channels=3), images).bops / 1e9 == pytest.approx(
        published, abs=0.05
    )
    with_weights = inspect(RESNETS[depth](channels=3, shortcut="B"), images).bops / 1e9
    assert with_weights > published + 0.2  # so the published networks have shortcuts of kind A


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [(20, "A", 269_722), (20, "B", 272_474), (56, "A", 853_018), (56, "B", 855_770)],
)
def test_parameters_for_cifar_are_those_of_other_implementations(
    depth: int, shortcut: str, parameters: int
) -> None:
    network = RESNETS[depth](channels=3, shortcut=shortcut)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("depth", RESNETS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_parameters_and_macs_in_closed_form(depth: int, channels: int, shortcut: str) -> None:
    blocks, classes = (depth - 2) // 6, 7
    network = RESNETS[depth](classes, channels, shortcut)
    macs, kernels, norms = channels * 16 * 9 * 28**2, channels * 16 * 9, 2 * 16
    for inputs, outputs, side in ((16, 16, 28), (16, 32, 14), (32, 64, 7)):
        group = (inputs + (2 * blocks - 1) * outputs) * outputs * 9
        norm = 2 * outputs * 2 * blocks
        if shortcut == "B" and inputs != outputs:
            group, norm = group + inputs * outputs, norm + 2 * outputs
        macs, kernels, norms = macs + group * side**2, kernels + group, norms + norm
    cost = inspect(network, torch.zeros(1, channels, 28, 28))
    assert cost.parameters == kernels + norms + 64 * classes + classes
    assert cost.macs == macs + 64 * classes
    assert cost.uncounted == ()


def reference(network: ResNet, images: Tensor) -> Tensor:
    """He et al.'s equations written once more, as one loop over convolutions by name."""
    layers = dict(network.named_modules())

    def convolve(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        return layers[norm](functional.conv2d(x, layers[name].weight, stride=stride, padding=1))

    x = convolve(images, "conv1", "bn1").relu()
    for group in (1, 2, 3):
        for block in range(len(layers[f"layer{group}"])):
            path, stride = f"layer{group}.{block}", 2 if group > 1 and block == 0 else 1
            y = convolve(x, f"{path}.conv1", f"{path}.bn1", stride).relu()
            y = convolve(y, f"{path}.conv2", f"{path}.bn2")
            if f"{path}.shortcut.0" in layers:
                x = layers[f"{path}.shortcut.1"](layers[f"{path}.shortcut.0"](x))
            else:
                x = functional.avg_pool2d(x, 1, stride)  # a pool of one pixel picks it
            y[:, : x.shape[1]] += x
            x = y.relu()
    return network.fc(x.flatten(2).mean(2))


@pytest.mark.parametrize("build", [zoo.resnet8, zoo.resnet20])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("side", [28, 15])
def test_resnets_compute_the_equations(
    build: Callable[..., ResNet], shortcut: str, side: int
) -> None:
    torch.manual_seed(0)
    network = build(shortcut=shortcut).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 1, side, side)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(network, images))


def test_the_shortcut_without_weights_keeps_channels_in_place() -> None:
    images = torch.randn(2, 3, 5, 4)
    shorter = Shortcut(3, 5)(images)
    assert shorter.shape == (2, 5, 3, 2)
    assert torch.equal(shorter[:, :3], images[:, :, ::2, ::2])
    assert not shorter[:, 3:].any()


def test_an_unknown_shortcut_is_refused() -> None:
    with pytest.raises(SecateurError, match="shortcut: 'C'"):
        zoo.resnet8(shortcut="C")  # type: ignore[arg-type]
