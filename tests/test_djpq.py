"""DJPQ: its costs counted by hand, its recipe and its loop, the network that it ends with."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.channels import ChannelGraph, compact
from secateur.engine.progress import Progress
from secateur.engine.trainer import Segment, Trainer
from secateur.errors import RecipeError
from secateur.gates import VIBGate
from secateur.methods import DJPQ
from secateur.plan import build_plan
from secateur.quantizers import FixedQuantizer, Quantizer, input_quantizer
from secateur.recipe import load_recipe
from secateur.sets import Levels, Unstructured
from secateur.zoo import lenet5, resnet8

EIGHT = Levels(8, zero=True)


def digits_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 36, 10),
    )  # fmt: skip


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def train(method: DJPQ, steps: int, lr: float = 3e-3) -> nn.Module:
    """Train a few steps on noise; enough to calibrate and to move everything."""
    model = method.model.train()
    optimizer = torch.optim.Adam(method.parameter_groups(lr))
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images()), torch.arange(16) % 10)
        (loss + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    return model.eval()


def close(method: DJPQ, every: int) -> int:
    """Close every n-th channel of each gate; return how many are closed."""
    with torch.no_grad():
        for gate, _, _ in method.gates:
            own = gate.mu if isinstance(gate, VIBGate) else gate.logit
            assert isinstance(own, Tensor)
            own[::every] = 0.0 if isinstance(gate, VIBGate) else -9.0
    return sum(int((~gate.open()).sum()) for gate, _, _ in method.gates)


def counted(model: nn.Module, method: DJPQ) -> int:
    """Count BOPs of a finished network from the shapes that flow and the grids that are left."""
    total = 0

    def count(name: str, layer: Any, output: Tensor) -> None:
        nonlocal total
        integers = (layer.weight / method.steps[name].flatten()[0]).abs()
        bits = method.widths[name][0]
        if method.steps[name].numel() == 1:
            assert torch.allclose(integers, integers.round(), atol=1e-3)
            assert float(integers.max()) <= 2 ** (bits - 1) - 1 + 1e-3
        grid = input_quantizer(layer)
        assert isinstance(grid, FixedQuantizer)
        most = round(float(grid.most))
        levels = 2 * most + 1 if grid.signed else most + 1
        macs = output[0].numel() * layer.weight[0].numel()
        total += macs * bits * math.ceil(math.log2(levels))

    hooks = [
        layer.register_forward_hook(lambda m, i, o, name=name: count(name, m, o))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images(1))
    for hook in hooks:
        hook.remove()
    return total


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "as in the paper": (digits_network, {}),
    "restricted": (digits_network, {"widths": [2, 4, 8]}),
    "hard-concrete, linear": (resnet8, {"gates": "hard_concrete", "quantizer": "linear"}),
    "without norms": (lenet5, {}),
    "LSQ with learned bits": (digits_network, {"quantizer": "lsq"}),
    "LSQ": (
        resnet8,
        {"gates": "none", "quantizer": "lsq", "learn_bits": False, "activation_bits": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_finished_network_is_the_one_in_evaluation_and_costs_what_was_counted(
    case: str,
) -> None:
    build, options = CASES[case]
    model = build()
    keys = list(model.state_dict())
    method = DJPQ(EIGHT, images(1), gamma=300.0, **options).attach(model)
    assert method.bops.hard() / method.bops.dense == pytest.approx(
        8 * options.get("activation_bits", 8) / 1024
    )
    train(method, 20 if "widths" in options else 6, 0.03)
    closed = close(method, 3)
    assert bool(closed) == (options.get("gates") != "none")
    expected, bops, metrics = model(images()), method.bops.hard(), method.metrics()
    assert method.finalize() is model
    assert method.finalize() is model
    assert torch.allclose(model(images()), expected, atol=1e-5)
    assert [key for key in model.state_dict() if "input_quantizer" not in key] == keys
    assert not [m for m in model.modules() if isinstance(m, Quantizer)]
    widths = [w for pair in method.widths.values() for w in pair]
    if "widths" in options:
        assert set(widths) <= {2, 4, 8}
    if options.get("learn_bits", True):
        assert min(widths) < 8
    small = compact(model, images(1), fixed=set(method.weights)).model
    graph = ChannelGraph(small, images(1))
    whole = ChannelGraph(build(), images(1))
    lost = sum(g.channels for g in whole.groups) - sum(g.channels for g in graph.groups)
    assert lost == closed
    exact = [copy.deepcopy(each).double()(images().double()) for each in (model, small)]
    assert torch.allclose(*exact, atol=1e-9)
    weight_bits = {name: weights for name, (weights, _) in method.widths.items()}
    activation_bits = {name: activations for name, (_, activations) in method.widths.items()}
    cost = sc.inspect(small, images(1), weight_bits=weight_bits, activation_bits=activation_bits)
    assert cost.bops == bops == counted(small, method)
    assert metrics["bops"] == bops / (sc.inspect(build(), images(1)).macs * 1024)


def test_the_soft_cost_is_the_formula_with_channels_pruned_on_both_sides() -> None:
    model = digits_network()
    method = DJPQ(EIGHT, images(1)).attach(model)
    train(method, 3, 0.05)
    first, second = (gate for gate, _, _ in method.gates)
    with torch.no_grad():
        first.mu.copy_(torch.linspace(0.001, 1, 8))
        second.mu.copy_(torch.linspace(0.002, 0.02, 12))
    p1, p2 = (
        1 - torch.sigmoid((g.mu**2 / g.log_variance.exp() / 1e-3).log()).mean()
        for g in (first, second)
    )
    layers = [model[0], model[3], model[7]]  # type: ignore[index]
    macs = [8 * 25 * 144, 12 * 8 * 9 * 36, 12 * 36 * 10]
    kept = [1 - p1, (1 - p1) * (1 - p2), 1 - p2]
    total = 0.0
    for layer, mac, share in zip(layers, macs, kept, strict=True):
        w, a = layer.parametrizations.weight[0], layer.input_quantizer
        bits = torch.log2(w.limit**w.power / w.step + 1) + 1
        inputs = torch.log2(a.limit / a.step + 1) + (1 if layer is layers[0] else 0)
        total = total + mac * share * bits * inputs
    expected = total.detach() / (sum(macs) * 1024)  # type: ignore[attr-defined]
    assert float(method.bops.soft().detach()) == pytest.approx(float(expected), rel=1e-5)
    divergence = sum(float(g.penalty().detach()) for g in (first, second))
    o = method.options
    assert float(method.penalty().detach()) == pytest.approx(
        o.beta * divergence + o.gamma * float(expected), rel=1e-5
    )
    method.bops.soft().backward()
    for name, parameter in model.named_parameters():
        pressed = "log2_step" in name or ".gate." in name
        moved = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert moved == pressed, f"{name}: bits cost their steps, and nothing else"


def test_it_prunes_and_quantizes_digits_in_a_loop_of_one_s_own() -> None:
    splits = data.load("digits")
    x = torch.stack([torch.as_tensor(splits.train[i][0]) for i in range(len(splits.train))])
    y = torch.tensor([int(splits.train[i][1]) for i in range(len(splits.train))])
    model = digits_network()
    generator = torch.Generator().manual_seed(0)

    def epochs(count: int, optimizer: torch.optim.Optimizer, method: DJPQ | None = None) -> None:
        for _ in range(count):
            for batch in torch.randperm(len(x), generator=generator).split(64):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                (loss + method.penalty() if method else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
                if method:
                    method.step()

    epochs(4, torch.optim.Adam(model.parameters(), 3e-3))
    method = DJPQ(EIGHT, x[:1], beta=3e-2, gamma=20.0, gate_lr=50.0).attach(model)
    epochs(10, torch.optim.Adam(method.parameter_groups(2e-3)), method)
    metrics = method.metrics()
    model.eval()
    accuracy = float((model(x).argmax(1) == y).float().mean())
    assert accuracy > 0.9, (accuracy, metrics)
    assert metrics["bops"] < 0.02, metrics  # 50x; 8 bits alone are 16x
    assert metrics["channels"] < 1, metrics
    small = compact(method.finalize(), x[:1], fixed=set(method.weights)).model
    assert float((small(x).argmax(1) == y).float().mean()) == pytest.approx(accuracy, abs=2e-3)


def run(folder: Path, epochs: int | None = None, resume: bool = False) -> tuple[Any, Trainer]:
    """Train a recipe's djpq stage with the engine; stop after some epochs as if interrupted."""
    recipe = load_recipe(
        {
            "model": "secateur.zoo:lenet5",
            "data": "digits",
            "train": {"epochs": 1, "batch_size": 64, "optimizer": "adam", "lr": 2e-3, "threads": 1},
            "stages": [
                {"method": "djpq", "epochs": 2, "gates": "hard_concrete"}
                | {"layers": {"3": {"bits": 4}}}
            ],
        }
    )
    splits = data.fewer(data.load("digits"), 256)
    task = sc.Task(digits_network(), splits.train, splits.validation, splits.test)
    stage = recipe.stages[0]
    plan = build_plan(task.model, stage.target, layers=stage.layers)
    method = DJPQ(plan, task.example_input, **stage.options.model_dump())
    segments = [Segment(recipe_phase, 0, method) for recipe_phase in method.phases()]
    from accelerate import Accelerator
    from rich.console import Console

    trainer = Trainer(
        task, recipe.train, folder, "test", Progress(Console(quiet=True)), Accelerator(),
        teacher=digits_network,
    )  # fmt: skip
    if epochs is not None:
        save = trainer._save

        def interrupted(*given: Any) -> None:
            save(*given)
            if given[1] == epochs:
                raise KeyboardInterrupt

        trainer._save = interrupted  # type: ignore[method-assign]
    trainer.run(segments, resume)
    return method, trainer


