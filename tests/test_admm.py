"""ADMM against its definition, and masked retraining against every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods import ADMM, Phase
from secateur.methods.rho import next_rho
from secateur.plan import build_plan
from secateur.sets import (
    Block,
    Channel,
    Column,
    ConstraintSet,
    Filter,
    Kernel,
    Levels,
    Unstructured,
)

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}
TARGETS: list[ConstraintSet] = [
    Unstructured(density=0.2),
    Levels(2),
    Levels(3, zero=True),
    Unstructured(density=0.2) & Levels(2),
    Column(density=0.5) & Filter(density=0.5) & Levels(3, spacing="power_of_two"),
]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def train(
    model: nn.Module, method: ADMM, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(32, 8, generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))
        (loss + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()


def test_one_update_is_the_scaled_admm_iteration() -> None:
    """Z = project(W + U), U += W - Z, U rescaled by rho_old / rho_new (Boyd et al., 3.4)."""
    model = small_model()
    target = Unstructured(density=0.25)
    plan = build_plan(model, target, scope="layer")
    method = ADMM(plan, rho=0.5, rho_growth=2.0, rho_max=10.0, interval=1)
    method.attach(model)
    weight = model[0].weight
    z, u, rho = target.project(weight), torch.zeros_like(weight), 0.5
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        before = weight.detach().clone()
        method.step()
        assert torch.equal(weight, before)
        z = target.project(before + u)
        u = (u + before - z) / 2
        rho *= 2
        torch.testing.assert_close(method.z["0.weight"], z)
        torch.testing.assert_close(method.u["0.weight"], u)
        assert method.rho == rho


def test_penalty_and_its_gradient_equal_the_formula() -> None:
    model = small_model()
    method = ADMM(Unstructured(density=0.3), rho=0.7)
    method.attach(model)
    for name in method.u:
        method.u[name].normal_()
    penalty = method.penalty()
    penalty.backward()
    expected = 0.0
    for name, weight in method.weights.items():
        difference = weight.detach() - method.z[name] + method.u[name]
        expected += 0.35 * float(difference.square().sum())
        torch.testing.assert_close(weight.grad, 0.7 * difference)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)


def test_z_and_u_share_no_memory_with_the_weights_and_carry_no_graph() -> None:
    model = small_model()
    method = ADMM(Unstructured(density=1.0), interval=1)
    method.attach(model)
    method.step()
    for name, weight in method.weights.items():
        for copy_ in (method.z[name], method.u[name]):
            assert copy_.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
            assert not copy_.requires_grad


def test_state_is_two_copies_of_planned_weights_only() -> None:
    model = small_model()
    plan = build_plan(model, Unstructured(density=0.1), layers={"2": "dense"})
    method = ADMM(plan).attach(model)
    assert set(method.z) == set(method.u) == {"0.weight"}
    assert sum(each.numel() for each in (*method.z.values(), *method.u.values())) == 2 * 128


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_and_levels_survive_200_steps_of_retraining(
    target: ConstraintSet, optimizer: str
) -> None:
    model = small_model()
    plan = build_plan(model, target, scope="layer")
    method = ADMM(plan, interval=5, rho=0.1).attach(model)
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, method, made, 20)
    method.harden()
    masks = {name: weight == 0 for name, weight in method.weights.items()}
    frozen = {name: weight.detach().clone() for name, weight in method.weights.items()}
    for _ in range(20):  # the same optimizer, moments from before the projection and all
        train(model, method, made, 10)
        for name, weight in method.weights.items():
            assert target.contains(weight)
            if not (isinstance(target, Levels) and target.zero):
                assert torch.equal(weight == 0, masks[name])
    assert any(not torch.equal(frozen[name], weight) for name, weight in method.weights.items())
    assert method.finalize() is model


class ConvNet(nn.Sequential):
    """Two convolutions with their norms, and a linear layer, on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3)),
        )


