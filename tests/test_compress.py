"""The whole job on small data: what is written, parity, resuming, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import data, finish
from secateur.engine import checkpoint
from secateur.engine.progress import Progress
from secateur.errors import ParityError, SecateurError
from secateur.report import schema

RECIPE: dict[str, Any] = {
    "train": {"epochs": 3, "batch_size": 64, "lr": 5e-3, "threads": 1},
    "stages": [
        {"method": "admm", "density": 0.2, "bits": 4, "epochs": 3, "retrain_epochs": 3},
    ],
}
STAGED: dict[str, Any] = {
    "train": {"epochs": 2, "batch_size": 64, "threads": 1, "optimizer": "sgd", "lr": 0.05},
    "stages": [
        {"method": "admm", "density": 0.2, "epochs": 2, "retrain_epochs": 2, "steps": [0.5, 1]},
        {"method": "admm", "set": "levels", "bits": 3, "epochs": 2, "retrain_epochs": 2},
    ],
}

GUIDED: dict[str, Any] = {
    "train": {"epochs": 1, "batch_size": 64, "threads": 1},
    "stages": [
        {
            "method": "admm", "density": 0.2, "bits": 3, "epochs": 2, "retrain_epochs": 2,
            "distill": 0.5, "average": 0.9, "cycles": 2, "pull": "decoupled", "rho_max": 30.0,
        },
    ],
}  # fmt: skip

USER_CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))


def task() -> sc.Task:
    splits = data.load("digits")
    return sc.Task(network(), splits.train, splits.validation, splits.test, name="tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> sc.Result:
    return sc.compress(task(), RECIPE, out=tmp_path_factory.mktemp("run"))


def test_everything_promised_is_written(finished: sc.Result) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    promised = {"model.secateur", "model.onnx", "report.json", "report.html", "recipe.yaml"}
    assert promised | {"checkpoint"} == names
    schema.validate(json.loads((finished.folder / "report.json").read_text()))


def test_report_figures_agree_with_an_independent_count(finished: sc.Result) -> None:
    report, model = finished.report, finished.model
    weights = [p for p in model.parameters() if p.ndim > 1]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    assert kept <= round(0.2 * total)
    assert report["ratio"]["weights"] == pytest.approx(total / kept)
    packed = (finished.folder / "model.secateur").stat().st_size
    dense = 4 * sum(p.numel() for p in model.parameters())
    assert report["ratio"]["file"] == pytest.approx(dense / packed)
    assert report["ratio"]["bops"] == pytest.approx(8)
    assert report["accuracy"]["dense"] > 0.85
    assert report["accuracy"]["compressed"] > 0.8
    same = {report["accuracy"][name] for name in ("compressed", "decoded", "onnx")}
    assert len(same) == 1


def test_packed_file_holds_the_returned_model(finished: sc.Result) -> None:
    loaded = sc.load(finished.folder / "model.secateur", network())
    for name, value in finished.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    for weight in (loaded[1].weight, loaded[3].weight):
        assert (sc.sets.Unstructured(density=1.0) & sc.sets.Levels(4)).contains(weight)
        assert len(weight.unique()) <= 17


def test_a_stage_of_levels_keeps_the_zeros_of_the_stage_before(tmp_path: Path) -> None:
    result = sc.compress(task(), STAGED, out=tmp_path)
    weights = [p for p in result.model.parameters() if p.ndim > 1]
    total = sum(weight.numel() for weight in weights)
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert 0.18 * total < kept <= round(0.2 * total)  # what rounds to zero is dropped too
    assert all(len(weight.unique()) <= 9 for weight in weights)
    phases = [(h["stage"], h["phase"]) for h in result.report["history"]]
    assert phases == [
        *[(None, "train")] * 2,
        *[(0, "admm")] * 2, *[(0, "retrain")] * 2, *[(0, "admm")] * 2, *[(0, "retrain")] * 2,
        *[(1, "admm")] * 2, *[(1, "retrain")] * 2,
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.mark.parametrize("recipe", [RECIPE, STAGED, GUIDED], ids=["joint", "staged", "guided"])
def test_resuming_after_any_epoch_gives_the_same_bytes(
    recipe: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**recipe, "export": {"onnx": False}}
    whole = sc.compress(task(), recipe, out=tmp_path / "whole")
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
            result = sc.compress(task(), recipe, out=out, resume=life > 0)
            break
        except Killed:
            assert not (out / "report.json").exists()
    assert life == epochs - 1
    assert (out / "model.secateur").read_bytes() == expected
    strip = [{k: v for k, v in h.items() if k != "seconds"} for h in result.report["history"]]
    assert strip == [
        {k: v for k, v in h.items() if k != "seconds"} for h in whole.report["history"]
    ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "secateur", "compress", "recipe.yaml", *arguments]


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(USER_CODE)
    recipe = {**RECIPE, "model": "mynet:net", "data": "digits", "export": {"onnx": False}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_sigkill_and_resume_from_the_shell(user_folder: Path) -> None:
    run: dict[str, Any] = {"cwd": user_folder, "capture_output": True, "text": True, "timeout": 240}
    assert subprocess.run(command("--out", "whole"), **run).returncode == 0
    state = user_folder / "killed" / checkpoint.FOLDER / checkpoint.NAME
    victim = subprocess.Popen(
        command("--out", "killed"), cwd=user_folder, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (user_folder / "killed" / "report.json").exists()

    refused = subprocess.run(command("--out", "killed"), **run)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = subprocess.run(command("--out", "killed", "--resume", "--set", "train.lr=0.1"), **run)
    assert other.returncode == 2
    assert "another recipe" in other.stderr

    resumed = subprocess.run(command("--out", "killed", "--resume"), **run)
    assert resumed.returncode == 0, resumed.stderr
    packed = [(user_folder / each / "model.secateur").read_bytes() for each in ("whole", "killed")]
    assert packed[0] == packed[1]


def test_two_processes_agree_and_write_once(user_folder: Path) -> None:
    launch = "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --num_cpu_threads_per_process 1 --main_process_port 0"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split(), *command("--out", "ddp")[1:]],
        cwd=user_folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 2  # the headline and a table, from one process
    report = json.loads((user_folder / "ddp" / "report.json").read_text())
    assert report["accuracy"]["compressed"] == report["accuracy"]["decoded"] > 0.75


def test_disagreeing_artifacts_fail_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = finish.packed.load

    def tampered(*arguments: Any) -> nn.Module:
        model = real(*arguments)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.01)
        return model

    monkeypatch.setattr(finish.packed, "load", tampered)
    recipe = {**RECIPE, "export": {"onnx": False}}
    with pytest.raises(ParityError, match="decoded: the artifact's outputs differ"):
        sc.compress(task(), recipe, out=tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_diverging_training_says_so(tmp_path: Path) -> None:
    recipe = {**RECIPE, "train": {**RECIPE["train"], "optimizer": "sgd", "lr": 1e30}}
    with pytest.raises(SecateurError, match=r"train\.lr"):
        sc.compress(task(), recipe, out=tmp_path)


def test_trained_weights_are_taken_over(finished: sc.Result, tmp_path: Path) -> None:
    dense = finished.folder / checkpoint.FOLDER / checkpoint.DENSE
    recipe = {**RECIPE, "weights": str(dense), "export": {"onnx": False}}
    result = sc.compress(task(), recipe, out=tmp_path)
    assert all(entry["method"] == "admm" for entry in result.report["history"])
    assert result.report["accuracy"]["dense"] == finished.report["accuracy"]["dense"]
    dense.with_suffix(".bad.safetensors").write_bytes(b"nothing")
    recipe["weights"] = str(dense.with_suffix(".bad.safetensors"))
    with pytest.raises(SecateurError, match=r"weights: .* does not fit the model"):
        sc.compress(task(), recipe, out=tmp_path / "bad")