def test_a_recipe_stage_resumes_to_the_same_bits_and_channels(tmp_path: Path) -> None:
    whole, straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", epochs=1)
    parts, resumed = run(tmp_path / "b", resume=True)
    assert whole.widths == parts.widths
    assert whole.widths["3"][0] <= 4
    for key, value in straight.task.model.state_dict().items():
        assert torch.equal(value, resumed.task.model.state_dict()[key]), key
    wanted = {"bops", "channels", "weight_bits", "activation_bits"}
    assert wanted <= set(straight.history[-1])
    assert straight.history[-1]["bops"] == resumed.history[-1]["bops"]


def test_a_recipe_without_a_set_has_eight_bits_with_zero() -> None:
    base = {"model": "secateur.zoo:lenet5", "data": "digits"}
    for extra, bits in (({}, 8), ({"bits": 4}, 4)):
        recipe = load_recipe({**base, "stages": [{"method": "djpq", **extra}]})
        assert recipe.stages[0].target == Levels(bits, zero=True)


@pytest.mark.parametrize(
    ("target", "options", "field"),
    [
        (Unstructured(density=0.5), {}, "set:"),
        (Levels(4), {}, "set:"),
        (Levels(4, spacing="power_of_two"), {}, "set:"),
        (EIGHT, {"example_input": None}, "example_input:"),
        (EIGHT, {"widths": [16]}, "widths:"),
        (EIGHT, {"widths": [4, 2]}, "widths:"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(
    target: Any, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{field}"):
        DJPQ(target, **({"example_input": images(1)} | options)).attach(digits_network())


def test_layers_that_pass_by_their_module_stay_dense_and_are_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.b(torch.relu(self.a(x))))
            return nn.functional.linear(hidden, self.c.weight)

    method = DJPQ(EIGHT, torch.zeros(1, 6)).attach(Tied())
    assert [note.partition(":")[0] for note in method.notes] == ["c"]
    assert [row.note for row in method.plan.rows if row.layer == "b"] == ["its weight is that of a"]
    assert method.bops.widths()["c"] == (32, 32)
