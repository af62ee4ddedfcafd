"""What runtimes make of the ONNX file of a run: real ones, and ones that are wrong."""

from __future__ import annotations

import copy
import dataclasses
import io
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

import secateur as sc
from secateur.data import InMemory
from secateur.measure import RUNTIMES
from secateur.measure.runtimes import Feeds, Loaded, RuntimeModel
from secateur.parity import ROUNDED_TOLERANCES, Proof, Tolerance, compare, prove
from secateur.report import schema
from secateur.report.html import page
from secateur.report.terminal import print_report
from secateur.sets import Levels
from tiny import digits_task

pytest.importorskip("onnxruntime")

SAMPLES = 130


def task(labels: Callable[[Tensor], Tensor] = lambda outputs: outputs.argmax(1)) -> sc.Task:
    """Return a task that the untrained network does perfectly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    inputs = torch.randn(SAMPLES, 12)
    samples = InMemory(inputs, labels(model(inputs).detach()))
    return sc.Task(model, samples, samples, samples)


def proof(some: sc.Task, folder: Path) -> Proof:
    example = some.example_input
    path = sc.export_onnx(some.model, example, folder / "model.onnx")
    dense = copy.deepcopy(some.model)
    networks = {"dense": dense, "compressed": some.model, "decoded": dense}
    return prove(some, {**networks, "onnx": RuntimeModel(RUNTIMES["onnxruntime"], path, 1)}, path)


def play(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let another runtime stand in for OpenVINO: ONNX Runtime, its outputs changed."""
    honest = RUNTIMES["onnxruntime"].load

    def load(path: Path, feeds: Feeds, threads: int) -> Loaded:
        run = honest(path, feeds, threads)
        return lambda given: [change(each) for each in run(given)]

    played = dataclasses.replace(RUNTIMES["openvino"], package="torch", load=load)
    monkeypatch.setitem(RUNTIMES, "openvino", played)


def fail(error: Exception) -> Callable[[Any], Any]:
    def change(_: Any) -> Any:
        raise error

    return change


