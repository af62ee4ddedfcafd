"""Gates against numeric integrals and samples; on groups of channels; folded and cut away."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.channels import ChannelGraph, compact
from secateur.gates import Gate, HardConcreteGate, VIBGate, attach_gates, fold_gates
from secateur.zoo import lenet5, resnet8


def normal(x: Tensor, mean: float, variance: float) -> Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@given(st.floats(-2, 2), st.floats(-6, 1))
def test_the_vib_penalty_is_the_divergence_integrated_numerically(
    mu: float, log_variance: float
) -> None:
    """Of N(mu, sigma^2) from N(0, mu^2 + sigma^2), the prior that makes it least."""
    gate = VIBGate(1, [torch.tensor([0])], log_variance=log_variance).double()
    with torch.no_grad():
        gate.mu.fill_(mu)
        gate.log_variance.fill_(log_variance)
    variance = math.exp(log_variance)
    deviation = math.sqrt(variance)
    z = torch.linspace(mu - 12 * deviation, mu + 12 * deviation, 20_001, dtype=torch.float64)
    p = normal(z, mu, variance)

    def divergence(prior: float) -> float:
        logs = -((z - mu) ** 2) / (2 * variance) + z**2 / (2 * prior)
        return float(torch.trapezoid(p * (logs + 0.5 * math.log(prior / variance)), z))

    best = mu**2 + variance
    assert float(gate.penalty().detach()) == pytest.approx(divergence(best), abs=1e-5)
    assert divergence(best) <= min(divergence(best * 0.9), divergence(best * 1.1)) + 1e-9


@settings(max_examples=20)
@given(st.floats(-4, 4))
def test_the_hard_concrete_penalty_is_the_share_of_samples_that_are_not_zero(logit: float) -> None:
    torch.manual_seed(0)
    gate = HardConcreteGate(1, [torch.tensor([0])], logit)
    z = gate.sample(20_000).detach()
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    assert float((z != 0).float().mean()) == pytest.approx(float(gate.penalty().detach()), abs=0.02)
    assert bool(gate.scale()[0] > 0) == (logit > math.log(0.1 / 1.1))  # the only one: stays open
    assert bool(gate.means()[0] > 0) == (logit > math.log(0.1 / 1.1))


@pytest.mark.parametrize("kind", [VIBGate, HardConcreteGate])
def test_noise_is_fresh_for_each_sample_and_has_the_stated_moments(kind: type[Gate]) -> None:
    torch.manual_seed(0)
    gate = kind(3, [torch.arange(3)])
    z = gate.sample(50_000).detach()
    assert z.shape == (50_000, 3)
    assert z.unique().numel() > (1000 if kind is VIBGate else 100)
    if isinstance(gate, VIBGate):
        assert z.mean(0).tolist() == pytest.approx([1.0] * 3, abs=5e-3)
        assert z.var(0).log().tolist() == pytest.approx([-5.0] * 3, abs=0.05)
    assert torch.equal(gate.scale(), gate.means().detach())


def test_every_maker_keeps_a_channel() -> None:
    gate = VIBGate(4, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([0.0, 1e-3, 1.0, 0.0]))
    assert gate.open().tolist() == [False, True, True, False]
    assert bool((gate.keep_prob()[2] > 0.99) and (gate.keep_prob()[0] < 0.1))


class Concatenated(nn.Module):
    """Two branches side by side, one of them depthwise, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(3, 4, 3)
        self.deep, self.deep_norm = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.join = nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm(self.a(x)))
        a = torch.nn.functional.hardtanh(self.deep_norm(self.deep(a)), 0.0, 6.0)
        b = torch.relu(self.b(x))[:, :, 1:-1, 1:-1]
        joined = torch.nn.functional.gelu(self.join(torch.cat([a, b], 1)))
        return self.fc(joined.flatten(1))  # type: ignore[no-any-return]


NETWORKS = {
    "chain": (lenet5, (2, 1, 28, 28)),
    "residual": (lambda: resnet8(shortcut="B"), (2, 1, 28, 28)),
    "concatenated, depthwise, flattened": (Concatenated, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", [VIBGate, HardConcreteGate])
def test_gated_folded_and_sliced_networks_agree(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model: nn.Module = build()
    x = torch.randn(shape)
    model.train()(x)  # running statistics that are not 0 and 1
    plain_keys = list(model.state_dict())
    graph = ChannelGraph(model, x[:1])
    gated = attach_gates(graph, kind)
    free = {
        int(number) for group in graph.groups
        for i, number in enumerate(group.classes) if i not in group.kept_whole
    }  # fmt: skip
    assert {int(c) for _, classes, _ in gated for c in classes} == free
    closed = 0
    with torch.no_grad():
        for gate, _, _ in gated:
            for parameter in gate.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
            own = gate.mu if isinstance(gate, VIBGate) else gate.logit
            assert isinstance(own, Tensor)
            own[::3] = 0.0 if isinstance(gate, VIBGate) else -9.0
            if isinstance(gate, VIBGate):
                own[1] = -0.7  # a negative multiplier folds as well
            closed += int((~gate.open()).sum())
    assert closed
    model.train()
    assert not torch.equal(model(x), model(x))
    expected = model.eval()(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    torch.export.export(model, (x,), strict=False)
    fold_gates(model)
    assert list(model.state_dict()) == plain_keys
    assert torch.allclose(model(x), expected, atol=1e-5)
    small = compact(model, x[:1])
    assert torch.allclose(small.model(x), expected, atol=1e-5)
    again = ChannelGraph(small.model, x[:1])
    assert sum(g.channels for g in graph.groups) - sum(g.channels for g in again.groups) == closed


def test_one_gate_multiplies_every_summand_of_a_residual_sum() -> None:
    model = resnet8(shortcut="B")
    gated = attach_gates(ChannelGraph(model, torch.zeros(1, 1, 28, 28)), VIBGate)
    shared = [set(modules) for _, _, modules in gated if len(modules) > 1]
    assert {"layer2.0.bn2", "layer2.0.shortcut.1"} in shared
    assert {"bn1", "layer1.0.bn2"} in shared
