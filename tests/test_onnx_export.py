"""The exported file, in ONNX Runtime, against the model in PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from secateur.artifact.onnx import OnnxModel, export_onnx
from secateur.errors import ArtifactError, MissingDependencyError, SecateurError
from secateur.zoo import lenet5

onnx = pytest.importorskip("onnx")


class Residual(nn.Module):
    """A small network with batch norm, a shortcut, a grouped convolution and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.stem(images)))
        hidden = functional.relu(hidden + self.norm2(self.grouped(hidden)))
        return self.head(self.drop(hidden.mean((2, 3))))


def trained(model: nn.Module, example: Tensor) -> nn.Module:
    """Give batch norm statistics that differ from their initial values."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, *example.shape[1:]) * 2 + 1)
    return model


@pytest.fixture(scope="module", params=["lenet5", "residual"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Tensor, Path]:
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 28, 28) if request.param == "lenet5" else torch.zeros(1, 3, 9, 9)
    model = trained(lenet5() if request.param == "lenet5" else Residual(), example)
    path = export_onnx(model, example, tmp_path_factory.mktemp("onnx") / "new" / "model.onnx")
    return model, example, path


@pytest.mark.parametrize("batch", [1, 7])
def test_runtime_and_torch_agree(exported: tuple[nn.Module, Tensor, Path], batch: int) -> None:
    model, example, path = exported
    images = torch.randn(batch, *example.shape[1:])
    found = OnnxModel(path, threads=1)(images)
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        expected = model.eval()(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_file_is_one_that_runtimes_read(exported: tuple[nn.Module, Tensor, Path]) -> None:
    model, _, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version <= 10
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 20}
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["output"]
    for value in [*proto.graph.input, *proto.graph.output]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < weights + 20_000


def test_the_exporter_is_quiet_and_restores_every_mode(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = Residual().train()
    model.norm1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, torch.zeros(4, 3, 9, 9), tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrized_layers_export_their_value(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Halved())
    path = export_onnx(nn.Sequential(layer), torch.zeros(1, 4), tmp_path / "model.onnx")
    rows = torch.randn(5, 4)
    torch.testing.assert_close(OnnxModel(path)(rows), layer(rows).detach(), atol=1e-5, rtol=1e-5)


class Broken(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows if rows.sum() > 0 else -rows


class Two(nn.Module):
    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows + 1, rows * 2


@pytest.mark.parametrize("model", [Broken(), Two()])
def test_a_failed_export_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, model: nn.Module
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(SecateurError, match=type(model).__name__) as caught:
        export_onnx(model, torch.zeros(1, 3), path)
    assert len(str(caught.value).splitlines()) <= 3
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def fails(self: object, destination: Path, **options: object) -> None:
        Path(destination).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fails)
    with pytest.raises(OSError, match="no space"):
        export_onnx(nn.Linear(3, 2), torch.zeros(1, 3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        OnnxModel(path)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "secateur\[onnx\]"'):
        export_onnx(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "model.onnx")
    with pytest.raises(MissingDependencyError, match=r'pip install "secateur\[onnx\]"'):
        OnnxModel(tmp_path / "model.onnx")
