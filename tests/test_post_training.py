"""Reconstruction of layers from inputs: against brute force, closed forms and torch's layers."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur import methods
from secateur.data import InMemory
from secateur.errors import RecipeError
from secateur.plan import build_plan
from secateur.posttraining import reconstruct
from secateur.posttraining.moments import Moments, columns
from secateur.posttraining.quadratic import Quadratic, admm, fitted, least_squares
from secateur.posttraining.quadratic import reconstruct as reconstruct_layer
from secateur.posttraining.sequence import steps
from secateur.sets import (
    NM,
    Block,
    Channel,
    Column,
    ConstraintSet,
    Filter,
    Kernel,
    Levels,
    Transposable,
    Unstructured,
)
from tiny import digits_task, small_model

SETS: list[ConstraintSet] = [
    Unstructured(density=0.4),
    NM(2, 4),
    NM(1, 4, rows=2),
    Transposable(2, 4),
    Filter(density=0.5),
    Channel(density=0.5),
    Column(density=0.5),
    Kernel(density=0.5),
    Block(rows=2, columns=4, density=0.5),
    Levels(3),
    Levels(4, zero=True),
    Levels(3, spacing="power_of_two"),
    Unstructured(density=0.4) & Levels(3),
    NM(2, 4) & Levels(2),
    Column(density=0.5) & Filter(density=0.5) & Levels(3),
]


def problem(
    shape: tuple[int, ...], seed: int = 0, groups: int = 1, samples: int = 200
) -> tuple[Quadratic, Tensor]:
    """Return a layer on inputs that depend on each other, and these inputs."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.Size(shape[1:]).numel()
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    mixed = torch.randn(groups, width, width, **options)
    inputs = torch.randn(groups, samples, width, **options) @ mixed
    weight = torch.randn(shape, **options)
    return Quadratic.damped(weight, inputs.transpose(1, 2) @ inputs, 1e-9), inputs


def outputs_error(weight: Tensor, found: Tensor, inputs: Tensor) -> float:
    rows = (weight - found).reshape(len(inputs), -1, inputs.shape[2])
    return float((inputs @ rows.transpose(1, 2)).square().sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_the_loss_is_the_squared_distance_of_outputs(groups: int) -> None:
    made, inputs = problem((6, 5), groups=groups)
    other = torch.randn(6, 5, dtype=torch.float64)
    assert made.loss(other) == pytest.approx(outputs_error(made.weight, other, inputs), rel=1e-6)


def test_least_squares_within_a_support_is_the_closed_form() -> None:
    made, inputs = problem((7, 12))
    support = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    support[3] = False
    found = least_squares(made, support, made.weight * support)
    for row, keep in enumerate(support):
        reads = inputs[0][:, keep]
        wanted = inputs[0] @ made.weight[row]
        closed = torch.linalg.lstsq(reads, wanted[:, None]).solution.flatten()
        torch.testing.assert_close(found[row][keep], closed, rtol=1e-3, atol=1e-3)
        assert not bool(found[row][~keep].any())
        error = (reads @ found[row][keep] - wanted).square().sum()
        least = (reads @ closed - wanted).square().sum()
        assert float(error) <= float(least) * (1 + 1e-6) + 1e-6


def best_by_brute_force(made: Quadratic, inputs: Tensor, keep: int) -> float:
    errors = []
    for chosen in itertools.combinations(range(made.weight.shape[1]), keep):
        reads = inputs[0][:, list(chosen)]
        wanted = inputs[0] @ made.weight[0]
        solution = torch.linalg.lstsq(reads, wanted[:, None]).solution
        errors.append(float((reads @ solution - wanted[:, None]).square().sum()))
    return min(errors)


def test_supports_are_near_the_best_of_all() -> None:
    found, projected, best = [], [], []
    for seed in range(12):
        made, inputs = problem((1, 9), seed)
        target = Unstructured(keep=4)
        least = best_by_brute_force(made, inputs, 4)
        error = made.loss(reconstruct_layer(made, target))
        plain = made.loss(fitted(made, target.project(made.weight), target))
        assert least * (1 - 1e-6) <= error
        found.append(error)
        projected.append(plain)
        best.append(least)
    assert sum(found) < 0.8 * sum(projected), "better than fitting what magnitude keeps"
    assert sum(found) < 1.2 * sum(best)


def test_levels_take_the_scale_that_suits_the_outputs() -> None:
    made, _ = problem((4, 8))
    target = Levels(3)
    member = target.project(made.weight)
    found = fitted(made, member, target)
    ratio = (found / member).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert target.contains(found)
    for other in (0.99, 1.01):
        assert made.loss(found) <= made.loss(found * other)


@pytest.mark.parametrize("target", SETS, ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (8, 8, 3, 3)])
def test_every_set_is_met_and_no_worse_than_projected(
    target: ConstraintSet, shape: tuple[int, ...]
) -> None:
    made, _ = problem(shape)
    found = reconstruct_layer(made, target)
    assert target.contains(found)
    plain = made.loss(target.project(made.weight))
    assert made.loss(found) <= plain
    parts = target.split()[0]
    if not any(isinstance(each, Filter) for each in parts):  # outputs that go cannot be made up for
        assert made.loss(found) < 0.75 * plain


