"""Linear layers on integers in ONNX, against the operators' specifications and runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur import data
from secateur.artifact import dynamic, nbits
from secateur.artifact.onnx import OnnxModel, export_onnx
from secateur.artifact.products import with_products
from secateur.codec import Quantized
from secateur.errors import ArtifactError
from secateur.measure import RUNTIMES
from secateur.quantizers import regrid
from secateur.sets import Levels
from secateur.sets.channel_levels import ChannelLevels

onnx = pytest.importorskip("onnx")

SETS = {
    2: Levels(2, zero=True),
    4: Levels(3),
    8: ChannelLevels(8, zero=True),
}
"""Sets by the bits that hold their levels, one scale or one for each output."""


def quantize(model: nn.Module, target: Levels) -> dict[str, Quantized]:
    found = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data = target.project(weight.detach())
            found[name] = target.quantized(weight.detach())
    return found


def network(inputs: int = 150) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 7, bias=False)).eval()


def weights_of(path: Path) -> list[np.ndarray]:
    """Read the matrices of a file's operators by their specification, one code at a time."""
    model = onnx.load(path)
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        sizes = {each.name: each.i for each in node.attribute}
        assert node.domain == "com.microsoft"
        assert sizes["accuracy_level"] == 4
        assert sizes["block_size"] in (16, 32, 64, 128, 256)
        codes, scales = (tensors[name] for name in node.input[1:3])
        assert codes.dtype == np.uint8
        assert len(node.input) == 3, "zero points are the middle of the codes"
        bits, zero = sizes["bits"], 2 ** (sizes["bits"] - 1)
        matrix = np.zeros((sizes["N"], sizes["K"]), np.float32)
        for row, column in np.ndindex(*matrix.shape):
            block, place = divmod(column, sizes["block_size"])
            byte, shift = divmod(place * bits, 8)
            code = int(codes[row, block, byte]) >> shift & 2**bits - 1
            matrix[row, column] = np.float32(code - zero) * scales[row, block]
        found.append(matrix)
    return found


@pytest.mark.parametrize("bits", SETS)
def test_the_file_holds_exactly_the_weights(bits: int, tmp_path: Path) -> None:
    model = network()
    quantized = quantize(model, SETS[bits])
    assert [nbits.width_of(each) for each in quantized.values()] == [bits, bits]
    path = export_onnx(model, torch.zeros(1, 150), tmp_path / "m", quantized, batch=1)
    expected = [quantized[name].weight(torch.float32).numpy() for name in quantized]
    for found, weight in zip(weights_of(path), expected, strict=True):
        np.testing.assert_array_equal(found, weight)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators == ["MatMulNBits", "Add", "Relu", "MatMulNBits"]
    floats = 4 * sum(weight.size for weight in expected)
    assert path.stat().st_size < floats * bits / 32 * 256 / 150 + 2000


@pytest.mark.parametrize(("bits", "more"), [(2, ()), (4, (5,)), (8, ())])
def test_runtimes_compute_it(bits: int, more: tuple[int, ...], tmp_path: Path) -> None:
    model = network()[0]
    quantized = quantize(model, SETS[bits])
    path = export_onnx(model, torch.randn(1, *more, 150), tmp_path / "m.onnx", quantized, batch=1)
    simulated, done = with_products(model, quantized, torch.zeros(1, *more, 150), 1)
    assert done == {"weight"}
    for batch in (1, 9):
        rows = torch.randn(batch, *more, 150)
        with torch.no_grad():
            exact, expected = model(rows), simulated(rows)
        largest = float(exact.abs().max())
        assert float((expected - exact).abs().max()) < 0.03 * largest, "inputs are rounded to int8"
        found = OnnxModel(path, threads=1)(rows)
        assert float((found - expected).abs().max()) <= 1e-5 * largest
        openvino = RUNTIMES["openvino"]
        pytest.importorskip(openvino.package)
        (other,) = openvino.prepare(path, {"input": rows.numpy()}, threads=1)()
        assert float((torch.tensor(other) - exact).abs().max()) < 0.03 * largest


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_packing_keeps_every_level(data: Any) -> None:
    bits = data.draw(st.sampled_from(nbits.WIDTHS))
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 300)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    half = 2 ** (bits - 1)
    levels = torch.randint(-half, half, shape, generator=generator).short()
    levels[0, 0] = -half  # no fewer bits hold this
    scales = tuple(torch.rand(shape[0], generator=generator).add(0.1).tolist())
    quantized = Quantized(levels, scales, 8, True)
    assert nbits.width_of(quantized) == bits
    packed, kept = nbits.pack(quantized, bits)
    assert packed.shape[1] == kept.shape[1]
    found = nbits.unpack(packed, kept, bits, shape[1])
    assert torch.equal(found, quantized.weight(torch.float32))


