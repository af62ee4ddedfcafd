"""Automatic rates: budgets are met, closely, and spent as well as brute force would."""

from __future__ import annotations

import copy
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from secateur import data
from secateur.allocation import WAYS, Budget, allocate, apply
from secateur.allocation.distribute import By
from secateur.allocation.knapsack import frontier
from secateur.allocation.measure import MEASURES
from secateur.artifact import packed
from secateur.errors import NonFiniteError, RecipeError
from secateur.finish import settle
from secateur.plan import Plan, build_plan
from secateur.report.allocation import allocation_table
from secateur.sets import NM, Block, Column, ConstraintSet, Counted, Filter, Levels, Unstructured
from secateur.zoo import lenet5
from tiny import digits_network

Loss = Callable[[nn.Module], float]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train = data.load("digits").train
    pairs = [train[number] for number in range(len(train))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def trained(model: nn.Module, digits: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    images, labels = digits
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def network(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A trained network of 784-24-10, 19,056 weights."""
    return trained(digits_network(), digits, 8)


@pytest.fixture(scope="module")
def lenet(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return trained(lenet5(), digits, 2)


@pytest.fixture(scope="module")
def calibration(digits: tuple[Tensor, Tensor]) -> Loss:
    images, labels = digits[0][:300], digits[1][:300]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(images), labels))

    return loss


@pytest.mark.parametrize(
    ("raw", "dense", "limit"),
    [
        ({"weights": "348x"}, 430_500, 430_500 / 348),
        ({"weights": 1237}, 430_500, 1237),
        ({"bits": "1000x"}, 32e6, 32e3),
        ({"bits": "2.5e4"}, 32e6, 25_000),
        ({"file": "1.5kB"}, 1e6, 1500),
        ({"file": "1.5 KiB"}, 1e6, 1536),
        ({"file": 1500}, 1e6, 1500),
        ({"file": "2 MB"}, 1e9, 2e6),
        ({"file": "12.5 x"}, 1e6, 80_000),
    ],
)
def test_budgets_are_read_as_recipes_write_them(raw: Any, dense: float, limit: float) -> None:
    budget = Budget.parse(raw)
    assert budget.limit(dense) == limit
    assert Budget.parse(json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("1.5kB", "budget: '1.5kB' is not a map of one kind"),
        ({"file": 1, "bits": 2}, "is not a map of one kind"),
        ({"wieghts": 5}, "budget: there is no kind 'wieghts'. Did you mean 'weights'"),
        ({"file": "1.5kb"}, r"budget\.file: '1.5kb' has the unknown suffix 'kb'"),
        ({"file": "3 x B"}, r"budget\.file: '3 x B' is not"),
        ({"weights": "5kB"}, r"budget\.weights: '5kB' has the unknown suffix"),
        ({"bits": "0.5x"}, r"budget\.bits: '0.5x' is more than the dense network takes"),
        ({"bits": 0}, r"budget\.bits: 0 is not a positive number of bits"),
        ({"bits": -3}, r"budget\.bits: -3 is not a positive number of bits"),
        ({"bits": True}, r"budget\.bits: True is not a positive number"),
        ({"file": "nan"}, r"budget\.file: 'nan' is not"),
        ({"file": "1e999"}, r"budget\.file: '1e999' is not"),
        ({"file": None}, r"budget\.file: None is not a positive number of bytes or a ratio"),
    ],
)
def test_other_budgets_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Budget.parse(raw)
    assert len(str(caught.value).splitlines()) <= 3


OPTION = st.tuples(st.integers(1, 30), st.integers(-5, 30))


@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_knapsack_is_as_good_as_brute_force(layers: list[list[tuple[int, int]]]) -> None:
    options = [tuple(np.array(each, dtype=float).T) for each in layers]
    sums = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*layers)]
    for budget in range(min(cost for cost, _ in sums), max(cost for cost, _ in sums) + 1):
        best = min(loss for cost, loss in sums if cost <= budget)
        found = frontier(options, budget)
        assert found.loss[-1] == best
        assert found.cost[-1] <= budget
        picked = [layer[pick] for layer, pick in zip(layers, found.picks[-1], strict=True)]
        assert (found.cost[-1], found.loss[-1]) == tuple(map(sum, zip(*picked, strict=True)))


def test_a_thinned_knapsack_stays_within_a_thousandth_of_the_dual_bound() -> None:
    random = np.random.default_rng(0)
    options = []
    for _ in range(12):
        share = np.geomspace(1, 1e-4, 150)
        rise = random.uniform(0.1, 3) * (1 - share ** random.uniform(0.05, 0.5))
        options.append((10 ** random.uniform(3, 6) * share, rise))
    budget = 0.02 * sum(cost[0] for cost, _ in options)
    found = frontier(options, 2 * budget)
    assert len(found.cost) > 3000
    loss = found.loss[found.cost <= budget][-1]
    bound = max(
        sum((rise + price * cost).min() for cost, rise in options) - price * budget
        for price in np.geomspace(1e-9, 1e-1, 2000)
    )
    assert bound <= loss <= bound * 1.001


TARGETS: list[ConstraintSet] = [
    Unstructured(density=0.1),
    Unstructured(density=0.1) & Levels(3),
    Block(2, 4, density=0.1) & Levels(2, zero=True),
    Column(density=0.1) & Filter(density=0.5) & Levels(2),
    Filter(density=0.5) & Levels(3),
]
SPENT = [0.97, 0.97, 0.97, 0.8, 0.4]  # one filter of 784 weights is over half of a budget
BUDGETS = [{"weights": "20x"}, {"bits": "150x"}, {"bits": 20_000}, {"file": "2kB"}]


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(("target", "share"), list(zip(TARGETS, SPENT, strict=True)), ids=str)
def test_budgets_of_every_kind_are_met_closely(
    network: nn.Module, calibration: Loss, target: ConstraintSet, share: float, by: Any
) -> None:
    before = copy.deepcopy(network.state_dict())
    plan = build_plan(network, target)
    for raw in BUDGETS:
        spent = allocate(network, plan, Budget.parse(raw), by=by, loss=calibration)
        assert share * spent.limit <= spent.cost <= spent.limit
        costs = sum(layer.cost for layer in spent.layers) + sum(spent.rest.values())
        assert costs == pytest.approx(spent.cost)
        projected = spent.plan.project({name: before[name] for name in ("1.weight", "3.weight")})
        for row in spent.plan.compressed:
            assert row.pooled or row.set.contains(projected[row.parameter])
        assert apply(plan, json.loads(json.dumps(spent.to_dict()))) == spent.plan
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_is_measured_is_what_the_file_takes(
    network: nn.Module, target: ConstraintSet, tmp_path: Path
) -> None:
    plan = build_plan(network, target)
    names = {"reference": "my:network", "arguments": {"width": 24}, "metadata": {"input": "1"}}
    overhead = packed.overhead_bytes(network, **names)
    plan = allocate(network, plan, Budget.parse({"file": 3000}), overhead=overhead).plan
    costs = {kind: MEASURES[kind](network, plan, overhead).of(plan) for kind in MEASURES}
    model = copy.deepcopy(network)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in costs["file"].projected.items():
            parameters[name].copy_(value)
        dead = (model[1].weight == 0).all(dim=1)
        model[1].bias[dead] = 0
    size = packed.save(
        tmp_path / "x", model, settle(model, [plan], torch.zeros(1, 784)).quantized, **names
    )
    weights = [size.tensors[name] for name in costs["file"].projected]
    assert costs["bits"].total == sum(each.total for each in weights)
    assert costs["weights"].total == sum(
        int(each.count_nonzero()) for each in costs["file"].projected.values()
    )
    assert 0 <= costs["file"].total - size.file <= 4  # digits of the length of the blob


@pytest.mark.parametrize("raw", [{"weights": "20x"}, {"bits": "150x"}, {"file": "25x"}], ids=str)
def test_a_ratio_is_to_what_the_dense_network_took(network: nn.Module, raw: Any) -> None:
    budget, plan = Budget.parse(raw), build_plan(network, Unstructured(density=0.1) & Levels(3))
    dense = MEASURES[budget.kind].dense(network, plan)
    sizes = {"weights": 784 * 24 + 240, "bits": 32 * (784 * 24 + 240), "file": 4 * (19056 + 34)}
    assert dense == sizes[budget.kind]
    asked = allocate(network, plan, budget)
    told = allocate(network, plan, budget, dense=2 * dense)
    assert (told.limit, told.dense) == (2 * asked.limit, 2 * asked.dense)
    assert asked.limit == dense / budget.number < told.cost <= told.limit


def test_batchnorms_and_other_layers_are_part_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    plan = build_plan(model, Filter(density=0.5), layers={"3": "dense"}, metric="batchnorm")
    spent = allocate(model, plan, Budget.parse({"file": "2 kB"}))
    assert set(spent.rest) == {"container", *(n for n in model.state_dict() if n[0] != "0")}
    settled = copy.deepcopy(model)
    with torch.no_grad():
        settled[0].weight.copy_(spent.plan.project({"0.weight": model[0].weight})["0.weight"])
    levels = settle(settled, [spent.plan], torch.zeros(1, 3, 4, 4)).quantized
    size = packed.save(tmp_path / "x", settled, levels, reference=None)
    assert 0 <= spent.cost - size.file <= 4


@pytest.mark.parametrize("levels", [None, Levels(3)], ids=str)
def test_by_magnitude_is_the_global_top_k(lenet: nn.Module, levels: Levels | None) -> None:
    target: ConstraintSet = Unstructured(keep=1237)
    today = build_plan(lenet, target & levels if levels else target)
    other: ConstraintSet = Unstructured(density=0.1)
    plan = build_plan(lenet, other & levels if levels else other)
    spent = allocate(lenet, plan, Budget.parse({"weights": 1237}))
    parameters = dict(lenet.named_parameters())
    weights = {row.parameter: parameters[row.parameter] for row in plan.compressed}
    expected, found = today.project(weights), spent.plan.project(weights)
    assert spent.plan.keep == spent.cost == 1237
    assert all(row.pooled for row in spent.plan.compressed)
    for name, weight in expected.items():
        assert torch.equal(weight, found[name])


@pytest.mark.parametrize("target", [Filter(keep=1), Column(keep=1), Block(2, 4, keep=1)], ids=str)
def test_groups_are_cut_at_one_threshold_relative_to_their_layers(
    network: nn.Module, target: Counted
) -> None:
    spent = allocate(network, build_plan(network, target), Budget.parse({"weights": "2x"}))
    kept, dropped = [], []
    for row in spent.plan.compressed:
        weight = network.get_submodule(row.layer).weight.detach()
        assert isinstance(row.set, Counted)
        support = row.set.project(weight) != 0
        energy = weight.double().square() / weight.double().square().mean()
        groups = target.groups(row.shape).expand(row.shape)
        for group in range(target.total(row.shape)):
            mean = float(energy[groups == group].mean())
            (kept if bool(support[groups == group].any()) else dropped).append(mean)
    assert min(kept) >= max(dropped)


def energies(weight: Tensor, m: int) -> list[float]:
    """Of the projections on 1:m, 2:m, ..., m:m, the share of the squared norm that stays."""
    whole = weight.double().square().sum()
    return [
        float(NM(n, m).project(weight).double().square().sum() / whole) for n in range(1, m + 1)
    ]


@pytest.mark.parametrize("budget", ["4x", "3x", "2.2x", "1.3x"])
def test_mixed_n_of_m_keeps_as_much_as_brute_force(budget: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    with torch.no_grad():
        for power, layer in enumerate(model):
            layer.weight.copy_(torch.randn(32, 32).pow(2 * power + 1))
    plan = build_plan(model, NM(1, 8))
    spent = allocate(model, plan, Budget.parse({"weights": budget}))
    found = [row.set for row in spent.plan.compressed]
    assert all(isinstance(each, NM) and each.m == 8 for each in found)
    kept = {
        row.layer: energies(model.get_submodule(row.layer).weight.detach(), 8)
        for row in plan.compressed
    }
    best = max(
        sum(kept[str(layer)][n - 1] for layer, n in enumerate(choice))
        for choice in itertools.product(range(1, 9), repeat=3)
        if sum(choice) * 128 <= spent.limit
    )
    chosen = [each.n for each in found if isinstance(each, NM)]
    assert sum(chosen) * 128 == spent.cost <= spent.limit
    assert sum(kept[str(layer)][n - 1] for layer, n in enumerate(chosen)) == pytest.approx(best)
    assert len(set(chosen)) > 1


@pytest.mark.parametrize("by", WAYS)
def test_mixed_n_of_m_with_levels_comes_back_from_its_record(
    network: nn.Module, calibration: Loss, by: By
) -> None:
    plan = build_plan(network, NM(2, 16) & Levels(4))
    spent = allocate(network, plan, Budget.parse({"bits": "30x"}), by=by, loss=calibration)
    assert 0.6 * spent.limit < spent.cost <= spent.limit
    again = apply(plan, json.loads(json.dumps(spent.to_dict())))
    assert [row.set for row in again.rows] == [row.set for row in spent.plan.rows]


def test_by_sensitivity_is_as_good_as_brute_force() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    inputs = torch.randn(50, 5)
    expected = model(inputs).detach()

    def loss(model: nn.Module) -> float:
        return float((model(inputs) - expected).detach().square().mean())

    def alone(layer: int, keep: int) -> float:
        changed = copy.deepcopy(model)
        before = model[layer].weight.detach()
        weight = Filter(keep=keep).project(before)
        with torch.no_grad():
            changed[layer].weight.copy_(weight * before.norm() / weight.norm())
        return loss(changed)

    plan = build_plan(model, Filter(density=0.5))
    sizes = {0: (4, 5), 2: (3, 4), 4: (4, 3)}
    measured = {
        layer: [(keep * size, alone(layer, keep)) for keep in range(1, filters + 1)]
        for layer, (filters, size) in sizes.items()
    }
    sums = [tuple(map(sum, zip(*c, strict=True))) for c in itertools.product(*measured.values())]
    for budget in (12, 15, 21, 30, 44):
        spent = allocate(
            model, plan, Budget.parse({"weights": budget}), by="sensitivity", loss=loss
        )
        best = min(rise for cost, rise in sums if cost <= budget)
        assert sum(layer.loss or 0 for layer in spent.layers) == pytest.approx(best, abs=1e-6)


def test_a_layer_that_the_loss_ignores_pays_for_the_others(
    network: nn.Module, calibration: Loss
) -> None:
    first = network[1].weight

    def loss(model: nn.Module) -> float:
        assert float(model[1].weight.detach().norm()) == pytest.approx(norm, rel=1e-5)
        return float(model[3].weight.detach().sub(second).square().sum())

    norm, second = float(first.detach().norm()), network[3].weight.detach().clone()
    plan = build_plan(network, Unstructured(density=0.1))
    spent = allocate(network, plan, Budget.parse({"weights": 201}), by="sensitivity", loss=loss)
    ignored, other = spent.layers
    assert (ignored.kept, ignored.loss, ignored.price) == (1, 0.0, None)
    assert other.kept >= 190
    assert other.price is not None
    assert other.price > 0


def test_lenet_gets_rates_that_its_layers_can_bear(lenet: nn.Module, calibration: Loss) -> None:
    plan = build_plan(lenet, Unstructured(density=0.1))
    spent = allocate(
        lenet, plan, Budget.parse({"weights": "348x"}), by="sensitivity", loss=calibration
    )
    density = {layer.layer: layer.kept / layer.weights for layer in spent.layers}
    assert 0.99 * spent.limit <= spent.cost <= spent.limit
    assert density["fc1"] == min(density.values())
    assert all(layer.kept > 20 for layer in spent.layers)  # none is given up


def test_bits_are_chosen_where_a_range_is_given(network: nn.Module, calibration: Loss) -> None:
    plan = build_plan(network, Unstructured(density=0.1) & Levels(3))
    budget = Budget.parse({"bits": 12_000})
    ways = [(2, 3, 4), (2,), (4,)]
    spent = [
        allocate(network, plan, budget, by="sensitivity", loss=calibration, bits=bits)
        for bits in ways
    ]
    total = [sum(layer.loss or 0 for layer in each.layers) for each in spent]
    assert total[0] <= min(total[1:]) + 0.05  # losses between rungs are interpolated
    for bits, each in zip(ways, spent, strict=True):
        chosen = {row.set.split()[1].bits for row in each.plan.compressed if row.set}
        assert chosen <= set(bits)
        assert apply(plan, json.loads(json.dumps(each.to_dict()))) == each.plan


@pytest.mark.parametrize("by", WAYS)
def test_fixed_layers_keep_what_the_plan_says(
    network: nn.Module, calibration: Loss, by: Any
) -> None:
    layers = {"3": {"density": 0.5}}
    plan = build_plan(network, Unstructured(density=0.1), layers=layers)
    spent = allocate(
        network, plan, Budget.parse({"weights": 400}), by=by, loss=calibration, fixed={"3"}
    )
    assert [layer.kept for layer in spent.layers] == pytest.approx([280, 120], rel=0.02)
    assert spent.layers[1].kept == 120
    assert apply(plan, spent.to_dict()) == spent.plan


@pytest.mark.parametrize("by", WAYS)
def test_path_aware_plans_are_measured_as_they_project(
    network: nn.Module, calibration: Loss, by: Any
) -> None:
    plan = build_plan(network, Unstructured(density=0.1), path_aware=torch.zeros(1, 1, 28, 28))
    spent = allocate(network, plan, Budget.parse({"weights": 100}), by=by, loss=calibration)
    weights = {name: network.state_dict()[name] for name in ("1.weight", "3.weight")}
    projected = spent.plan.project(weights)
    assert sum(int(each.count_nonzero()) for each in projected.values()) == spent.cost <= 100
    assert spent.plan.graph is plan.graph


def test_levels_alone_have_only_bits_to_choose(network: nn.Module, calibration: Loss) -> None:
    plan = build_plan(network, Levels(4))
    spent = allocate(
        network,
        plan,
        Budget.parse({"bits": "12x"}),
        by="sensitivity",
        loss=calibration,
        bits=(1, 2, 3, 8),
    )
    assert {row.set for row in spent.plan.compressed} <= {Levels(bits) for bits in (1, 2, 3, 8)}
    assert spent.plan.compressed[1].set == Levels(8)  # the last layer is small
    with pytest.raises(RecipeError, match=r"budget\.weights: 1,906 weights, but"):
        allocate(network, plan, Budget.parse({"weights": "10x"}))


@pytest.mark.parametrize("by", WAYS)
def test_impossible_budgets_say_what_stands_in_the_way(
    network: nn.Module, calibration: Loss, by: Any
) -> None:
    plan = build_plan(network, Filter(density=0.1) & Levels(3))
    with pytest.raises(RecipeError) as caught:
        allocate(network, plan, Budget.parse({"file": 100}), by=by, loss=calibration)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("budget.file: 100 bytes, but with one unit left in each layer it is ")
    assert second.startswith("Of these take 1 2")  # under 294 bytes: a filter of 784 values, 3 bits
    assert "container 1" in second
    least = int(third.split()[3].replace(",", ""))
    spent = allocate(network, plan, Budget.parse({"file": least}), by=by, loss=calibration)
    assert spent.cost == least
    assert [row.set for row in spent.plan.compressed] == [Filter(keep=1) & Levels(3)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "sensitvity"}, "no way 'sensitvity'.* Did you mean 'sensitivity'"),
        ({"by": "sensitivity"}, "loss: allocation by sensitivity needs"),
        ({"bits": (2, 3)}, "bits: .* magnitudes say nothing about bits"),
        ({"fixed": {"4"}}, "fixed: '4' is no layer of the plan"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    network: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    plan = build_plan(network, Unstructured(density=0.1))
    with pytest.raises(RecipeError, match=message):
        allocate(network, plan, Budget.parse({"weights": "10x"}), **arguments)


def test_bits_need_levels_and_budgets_a_layer(network: nn.Module, calibration: Loss) -> None:
    budget = Budget.parse({"weights": "10x"})
    plan = build_plan(network, Unstructured(density=0.1))
    with pytest.raises(RecipeError, match="no set of the plan has levels"):
        allocate(network, plan, budget, by="sensitivity", loss=calibration, bits=(2, 3))
    with pytest.raises(RecipeError, match="budget: the plan has no layer to spend it on"):
        allocate(network, Plan(()), budget)


def test_losses_and_weights_that_are_not_finite_are_refused(network: nn.Module) -> None:
    before = copy.deepcopy(network.state_dict())
    plan, budget = build_plan(network, Unstructured(density=0.1)), Budget.parse({"weights": "10x"})

    def loss(model: nn.Module) -> float:
        changed = not torch.equal(model[3].weight, before["3.weight"])
        return float("nan") if changed else 1.0

    with pytest.raises(NonFiniteError, match="loss: it is nan for 3 in unstructured"):
        allocate(network, plan, budget, by="sensitivity", loss=loss)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken[3].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="3: 1 of 240 weights"):
        allocate(broken, plan, budget)


def test_an_allocation_is_not_applied_to_another_plan(network: nn.Module) -> None:
    plan = build_plan(network, Unstructured(density=0.1))
    saved = allocate(network, plan, Budget.parse({"weights": "10x"})).to_dict()
    for other in (
        build_plan(network, Unstructured(density=0.1), layers={"3": "dense"}),
        build_plan(network, Filter(density=0.1)),
        build_plan(lenet5(), Unstructured(density=0.1)),
    ):
        with pytest.raises(RecipeError, match="allocation: it was made for other layers"):
            apply(other, saved)


@pytest.mark.parametrize("by", WAYS)
def test_the_table_says_what_and_why(network: nn.Module, calibration: Loss, by: Any) -> None:
    plan = build_plan(network, Unstructured(density=0.1) & Levels(3))
    spent = allocate(network, plan, Budget.parse({"file": "1.5kB"}), by=by, loss=calibration)
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(allocation_table(spent.to_dict(), "stage [0]"))
    text = console.file.getvalue()
    assert "stage [0]" in text
    assert "at most 1,500 bytes" in text
    assert "not planned: container" in text
    assert ("saves" in text) == (by == "sensitivity")
    for layer in spent.layers:
        assert f"{layer.cost:,.0f}" in text
