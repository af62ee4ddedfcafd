"""Networks with quantized weights and activations on disk: packed, decoded, in ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from onnx_count import bops_of, constants
from secateur import data
from secateur.artifact import packed
from secateur.artifact.integers import fits, on_grid
from secateur.artifact.onnx import OnnxModel, export_onnx
from secateur.codec import Quantized
from secateur.errors import ArtifactError, ParityError
from secateur.parity import compare
from secateur.quantizers import FixedQuantizer, activation_bits, grids, input_quantizer, regrid
from secateur.sets import Levels
from secateur.sets.channel_levels import ChannelLevels
from secateur.zoo import lenet5

onnx = pytest.importorskip("onnx")

TRAIN = {"epochs": 2, "batch_size": 32, "lr": 5e-3, "threads": 1}
DJPQ = {"method": "djpq", "epochs": 2, "gates": "hard_concrete", "gamma": 30.0, "lr": 3e-3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 10),
    )  # fmt: skip


def task() -> sc.Task:
    splits = data.fewer(data.load("digits"), 320)
    return sc.Task(network(), splits.train, splits.validation, splits.test, name="tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> sc.Result:
    recipe = {"train": TRAIN, "stages": [DJPQ]}
    return sc.compress(task(), recipe, out=tmp_path_factory.mktemp("run"))


def test_djpq_ends_in_files_that_compute_what_was_trained(finished: sc.Result) -> None:
    report, model = finished.report, finished.model
    assert report["accuracy"]["compressed"] > 0.6
    assert report["parity"]["decoded"] == 0.0
    inputs = activation_bits(model)
    assert set(inputs) == {"0", "3", "6"}
    rows = {row["name"]: row for row in report["layers"] if row["set"] != "dense"}
    assert {name: row["activation_bits"] for name, row in rows.items()} == inputs
    assert max(row["bits"] for row in rows.values()) <= 8
    loaded = packed.unpack(finished.folder / "model.secateur", network())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert grids(loaded.model) == grids(model)
    again = packed.unpack(finished.folder / "model.secateur", loaded.model)  # as it is already
    images = torch.rand(9, 1, 28, 28)
    assert torch.equal(again.model(images), model(images))
    for name, levels in loaded.quantized.items():
        assert torch.equal(levels.weight(torch.float32), model.state_dict()[name])
    assert packed.read_header(finished.folder / "model.secateur").version == 2


def test_bops_are_those_of_the_onnx_graph_and_of_the_method(finished: sc.Result) -> None:
    counted = bops_of(finished.folder / "model.onnx")
    assert finished.report["cost"]["compressed"]["bops"] == counted
    hard = finished.report["history"][-1]["bops"] * finished.report["cost"]["dense"]["bops"]
    assert hard == pytest.approx(counted)


def test_the_onnx_file_holds_integers(finished: sc.Result, tmp_path: Path) -> None:
    path, model = finished.folder / "model.onnx", finished.model
    plain = export_onnx(model, torch.zeros(1, 1, 28, 28), tmp_path / "plain.onnx")
    weights = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    assert plain.stat().st_size - path.stat().st_size > 2 * weights
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 10
    operators = Counter(node.op_type for node in proto.graph.node)
    assert operators["QuantizeLinear"] == 3
    assert operators["DequantizeLinear"] == 6
    assert not operators["Round"]
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in proto.graph.initializer) >= 3
    assert finished.report["parity"]["agreement"]["onnx"] >= 0.997


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_grids_of_any_width_agree_in_onnx_runtime(tmp_path: Path, bits: int, signed: bool) -> None:
    torch.manual_seed(bits)
    layer = nn.Linear(64, 32)
    levels = torch.randint(-3, 4, (32, 64), dtype=torch.int16)
    quantized = Quantized(levels, tuple((torch.rand(32) + 0.1).tolist()), 3, True)
    layer.weight.data = quantized.weight(torch.float32)
    model = regrid(nn.Sequential(layer), f"{'s' if signed else 'u'}{2 ** (bits - signed) - 1}")
    layer.input_quantizer.step.fill_(0.037)  # type: ignore[operator, union-attr]
    path = export_onnx(model, torch.zeros(1, 64), tmp_path / "m", {"0.weight": quantized})
    rows = torch.randn(50, 64) * 0.037 * 2**bits
    # a layer that reads all levels of a byte, or all but one, runs in integers, its bias too
    unit = 0.037 * max(quantized.scale) if bits == 8 else 0.0  # type: ignore[arg-type]
    found, expected = OnnxModel(path)(rows), model(rows).detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 + unit / 2)
    grid = input_quantizer(layer)
    assert isinstance(grid, FixedQuantizer)
    assert torch.equal(on_grid(rows, grid.step, grid.least, grid.most), grid(rows))


def test_small_weights_are_integers_too_where_inputs_are(tmp_path: Path) -> None:
    """ONNX Runtime would quantize them its own way, with what is folded into them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 40, 3)
    )
    model[1].running_var.copy_(torch.logspace(-3, 3, 8))
    quantized = {}
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        weight.data = Levels(4, zero=True).project(weight.detach())
        quantized[name] = Levels(4, zero=True).quantized(weight.detach())
    regrid(model.eval(), "s7;u15")
    model[0].input_quantizer.step.fill_(0.3)  # type: ignore[operator, union-attr]
    images = torch.randn(20, 1, 9, 9)
    for given in (quantized, {}):
        path = export_onnx(model, images, tmp_path / "m", given)
        torch.testing.assert_close(
            OnnxModel(path)(images), model(images).detach(), rtol=1e-4, atol=1e-4
        )


