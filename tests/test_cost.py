"""`inspect` against published totals and closed forms."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from secateur.cost import Cost, inspect
from secateur.errors import SecateurError
from secateur.zoo import lenet5

torchvision_models = pytest.importorskip("torchvision.models")


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return torchvision_models.resnet18()


def macs_by_name(cost: Cost) -> dict[str, int]:
    return {layer.name: layer.macs for layer in cost.layers if layer.macs}


def test_resnet18_has_the_published_totals(resnet18: nn.Module) -> None:
    cost = inspect(resnet18, torch.zeros(1, 3, 224, 224))
    assert cost.parameters == 11_689_512
    assert cost.macs == 1_814_073_344
    assert cost.bops / 1e9 == pytest.approx(1857.6, abs=0.05)
    assert cost.bytes == 4 * 11_689_512
    assert cost.uncounted == ()


def test_first_and_last_layer_may_have_their_own_bits(resnet18: nn.Module) -> None:
    cost = inspect(resnet18, torch.zeros(1, 3, 224, 224), bits=(4, 4), first_last_bits=8)
    assert cost.bops / 1e9 == pytest.approx(34.71, abs=0.005)
    assert [layer.name for layer in cost.layers if layer.weight_bits == 8] == ["conv1", "fc"]
    stem, head, norms, bias = 3 * 64 * 49, 512_000, 9_600, 1_000
    inner = 11_689_512 - stem - head - norms - bias
    assert [layer.kind for layer in cost.layers if layer.weight_bits == 4].count("Conv2d") == 19
    assert cost.bytes == (stem + head) + inner / 2 + 4 * (norms + bias)


def test_layers_may_have_weight_bits_of_their_own() -> None:
    image = torch.zeros(1, 1, 28, 28)
    own = {"conv2": 3, "fc2": 4}
    cost = inspect(lenet5(), image, bits=(16, 8), first_last_bits=6, weight_bits=own)
    assert [(each.weight_bits, each.activation_bits) for each in cost.layers] == [
        *((6, 6), (3, 8), (16, 8), (4, 6)),
    ]
    assert cost.bops == 288_000 * 36 + 1_600_000 * 24 + 400_000 * 128 + 5_000 * 24
    assert cost.bytes == (500 * 6 + 25_000 * 3 + 400_000 * 16 + 5_000 * 4) / 8 + 4 * 580
    with pytest.raises(SecateurError, match=r"weight_bits of fc2: 0"):
        inspect(lenet5(), image, weight_bits={"fc2": 0})
    with pytest.raises(SecateurError, match="Did you mean 'conv2'"):
        inspect(lenet5(), image, weight_bits={"conv22": 4})


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small", "vit_b_16", "swin_t"])
def test_other_networks_have_the_published_totals(name: str) -> None:
    published = torchvision_models.get_model_weights(name).DEFAULT.meta
    cost = inspect(torchvision_models.get_model(name, weights=None), torch.zeros(1, 3, 224, 224))
    assert cost.parameters == published["num_params"]
    assert cost.macs / 1e9 == pytest.approx(published["_ops"], abs=0.0006)
    assert cost.uncounted == ()


def test_lenet5_in_closed_form() -> None:
    cost = inspect(lenet5(), torch.zeros(1, 1, 28, 28), bits=(3, 8))
    assert macs_by_name(cost) == {
        "conv1": 288_000,
        "conv2": 1_600_000,
        "fc1": 400_000,
        "fc2": 5_000,
    }
    assert cost.macs == 2_293_000
    assert cost.bops == 2_293_000 * 24
    assert cost.bytes == 430_500 * 3 / 8 + 580 * 4
    assert [layer.shape for layer in cost.layers] == [
        (20, 1, 5, 5),
        (50, 20, 5, 5),
        (500, 800),
        (10, 500),
    ]


@settings(max_examples=30)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    out_per_group=st.integers(1, 3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
)
def test_any_convolution_in_closed_form(
    groups: int,
    out_per_group: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    batch: int,
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(
        8, groups * out_per_group, kernel, stride, padding, groups=groups, dilation=dilation
    )
    images = torch.zeros(batch, 8, 9, 11)
    pixels = (images if transposed else layer(images)).shape[2:].numel()
    # each input channel meets the outputs of its group, once per kernel position and pixel
    expected = batch * pixels * 8 * out_per_group * kernel**2
    assert inspect(layer, images).macs == expected


class Functional(nn.Module):
    """Products that no layer makes: a bare kernel, an einsum, attention, a product of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(6, 4, 3, 3))
        self.mixer = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.conv2d(images, self.kernel, padding=1).flatten(2).transpose(1, 2)
        mixed = functional.linear(maps, self.mixer.weight)
        heads = functional.scaled_dot_product_attention(
            mixed[:, None], maps[:, None], maps[:, None]
        )
        return (
            torch.einsum("bhnc,bnc->bh", heads, maps) + self.kernel[0, 0, 0] @ images[0, 0, 0, :3]
        )


def test_functional_operations_count_for_the_holder_of_the_weight() -> None:
    cost = inspect(Functional(), torch.zeros(1, 4, 5, 5))
    attention, einsum, dot = 2 * 25 * 25 * 6, 25 * 6, 3
    assert macs_by_name(cost) == {
        "": 25 * 6 * 4 * 9 + attention + einsum + dot,
        "mixer": 25 * 6 * 6,
    }


