"""Channels of whole networks: torchvision's, and LeNet-5 pruned weight by weight."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from secateur.channels import ChannelGraph, compact, fold_constants, replay, shrink
from secateur.reference import build
from secateur.zoo import lenet5


def randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give biases, scales and statistics random values, so that zero filters emit something."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def zero_filters(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Zero the filters of 30 % of all channels, wherever each is made."""
    for group in ChannelGraph(model, images).groups:
        dead = torch.rand(group.channels, generator=generator) < 0.3
        dead[list(group.kept_whole)] = False
        for member in group.members:
            module = model.get_submodule(member.module)
            if member.side == "out" and isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.data[dead[member.channel]] = 0


SMALL = (1, 28, 28)
RGB = (3, 32, 32)
LARGE = (3, 64, 64)


@pytest.mark.parametrize(
    ("reference", "arguments", "image", "left"),
    [
        ("torchvision.models:resnet18", {"num_classes": 10}, LARGE, 0.5),
        ("torchvision.models:mobilenet_v2", {"num_classes": 10}, LARGE, 0.55),
        ("torchvision.models:densenet121", {"num_classes": 10}, LARGE, 0.55),
        ("torchvision.models:vgg16", {"num_classes": 10}, LARGE, 0.52),
        ("secateur.zoo:lenet5_wide", {}, SMALL, 0.55),
        ("secateur.zoo:vgg7", {"width": 0.25}, SMALL, 0.55),
        ("secateur.zoo:vgg7", {"channels": 3, "width": 0.25}, RGB, 0.55),
        ("secateur.zoo:vgg7", {"width": 0.125, "head": "average"}, SMALL, 0.55),
        ("secateur.zoo:vgg7", {"channels": 3, "head": "average", "width": 0.5}, RGB, 0.55),
        ("secateur.zoo:mobilenet_v2", {"width": 0.25}, SMALL, 0.6),
        ("secateur.zoo:mobilenet_v2", {"channels": 3}, RGB, 0.6),
    ],
)
def test_networks_without_their_dead_channels(
    reference: str, arguments: dict[str, object], image: tuple[int, ...], left: float
) -> None:
    pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(0)
    model = randomized(build(reference, arguments), generator)
    images = torch.randn(2, *image, generator=generator)
    zero_filters(model, images, generator)
    small = compact(model, images)
    with torch.no_grad():
        expected, found = model(images), small.model.eval()(images)
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small.model))
    assert after <= left * before
    with torch.device("meta"):  # random weights would be overwritten anyway
        fresh = build(reference, arguments)
    again = replay(json.loads(json.dumps(small.kept)), fresh)
    again.load_state_dict(small.model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), found)


def test_shrink_halves_the_widths_of_a_residual_network_in_eights() -> None:
    models = pytest.importorskip("torchvision").models
    model = models.resnet18(num_classes=10)
    small = shrink(model, torch.zeros(1, 3, 64, 64), density=0.5, round_to=8)
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d):
            dense = model.get_submodule(name)
            assert module.out_channels == dense.out_channels // 2
            assert module.in_channels in (3, dense.in_channels // 2)
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def sparse_lenet() -> nn.Module:
    """LeNet-5 in double precision with 4,305 random weights: 100 times fewer."""
    generator = torch.Generator().manual_seed(0)
    model = lenet5().double()
    kept = {"conv1": 150, "conv2": 1500, "fc1": 2300, "fc2": 355}
    with torch.no_grad():
        for name, layer in model.named_children():
            mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
            mask[torch.randperm(len(mask), generator=generator)[: kept[name]]] = True
            values = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(values * mask.view(layer.weight.shape))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
            layer.bias[torch.rand(layer.bias.shape, generator=generator) < 0.3] = 0
            if name.startswith("conv"):
                layer.weight[:3] = 0  # some filters without weights, besides the random ones
    return model


def without_effect(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the weights that no logit depends on, by differentiating them on many images."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    logits = model(images)
    seen = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    gradients = torch.autograd.grad((logits * seen).sum(), list(weights.values()))
    for name, gradient in zip(weights, gradients, strict=True):
        found[name] = gradient == 0
    return found


def passes_relu(model: nn.Module, images: Tensor) -> Tensor:
    """Return which units of fc1 are positive for one of the images."""
    seen: list[Tensor] = []
    handle = model.fc1.register_forward_hook(lambda m, given, made: seen.append(made))
    model(images)
    handle.remove()
    return (seen[0] > 0).any(dim=0)


def test_unreachable_weights_are_exactly_those_without_effect() -> None:
    model = sparse_lenet()
    generator = torch.Generator().manual_seed(2)
    images = 20 * torch.randn(512, 1, 28, 28, generator=generator, dtype=torch.float64)
    images += 100 * torch.randn(512, 1, 1, 1, generator=generator, dtype=torch.float64)
    graph = ChannelGraph(model, images[:1])

    for _ in range(2):  # before folding constants, and after
        unreachable = graph.unreachable()
        measured = without_effect(model, images)
        assert unreachable.keys() == measured.keys()
        for name, mask in unreachable.items():
            assert not bool((mask & ~measured[name]).any()), name
            missed = measured[name] & ~mask
            passes = passes_relu(model, images)  # slopes say nothing of a unit that never does
            if name.startswith("fc"):
                missed &= passes[:, None] if name == "fc1.weight" else passes
            assert not bool(missed.any()), name

        weights = dict(model.named_parameters())
        with torch.no_grad():
            logits = model(images[:8])
            for name, mask in unreachable.items():  # and the brute force itself, on a few
                live = (mask & (weights[name] != 0)).nonzero()[:10]
                for position in map(tuple, live.tolist()):
                    value = weights[name][position].clone()
                    weights[name][position] = 0
                    assert torch.equal(model(images[:8]), logits)
                    weights[name][position] = value

            fold_constants(graph)
            gap = float((model(images[:8]) - logits).abs().max())
            assert gap <= 1e-12 * float(logits.abs().max())
            for name, mask in graph.constant_reads().items():
                assert not bool((mask & (weights[name] != 0)).any())


def test_other_weights_can_be_asked_about() -> None:
    model = lenet5()
    graph = ChannelGraph(model, torch.zeros(1, 1, 28, 28))
    assert not any(bool(mask.any()) for mask in graph.unreachable().values())
    changed = model.fc2.weight.detach().clone()
    changed[:, 7] = 0
    masks = graph.unreachable({"fc2.weight": changed})
    assert bool(masks["fc1.weight"][7].all())
    assert int(masks["fc1.weight"].sum()) == 800
    assert not bool(masks["fc2.weight"].any())


def test_a_sparse_lenet_becomes_a_small_dense_one() -> None:
    model = sparse_lenet()
    images = torch.randn(8, 1, 28, 28, dtype=torch.float64)
    small = compact(model, images)
    with torch.no_grad():
        expected, found = model(images), small.model(images)
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())
    assert small.model.fc1.out_features < 300
    assert ChannelGraph(small.model, images).flow().unreachable()["fc1.weight"].sum() == 0
