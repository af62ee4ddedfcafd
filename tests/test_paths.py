"""Path-aware budgets: the quick way ends where projecting after every change does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.errors import NonFiniteError
from secateur.paths import useless
from secateur.plan import Plan, build_plan
from secateur.sets import ConstraintSet, Levels, Unstructured
from secateur.zoo import lenet5

EXAMPLE = torch.zeros(1, 1, 12, 12)


def network(seed: int, ties: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 9, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    for layer in model.modules():
        if ties and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data.mul_(6).round_().div_(6)
    return model


def weights_of(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {row.parameter: parameters[row.parameter].detach() for row in plan.compressed}


def by_projecting(plan: Plan, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Follow the definition: project, drop what is useless, project again."""
    assert plan.graph is not None
    free = Plan(plan.rows, plan.keep)  # no graph, so that it projects once
    while True:
        projected = free.project(weights)
        found = useless(plan.graph, projected)
        if not any(bool(each.any()) for each in found.values()):
            return projected
        weights = {name: each.masked_fill(found[name], 0) for name, each in weights.items()}


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([5, 12, 40, 120, 400, 2000]),
    st.sampled_from([None, Levels(3), Levels(3, zero=True)]),
)
def test_ends_as_by_projecting_after_every_change(
    seed: int, ties: bool, keep: int, levels: Levels | None
) -> None:
    model = network(seed, ties)
    target: ConstraintSet = Unstructured(keep=keep)
    if levels is not None:
        target = target & levels
    plan = build_plan(model, target, path_aware=EXAMPLE)
    weights = weights_of(model, plan)
    found, expected = plan.project(weights), by_projecting(plan, weights)
    assert plan.graph is not None
    assert not any(bool(each.any()) for each in useless(plan.graph, found).values())
    if levels is None or not levels.zero:  # else levels of 0 free room in another order
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_as_many_rounds_as_it_takes() -> None:
    torch.manual_seed(3)
    model = lenet5()  # random weights: what is kept forms hardly any path
    plan = build_plan(model, Unstructured(keep=861), path_aware=torch.zeros(1, 1, 28, 28))
    projected = plan.project(weights_of(model, plan))
    assert plan.graph is not None
    assert not any(bool(each.any()) for each in useless(plan.graph, projected).values())
    assert sum(int(each.count_nonzero()) for each in projected.values()) == 861


def test_what_is_not_finite_is_named() -> None:
    model = network(0, ties=False)
    plan = build_plan(model, Unstructured(keep=50), path_aware=EXAMPLE)
    weights = weights_of(model, plan)
    weights["3.weight"][2, 1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="3: "):
        plan.project(weights)