def test_attention_layers_count_projections_and_products() -> None:
    tokens, width = 7, 12
    layer = nn.TransformerEncoderLayer(width, 3, dim_feedforward=20, batch_first=True)
    cost = inspect(layer, torch.zeros(1, tokens, width))
    assert macs_by_name(cost) == {
        "self_attn": tokens * width * 3 * width + 2 * tokens * tokens * width,
        "self_attn.out_proj": tokens * width * width,
        "linear1": tokens * width * 20,
        "linear2": tokens * 20 * width,
    }


def test_recurrent_layers_count_every_step() -> None:
    cost = inspect(nn.LSTM(3, 5, batch_first=True), torch.zeros(1, 7, 3))
    assert cost.macs == 7 * 4 * 5 * (3 + 5)
    assert cost.uncounted == ()


class Unknown(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.cdist(torch.fft.rfft2(images).abs(), torch.ones(3, 3))


def test_operations_without_a_formula_are_named() -> None:
    cost = inspect(Unknown(), torch.zeros(1, 1, 4, 4))
    assert cost.macs == 0
    assert {"aten._fft_r2c", "aten._cdist_forward"} <= set(cost.uncounted)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def test_shared_parameters_count_once_and_macs_for_the_layer_that_runs() -> None:
    cost = inspect(Tied(), torch.zeros(1, 6, dtype=torch.long))
    assert cost.parameters == 44
    assert macs_by_name(cost) == {"head": 6 * 44}


def test_a_layer_used_twice_costs_twice_and_is_stored_once() -> None:
    layer = nn.Linear(5, 5)
    cost = inspect(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 5))
    assert (cost.macs, cost.parameters) == (50, 30)


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight @ weight.T).sum()


def test_what_a_parametrization_computes_is_not_the_network_s_cost() -> None:
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Masked())
    cost = inspect(nn.Sequential(layer), torch.zeros(1, 6), bits=(4, 8))
    assert macs_by_name(cost) == {"0": 24}
    assert (cost.layers[0].kind, cost.layers[0].shape) == ("Linear", (4, 6))
    assert cost.bytes == 24 / 2 + 4 * 4


class DataDependent(nn.Module):
    """Cannot run without data, keeps state, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 3)
        self.seen: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        rows.add_(1)
        self.seen.append(self.norm(rows))
        return self.layer(rows) if rows.sum() > 0 else rows


@pytest.mark.parametrize("model", [DataDependent(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())])
def test_the_model_and_the_input_come_back_untouched(model: nn.Module) -> None:
    model.train()
    list(model.modules())[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rows, generator = torch.ones(2, 3), torch.get_rng_state()
    cost = inspect(model, rows)
    assert cost.macs == (18 if isinstance(model, DataDependent) else 0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(rows, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), generator)
    assert getattr(model, "seen", []) == []


def test_large_networks_need_no_arithmetic() -> None:
    start = time.process_time()
    cost = inspect(
        nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(30)]), torch.zeros(9, 64, 300, 300)
    )
    assert cost.macs > 5e11
    assert time.process_time() - start < 5


def test_several_inputs_are_a_tuple() -> None:
    layer = nn.Bilinear(3, 4, 5)
    assert inspect(layer, (torch.zeros(1, 3), torch.zeros(1, 4))).parameters == 65


def test_layers_may_have_bits_of_their_own() -> None:
    example = torch.zeros(1, 1, 28, 28)
    plain = {each.name: each.macs for each in inspect(lenet5(), example).layers}
    own = {"weight_bits": {"fc1": 2}, "activation_bits": {"fc1": 3}}
    cost = inspect(lenet5(), example, (4, 8), first_last_bits=8, **own)
    bits = {"conv1": 64, "conv2": 32, "fc1": 6, "fc2": 64}
    assert cost.bops == sum(plain[name] * product for name, product in bits.items())


def test_to_dict_is_json_with_the_stable_names(resnet18: nn.Module) -> None:
    cost = inspect(resnet18, torch.zeros(1, 3, 64, 64), bits=(8, 4))
    read = json.loads(json.dumps(cost.to_dict()))
    assert read["total"] == {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "effective_macs": cost.effective_macs,
        "bops": cost.bops,
        "bytes": cost.bytes,
    }
    assert sum(layer["macs"] for layer in read["layers"]) == cost.macs
    assert read["bits"] == {"weights": 8, "activations": 4, "first_last": None}
    assert read["uncounted"] == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits": (0, 8)}, "weight_bits: 0"),
        ({"bits": (8, 33)}, "activation_bits: 33"),
        ({"first_last_bits": -1}, "first_last_bits: -1"),
        ({"weight_bits": {"fc1": 40}}, "weight_bits of fc1: 40"),
        ({"activation_bits": {"fc9": 8}}, "activation_bits: .*'fc9'.*fc"),
        ({"example_input": torch.zeros(1, 2, 28, 28)}, "1x2x28x28"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(SecateurError, match=field) as caught:
        inspect(lenet5(), **({"example_input": torch.zeros(1, 1, 28, 28)} | arguments))  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) <= 3
