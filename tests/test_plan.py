"""Plans: which layer becomes what, and the one budget that layers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import NonFiniteError, RecipeError
from secateur.plan import Plan, build_plan
from secateur.sets import (
    Block,
    Channel,
    Column,
    ConstraintSet,
    Counted,
    Filter,
    Kernel,
    Levels,
    Unstructured,
)
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


STRUCTURED = [
    Filter(density=0.3),
    Channel(density=0.3),
    Column(density=0.3),
    Kernel(density=0.3),
    Block(4, 8, density=0.3),
    Column(density=0.3) & Filter(density=0.5),
]


@pytest.mark.parametrize("target", STRUCTURED, ids=str)
def test_structured_sets_are_met_in_each_layer_and_relaxed_by_share(target: ConstraintSet) -> None:
    torch.manual_seed(0)
    model = lenet5()
    plan = build_plan(model, target & Levels(2))
    assert plan.keep == 0
    projected = plan.project(weights_of(model, plan))
    assert all((target & Levels(2)).contains(weight) for weight in projected.values())
    half = plan.relaxed(0.5)
    relaxed = half.project(weights_of(model, half))
    for row in half.compressed:
        assert row.set == target.relaxed(row.shape, 0.5)
        patterns, levels = row.set.split()
        assert levels is None
        assert row.set.contains(relaxed[row.parameter])
        for easy, full in zip(patterns, target.split()[0], strict=True):
            assert isinstance(easy, Counted)
            assert isinstance(full, Counted)
            total = full.total(row.shape)
            assert easy.keep == round((full.count(total) * total) ** 0.5)


@pytest.mark.parametrize("target", STRUCTURED, ids=str)
def test_earlier_zeros_stay_zero_in_groups_that_are_quantized(target: ConstraintSet) -> None:
    torch.manual_seed(0)
    model = lenet5()
    plan = build_plan(model, target & Levels(2))
    weights = weights_of(model, plan)
    assert plan.within(weights) == plan
    with torch.no_grad():
        model.fc1.weight.view(-1)[::3] = 0
    narrowed = plan.within(weights)
    projected = narrowed.project(weights)
    assert int(projected["fc1.weight"].view(-1)[::3].count_nonzero()) == 0
    assert target.contains(projected["fc1.weight"])
    sets = narrowed.sets(projected)
    assert sets["conv1"] == target & Levels(2)
    assert sets["fc1"].contains(projected["fc1.weight"])
    hard = {name: weight.clone() for name, weight in plan.project(weights).items()}
    assert plan.within(hard) == plan  # whole groups of zeros need no narrowing


def test_exceptions_change_one_of_two_patterns_by_its_name() -> None:
    target = Column(density=0.3) & Filter(density=0.5) & Levels(2)
    layers = {"conv1": {"filter": {"keep": 9}, "bits": 3}, "fc1": {"column": {"density": 0.1}}}
    sets = {row.layer: row.set for row in build_plan(lenet5(), target, layers=layers).rows}
    assert sets["conv1"] == Column(density=0.3) & Filter(keep=9) & Levels(3)
    assert sets["fc1"] == Column(density=0.1) & Filter(density=0.5) & Levels(2)
    plan = build_plan(lenet5(), Block(2, 2, keep=3), layers={"conv1": {"rows": 4}})
    assert plan.rows[0].set == Block(4, 2, keep=3)


class Net(nn.Module):
    """A convolution with its norm, one without, and a block that normalizes first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.relu = nn.ReLU()
        self.bn2 = nn.BatchNorm2d(6)
        self.stem = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
        self.pre = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(5))


def test_a_batchnorm_is_found_right_after_its_convolution_only() -> None:
    plan = build_plan(Net(), Filter(density=0.5), metric="batchnorm", layers={"stem.0": "dense"})
    norms = {row.layer: row.norm for row in plan.rows if row.kind == "Conv2d"}
    assert norms == {"conv1": "bn1", "conv2": "", "stem.0": "", "pre.1": ""}
    assert all(not row.norm for row in build_plan(Net(), Filter(density=0.5)).rows)


