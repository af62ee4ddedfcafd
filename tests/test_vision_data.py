"""CIFAR-10 and ImageNet in their own layouts, filled with random images, and their recipes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur import data
from secateur.data import vision
from secateur.errors import DataError
from secateur.recipe import load_recipe

pytest.importorskip("torchvision")
from PIL import Image

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Write random batches as CIFAR-10 has them, and return all pixels of training."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *given: True)
    monkeypatch.setattr(vision, "CIFAR_VALIDATION", 30)
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    pixels = []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels.append(generator.integers(0, 256, (20, 3072), dtype=np.uint8))
        labels = generator.integers(0, 10, 20).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels[-1], "labels": labels}))
    return np.concatenate(pixels[:5]).reshape(-1, 3, 32, 32)


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few photographs of ten classes, and read them small."""
    monkeypatch.setattr(vision, "SIDE", 32)
    monkeypatch.setattr(vision, "RESIZED", 36)
    monkeypatch.setattr(vision, "HELD_OUT", 4)
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 1)):
        for label in range(10):
            folder = tmp_path / "imagenet" / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                photograph = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(photograph).save(folder / f"{i}.JPEG")


@pytest.mark.usefixtures("cifar")
def test_cifar_is_normalized_and_split(tmp_path: Path, cifar: np.ndarray[Any, Any]) -> None:
    splits = data.load("cifar10", root=tmp_path)
    lengths = [len(part) for part in (splits.train, splits.validation, splits.test)]  # type: ignore[arg-type]
    assert lengths == [70, 30, 20]
    assert splits.classes[3] == "cat"
    mean, std = ([[[v]] for v in vision.CIFAR[key]] for key in ("mean", "std"))
    expected = (cifar[70:] / 255 - mean) / std
    assert isinstance(splits.validation, data.InMemory)
    np.testing.assert_allclose(splits.validation.inputs, expected, atol=1e-5)
    assert next(e["here"] for e in data.available(tmp_path) if e["name"] == "cifar10")


@pytest.mark.usefixtures("imagenet")
def test_imagenet_is_varied_in_training_alone(tmp_path: Path) -> None:
    splits = data.load("imagenet", root=tmp_path)
    train: Any = splits.train
    assert (len(train), len(splits.validation), len(splits.test)) == (30, 10, 10)  # type: ignore[arg-type]
    assert splits.classes == tuple(f"n{label:08}" for label in range(10))
    assert train[0][0].shape == (3, 32, 32)
    assert not torch.equal(train[0][0], train[0][0])
    still = data.in_memory(train, 8)
    assert torch.equal(still.inputs, data.in_memory(train, 8).inputs)
    assert [train[i][1] for i in range(8)] == still.targets.tolist()
    assert len(set(still.targets.tolist())) > 3, "the first of them stand for all"
    fewer: Any = data.fewer(splits, 5).train
    assert len(fewer) == 5
    assert not torch.equal(fewer[0][0], fewer[0][0])


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_data_that_is_not_here_is_said_how_to_get(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=name) as caught:
        data.load(name, root=tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_imagenet_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image-net\.org\.\n.*/train"):
        data.get("imagenet", tmp_path)


def shortened(name: str, root: Path, *changes: str) -> sc.Recipe:
    common = [
        f"data.root={root}", "train.threads=1", "train.workers=0", "train.batch_size=32",
        "stages.0.epochs=1", "stages.0.tune_epochs=1", "stages.0.allocation.samples=4",
    ]  # fmt: skip
    return load_recipe(RECIPES / f"{name}.yaml", [*common, *changes])


@pytest.mark.usefixtures("cifar")
def test_the_recipe_for_cifar_runs(tmp_path: Path) -> None:
    recipe = shortened("resnet20-cifar10-djpq-40x", tmp_path, "train.epochs=1", "export.onnx=false")
    report = sc.compress(None, recipe, out=tmp_path / "run").report
    assert 40 <= report["ratio"]["bops"] <= 40 * 1.03


@pytest.mark.usefixtures("imagenet")
@pytest.mark.parametrize(
    ("name", "ratio"),
    [("resnet18-imagenet-djpq-53x", 18), ("mobilenet-v2-imagenet-djpq-43x", 16.6)],
)
def test_the_recipes_for_imagenet_run(name: str, ratio: float, tmp_path: Path) -> None:
    changes = ["model_args.weights=null", "model_args.num_classes=10", "export.onnx=false"]
    changes.append(f"stages.0.budget.bops={ratio}x")  # near 8 bits; the rest is a long landing
    report = sc.compress(None, shortened(name, tmp_path, *changes), out=tmp_path / "run").report
    assert ratio <= report["ratio"]["bops"] <= ratio * 1.03
