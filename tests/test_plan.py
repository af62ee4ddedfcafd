"""Plans: which layer becomes what, and the one budget that layers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import NonFiniteError, RecipeError
from secateur.plan import Plan, build_plan
from secateur.sets import Levels, Unstructured
from secateur.zoo import lenet5


def weights_of(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {row.parameter: parameters[row.parameter] for row in plan.compressed}


def test_global_budget_is_one_top_k_over_all_layers() -> None:
    torch.manual_seed(0)
    model = lenet5()
    plan = build_plan(model, Unstructured(density=0.01))
    weights = weights_of(model, plan)
    projected = plan.project(weights)
    everything = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    threshold = everything.sort(descending=True).values[4305 - 1]
    for name, weight in weights.items():
        expected = torch.where(weight.abs() >= threshold, weight, 0.0)
        assert torch.equal(projected[name], expected)
    assert sum(int(each.count_nonzero()) for each in projected.values()) == plan.keep == 4305


def test_layer_scope_gives_each_layer_its_own_budget() -> None:
    model = lenet5()
    plan = build_plan(model, Unstructured(density=0.1), scope="layer")
    projected = plan.project(weights_of(model, plan))
    assert [int(each.count_nonzero()) for each in projected.values()] == [50, 2500, 40000, 500]


def test_exceptions_by_name_glob_and_type_in_this_order() -> None:
    plan = build_plan(
        lenet5(),
        Unstructured(density=0.01) & Levels(3),
        layers={
            "Linear": {"bits": 5},
            "fc*": {"density": 0.5},
            "fc2": "dense",
            "Conv2d": {"keep": 7, "bits": 2},
        },
    )
    sets = {row.layer: row.set for row in plan.rows}
    assert sets["conv1"] == sets["conv2"] == Unstructured(keep=7) & Levels(2)
    assert sets["fc1"] == Unstructured(density=0.5) & Levels(3)
    assert sets["fc2"] is None
    assert [row.note for row in plan.rows if row.layer == "fc2"] == ["left dense by 'fc2'"]
    assert plan.keep == 0


def test_layers_with_their_own_density_leave_the_shared_budget() -> None:
    model = lenet5()
    plan = build_plan(model, Unstructured(density=0.1), layers={"conv1": {"density": 0.5}})
    assert plan.keep == 43000
    projected = plan.project(weights_of(model, plan))
    assert int(projected["conv1.weight"].count_nonzero()) == 250


def test_everything_with_parameters_has_a_row_and_a_reason() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    plan = build_plan(model, Unstructured(density=0.5))
    assert {row.layer for row in plan.rows} == {"0", "1", "3"}
    assert next(row.note for row in plan.rows if row.layer == "1") == "left dense: BatchNorm2d"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"cnov1": "dense"}, "'cnov1' matches no layer. Did you mean 'conv1'"),
        ({"conv1": {"densty": 0.5}}, "layers.conv1.densty: no such option. Did you mean 'density'"),
        ({"BatchNorm2d": "dense"}, "matches no layer"),
    ],
)
def test_exceptions_that_match_nothing_are_refused(layers: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_plan(lenet5(), Unstructured(density=0.5), layers=layers)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="no convolution or linear layer"):
        build_plan(nn.ReLU(), Unstructured(density=0.5))


def test_non_finite_weights_name_their_layer() -> None:
    model = lenet5()
    plan = build_plan(model, Unstructured(density=0.1))
    with torch.no_grad():
        model.fc1.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="fc1: 1 of 400000 weights"):
        plan.project(weights_of(model, plan))


def test_relaxing_moves_the_budget_geometrically_and_leaves_levels_to_the_end() -> None:
    plan = build_plan(lenet5(), Unstructured(density=0.01) & Levels(4))
    half = plan.relaxed(0.5)
    assert abs(half.keep - 43050) <= 3  # rounding of 4305 is felt tenfold
    assert all(isinstance(row.set, Unstructured) for row in half.compressed)
    assert plan.relaxed(1) is plan
    assert build_plan(lenet5(), Levels(4)).relaxed(0.5).compressed == ()


def test_levels_after_pruning_keep_the_zeros() -> None:
    model = lenet5()
    plan = build_plan(model, Levels(3))
    with torch.no_grad():
        model.fc1.weight[:, 3:] = 0
    narrowed = plan.within(weights_of(model, plan))
    projected = narrowed.project(weights_of(model, plan))
    assert int(projected["fc1.weight"][:, 3:].count_nonzero()) == 0
    assert int(projected["conv1.weight"].count_nonzero()) == 500