def test_openvino_is_held_to_the_trained_network(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    recipe = {
        "train": {"epochs": 2, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "stages": [{"method": "gmp", "density": 0.3, "epochs": 0, "retrain_epochs": 1}],
    }
    result = sc.compress(digits_task(), recipe, out=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    schema.validate(report)
    found = report["parity"]["runtimes"]
    assert set(found) == {"onnxruntime", "openvino"}
    test = digits_task().test
    assert isinstance(test, InMemory)
    floats = {"INFERENCE_PRECISION_HINT": "f32"}  # else it takes bfloat16 where there is AMX
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", floats)
    ran = torch.from_numpy(compiled(test.inputs.numpy())[0])
    with torch.no_grad():
        expected = result.model(test.inputs)
    hits = (ran.argmax(1) == test.targets).double().mean()
    assert found["openvino"]["accuracy"] == pytest.approx(float(hits))
    assert found["openvino"]["agreement"] == 1
    apart = float((ran - expected).abs().max() / expected.abs().max())
    assert found["openvino"]["difference"] == pytest.approx(apart, abs=1e-6)
    assert found["onnxruntime"]["accuracy"] == report["accuracy"]["onnx"]
    relative = report["parity"]["onnx"] / float(expected.abs().max())
    assert found["onnxruntime"]["difference"] == pytest.approx(relative, rel=1e-4)
    assert not any("openvino" in note for note in report["notes"])
    title = f"openvino {openvino.__version__.partition('-')[0]}"
    assert title in page(report)
    assert title in printed(report)


def printed(report: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def test_a_runtime_that_is_wrong_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, lambda outputs: np.roll(outputs, 1, axis=1))
    shown = proof(task(), tmp_path)
    wrong = shown.parity["runtimes"]["openvino"]
    assert shown.parity["agreement"]["onnx"] == shown.accuracy["onnx"] == 1
    assert wrong["accuracy"] == wrong["agreement"] < 0.5
    assert wrong["difference"] > 0.1
    (note,) = shown.notes
    for text in ("openvino: OpenVINO", f"{wrong['accuracy']:.2%} for 100.00%", "ONNX Runtime"):
        assert text in note


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fail(RuntimeError("no kernel\nfor this")), "OpenVINO cannot run this file. no kernel for"),
        (fail(ImportError("libtbb")), "OpenVINO is not installed. Install it with: pip install"),
        (lambda outputs: outputs * np.nan, "outputs of OpenVINO are no finite numbers"),
        (lambda outputs: outputs[:, :1], "outputs of OpenVINO are no finite numbers"),
    ],
)
def test_a_runtime_that_fails_is_named_and_the_run_goes_on(
    change: Callable[[Any], Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, change)
    shown = proof(task(), tmp_path)
    assert set(shown.parity["runtimes"]) == {"onnxruntime"}
    (note,) = shown.notes
    assert reason in note
    assert "Run the file in ONNX Runtime" in note
    assert "\n" not in note


def test_a_runtime_that_is_not_here_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(RUNTIMES["openvino"], package="no-such-package")
    monkeypatch.setitem(RUNTIMES, "openvino", absent)
    shown = proof(task(), tmp_path)
    assert set(shown.parity["runtimes"]) == {"onnxruntime"}
    assert shown.notes == []


def test_openvino_may_round_what_meets_integers(tmp_path: Path) -> None:
    """By itself it rounds what such layers read if they are large; the file says floats."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    model, levels = copy.deepcopy(dense), {}
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name)
        weight.data = Levels(4, zero=True).project(weight.detach())
        levels[name] = Levels(4, zero=True).quantized(weight.detach())
    inputs = torch.randn(SAMPLES, 256)
    samples = InMemory(inputs, dense(inputs).detach().argmax(1))
    some = sc.Task(model, samples, samples, samples)
    path = sc.export_onnx(model, inputs, tmp_path / "model.onnx", levels)
    onnx = RuntimeModel(RUNTIMES["onnxruntime"], path, 1)
    networks = {"dense": dense, "compressed": model, "decoded": model, "onnx": onnx}
    shown = prove(some, networks, path)
    assert shown.parity["runtimes"]["openvino"]["difference"] < 0.02
    assert shown.notes == []


class Rating(nn.Module):
    """One number for each sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 160)
        self.read = nn.Linear(160, 160)
        self.last = nn.Linear(160, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.last(torch.relu(self.read(self.table(tokens).mean(1))))
        return rows[:, 0]


def closeness(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1 - (outputs - targets).abs().clamp(max=1)


def test_tokens_a_deployed_batch_and_a_score_of_the_users_own(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (SAMPLES, 7))
    samples = InMemory(tokens, tokens.double().mean(1).div(20).float())
    ratings = sc.Task(
        Rating(), samples, samples, samples, loss=nn.functional.mse_loss, score=closeness
    )
    recipe = {
        "train": {"epochs": 3, "batch_size": 32, "threads": 1},
        "stages": [{"method": "post_training", "set": "levels", "bits": 4, "zero": True}],
        "export": {"batch": 1},
    }
    report = sc.compress(ratings, recipe, out=tmp_path).report
    schema.validate(report)
    assert report["parity"]["agreement"] == {"decoded": None, "onnx": None}
    for figures in report["parity"]["runtimes"].values():
        assert figures["agreement"] is None, "one number is no class"
        assert figures["difference"] < 0.03, "inputs are rounded to bytes, or not at all"
        assert figures["accuracy"] == pytest.approx(report["accuracy"]["compressed"], abs=0.02)
    assert len(report["parity"]["runtimes"]) == 2
    assert not any("openvino" in note for note in report["notes"])
    assert "–" in printed(report)


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=18, max_size=18),
    share=st.sampled_from([0.5, 1.0]),
    changes=st.integers(0, 6),
)
def test_tolerances_by_brute_force(values: list[float], share: float, changes: int) -> None:
    expected = torch.linspace(-4, 4, 18, dtype=torch.float64).view(6, 3).sin()
    found = expected + 0.1 * torch.tensor(values, dtype=torch.float64).view(6, 3)
    largest = max(abs(float(value)) for value in expected.flatten())
    near = turned = 0
    for one, other in zip(found.tolist(), expected.tolist(), strict=True):
        near += max(abs(a - b) for a, b in zip(one, other, strict=True)) / largest <= 0.2
        turned += one.index(max(one)) != other.index(max(other))
    met = Tolerance(0.2, share, changes).met(found, expected)
    assert met is (near / 6 >= share and turned <= changes)


def test_classes_of_pixels_count_by_sample() -> None:
    """Of 4 samples of 2 x 2 pixels one has one pixel of another class: a quarter of a sample."""
    outputs = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    moved = outputs.clone()
    moved[1, :, 0, 1] = outputs[1, :, 0, 1].roll(1, 0)
    same = {"dense": outputs, "compressed": outputs, "decoded": outputs}
    parity = compare({**same, "onnx": moved}, rounds=True)
    assert parity["agreement"] == {"decoded": 1.0, "onnx": 1 - 1 / 16}
    low = ROUNDED_TOLERANCES[0]
    assert Tolerance.of_rounding(same) == Tolerance(low, 0.5, 1.0), "compression moved nothing"
    half = Tolerance.of_rounding({**same, "dense": outputs * (1 + 0.02)})
    assert low < half.difference < 0.01
