"""Networks that lose channels on the way: between stages, in packed files, after a restart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur import data, zoo
from secateur.artifact import packed
from secateur.channels import narrow, replay, shrink_to, widths
from secateur.engine.trainer import Trainer
from secateur.errors import ArtifactError, ChannelError, SecateurError
from tiny import digits_task

TRAIN = {"epochs": 2, "batch_size": 64, "lr": 5e-3, "threads": 1}
LIGHT = {"epochs": 1, "retrain_epochs": 2}
STRUCTURED = {
    "train": TRAIN,
    "stages": [
        {"method": "admm", "set": "filter", "density": 0.5, "layers": {"3": "dense"}, **LIGHT},
        {"method": "admm", "set": "filter", "keep": 9, "layers": {"3": "dense"}, **LIGHT},
        {"method": "admm", "set": "levels", "bits": 4, **LIGHT},
    ],
}


def residual_task() -> sc.Task:
    splits = data.load("digits")
    torch.manual_seed(0)
    small = [
        data.splits.InMemory(part.inputs[:200], part.targets[:200])  # type: ignore[attr-defined]
        for part in (splits.train, splits.validation, splits.test)
    ]
    return sc.Task(zoo.resnet8(), *small, name="residual", reference="secateur.zoo:resnet8")


def test_structured_stages_leave_a_physically_smaller_network(tmp_path: Path) -> None:
    task = digits_task()
    model = task.model
    result = sc.compress(task, STRUCTURED, out=tmp_path)
    assert result.model is model, "the user's own network is the one that was cut"
    assert [model[1].out_features, model[3].in_features] == [9, 9]  # type: ignore[index]
    removed_everywhere = [weight.count_nonzero() == weight.numel() for weight in
                          (model[1].weight, model[3].weight)]  # type: ignore[index]  # fmt: skip
    assert all(removed_everywhere)
    report = result.report
    assert report["ratio"]["weights"] == pytest.approx((784 * 24 + 240) / (784 * 9 + 90))
    assert report["ratio"]["macs"] == pytest.approx((784 * 24 + 240) / (784 * 9 + 90))
    assert report["layers"][0]["shape"] == [24, 784]
    assert report["layers"][0]["compressed_shape"] == [9, 784]
    for blank in (digits_task().model, copy.deepcopy(model)):  # as built, or cut already
        loaded = sc.load(tmp_path / "model.secateur", blank)
        assert loaded is blank
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(("round_to", "widths"), [(1, [10, 9]), (4, [12, 8]), (8, [8, 8])])
def test_stages_keep_widths_that_are_multiples(
    round_to: int, widths: list[int], tmp_path: Path
) -> None:
    shares = [{"density": 0.4}, {"keep": 9}]  # of 24 units; the second is of what is left
    same = {"method": "admm", "set": "filter", "layers": {"3": "dense"}, **LIGHT}
    for number in range(len(shares)):
        stages = [{**same, **each} for each in shares[: number + 1]]
        recipe = {"train": TRAIN, "round_to": round_to, "stages": stages}
        result = sc.compress(digits_task(), recipe, out=tmp_path / str(number))
        assert result.model[1].out_features == widths[number]  # type: ignore[index]
        assert int((result.model[1].weight != 0).any(1).sum()) == widths[number]  # type: ignore[index, union-attr, operator]


def test_useless_channels_fill_up_a_multiple(tmp_path: Path) -> None:
    sparse = {"method": "admm", "density": 0.01, **LIGHT}
    widths = []  # of 24
    for round_to in (1, 11):
        recipe = {"train": TRAIN, "round_to": round_to, "stages": [sparse]}
        result = sc.compress(digits_task(), recipe, out=tmp_path / str(round_to))
        widths.append(result.model[1].out_features)  # type: ignore[index]
    assert widths == [16, 22]


def test_turned_off_nothing_is_cut(tmp_path: Path) -> None:
    result = sc.compress(digits_task(), {**STRUCTURED, "compact": False}, out=tmp_path)
    assert result.model[1].out_features == 24  # type: ignore[index]


@pytest.mark.parametrize("stop", range(3, 11))
def test_a_restart_after_any_epoch_ends_the_same(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: bytes
) -> None:
    save, saved = Trainer._save, 0

    def stopping(self: Trainer, *arguments: Any) -> None:
        nonlocal saved
        save(self, *arguments)
        saved += 1
        if saved == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            sc.compress(digits_task(), STRUCTURED, out=tmp_path)
    sc.compress(digits_task(), STRUCTURED, out=tmp_path, resume=True)
    assert (tmp_path / "model.secateur").read_bytes() == whole_run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    sc.compress(digits_task(), STRUCTURED, out=folder)
    return (folder / "model.secateur").read_bytes()


def test_a_residual_network_is_cut_and_loads_by_name(tmp_path: Path) -> None:
    stages = [
        {"method": "admm", "set": "filter", "density": 0.4, "layers": {"fc": "dense"}, **LIGHT},
        {"method": "admm", "density": 0.3, "bits": 4, "path_aware": True, **LIGHT},
    ]
    result = sc.compress(residual_task(), {"train": TRAIN, "stages": stages}, out=tmp_path)
    assert result.report["ratio"]["macs"] > 1.2
    loaded = sc.load(tmp_path / "model.secateur")
    probe = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(probe), result.model(probe))
    assert packed.read_header(tmp_path / "model.secateur").changes.widths


def test_blocks_stay_where_they_are_and_the_report_says_so(tmp_path: Path) -> None:
    blocks = {"method": "admm", "set": "block", "rows": 4, "columns": 4, "density": 0.1, **LIGHT}
    result = sc.compress(digits_task(), {"train": TRAIN, "stages": [blocks]}, out=tmp_path)
    assert "channels stay: the set 'block' counts their places" in result.report["notes"]


def test_a_network_that_cannot_be_traced_stays_whole(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_task().model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images) if float(images.sum()) > -1e30 else images  # type: ignore[no-any-return]

    task = digits_task()
    task.model = Branching()
    stages = [{"method": "admm", "density": 0.05, **LIGHT}]
    recipe = {"train": TRAIN, "stages": stages, "export": {"onnx": False}}
    result = sc.compress(task, recipe, out=tmp_path)
    assert any(note.startswith("channels stay: ") for note in result.report["notes"])
    assert result.model.net[1].out_features == 24  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "vgg11", "resnext50_32x4d", "densenet121"]
)
def test_widths_rebuild_the_shapes_of_a_cut_network(name: str) -> None:
    size = 64
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, num_classes=10)
    small = shrink_to(model, torch.randn(1, 3, size, size), 0.5).model
    again = narrow(models.get_model(name, num_classes=10), widths(small, model))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }
    with torch.no_grad():
        assert again.eval()(torch.randn(1, 3, size, size)).shape == (1, 10)


def test_widths_of_an_uncut_network_are_empty() -> None:
    model = zoo.resnet8()
    assert widths(copy.deepcopy(model), model) == ""


def test_widths_in_words() -> None:
    model = zoo.lenet5()
    kept = {"conv1": {"out": [0, 3]}, "conv2": {"in": [0, 3], "bias": True}}
    model.conv2.bias = None
    small = replay(kept, copy.deepcopy(model))
    assert widths(small, model) == "1,2;2,50b;;"


@given(st.text(alphabet="0123456789,;b- x", max_size=30))
@settings(max_examples=200)
def test_malformed_widths_are_refused_or_fit(text: str) -> None:
    try:
        narrowed = narrow(zoo.lenet5(), text)
    except ChannelError:
        return
    assert text.count(";") == 3
    assert all(parameter.numel() for parameter in narrowed.parameters())


@pytest.mark.parametrize("text", ["9" * 9 + ",20;;;", ";;;", "0,1;;;", "5,5;;;", "x;;;", "1,2"])
def test_a_file_with_other_widths_is_refused(text: str, tmp_path: Path) -> None:
    model = zoo.lenet5()
    packed.save(tmp_path / "m", model, {}, reference="secateur.zoo:lenet5", widths="1,20;;;")
    assert torch.equal(sc.load(tmp_path / "m").conv1.weight, model.conv1.weight)  # type: ignore[union-attr]
    packed.save(tmp_path / "m", model, {}, reference="secateur.zoo:lenet5", widths=text)
    if text == ";;;":
        sc.load(tmp_path / "m")
        return
    with pytest.raises(ArtifactError, match="widths"):
        sc.load(tmp_path / "m")


def test_recipe_states_whether_networks_are_cut() -> None:
    recipe = sc.load_recipe({"model": "a:b", "data": "digits", "stages": [{"method": "admm"}]})
    assert json.loads(json.dumps(recipe.to_dict()))["compact"] is True


def floored(floor: float) -> dict[str, Any]:
    mild = {"method": "admm", "density": 0.5, **LIGHT}
    brutal = {"method": "admm", "set": "filter", "keep": 1, "layers": {"3": "dense"}, **LIGHT}
    return {"train": TRAIN, "stages": [mild, brutal, mild], "floor": floor}


def test_a_stage_below_the_floor_is_undone(tmp_path: Path) -> None:
    result = sc.compress(digits_task(), floored(0.6), out=tmp_path / "floored")
    first = {"train": TRAIN, "stages": floored(0.6)["stages"][:1]}
    alone = sc.compress(digits_task(), first, out=tmp_path / "alone")
    for name, value in alone.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value)
    note = result.report["notes"][-1]
    assert note.startswith("stage 1 and all after it were undone: validation accuracy ")
    assert note.endswith("is below the floor 60.00%")
    assert {entry["stage"] for entry in result.report["history"]} == {None, 0, 1}
    assert result.report["accuracy"]["validation"]["compressed"] >= 0.6
    again = sc.compress(digits_task(), floored(0.6), out=tmp_path / "floored", resume=True)
    assert again.report["accuracy"] == result.report["accuracy"]


def test_a_floor_that_nothing_meets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"floor: after the first stage validation accuracy"):
        sc.compress(digits_task(), floored(0.999), out=tmp_path)
