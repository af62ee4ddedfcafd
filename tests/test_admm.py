"""ADMM against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.channels import compact
from secateur.errors import RecipeError
from secateur.methods import ADMM, Phase
from secateur.methods.admm import unsettled
from secateur.methods.purify import purified
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
from tiny import small_model, train


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
    method = ADMM(Unstructured(density=0.3), rho=0.7, rho_schedule="constant")
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


@pytest.mark.parametrize("purify", [None, (0.8, 0.9)])
def test_a_purified_channel_leaves_the_network(purify: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    with torch.no_grad():
        model[3].weight[:, 2] *= 1e-3
        model[3].weight[:, 2, 1, 1] = (
            1.5 * model[3].weight.abs().mean()
        )  # one column of nine is left
    plan = build_plan(model, Column(density=0.5), layers={"0": "dense", "Linear": "dense"})
    method = ADMM(plan, interval=5, purify=purify).attach(model)
    expected = Column(density=0.5).project(model[3].weight.detach())
    method.begin(method.phases()[-1], 5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        inputs = torch.randn(32, 2, 8, 8)
        nn.functional.cross_entropy(model(inputs), inputs.mean((2, 3)).argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    method.finalize()
    gone = (model[3].weight == 0).transpose(0, 1).flatten(1).all(1)
    assert gone.nonzero().flatten().tolist() == ([2] if purify else [])
    others = [number for number in range(8) if number != 2]
    assert torch.equal(model[3].weight[:, others] == 0, expected[:, others] == 0)
    smaller = compact(model, torch.zeros(1, 2, 8, 8), 1, {"3.weight"}).model
    assert len(smaller[0].weight) == (7 if purify else 8)


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


def test_three_progressive_steps_take_equal_ratios() -> None:
    model = small_model()
    method = ADMM(
        Unstructured(keep=22), steps=(1 / 3, 2 / 3, 1.0), epochs=1, retrain_epochs=1
    ).attach(model)
    kept, names = [], []
    for phase in method.phases():
        method.begin(phase, 20)
        train(model, method, torch.optim.Adam(model.parameters(), 1e-2), 20)
        names.append((phase.step, phase.name))
        if phase.name == "retrain":
            kept.append(sum(int(weight.count_nonzero()) for weight in method.weights.values()))
    assert names == [(step, name) for step in range(3) for name in ("admm", "retrain")]
    assert kept == [88, 44, 22]  # of 176 = 8 * 22
    assert not method.approximate


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


def test_the_report_names_phases_that_ended_far_from_their_sets() -> None:
    def row(stage: int, step: int, primal: float) -> dict:
        return {"stage": stage, "step": step, "phase": "admm", "primal": primal}

    history = [{"stage": None}, row(0, 0, 0.9), row(0, 0, 0.1), row(0, 1, 0.1), row(0, 1, 0.9)]
    (note,) = unsettled([*history, {"stage": 0, "step": 1, "phase": "retrain"}])
    assert note.startswith("stage 0, step 1: ADMM ended 90% of")


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
    options = {"rho": 3.0, "rho_schedule": "constant", "pull": "decoupled"}
    method = ADMM(Unstructured(density=0.2), **options).attach(model)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1}, "rho"),
        ({"steps": ()}, "steps"),
        ({"steps": (0.5,)}, "rise from above 0 to 1"),
        ({"epoch": 3}, "epoch"),
        ({"purify": (70, 30)}, r"purify\.0: .*less than or equal to 1"),
        ({"rho": 1.0}, "rho_max: .*at least rho, 1.0"),
        ({"rho": 0.2, "rho_max": 0.1, "rho_schedule": "balanced"}, "rho_max: .*at least rho"),
        ({"epochs": 3, "rho_schedule": "ladder"}, "rho_schedule: .*4 rungs.* not 3"),
        ({"retrain_epochs": 2, "snap": (0.3, 0.6, 1.0)}, "snap: .*shares than retrain_epochs, 2"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ADMM(Unstructured(density=0.1), **options)


def test_purification_drops_just_the_empty_and_weak_channels() -> None:
    weight = torch.zeros(3, 4, 2, 2)
    weight[:, 0] = 1.0  # full
    weight[:, 1, 0, 0] = 0.01  # three of four columns empty, and weak
    weight[:, 2, 1, 1] = 5.0  # three of four columns empty, but strong
    weight[:, 3] = 0.01  # weak, but no column is empty
    result = purified(weight, emptiness=0.75, importance=0.5)
    assert torch.equal(result[:, 1], torch.zeros(3, 2, 2))
    others = [0, 2, 3]
    assert torch.equal(result[:, others], weight[:, others])
    assert torch.equal(purified(weight, 0.76, 0.5), weight)
    assert torch.equal(purified(torch.zeros(2, 2), 0.1, 0.1), torch.zeros(2, 2))