@pytest.mark.parametrize(
    ("target", "bits"),
    [
        (Levels(1), 2),
        (Levels(2), 4),
        (Levels(4, zero=True), 4),
        (Levels(4), 8),
        (Levels(3, zero=True, spacing="power_of_two"), 4),
        (Levels(4, spacing="power_of_two"), None),
        (Levels(8), None),
    ],
)
def test_which_bits_hold_which_set(target: Levels, bits: int | None) -> None:
    """128, which 8 bits without zero and 4 bits of powers of two reach, is one too many."""
    weight = target.project(torch.linspace(-1, 1, 64 * 64).view(64, 64))
    half = torch.arange(64 * 64).view(64, 64) % 2 == 0
    assert nbits.width_of(target.quantized(weight * half)) == bits


def test_what_stays_as_it_was() -> None:
    """Layers that read integers, convolutions, what would not get smaller."""
    model = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Flatten(), nn.Linear(30, 40), nn.Linear(40, 2))
    quantized = quantize(model, SETS[8])
    example = torch.zeros(1, 3, 3, 3)
    assert with_products(model, quantized, example, 1)[1] == {"2.weight", "3.weight"}
    assert with_products(regrid(model, ";;u255"), quantized, example, 1)[1] == {"2.weight"}
    tiny = nn.Sequential(nn.Linear(2, 2))
    assert not with_products(tiny, quantize(tiny, SETS[8]), torch.zeros(1, 2), 1)[1]


@pytest.mark.parametrize(("more", "batch"), [((), 9), ((9,), 1)])
def test_many_rows_are_products_of_bytes(more: tuple[int, ...], batch: int, tmp_path: Path) -> None:
    model = network()
    quantized = quantize(model, ChannelLevels(4, zero=True))
    example = torch.randn(1, *more, 150)
    path = export_onnx(model, example, tmp_path / "m.onnx", quantized, batch)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("MatMulInteger") == operators.count("DynamicQuantizeLinear") == 2
    tensors = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    for levels in quantized.values():
        assert any(np.array_equal(each, levels.levels.T) for each in tensors)
    simulated, done = with_products(model, quantized, example, batch)
    assert done == set(quantized)
    rows = torch.randn(64, *more, 150)
    with torch.no_grad():
        exact, expected = model(rows), simulated(rows)
    largest = float(exact.abs().max())
    assert float((expected - exact).abs().max()) < 0.03 * largest
    for name, tolerance in (("onnxruntime", 2e-3), ("openvino", 2e-3)):
        pytest.importorskip(name)
        (found,) = RUNTIMES[name].prepare(path, {"input": rows.numpy()}, threads=1)()
        assert float((torch.tensor(found) - expected).abs().max()) <= tolerance * largest, name


def test_levels_that_saturate_are_packed_in_large_batches_too() -> None:
    model = network()
    quantized = quantize(model, SETS[8])
    assert set(quantized) == with_products(model, quantized, torch.zeros(1, 150), 64)[1]
    found, _ = with_products(model, quantized, torch.zeros(1, 150), 64)
    assert isinstance(found[0], nbits.Product)


def test_bytes_as_onnx_defines_them() -> None:
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) + 0.3
    levels = torch.randint(-63, 64, (30, 8), generator=torch.Generator().manual_seed(1)).to(
        torch.int8
    )
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    made = [onnx.helper.make_empty_tensor_value_info(name) for name in ("y", "scale", "zero")]
    given = [onnx.helper.make_tensor_value_info("x", 1, [20, 30])]
    graph = onnx.helper.make_graph([node], "g", given, made)
    integers, step, zero = ReferenceEvaluator(onnx.helper.make_model(graph)).run(
        None, {"x": x.numpy()}
    )
    expected = (integers.astype(int) - int(zero)) @ levels.numpy().astype(int) * (step * 0.5)
    found = dynamic.matmul_dynamic(x, levels, torch.tensor(0.5))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


class Functional(nn.Module):
    """Uses its layer's weight and not the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(150, 40)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.layer.weight)


def test_a_weight_that_would_be_floats_is_refused(tmp_path: Path) -> None:
    model = Functional()
    quantized = quantize(model, SETS[4])
    with pytest.raises(ArtifactError, match="0 of 1 linear weights"):
        export_onnx(model, torch.zeros(1, 150), tmp_path / "m", quantized, batch=1)
    assert not (tmp_path / "m").exists()


def test_a_recipe_ends_in_a_file_of_few_bits(tmp_path: Path) -> None:
    splits = data.fewer(data.load("digits"), 200)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    task = sc.Task(model, splits.train, splits.validation, splits.test)
    recipe = {
        "train": {"epochs": 1, "threads": 1, "lr": 5e-3},
        "stages": [{"method": "post_training", "set": "levels", "bits": 4, "zero": True}],
        "export": {"batch": 1},
    }
    result = sc.compress(task, recipe, out=tmp_path)
    found = weights_of(tmp_path / "model.onnx")
    for matrix, weight in zip(found, (model[1].weight, model[3].weight), strict=True):
        np.testing.assert_array_equal(matrix, weight.detach().numpy())
    assert result.report["parity"]["onnx"] > 1e-6, "inputs are rounded, too"
    assert result.report["accuracy"]["onnx"] == pytest.approx(
        result.report["accuracy"]["compressed"], abs=0.02
    )
    with pytest.raises(sc.SecateurError, match=r"export\.batch"):
        sc.load_recipe({"model": "a:b", "data": "digits", **recipe, "export": {"batch": 0}})
