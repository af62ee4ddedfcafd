"""The contract of methods: one battery that every method passes with every target.

A new method is one row in ``METHODS``, a new kind of target one row in ``TARGETS``.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import methods
from secateur.engine.progress import Progress
from secateur.methods import Method, Phase
from secateur.plan import Plan, build_plan
from secateur.sets import NM, Column, ConstraintSet, Filter, Levels, Unstructured, join
from tiny import OPTIMIZERS, digits_network, digits_task, small_model, train

STEPS = 20
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    # name of the row, at least one the name in recipes: name in recipes, options
    "admm": ("admm", {"rho": 0.1, "interval": 5}),
    "admm in two steps": ("admm", {"rho": 0.1, "interval": 5, "steps": [0.5, 1.0]}),
    "admm guided": (
        "admm",
        {"pull": "decoupled", "rho_max": 3.0, "rho_schedule": "ladder", "cycles": 2}
        | {"distill": 0.5, "average": 0.9, "epochs": 4},
    ),
    "admm by shares": (
        "admm",
        {"rho": 0.1, "interval": 5, "edges_last": True}
        | {"scale": "trained", "snap": [0.5, 1.0], "retrain_epochs": 2},
    ),
    "admm purified": ("admm", {"rho": 0.1, "interval": 5, "purify": [0.5, 0.9]}),
    "gmp": ("gmp", {"interval": 4}),
    "gmp guided": ("gmp", {"initial_density": 0.9, "distill": 0.5, "average": 0.9}),
    "gmp by shares": (
        "gmp",
        {"interval": 4, "scale": "trained", "snap": [0.3, 0.6, 1.0], "retrain_epochs": 3}
        | {"average": 0.9},
    ),
    "srste": ("srste", {"decay": 1e-2}),
    "srste decoupled": ("srste", {"decay": 1e-2, "mode": "decoupled", "anneal": 9, "interval": 4}),
    "srste on levels": ("srste", {"decay": 1e-2, "joint": True, "scale": "trained"}),
    "srste after dense training": ("srste", {"mode": "decoupled", "precondition": 1}),
}
UNPROJECTED = {"djpq", "post_training"}
"""Methods that learn their grids and channels, or look at inputs; each has a file of its own."""

TARGETS: list[ConstraintSet] = [
    Unstructured(density=0.2),
    Levels(2),
    Levels(3, zero=True),
    Unstructured(density=0.2) & Levels(2),
    Filter(density=0.5),
    NM(1, 4) & Levels(2),
    Column(density=0.5) & Filter(density=0.5) & Levels(3, spacing="power_of_two"),
]

every_method = pytest.mark.parametrize("name", METHODS)
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def make(name: str, target: ConstraintSet | Plan) -> Method:
    registered, options = METHODS[name]
    short = {"epochs": 1, "retrain_epochs": 1}
    return methods.METHODS[registered](target, **(short | options))


def optimizer_of(model: nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    return OPTIMIZERS[name](model.parameters())


def through(model: nn.Module, method: Method, phases: tuple[Phase, ...]) -> None:
    for number, phase in enumerate(phases):
        method.begin(phase, STEPS)
        train(model, method, optimizer_of(model), phase.epochs * STEPS, seed=number)


def test_every_method_has_a_row() -> None:
    assert set(methods.METHODS) - UNPROJECTED <= set(METHODS)


@every_method
@every_target
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_target_is_met_exactly(name: str, target: ConstraintSet, scope: str) -> None:
    model = small_model()
    plan = build_plan(model, target, scope=scope)
    method = make(name, plan).attach(model)
    through(model, method, method.phases())
    assert not method.approximate
    assert method.finalize() is model
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [int(weight.count_nonzero()) for weight in weights]
    patterns, levels = target.split()
    budget = [len(weight.flatten()) for weight in weights]
    if patterns:
        members = [join(patterns, None).project(torch.randn_like(weight)) for weight in weights]
        budget = [int(member.count_nonzero()) for member in members]
    if any(row.pooled for row in plan.rows):
        kept, budget = [sum(kept)], [round(0.2 * (128 + 48))]
    if levels and (levels.zero or any(pattern.elementwise for pattern in patterns)):
        assert all(one <= most for one, most in zip(kept, budget, strict=True))  # zero is a level
    else:
        assert kept == budget
    if scope == "layer":
        assert all(target.contains(weight) for weight in weights)
    sets = plan.sets(method.weights)
    assert all(sets[row.layer].contains(method.weights[row.parameter]) for row in plan.compressed)


@every_method
@every_target
def test_finalize_projects_in_a_loop_that_knows_no_phases(name: str, target: ConstraintSet) -> None:
    model = small_model()
    method = make(name, build_plan(model, target, scope="layer")).attach(model)
    train(model, method, optimizer_of(model), 30)
    before = copy.deepcopy(model.state_dict())
    with method.projected():
        again = method.plan.project(method.weights)
        assert all(torch.equal(each, method.weights[key]) for key, each in again.items())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    method.finalize()
    assert not method.approximate
    assert all(target.contains(weight) for weight in method.weights.values())


@every_method
@every_target
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_survive_200_steps(name: str, target: ConstraintSet, optimizer: str) -> None:
    """The optimizer is the same from the start: its moments are from before the projection."""
    model = small_model()
    method = make(name, build_plan(model, target, scope="layer")).attach(model)
    made = optimizer_of(model, optimizer)
    *earlier, last = method.phases()
    for phase in earlier:
        method.begin(phase, STEPS)
        train(model, method, made, phase.epochs * STEPS)
    method.begin(last, STEPS)
    start = {key: weight.detach().clone() for key, weight in method.weights.items()}
    for part in range(20):
        train(model, method, made, 10, seed=part)
        for key, weight in method.weights.items():
            assert target.contains(weight)
            if not (isinstance(target, Levels) and target.zero):
                assert torch.equal(weight == 0, start[key] == 0)
    moved = [not torch.equal(start[key], weight) for key, weight in method.weights.items()]
    assert any(moved)


PHASES = [
    pytest.param(name, target, number, id=f"{name}-{target}-{number} {phase.name}")
    for name in METHODS
    for target in TARGETS
    for number, phase in enumerate(make(name, target).phases())
]


@pytest.mark.parametrize(("name", "target", "number"), PHASES)
def test_state_round_trips_bit_for_bit_within_each_phase(
    name: str, target: ConstraintSet, number: int
) -> None:
    def rest(model: nn.Module, method: Method) -> list[Tensor]:
        train(model, method, torch.optim.SGD(model.parameters(), 0.05), 9, seed=8)
        through(model, method, method.phases()[number + 1 :])
        method.finalize()
        return [parameter.detach() for parameter in model.parameters()]

    model = small_model()
    method = make(name, target).attach(model)
    phases = method.phases()
    through(model, method, phases[:number])
    method.begin(phases[number], STEPS)
    train(model, method, torch.optim.SGD(model.parameters(), 0.05), 11, seed=7)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "method": method.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = small_model()
    other.load_state_dict(saved["model"])
    resumed = make(name, target).attach(other)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["method"])
    assert resumed.approximate == method.approximate
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(rest(model, method), rest(other, resumed), strict=True):
        assert torch.equal(one, two)


@every_method
@every_target
def test_the_model_stays_a_plain_module(name: str, target: ConstraintSet) -> None:
    model = small_model()
    kinds = [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    method = make(name, target).attach(model)

    def assert_plain() -> None:
        assert [type(module) for module in model.modules()] == kinds
        assert list(model.state_dict()) == list(parameters)
        assert all(parameters[key] is each for key, each in model.named_parameters())
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert all(each.requires_grad and each.is_leaf for each in parameters.values())

    assert_plain()
    through(model, method, method.phases())
    assert_plain()
    assert method.finalize() is model
    assert_plain()
    assert not any(each._post_accumulate_grad_hooks for each in parameters.values())
    copy.deepcopy(model)


def joint(name: str) -> dict[str, Any]:
    registered, options = METHODS[name]
    stage = {"method": registered, "density": 0.2, "bits": 4, "epochs": 2, "retrain_epochs": 2}
    return {
        "train": {"epochs": 1, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "stages": [{**stage, **options}],
        "export": {"onnx": False},
    }


def staged(name: str) -> dict[str, Any]:
    """Return a recipe that prunes, then quantizes what is left, in a stage each."""
    registered, options = METHODS[name]
    stage = {"method": registered, "epochs": 2, "retrain_epochs": 2, **options}
    quantize = {key: value for key, value in stage.items() if key != "steps"}
    return {
        "train": {"epochs": 1, "batch_size": 64, "threads": 1, "optimizer": "sgd", "lr": 0.05},
        "stages": [{**stage, "density": 0.2}, {**quantize, "set": "levels", "bits": 3}],
        "export": {"onnx": False},
    }


@every_method
def test_a_stage_of_levels_keeps_the_zeros_of_the_stage_before(name: str, tmp_path: Path) -> None:
    recipe = staged(name)
    result = sc.compress(digits_task(), recipe, out=tmp_path)
    weights = [p for p in result.model.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in digits_network().parameters() if p.ndim > 1)
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert 0.18 * total < kept <= round(0.2 * total)  # what rounds to zero is dropped too
    assert all(len(weight.unique()) <= 9 for weight in weights)
    trained = [(entry["stage"], entry["phase"]) for entry in result.report["history"]]
    expected: list[tuple[int | None, str]] = [(None, "train")]
    for number, stage in enumerate(recipe["stages"]):
        kind = methods.METHODS[stage["method"]]
        options = {key: stage[key] for key in stage if key in kind.Options.model_fields}
        target = Levels(stage["bits"]) if "bits" in stage else Unstructured(density=0.2)
        of_stage = kind(target, **options).phases()
        expected += [(number, phase.name) for phase in of_stage for _ in range(phase.epochs)]
    assert trained == expected


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@every_method
@pytest.mark.parametrize("recipe", [joint, staged])
def test_resuming_after_any_epoch_gives_the_same_bytes(
    recipe: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sc.compress(digits_task(), recipe(name), out=tmp_path / "whole")
    expected = (whole.folder / "model.secateur").read_bytes()
    epochs = len(whole.report["history"])
    steps = Progress.advance
    count = 0

    def advance(self: Progress) -> None:
        nonlocal count
        count += 1
        if count == 27:  # 20 steps are an epoch: each life does one epoch and dies in the next
            raise Killed
        steps(self)

    monkeypatch.setattr(Progress, "advance", advance)
    out = tmp_path / "killed"
    for life in range(epochs):
        count = 0
        try:
            result = sc.compress(digits_task(), recipe(name), out=out, resume=life > 0)
            break
        except Killed:
            assert not (out / "report.json").exists()
    assert life == epochs - 1
    assert (out / "model.secateur").read_bytes() == expected
    strip = [{k: v for k, v in h.items() if k != "seconds"} for h in result.report["history"]]
    assert strip == [
        {k: v for k, v in h.items() if k != "seconds"} for h in whole.report["history"]
    ]


RANK = """
import json, os
import torch
from rich.console import Console
import secateur as sc
from tiny import digits_task

assert os.environ["WORLD_SIZE"] == "2"
result = sc.compress(digits_task(), json.load(open("recipe.json")), out="run", console=Console())
weights = {key: each for key, each in result.model.state_dict().items() if each.ndim > 1}
torch.save(weights, f"rank{os.environ['RANK']}.pt")
"""


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - UNPROJECTED))
def test_two_processes_agree_and_write_once(name: str, tmp_path: Path) -> None:
    recipe = joint(name)
    del recipe["stages"][0]["bits"]  # scales are rounded after training, by the writing process
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "tiny.py").write_text((Path(__file__).parent / "tiny.py").read_text())
    launch = "torch.distributed.run --standalone --nproc_per_node 2 rank.py"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split()],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 2  # the headline and a table, from one process
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    packed = sc.load(tmp_path / "run" / "model.secateur", digits_network()).state_dict()
    assert len(ranks[0]) == 2
    for key, weight in ranks[0].items():
        assert torch.equal(weight, ranks[1][key])
        assert torch.equal(weight, packed[key])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"]["compressed"] == report["accuracy"]["decoded"] > 0.75