@pytest.mark.parametrize(
    ("name", "pairs"), [("resnet18", 20), ("vgg11_bn", 8), ("mobilenet_v2", 52)]
)
def test_every_convolution_of_common_networks_finds_its_batchnorm(name: str, pairs: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()
    plan = build_plan(model, Filter(density=0.5), metric="batchnorm")
    convolutions = [row for row in plan.rows if row.kind == "Conv2d"]
    assert len(convolutions) == pairs
    assert all(row.norm for row in convolutions)
    assert not any(row.norm for row in plan.rows if row.kind == "Linear")


@pytest.mark.parametrize("target", [Filter(keep=3), Unstructured(keep=100)], ids=str)
def test_the_scale_of_the_batchnorm_decides_as_it_is_now(target: ConstraintSet) -> None:
    torch.manual_seed(0)
    model = Net()
    plan = build_plan(
        model,
        target,
        metric="batchnorm",
        layers=dict.fromkeys(("conv2", "stem.0", "pre.1"), "dense"),
    )
    for _ in range(3):
        with torch.no_grad():
            model.bn1.weight.uniform_(-2, 2)
            model.bn1.running_var.uniform_(0.1, 9)
        seen = model.conv1.weight * (
            model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt()
        ).view(-1, 1, 1, 1)
        expected = torch.where(target.project(seen) != 0, model.conv1.weight, 0)
        projected = plan.project(weights_of(model, plan), model)
        assert torch.equal(projected["conv1.weight"], expected)
        plain = plan.project(weights_of(model, plan))
        assert torch.equal(plain["conv1.weight"], target.project(model.conv1.weight))


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
        ({"conv1": {"unstructured": {"kep": 3}}}, "layers.conv1.unstructured.kep: no such option"),
    ],
)
def test_exceptions_that_match_nothing_are_refused(layers: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_plan(lenet5(), Unstructured(density=0.5), layers=layers)


def test_an_option_of_two_patterns_must_say_of_which() -> None:
    with pytest.raises(
        RecipeError, match=r"layers\.conv1\.keep: it is an option of column and of f"
    ):
        build_plan(
            lenet5(), Column(density=0.5) & Filter(density=0.5), layers={"conv1": {"keep": 3}}
        )


def test_a_model_without_batchnorm_has_no_metric() -> None:
    with pytest.raises(RecipeError, match="metric: 'batchnorm', but no layer"):
        build_plan(lenet5(), Filter(density=0.5), metric="batchnorm")


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


def test_without_levels_only_zeros_are_planned() -> None:
    both = build_plan(
        lenet5(), Unstructured(density=0.01) & Levels(4), layers={"fc2": {"density": 0.5}}
    )
    zeros = build_plan(lenet5(), Unstructured(density=0.01), layers={"fc2": {"density": 0.5}})
    assert both.without_levels() == zeros
    assert zeros.without_levels() == zeros
    assert build_plan(lenet5(), Levels(4)).without_levels().compressed == ()


def test_levels_after_pruning_keep_the_zeros() -> None:
    model = lenet5()
    plan = build_plan(model, Levels(3))
    with torch.no_grad():
        model.fc1.weight[:, 3:] = 0
    narrowed = plan.within(weights_of(model, plan))
    projected = narrowed.project(weights_of(model, plan))
    assert int(projected["fc1.weight"][:, 3:].count_nonzero()) == 0
    assert int(projected["conv1.weight"].count_nonzero()) == 500


def test_path_aware_budgets_go_to_weights_that_matter() -> None:
    torch.manual_seed(0)
    model, example = lenet5(), torch.zeros(1, 1, 28, 28)
    nn.init.constant_(model.fc1.bias, 9.0)  # every ReLU fires, so gradients show every path
    target = Unstructured(density=0.5)
    counts = {"conv1": 90, "conv2": 560, "fc1": 440, "fc2": 147}
    layers = {layer: {"keep": keep} for layer, keep in counts.items()}

    def useless(projected: dict[str, torch.Tensor]) -> int:
        """Count non-zeros whose gradient is zero on every input, or a constant the bias can add."""
        sparse = lenet5()
        sparse.load_state_dict({**model.state_dict(), **projected})
        hidden = []
        sparse.fc1.register_forward_hook(lambda *args: hidden.append(args[2].relu()))
        images = torch.randn(64, 1, 28, 28)
        sparse(images).square().sum().backward()
        weights = {name: dict(sparse.named_parameters())[name] for name in projected}
        dead = {name: (weight != 0) & (weight.grad == 0) for name, weight in weights.items()}
        fixed = hidden[0].std(dim=0) == 0
        dead["fc2.weight"] |= (sparse.fc2.weight != 0) & fixed
        return sum(int(each.sum()) for each in dead.values())

    plain = build_plan(model, target, layers=layers)
    aware = build_plan(model, target, layers=layers, path_aware=example)
    weights = weights_of(model, plain)
    before, after = plain.project(weights), aware.project(weights)
    assert useless(before) > 200
    assert useless(after) <= 2  # max pooling may never pick a weight on these images
    assert [int(each.count_nonzero()) for each in after.values()] == list(counts.values())
    assert aware.relaxed(0.5).graph is aware.graph