def test_weights_alone_become_integers_where_int8_holds_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, quantized = lenet5().eval(), {}
    sets = {
        "conv1.weight": Levels(4, spacing="power_of_two"),  # reaches 128: stays in floats
        "conv2.weight": Levels(4, zero=True, spacing="power_of_two"),
        "fc1.weight": Levels(3),
        "fc2.weight": Levels(8, zero=True),
    }
    for name, target in sets.items():
        weight = model.get_parameter(name)
        weight.data = target.project(weight.detach())
        quantized[name] = target.quantized(weight.detach())
    assert [fits(each) for each in quantized.values()] == [False, True, True, True]
    example = torch.rand(20, 1, 28, 28)
    sizes = [
        export_onnx(model, example, tmp_path / str(i), given).stat().st_size
        for i, given in enumerate(({}, quantized))
    ]
    assert sizes[1] < 0.27 * sizes[0]
    found = OnnxModel(tmp_path / "1")(example)
    torch.testing.assert_close(found, model(example).detach(), rtol=1e-5, atol=1e-5)
    scales = {v.item() for v in constants(onnx.load(tmp_path / "1")).values() if v.size == 1}
    assert {np.float32(each.scale) for name, each in quantized.items() if name[:4] != "conv1"} - {
        np.float32(v) for v in scales
    } == {np.float32(quantized["conv1.weight"].scale)}


def test_levels_by_channel_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator)
    weight[2] = 0
    target = ChannelLevels(3, zero=True)
    member = target.project(weight)
    assert target.contains(member)
    assert not Levels(3, zero=True).contains(member)
    quantized = target.quantized(member)
    assert torch.equal(quantized.weight(torch.float32), member)
    assert int(quantized.levels.abs().max()) == 3
    for row, one in zip(weight, member, strict=True):
        assert torch.equal(Levels(3, zero=True).project(row), one)
    assert target.storage(member).total == 8 * len(target.encode(member))


def stages(*each: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"train": TRAIN, "stages": list(each), "export": {"onnx": False}, **more}