@pytest.mark.parametrize("metric", ["plain", "batchnorm"])
@pytest.mark.parametrize(
    ("target", "kept"),  # weights kept in each of the two convolutions, of 8 x 2 x 9, 12 x 8 x 9
    [
        (Filter(density=0.25), [2 * 18, 3 * 72]),
        (Channel(density=0.5), [8 * 9, 12 * 4 * 9]),
        (Column(density=0.5) & Levels(2), [8 * 9, 12 * 36]),
        (Kernel(density=0.25), [4 * 9, 24 * 9]),
        (Block(4, 6, density=0.5) & Levels(1), [3 * 24, 18 * 24]),
        (Column(density=0.5) & Filter(density=0.5), [4 * 9, 6 * 36]),
        (Column(density=0.5) & Filter(density=0.5) & Levels(3), [4 * 9, 6 * 36]),
        (Filter(density=0.5) & Levels(4, spacing="power_of_two"), [4 * 18, 6 * 72]),
    ],
    ids=str,
)
def test_admm_trains_a_network_into_structured_sets(
    target: ConstraintSet, kept: list[int], metric: str
) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    plan = build_plan(model, target, layers={"Linear": "dense"}, metric=metric)
    method = ADMM(plan, steps=(0.5, 1.0), interval=5, rho=0.05).attach(model)
    generator = torch.Generator().manual_seed(1)
    for phase in method.phases():
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        method.begin(phase, 5)
        for _ in range(20):
            inputs = torch.randn(32, 2, 8, 8, generator=generator)
            labels = inputs.mean((2, 3)).argmax(1)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            (loss + method.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            method.step()
    assert float(loss.detach()) < 0.65  # of two equally likely classes: 0.69
    assert method.finalize() is model
    for row in plan.compressed:
        assert target.contains(method.weights[row.parameter])
    assert [int(weight.count_nonzero()) for weight in method.weights.values()] == kept
    dead = (model[0].weight == 0).flatten(1).all(1)
    assert torch.equal(model[0].bias == 0, dead)


def test_biases_of_dead_outputs_are_pruned_but_not_in_the_last_layer() -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[2].weight[1] = 0
    method = ADMM(Unstructured(density=0.5), interval=1).attach(model)
    train(model, method, torch.optim.Adam(model.parameters(), 1e-2), 10)
    assert model[0].bias[4] == 0
    assert int(model[0].bias.count_nonzero()) == 15
    assert model[2].bias[1] != 0


def test_earlier_zeros_stay_zero_through_later_steps() -> None:
    model = small_model()
    method = ADMM(Unstructured(density=0.1), steps=(0.5, 1.0), epochs=1, retrain_epochs=1)
    method.attach(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    dead = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in method.weights.items()}
    for phase in method.phases():
        method.begin(phase, 20)
        train(model, method, optimizer, 20)
        for name, weight in method.weights.items():
            assert bool((weight[dead[name]] == 0).all())
            if phase.name == "retrain":
                dead[name] = weight == 0
    kept = sum(int((~each).sum()) for each in dead.values())
    assert kept == round(0.1 * (128 + 48))


def test_residuals_shrink_as_rho_grows() -> None:
    model = small_model()
    method = ADMM(Unstructured(density=0.2), rho=0.01, rho_max=10.0, interval=20)
    method.attach(model)
    method.begin(Phase("admm", 20), 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    primal = []
    for _ in range(20):
        train(model, method, optimizer, 20)
        primal.append(method.metrics()["primal"])
    assert method.metrics()["rho"] == pytest.approx(10.0)
    assert primal[-1] < 0.05 < primal[0]


def test_balanced_rho_follows_the_residuals() -> None:
    assert next_rho("balanced", 1.0, 1.0, 10.0, primal=1.0, dual=1.0) == pytest.approx(1.2)
    assert next_rho("balanced", 1.0, 1.0, 10.0, primal=0.1, dual=1.0) == pytest.approx(1 / 1.2)
    assert next_rho("balanced", 1.0, 1.0, 1.1, primal=1.0, dual=1.0) == 1.1
    assert next_rho("constant", 1.0, 1.0, 10.0, primal=1.0, dual=1.0) == 1.0


def test_ladder_restarts_from_the_weights_with_tenfold_rho() -> None:
    model = small_model()
    options = {"rho": 1e-3, "rho_max": 1.0, "rho_schedule": "ladder", "epochs": 10}
    method = ADMM(Unstructured(density=0.2), **options).attach(model)
    phases = method.phases()
    assert [phase.name for phase in phases] == ["admm"] * 4 + ["retrain"]
    assert sum(phase.epochs for phase in phases[:4]) == 10
    seen = []
    for phase in phases[:4]:
        method.begin(phase, 10)
        seen.append(method.rho)
        assert not any(bool(u.any()) for u in method.u.values())
        train(model, method, torch.optim.SGD(model.parameters(), 0.05), 10)
        assert method.rho == seen[-1]
    assert seen == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_decoupled_pull_is_the_proximal_step_under_every_optimizer(kind: type) -> None:
    """(W - V) / lr + rho (W - Z + U) = 0 where V is what the optimizer left."""
    model, plain = small_model(), small_model()
    method = ADMM(Unstructured(density=0.2), rho=3.0, pull="decoupled").attach(model)
    for name in method.u:
        method.u[name].normal_()
    inputs = torch.randn(32, 8)
    for each in (model, plain):
        optimizer = kind(each.parameters(), lr=0.05)
        nn.functional.cross_entropy(each(inputs), inputs[:, :3].argmax(1)).backward()
        optimizer.step()
    assert method.penalty().item() == 0
    method.step(0.05)
    left = dict(plain.named_parameters())
    for name, weight in method.weights.items():
        force = (weight - left[name]) / 0.05 + 3.0 * (weight - method.z[name] + method.u[name])
        torch.testing.assert_close(force, torch.zeros_like(force), atol=2e-4, rtol=0)
    with pytest.raises(RecipeError, match="learning rate"):
        method.step()


def test_projected_context_restores_the_weights() -> None:
    model = small_model()
    method = ADMM(Unstructured(density=0.2) & Levels(2)).attach(model)
    before = copy.deepcopy(model.state_dict())
    with method.projected():
        assert all(int(w.count_nonzero()) < w.numel() for w in method.weights.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("hardened", [False, True])
def test_state_round_trips_bit_for_bit(hardened: bool) -> None:
    target = Unstructured(density=0.2) & Levels(3)

    def run(model: nn.Module, method: ADMM, seed: int) -> list[Tensor]:
        train(model, method, torch.optim.SGD(model.parameters(), 0.05), 15, seed)
        return [parameter.detach().clone() for parameter in model.parameters()]

    model = small_model()
    method = ADMM(target, interval=4).attach(model)
    run(model, method, 1)
    if hardened:
        method.harden()
        run(model, method, 2)
    other = small_model()
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(method.state_dict())
    resumed = ADMM(target, interval=4).attach(other)
    resumed.load_state_dict(saved)
    for one, two in zip(run(model, method, 3), run(other, resumed, 3), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1}, "rho"),
        ({"steps": ()}, "steps"),
        ({"steps": (0.5,)}, "rise from above 0 to 1"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ADMM(Unstructured(density=0.1), **options)