def test_what_is_a_member_stays_as_it_is() -> None:
    made, _ = problem((6, 10))
    torch.testing.assert_close(reconstruct_layer(made, Unstructured(density=1.0)), made.weight)
    member = NM(2, 4).project(made.weight)
    again = reconstruct_layer(Quadratic(member, made.gram), NM(2, 4))
    torch.testing.assert_close(again, member)


def test_free_weights_converge_to_the_trained_ones() -> None:
    made, _ = problem((6, 10))
    free = Unstructured(density=1.0)
    torch.testing.assert_close(admm(made, free, 30, 0.3), made.weight)


def test_without_inputs_the_weights_are_projected() -> None:
    weight = torch.randn(6, 8)
    made = Quadratic.damped(weight, torch.zeros(1, 8, 8, dtype=torch.float64), 0.01)
    found = reconstruct_layer(made, Unstructured(density=0.5))
    torch.testing.assert_close(found, Unstructured(density=0.5).project(weight))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([0, 1, "same"]),
    st.sampled_from(["zeros", "reflect", "circular"]),
    st.sampled_from([1, 2, 4]),
)
def test_columns_times_filters_are_what_a_convolution_returns(
    dims: int, size: int, stride: int, dilation: int, padding: Any, mode: str, groups: int
) -> None:
    stride = 1 if padding == "same" else stride
    layer = CONVOLUTIONS[dims](
        4, 8, size, stride, padding, dilation, groups, bias=False, padding_mode=mode
    )
    inputs = torch.randn(2, 4, *(7, 6, 5)[:dims])
    expected = layer(inputs)
    read = columns(layer, inputs)
    made = read @ layer.weight.reshape(groups, 8 // groups, -1).transpose(1, 2)
    found = made.permute(1, 0, 2).reshape(2, *expected.shape[2:], 8).movedim(-1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    moments = Moments(layer)
    moments.add(inputs[:1])
    moments.add(inputs[1:])
    exact = read.double()
    torch.testing.assert_close(moments.gram, exact.mT @ exact, rtol=1e-4, atol=1e-4)
    centered = exact - exact.mean(1, keepdim=True)
    torch.testing.assert_close(moments.centered, centered.mT @ centered, rtol=1e-4, atol=1e-4)


def test_rows_that_hardly_differ_leave_more_than_rounding() -> None:
    layer, rows = nn.Linear(8, 4), 100 + 1e-3 * torch.randn(600, 8)
    moments = Moments(layer)
    for batch in rows.split(100):
        moments.add(batch)
    exact = rows.double() - rows.double().mean(0)
    torch.testing.assert_close(moments.centered[0], exact.mT @ exact, rtol=1e-2, atol=1e-6)
    problem = Quadratic.damped(layer.weight, moments.centered, 0.01)
    assert bool((torch.linalg.eigvalsh(problem.gram) > 0).all())


class Attentive(nn.Module):
    """Three layers that read one tensor, one that is shared, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.out = nn.Linear(8, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        mixed = (self.query(tokens) @ self.key(tokens).mT).softmax(-1) @ self.value(input=tokens)
        out: Tensor = self.out(self.out(mixed))
        return out if scale is None else out * scale


def test_layers_go_in_the_order_in_which_they_run() -> None:
    torch.manual_seed(0)
    model = Attentive()
    names = ["unused", "out", "query", "key", "value"]
    tokens = torch.randn(3, 5, 8)
    found = steps(model, names, [tokens])
    assert found == [["query", "key", "value"], ["out"], ["unused"]]
    named = [{"tokens": tokens, "scale": torch.ones(1)}, (tokens, torch.ones(1))]
    fits = reconstruct(model.train(), named, NM(2, 4))
    assert model.training
    assert model.query.training
    assert [each.layer for each in fits] == ["query", "key", "value", "out", "unused"]
    assert [each.rows for each in fits] == [30, 30, 30, 60, 0]
    assert all(NM(2, 4).contains(each.weight) for each in model.children())
    assert all(each.error <= each.projected for each in fits)


def test_biases_keep_the_mean_of_every_output() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    inputs = torch.rand(10, 4, 8, 8)
    before = layer(inputs)
    reconstruct(nn.Sequential(layer), [inputs[:5], inputs[5:]], Unstructured(density=0.3))
    after = layer(inputs)
    torch.testing.assert_close(before.mean((0, 2, 3)), after.mean((0, 2, 3)))
    assert float((before - after).detach().abs().max()) > 1e-3


def test_a_network_stays_nearer_to_itself_than_projected() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()]
    dense = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 16, 10)).eval()
    inputs = torch.randn(48, 3, 12, 12)
    inputs = inputs + inputs.roll(1, 2) + inputs.roll(1, 3)
    target, model, plain = Unstructured(density=0.5), copy.deepcopy(dense), copy.deepcopy(dense)
    reconstruct(model, inputs[:32].split(16), target)
    weights = {name: p for name, p in plain.named_parameters() if p.ndim > 1}
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(target.project(weight))
        expected = dense(inputs[32:])
        errors = [float((m(inputs[32:]) - expected).square().mean()) for m in (model, plain)]
    assert errors[0] < 0.7 * errors[1]


OPTIONS = {"samples": 64, "iterations": 20}


def recipe(**stage: Any) -> dict[str, Any]:
    return {
        "train": {"epochs": 4, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "stages": [{"method": "post_training", **OPTIONS, **stage}],
    }


@pytest.mark.parametrize(
    "stage",
    [
        {"density": 0.2},
        {"density": 0.2, "scope": "layer", "bits": 4},
        {"set": "nm", "n": 2, "m": 4},
        {"density": 0.2, "bits": 3, "retrain_epochs": 2, "snap": [0.5, 1.0]},
    ],
    ids=str,
)
def test_a_recipe_without_training(stage: dict[str, Any], tmp_path: Path) -> None:
    result = sc.compress(digits_task(), recipe(**stage), out=tmp_path)
    phases = [entry["phase"] for entry in result.report["history"]]
    assert phases == ["train"] * 4 + ["retrain"] * stage.get("retrain_epochs", 0)
    accuracy = result.report["accuracy"]
    assert accuracy["compressed"] == accuracy["decoded"] > accuracy["dense"] - 0.05
    assert result.report["ratio"]["weights"] > 1.9


def test_the_method_in_a_loop_of_your_own() -> None:
    inputs = torch.randn(64, *next(small_model().parameters()).shape[1:2])
    model = small_model()
    target = Unstructured(density=0.3)
    method = methods.PostTraining(build_plan(model, target, scope="layer"), inputs, iterations=20)
    method.attach(model)
    assert method.approximate
    assert method.finalize() is model
    assert not method.approximate
    assert 0 < method.metrics()["error"] < method.metrics()["projected_error"]
    assert all(target.contains(weight) for weight in method.weights.values())
    other = copy.deepcopy(model)
    resumed = methods.PostTraining(target, inputs).attach(other)
    resumed.load_state_dict(method.state_dict())
    assert not resumed.approximate
    assert resumed.metrics() == method.metrics()
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    zeros = {name: weight == 0 for name, weight in resumed.weights.items()}
    for _ in range(3):
        optimizer.zero_grad()
        other(inputs).square().mean().backward()
        optimizer.step()
        resumed.step()
    assert all(bool((resumed.weights[name][mask] == 0).all()) for name, mask in zeros.items())


def test_inputs_are_required() -> None:
    with pytest.raises(RecipeError, match="takes inputs"):
        methods.PostTraining(Unstructured(density=0.3)).attach(small_model())


def test_whole_filters_leave_a_network_without_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    images = torch.randn(33, 1, 8, 8)  # the last batch is one sample
    some = InMemory(images, images.flatten(1)[:, :4].argmax(1))
    stage: dict[str, Any] = {"method": "post_training", "set": "filter", "samples": 33}
    stage |= {"density": 0.5, "layers": {"4": "dense"}}
    recipe = {"train": {"epochs": 0}, "export": {"onnx": False}, "stages": [stage]}
    done = sc.compress(sc.Task(model, some, some, some, name="filters"), recipe, out=tmp_path)
    assert done.model[0].weight.shape == (4, 1, 3, 3)  # type: ignore[index]
    assert done.model[4].weight.shape == (4, 4 * 36)  # type: ignore[index]
    torch.testing.assert_close(
        done.model[1].running_mean,  # type: ignore[index]
        done.model[0](images).mean((0, 2, 3)),  # type: ignore[index]
        atol=1e-4,
        rtol=1e-3,
    )
