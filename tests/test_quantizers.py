"""Quantizers against closed forms, finite differences and plain autograd; attached to networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur import quantizers as q
from secateur.channels import ChannelGraph, compact
from secateur.methods.latent import scale_slope
from secateur.quantizers import Quantizer, quantize
from secateur.zoo import resnet8

values = st.lists(st.floats(-3, 3), min_size=1, max_size=30)
steps, limits, powers = st.floats(0.02, 0.7), st.floats(0.71, 2.5), st.floats(0.5, 2.0)


def tensors(*numbers: float) -> list[Tensor]:
    return [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in numbers]


def rounded(x: Tensor) -> Tensor:
    """Round to even by Python's own rule."""
    return torch.tensor([float(round(each)) for each in x.tolist()], dtype=x.dtype)


def warp(x: Tensor, limit: Tensor, power: Tensor) -> Tensor:
    """sgn(x) min(|x|, q)^t, written with other operators than the library's."""
    clipped = torch.where(x.abs() < limit, x.abs(), limit * torch.ones_like(x))
    return torch.copysign((clipped.log() * power).exp(), x)


@given(values, steps, limits, powers)
def test_the_power_quantizer_rounds_and_has_the_closed_form_gradients(
    numbers: list[float], d: float, limit: float, t: float
) -> None:
    x = torch.tensor(numbers, dtype=torch.float64) + 1e-3 * math.sqrt(2)  # off ties, ends and 0
    x.requires_grad_(True)
    step, q_m, power = tensors(d, limit, t)
    y = quantize(x, step, q_m, power)
    ratio = warp(x, q_m, power).detach() / step.detach()
    assert torch.allclose(y, rounded(ratio) * d, atol=1e-12)
    gradient = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    y.backward(gradient)
    sign, magnitude, inside = x.sign(), x.abs(), (x.abs() < limit).double()
    with torch.no_grad():
        forms = {
            "d": (step, rounded(ratio) - ratio),
            "q": (q_m, (1 - inside) * sign * t * limit ** (t - 1)),
            "t": (
                power,
                sign
                * (
                    inside * magnitude**t * magnitude.log()
                    + (1 - inside) * limit**t * math.log(limit)
                ),
            ),
        }
        for name, (parameter, form) in forms.items():
            assert parameter.grad is not None, name
            assert torch.isclose(parameter.grad, form @ gradient, rtol=1e-9, atol=1e-9), name
        by_x = inside * t * magnitude ** (t - 1) * gradient
        assert x.grad is not None
        assert torch.allclose(x.grad, by_x, rtol=1e-9, atol=1e-12)


@given(values, steps, limits, powers, st.booleans())
def test_gradients_are_finite_differences_of_the_surrogate(
    numbers: list[float], d: float, limit: float, t: float, warped: bool
) -> None:
    """Rounding counts as adding what it adds here: d r(x~/d) becomes x~ + d (r - x~/d)."""
    x = torch.tensor(numbers, dtype=torch.float64) + 1e-3 * math.sqrt(2)
    x = x[(x.abs() - limit).abs() > 1e-4]
    at = [d, limit, t if warped else 1.0]
    ratio = warp(x, *tensors(*at[1:])).detach() / d
    error = rounded(ratio) - ratio

    def surrogate(d: float, limit: float, t: float) -> float:
        return float((warp(x, *tensors(limit, t)) + d * error).detach().sum())

    parameters = tensors(*at)
    step, q_m, power = parameters
    quantize(x.requires_grad_(True), step, q_m, power if warped else None).sum().backward()
    x = x.detach()
    for i in range(3 if warped else 2):
        ahead, behind = list(at), list(at)
        ahead[i] += 1e-6
        behind[i] -= 1e-6
        expected = (surrogate(*ahead) - surrogate(*behind)) / 2e-6
        assert float(parameters[i].grad or 0) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(values, steps, limits, st.booleans(), st.booleans())
def test_the_fused_linear_form_is_plain_autograd_with_straight_through_rounding(
    numbers: list[float], d: float, limit: float, signed: bool, channels: bool
) -> None:
    x = torch.tensor([numbers, numbers[::-1]], dtype=torch.float64) + 1e-3 * math.sqrt(2)
    found, expected = [], []
    for results, fused in ((found, True), (expected, False)):
        own = x.clone().requires_grad_(True)
        step, q_m = tensors(d, limit)
        wide = (step.expand(2, 1) * 1, q_m.expand(2, 1) * 1) if channels else (step, q_m)
        if fused:
            y = quantize(own, *wide, signed=signed)
        else:
            low = -wide[1] if signed else torch.zeros_like(wide[1])
            ratio = torch.minimum(torch.maximum(own, low), wide[1]) / wide[0]
            y = wide[0] * (ratio + (ratio.round() - ratio).detach())
        (y * torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)).sum().backward()
        results += [y.detach(), own.grad, step.grad, q_m.grad]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@given(values, st.floats(0.05, 2), st.integers(2, 5))
