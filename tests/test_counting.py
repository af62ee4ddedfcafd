"""What is counted: against other counters on networks of many families; what is not, by name."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from secateur.cost import Cost, inspect
from tiny import Calls

models = pytest.importorskip("torchvision.models")

FAMILIES: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "googlenet": {"init_weights": False},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "vit_b_32": {"image_size": 64},
}
IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request: pytest.FixtureRequest) -> tuple[nn.Module, Cost]:
    """A network of each family and what it costs for 64x64 pixels."""
    model = models.get_model(request.param, weights=None, **FAMILIES[request.param]).eval()
    return model, inspect(model, IMAGE)


def test_torch_counts_two_operations_for_each_of_ours(counted: tuple[nn.Module, Cost]) -> None:
    model, cost = counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(IMAGE.to("meta"))
    assert counter.get_total_flops() == 2 * cost.macs
    assert cost.uncounted == ()


def test_fvcore_counts_the_same_products(counted: tuple[nn.Module, Cost]) -> None:
    """It has its own formulas, adds normalization and pooling, and leaves out fused attention."""
    fvcore = pytest.importorskip("fvcore.nn")
    model, cost = counted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        analysis = fvcore.FlopCountAnalysis(model, IMAGE)
        products = analysis.by_operator()
        unsupported = analysis.unsupported_ops()
    free = {"batch_norm", "layer_norm", "adaptive_avg_pool2d"}
    found = sum(count for name, count in products.items() if name not in free)
    attention = sum(layer.activation_macs for layer in cost.layers)
    if unsupported["aten::scaled_dot_product_attention"]:
        blocks, tokens, width = 12, (64 // 32) ** 2 + 1, 768
        assert attention == blocks * 2 * tokens**2 * width
        found += attention
    assert found == cost.macs


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "regnet_y_400mf"])
def test_torchinfo_also_counts_biases_and_norms(name: str) -> None:
    """Both are additions; of linear layers over several tokens, it counts one token."""
    torchinfo = pytest.importorskip("torchinfo")
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = models.get_model(name, weights=None).to("meta")
    image = IMAGE.to("meta")
    cost = inspect(model, image)
    found = torchinfo.summary(model, input_data=image, verbose=0, device="meta").total_mult_adds
    own = {name: dict(module.named_parameters(recurse=False)) for name, module in
           model.named_modules()}  # fmt: skip
    biases = sum(layer.outputs for layer in cost.layers if layer.macs and "bias" in own[layer.name])
    norms = sum(layer.parameters for layer in cost.layers if not layer.macs)
    assert found == cost.macs + biases + norms


@torch.library.custom_op("secateur_test::product", mutates_args=())
def product(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T


EXOTIC: dict[str, tuple[nn.Module, tuple[Any, ...], str]] = {
    "operator of a user": (
        Calls(lambda w, x: product(w), (3, 3)), (IMAGE,), "secateur_test.product"),
    "deformable convolution": (
        pytest.importorskip("torchvision.ops").DeformConv2d(3, 2, 3),
        (torch.zeros(1, 3, 5, 5), torch.zeros(1, 18, 3, 3)), "torchvision.deform_conv2d"),
    "bilinear form": (
        nn.Bilinear(3, 4, 5), (torch.zeros(1, 3), torch.zeros(1, 4)), "aten._trilinear"),
    "weighted bag of words": (
        nn.EmbeddingBag(9, 4), (torch.zeros(1, 6, dtype=torch.long),), "aten._embedding_bag"),
    "inverse": (
        Calls(lambda w, x: torch.linalg.inv(w + torch.eye(3)), (3, 3)), (IMAGE,),
        "aten.linalg_inv_ex"),
    "sampling grid": (
        Calls(lambda w, x: functional.grid_sample(x, w), (1, 2, 2, 2)), (IMAGE,),
        "aten.grid_sampler_2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXOTIC)
def test_what_has_no_formula_is_named_and_the_rest_is_counted(name: str) -> None:
    model, inputs, operator = EXOTIC[name]
    assert operator in inspect(model, inputs).uncounted

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.exotic = nn.Linear(5, 7), model

        def forward(self, rows: Tensor) -> Tensor:
            self.exotic(*inputs)
            return self.known(rows)  # type: ignore[no-any-return]

    cost = inspect(Within(), torch.zeros(2, 5))
    assert operator in cost.uncounted
    assert cost.macs == math.prod((2, 5, 7))


def test_the_documented_totals_are_what_the_documented_code_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "counting.md").read_text()
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed
