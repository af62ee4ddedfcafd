"""LeNets, VGG7 and MobileNet-V2 of the zoo against published totals, closed forms, equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import zoo
from secateur.artifact import packed
from secateur.cost import inspect
from secateur.errors import MissingDependencyError, SecateurError
from secateur.reference import build


def matrices(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("head", "gbops", "weights"),
    [("flatten", 630.7, 12_973_440), ("average", 622.7, 5_109_120)],
)
def test_vgg7_has_the_published_totals(head: str, gbops: float, weights: int) -> None:
    network = zoo.vgg7(channels=3, head=head)
    cost = inspect(network, torch.zeros(1, 3, 32, 32))
    assert cost.bops / 1e9 == pytest.approx(gbops, abs=0.06)
    assert matrices(network) == weights
    assert cost.uncounted == ()


@pytest.mark.parametrize("head", ["flatten", "average"])
@pytest.mark.parametrize("divisor", [1, 4, 8])
@pytest.mark.parametrize(("channels", "sides"), [(1, (28, 14, 7)), (3, (32, 16, 8))])
def test_vgg7_in_closed_form(
    head: str, divisor: int, channels: int, sides: tuple[int, ...]
) -> None:
    network = zoo.vgg7(7, channels, 1 / divisor, head)
    macs, inputs = 0, channels
    for side, outputs in zip(sides, (128, 256, 512), strict=True):
        outputs //= divisor
        macs += side**2 * 9 * outputs * (inputs + outputs)
        inputs = outputs
    features = inputs * (16 if head == "flatten" else 1)
    macs += 1024 // divisor * (features + 7)
    assert inspect(network, torch.zeros(1, channels, sides[0], sides[0])).macs == macs


def vgg7_equations(network: nn.Module, images: Tensor) -> Tensor:
    layers = dict(network.named_modules())
    x = images
    for block in (1, 2, 3):
        for n in (1, 2):
            kernel = layers[f"block{block}.conv{n}"].weight
            x = layers[f"block{block}.bn{n}"](functional.conv2d(x, kernel, padding=1)).relu()
        height, width = x.shape[2:]  # a side that is odd is first made even, with the least value
        x = functional.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    rows = x.flatten(1) if network.fc1.in_features > x.shape[1] else x.sum((2, 3)) / 16
    return network.fc2(network.bn(rows @ network.fc1.weight.T).relu())


@pytest.mark.parametrize("head", ["flatten", "average"])
@pytest.mark.parametrize("side", [25, 28, 32])
def test_vgg7_computes_its_equations(head: str, side: int) -> None:
    torch.manual_seed(0)
    network = zoo.vgg7(width=0.125, head=head).eval()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 1, side, side)
    with torch.no_grad():
        torch.testing.assert_close(network(images), vgg7_equations(network, images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "mean"}, "head: 'mean'"),
        ({"width": 0}, "width: 0"),
        ({"width": 0.001}, "width: 0.001 leaves no channels"),
        ({"width": -1}, "width: -1"),
    ],
)
def test_a_vgg7_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        zoo.vgg7(**arguments)


def test_lenets_have_the_published_totals() -> None:
    image = torch.zeros(1, 1, 28, 28)
    for network, macs, gbops, weights in (
        (zoo.lenet5(), 2.29, 2.35, 430_500),
        (zoo.lenet5_wide(), 4.27, 4.37, 32 * 25 + 64 * 32 * 25 + 512 * 1024 + 10 * 512),
    ):
        cost = inspect(network, image)
        assert cost.macs / 1e6 == pytest.approx(macs, abs=0.006)
        assert cost.bops / 1e9 == pytest.approx(gbops, abs=0.006)
        assert matrices(network) == weights


@pytest.mark.parametrize("build", [zoo.lenet5, zoo.lenet5_wide])
def test_lenets_compute_their_equations(build: Any) -> None:
    torch.manual_seed(0)
    network, x = build(), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        logits = network(x)
        for layer in (network.conv1, network.conv2):
            x = functional.conv2d(x, layer.weight, layer.bias)
            if build is zoo.lenet5_wide:
                x = x.clamp(min=0)
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        hidden = (x.flatten(1) @ network.fc1.weight.T + network.fc1.bias).clamp(min=0)
        torch.testing.assert_close(logits, hidden @ network.fc2.weight.T + network.fc2.bias)


def mobilenet_macs(side: int, channels: int, width: float) -> int:
    """Table 2 of arXiv 1801.04381 in a loop, with strides for small images."""

    def rounded(count: float) -> int:
        near = max(8, int(count + 4) // 8 * 8)
        return near + 8 if near < 0.9 * count else near

    inputs = rounded(32 * width)
    macs = side**2 * 9 * channels * inputs
    for factor, count, blocks, halves in (
        *((1, 16, 1, 0), (6, 24, 2, 0), (6, 32, 3, 1), (6, 64, 4, 1), (6, 96, 3, 0)),
        *((6, 160, 3, 1), (6, 320, 1, 0)),
    ):
        outputs = rounded(count * width)
        for block in range(blocks):
            hidden = inputs * factor
            macs += side**2 * inputs * hidden if factor > 1 else 0
            side = -(-side // 2) if halves and block == 0 else side
            macs += side**2 * hidden * (9 + outputs)
            inputs = outputs
    last = rounded(1280 * max(1, width))
    return macs + side**2 * inputs * last + last * 10


@pytest.mark.parametrize("width", [0.25, 1])
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (28, 3), (32, 3)])
def test_mobilenet_in_closed_form(width: float, side: int, channels: int) -> None:
    pytest.importorskip("torchvision")
    network = zoo.mobilenet_v2(channels=channels, width=width)
    cost = inspect(network, torch.zeros(1, channels, side, side))
    assert cost.macs == mobilenet_macs(side, channels, width)


def test_mobilenet_is_torchvision_s_but_for_two_strides() -> None:
    models = pytest.importorskip("torchvision.models")
    small, large = zoo.mobilenet_v2(1000, 3), models.mobilenet_v2()
    small.load_state_dict(large.state_dict())
    published = inspect(large, torch.zeros(1, 3, 224, 224)).bops
    assert published / 1e9 == pytest.approx(308.0, abs=0.06)
    for block in (small.features[0][0], small.features[2].conv[1][0]):
        block.stride = (2, 2)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(small.eval()(images), large.eval()(images))


def test_without_torchvision_the_rest_of_the_zoo_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.models", None)
    with pytest.raises(MissingDependencyError, match=r"secateur\[vision\]"):
        zoo.mobilenet_v2()
    assert zoo.vgg7(width=0.125)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", zoo.__all__)
def test_every_network_takes_small_images_by_name_and_comes_back_from_a_file(
    name: str, tmp_path: Any
) -> None:
    arguments: dict[str, Any] = {"classes": 4}
    if name in ("vgg7", "mobilenet_v2"):
        arguments |= {"channels": 3, "width": 0.125}
    network = build(f"secateur.zoo:{name}", arguments).eval()
    reference = f"secateur.zoo:{name}"
    packed.save(tmp_path / "m", network, {}, reference=reference, arguments=arguments)
    again = packed.load(tmp_path / "m").eval()
    for side in (28,) if name in ("lenet5", "lenet5_wide", "vit_tiny") else (28, 32):
        images = torch.randn(2, arguments.get("channels", 1), side, side)
        with torch.no_grad():
            assert network(images).shape == (2, 4)
            assert torch.equal(again(images), network(images))


def test_vit_computes_what_torch_does() -> None:
    torch.manual_seed(0)
    network = zoo.vit_tiny(side=8, width=24, depth=3, heads=2).eval()
    images = torch.randn(2, 1, 8, 8)
    tokens = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)  # 4 patches, 16 pixels
    tokens = tokens @ network.patches.weight.flatten(1).T + network.patches.bias + network.positions
    for block in network.blocks:
        layer = nn.TransformerEncoderLayer(24, 2, 96, 0, "gelu", batch_first=True, norm_first=True)
        own = dict(block.named_parameters())
        names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj."}
        names |= {"linear1.": "fc1.", "linear2.": "fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
        layer.load_state_dict(
            {t + k: own[s + k] for t, s in names.items() for k in ("weight", "bias")}
        )
        tokens = layer.train()(tokens)
    average = functional.layer_norm(tokens, (24,), network.norm.weight, network.norm.bias).mean(1)
    torch.testing.assert_close(network(images), network.head(average))


def test_vit_tiny_in_closed_form() -> None:
    network, images = zoo.vit_tiny(), torch.zeros(1, 1, 28, 28)
    products = 12 * (49 * 12 * 192**2 + 2 * 49**2 * 192)  # twelve blocks: matrices, attention
    cost = inspect(network, images)
    assert cost.macs == products + 49 * 16 * 192 + 192 * 10
    assert cost.uncounted == ()
    assert matrices(network) == 12 * 12 * 192**2 + 16 * 192 + 192 * 10 + 49 * 192


@pytest.mark.parametrize(
    ("changes", "named"), [({"patch": 5}, "patch, side"), ({"heads": 5}, "heads, width")]
)
def test_vit_that_cannot_be(changes: dict[str, int], named: str) -> None:
    with pytest.raises(SecateurError, match=named):
        zoo.vit_tiny(**changes)