def test_at_one_width_the_step_has_the_gradient_of_lsq(
    numbers: list[float], scale: float, bits: int
) -> None:
    """The same as that of scales which are trained on a fixed support."""
    x = torch.tensor(numbers, dtype=torch.float64) + 1e-3 * math.sqrt(2)
    quantizer = Quantizer(bits, widths=(bits,)).double()
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        quantizer.log2_limit.copy_(torch.tensor(scale * most, dtype=torch.float64).log2())
    quantizer(x).sum().backward()
    slope = float(scale_slope(x, scale, range(most + 1)).sum())
    expected = slope / math.sqrt(len(x) * most) * scale * math.log(2)  # by log2 of the step
    assert float(quantizer.log2_limit.grad) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@given(st.floats(-8, 3), st.floats(-3, 3), powers, st.booleans())
def test_bits_are_those_of_the_formula_and_widths_hold_every_level(
    log2_step: float, log2_limit: float, t: float, signed: bool
) -> None:
    quantizer = Quantizer(8, signed=signed, power=True)
    with torch.no_grad():
        quantizer.log2_limit.fill_(log2_limit)
        quantizer.log2_step.fill_(log2_step)  # type: ignore[union-attr]
        quantizer.power.fill_(t)  # type: ignore[union-attr]
    quantizer.bound(2, 16)
    d, q_t = (float(each.detach()) for each in (quantizer.step, quantizer.top))
    bits = math.log2(q_t / d + 1) + signed
    assert float(quantizer.bits()) == pytest.approx(bits, rel=1e-5)
    assert 2 - 1e-4 <= bits <= 16 + 1e-4
    levels = 2 * round(q_t / d) + 1 if signed else round(q_t / d) + 1
    assert quantizer.width == math.ceil(math.log2(levels))


def test_a_fractional_number_of_bits_is_never_counted_down() -> None:
    """8.4 real bits make 337 levels, which 8 bits cannot hold."""
    quantizer = Quantizer(8, power=True)
    with torch.no_grad():
        quantizer.log2_step.fill_(-math.log2(2**7.4 - 1))  # type: ignore[union-attr]
    x = torch.linspace(-1, 1, 10_001)
    assert len(quantizer(x).unique()) == 337
    assert quantizer.width == 9


@pytest.mark.parametrize("bits", [3.2, 4.0, 7.9])
def test_allowed_widths_round_bits_up_and_the_step_beneath_can_still_come_down(bits: float) -> None:
    quantizer = Quantizer(8, power=True, widths=(2, 4, 8, 16))
    with torch.no_grad():
        quantizer.log2_step.fill_(-math.log2(2 ** (bits - 1) - 1))  # type: ignore[union-attr]
    assert quantizer.width == (4 if bits <= 4 else 8)
    assert float(quantizer.step) == pytest.approx(1 / (2 ** (quantizer.width - 1) - 1))
    assert float(quantizer.bits()) == pytest.approx(bits, rel=1e-5)
    (quantizer(torch.randn(50)).square().sum() + quantizer.bits()).backward()
    assert float(quantizer.log2_step.grad) != 0  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fitting_beats_every_other_range(channels: int | None, bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3) * (torch.arange(6).view(6, 1, 1, 1) + 1 if channels else 1)
    quantizer = Quantizer(bits, widths=(bits,), channels=channels)
    quantizer.fit(weight)

    def error(factor: float) -> float:
        most = 2 ** (bits - 1) - 1
        limit = quantizer.limit.detach() * factor
        grid = (limit / most * torch.round(weight / limit * most)).clamp(-limit, limit)
        return float(((grid - weight) / quantizer.limit.detach()).square().sum())

    assert quantizer(weight).unique().numel() <= (2**bits - 1) * (channels or 1)
    assert error(1.0) <= min(error(f) for f in (0.6, 0.8, 0.9, 1.1, 1.2, 1.5)) * 1.001


@pytest.mark.parametrize("options", [{"power": True}, {"widths": (4,), "channels": 16}])
def test_an_attached_network_is_a_network(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, plain = resnet8(), resnet8()
    unsigned = q.unsigned_inputs(model, torch.zeros(1, 1, 28, 28))
    assert unsigned == {n for n, m in model.named_modules() if hasattr(m, "weight")
                        and n not in ("conv1",) and "bn" not in n}  # fmt: skip
    for name in ("conv1", "layer1.0.conv1", "fc"):
        layer = model.get_submodule(name)
        own = {"channels": 10, "dimensions": 2} if name == "fc" and "channels" in options else {}
        q.attach_weight(layer, Quantizer(4, **(options | own)))  # type: ignore[arg-type]
        q.attach_input(layer, Quantizer(4, signed=name not in unsigned, waits=True))
    images = torch.rand(4, 1, 28, 28)
    before = model.eval()(images)
    quantizer = q.input_quantizer(model.fc)
    assert isinstance(quantizer, Quantizer)
    assert quantizer.waits
    model.train()(images).sum().backward()
    assert not quantizer.waits
    assert not torch.equal(model.eval()(images), before)
    assert all(p.grad is not None for n, p in model.named_parameters() if "input" not in n)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        q.input_quantizer(twin.fc).log2_limit.add_(-3)  # type: ignore[union-attr, operator]
    assert not torch.equal(twin(images), model(images))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images), model(images))
    program = torch.export.export(model, (images,), strict=False)
    assert torch.allclose(program.module()(images), model(images), atol=1e-6)
    expected = model(images)
    twin = copy.deepcopy(model)
    for name in ("conv1", "layer1.0.conv1", "fc"):
        q.settle_weight(model.get_submodule(name))
        q.settle_input(model.get_submodule(name))
    assert torch.equal(model(images), expected)
    assert torch.equal(twin(images), expected)  # which shares its classes
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    q.regrid(plain, q.grids(model))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(images), expected)


def test_unsigned_grids_spend_no_level_below_zero() -> None:
    quantizer = Quantizer(2, signed=False, waits=True)
    x = torch.linspace(0, 1, 100)
    quantizer(x)
    assert quantizer(x).unique().numel() == 4
    assert quantizer.width == 2
    assert float(quantizer(torch.tensor(-1.0))) == 0


def test_signs_follow_the_graph() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            y = torch.sigmoid(self.b(x)) * x
            z = self.c(torch.cat([y, x], 1)[:, :4])
            return self.d(z + y) + self.e(torch.add(x, y, alpha=-1))  # type: ignore[no-any-return]

    assert q.unsigned_inputs(Network(), torch.zeros(2, 4)) == {"b", "c"}


def test_channels_of_a_quantized_network_are_followed_and_cut() -> None:
    torch.manual_seed(0)
    model, x = resnet8(shortcut="B"), torch.rand(4, 1, 28, 28)
    plain = ChannelGraph(model, x[:1])
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            q.attach_weight(layer, Quantizer(4, power=True))
            q.attach_input(layer, Quantizer(4, signed=name == "conv1", waits=True))
    model.train()(x)
    model.eval()
    graph = ChannelGraph(model, x[:1])
    assert [g.channels for g in graph.groups] == [g.channels for g in plain.groups]
    assert [g.kept_whole for g in graph.groups] == [g.kept_whole for g in plain.groups]
    with torch.no_grad():
        for norm in (model.layer1[0].bn1, model.layer2[0].bn1):  # type: ignore[index]
            for leaf in (norm.weight, norm.bias):
                leaf[::2] = 0
    small = compact(model, x[:1]).model
    assert small.layer1[0].conv1.weight.shape == (8, 16, 3, 3)  # type: ignore[index]
    assert small.layer2[0].conv2.weight.shape == (32, 16, 3, 3)  # type: ignore[index]
    assert torch.allclose(small.double()(x.double()), model.double()(x.double()), atol=1e-9)


def test_by_channel_one_number_says_the_bits_of_all() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 2, 2) * torch.tensor([0.1, 1.0, 9.0]).view(3, 1, 1, 1)
    quantizer = Quantizer(4, channels=3)
    quantizer.fit(weight)
    assert quantizer.step.shape == (3, 1, 1, 1)
    assert quantizer.width == 4
    assert float(quantizer.bits()) == pytest.approx(4)
    levels = quantizer(weight) / quantizer.step
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(levels.detach().abs().max().round()) == 7
    (quantizer(weight).square().sum() + quantizer.bits()).backward()
    assert quantizer.log2_step is not None
    assert quantizer.log2_step.shape == ()
    with torch.no_grad():
        quantizer.log2_step.fill_(-math.log2(2.5))
        quantizer.log2_limit[1] += 1
    assert float(quantizer.bits()) == pytest.approx(math.log2(3.5) + 1)
    quantizer.bound(2, 2)
    assert quantizer.width == 2
    assert float(quantizer(weight).abs().max()) == pytest.approx(float(quantizer.limit.max()))
