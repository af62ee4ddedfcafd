"""The whole job on small data: what is written, parity, resuming from the shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import data, finish, zoo
from secateur.cost.platforms import platform_names
from secateur.engine import checkpoint
from secateur.engine.teacher import Teacher
from secateur.errors import ParityError, SecateurError
from secateur.report import schema
from tiny import digits_network, digits_task

RECIPE: dict[str, Any] = {
    "train": {"epochs": 3, "batch_size": 64, "lr": 5e-3, "threads": 1},
    "stages": [
        {"method": "admm", "density": 0.2, "bits": 4, "epochs": 3, "retrain_epochs": 3},
    ],
}

USER_CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> sc.Result:
    return sc.compress(digits_task(), RECIPE, out=tmp_path_factory.mktemp("run"))


def test_everything_promised_is_written(finished: sc.Result) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    artifacts = {"model.secateur", "model.onnx", "predict.py"}
    promised = artifacts | {"report.json", "report.html", "recipe.yaml"}
    assert promised | {"checkpoint"} == names
    schema.validate(json.loads((finished.folder / "report.json").read_text()))


def test_report_figures_agree_with_an_independent_count(finished: sc.Result) -> None:
    report, model, whole = finished.report, finished.model, digits_network()
    weights = [p for p in model.parameters() if p.ndim > 1]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    total = sum(p.numel() for p in whole.parameters() if p.ndim > 1)
    assert kept <= round(0.2 * total)
    assert report["ratio"]["weights"] == pytest.approx(total / kept)
    packed = (finished.folder / "model.secateur").stat().st_size
    dense = 4 * sum(p.numel() for p in whole.parameters())
    assert report["ratio"]["file"] == pytest.approx(dense / packed)
    macs = sum(weight.numel() for weight in weights)
    assert report["ratio"]["bops"] == pytest.approx(8 * total / macs)
    assert report["accuracy"]["dense"] > 0.85
    assert report["accuracy"]["compressed"] > 0.8
    same = {report["accuracy"][name] for name in ("compressed", "decoded", "onnx")}
    assert len(same) == 1


def test_the_report_says_what_the_network_takes_elsewhere(finished: sc.Result) -> None:
    report = finished.report
    kinds = ("values", "index", "metadata")
    packed = report["storage"]["encodings"]["packed"]
    assert {kind: packed[kind] for kind in kinds} == {
        kind: report["storage"]["bits"][kind] for kind in kinds
    }
    weights = [p for p in finished.model.parameters() if p.ndim > 1]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert report["storage"]["encodings"]["rice"]["values"] == 4 * kept
    size = sum(weight.numel() for weight in weights)
    energy = report["energy"]
    assert 2**13 < size * 4 / 8 <= 2**15  # bytes, hence the SRAM of 20 pJ per 64 bits
    assert energy["compressed"]["weights"] == pytest.approx(size * 4 / 64 * 20e-12)
    assert energy["dense"]["compute"] == pytest.approx(19_056 * (3.7 + 0.9) * 1e-12)
    assert energy["zeros_skipped"]["compute"] == pytest.approx(kept * (3.7 + 0.9) * 1e-12)
    found = {each["platform"]: each for each in report["platforms"]}
    assert set(found) == set(platform_names())
    assert found["fpga-bops"]["speedup"]["whole"] == pytest.approx(report["ratio"]["bops"])
    assert found["weight-stationary"]["narrowed_to"] == 16


def test_packed_file_holds_the_returned_model(finished: sc.Result) -> None:
    loaded = sc.load(finished.folder / "model.secateur", digits_network())
    for name, value in finished.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    for weight in (loaded[1].weight, loaded[3].weight):
        assert (sc.sets.Unstructured(density=1.0) & sc.sets.Levels(4)).contains(weight)
        assert len(weight.unique()) <= 17


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
        sc.compress(digits_task(), recipe, out=tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_diverging_training_says_so(tmp_path: Path) -> None:
    recipe = {**RECIPE, "train": {**RECIPE["train"], "optimizer": "sgd", "lr": 1e30}}
    with pytest.raises(SecateurError, match=r"train\.lr"):
        sc.compress(digits_task(), recipe, out=tmp_path)


def test_trained_weights_are_taken_over(finished: sc.Result, tmp_path: Path) -> None:
    dense = finished.folder / checkpoint.FOLDER / checkpoint.DENSE
    recipe = {**RECIPE, "weights": str(dense), "export": {"onnx": False}}
    result = sc.compress(digits_task(), recipe, out=tmp_path)
    assert all(entry["method"] == "admm" for entry in result.report["history"])
    assert result.report["accuracy"]["dense"] == finished.report["accuracy"]["dense"]
    dense.with_suffix(".bad.safetensors").write_bytes(b"nothing")
    recipe["weights"] = str(dense.with_suffix(".bad.safetensors"))
    with pytest.raises(SecateurError, match=r"weights: .* does not fit the model"):
        sc.compress(digits_task(), recipe, out=tmp_path / "bad")


class Versioned(nn.Sequential):
    """A network that loads no weights of unknown version, as torchvision's MNASNet."""

    _version = 1

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 1:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_ask_for_versions_of_weights(tmp_path: Path) -> None:
    splits = data.fewer(data.load("digits"), 128)
    layers = (nn.Flatten(), nn.Linear(784, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
    task = sc.Task(Versioned(*layers), splits.train, splits.validation, splits.test)
    recipe = {**RECIPE, "export": {"onnx": False}}
    result = sc.compress(task, recipe, out=tmp_path, resume=True)
    assert result.report["accuracy"]["decoded"] == result.report["accuracy"]["compressed"]
    for kept in ("report.json", "report.html", "model.secateur"):  # as if it had been stopped there
        (tmp_path / kept).unlink(missing_ok=True)
    again = sc.compress(task, recipe, out=tmp_path, resume=True)
    assert again.report["accuracy"] == result.report["accuracy"]


@pytest.mark.parametrize(("flip", "epochs", "asks"), [(False, 9, False), (True, 9, True)])
def test_goals_of_augmented_images(flip: bool, epochs: int, asks: bool) -> None:
    network = zoo.lenet5().eval()
    train = data.augmented(data.load("digits"), 1, flip).train
    samples, asked = Teacher(lambda: network, train, epochs).ready()
    images, _, *goals = samples.__getitems__(list(range(64)))  # type: ignore[attr-defined]
    assert (asked is network) == asks == (not goals)
    with torch.no_grad():
        for each in goals:
            torch.testing.assert_close(each, network(images))


def test_goals_kept_in_memory_are_those_of_the_teacher(tmp_path: Path) -> None:
    stage = {"method": "gmp", "density": 0.3, "epochs": 1, "retrain_epochs": 2, "distill": 0.9}
    recipe = {"train": RECIPE["train"], "stages": [stage], "export": {"onnx": False}}
    task = digits_task()
    kept = sc.compress(task, recipe, out=tmp_path / "kept")
    fresh = digits_task()
    fresh.train = torch.utils.data.TensorDataset(task.train.inputs, task.train.targets)  # type: ignore[attr-defined]
    asked = sc.compress(fresh, recipe, out=tmp_path / "asked")
    for one, other in zip(kept.model.parameters(), asked.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