def test_a_stage_that_is_undone_takes_its_grids_along(tmp_path: Path) -> None:
    prune = {"method": "gmp", "density": 0.5, "epochs": 0, "retrain_epochs": 1}
    ruin = {"method": "gmp", "density": 0.002, "epochs": 0, "retrain_epochs": 1}
    worse = {**DJPQ, "epochs": 1, "lr": 0.5, "bits": 2, "activation_bits": 2}
    for name, (first, second), gridded in (
        ("prune", (prune, worse), False),
        ("djpq", (DJPQ, ruin), True),
    ):
        done = sc.compress(task(), stages(first, second, floor=0.6), out=tmp_path / name)
        notes, accuracies = done.report["notes"], [e["accuracy"] for e in done.report["history"]]
        assert any("stage 1 and all after it were undone" in n for n in notes), accuracies
        assert bool(grids(done.model)) is gridded
        assert done.report["accuracy"]["validation"]["compressed"] >= 0.6
        bits = {row["name"]: row["activation_bits"] for row in done.report["layers"]}
        assert (bits["6"] < 32) is gridded


def test_layers_left_dense_stay_so_in_every_figure(tmp_path: Path) -> None:
    stage = {**DJPQ, "epochs": 1, "layers": {"0": "dense"}}
    report = sc.compress(task(), stages(stage), out=tmp_path).report
    rows = {row["name"]: row for row in report["layers"]}
    assert (rows["0"]["bits"], rows["0"]["activation_bits"], rows["0"]["set"]) == (32, 32, "dense")
    assert rows["3"]["bits"] <= 8
    expected = sum(r["compressed_macs"] * r["bits"] * r["activation_bits"] for r in rows.values())
    assert report["cost"]["compressed"]["bops"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("u15", "1 entries"), (";;u0;", "is not the grid"), ("u15;x3;;", "x3"), ("u99999;;;", "u999")],
)
def test_malformed_grids_are_refused(tmp_path: Path, text: str, message: str) -> None:
    model = regrid(lenet5(), "u15;;;")
    path = tmp_path / "m"
    packed.save(path, model, {}, reference="secateur.zoo:lenet5")
    header = path.read_bytes().replace(
        b'"activations":"u15;;;"', f'"activations":"{text}"'.encode()
    )
    with pytest.raises(ArtifactError, match=message):
        regridded(header, path)


def regridded(content: bytes, path: Path) -> None:
    """Load a file after making its container's lengths and its checksum right again."""
    import struct
    import zlib

    (length,) = struct.unpack_from("<Q", content)
    end = content.index(b"}}") + 2 if b"}}" in content else 8 + length
    header = json.loads(content[8:end])
    blob = content[end:].lstrip(b" ")[:-4]
    text = json.dumps(header["__metadata__"], separators=(",", ":"), sort_keys=True)
    blob += struct.pack("<I", zlib.crc32(blob, zlib.crc32(text.encode())))
    new = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + blob)
    packed.load(path)


def test_rounding_networks_are_judged_by_most_samples() -> None:
    logits = torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
    dense = logits

    def changed(samples: int, by: float) -> dict[str, Tensor]:
        other = logits.clone()
        other[:samples] += by * torch.randn(samples, 10)
        return {"dense": dense, "compressed": logits, "decoded": logits, "onnx": other}

    assert compare(changed(0, 0), rounds=True)["onnx"] == 0.0
    compare(changed(20, 0.02), rounds=True)
    for samples, by in ((600, 0.02), (20, 5.0)):
        with pytest.raises(ParityError):
            compare(changed(samples, by), rounds=True)
    with pytest.raises(ParityError):
        compare(changed(1, 0.02))
    same = {"dense": logits, "compressed": logits, "decoded": logits, "onnx": logits + 0.01}
    with pytest.raises(ParityError):
        compare(same, rounds=True)
    compare(same | {"dense": logits * 1.1}, rounds=True)  # half of what compression did may be
    with pytest.raises(ParityError):
        compare(same | {"dense": logits * 1.1, "onnx": logits + 0.2}, rounds=True)
