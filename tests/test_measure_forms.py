"""Forms of layers against torch's dense layers, and the shapes they are built for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import cost
from secateur.measure.clock import stopwatch
from secateur.measure.forms import FORMS, SHARED_BY, dense, output_scale
from secateur.measure.prepared import Prepared, UnsupportedError, multiply
from secateur.measure.run import time_layers
from secateur.measure.shapes import Convolution, Linear, Shape, shapes


def conv(inputs: int, outputs: int, kernel: int = 3, **more: object) -> Convolution:
    square = {
        name: (more.pop(name, fill),) * 2  # type: ignore[arg-type]
        for name, fill in (("stride", 1), ("padding", kernel // 2), ("dilation", 1), ("size", 9))
    }
    return Convolution(
        batch=more.pop("batch", 1),  # type: ignore[arg-type]
        inputs=inputs,
        outputs=outputs,
        kernel=(kernel,) * 2,
        **square,  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )


PLAIN: dict[str, Shape] = {
    "3x3": conv(16, 64),
    "batch, stride": conv(32, 64, batch=3, stride=2),
    "dilated, not square": replace(conv(16, 32, padding=2, dilation=2), size=(9, 12)),
    "1x1": conv(32, 64, 1, batch=2),
    "1x1, stride": conv(16, 32, 1, stride=2),
    "1x1, padded": conv(16, 32, 1, padding=1),
    "flat": Convolution(2, 16, 32, (1, 20), (1, 5), (1, 2), (0, 2), (1, 1)),
    "row": Linear(64, 96, 1),
    "rows": Linear(48, 80, 7),
}
GROUPED: dict[str, Shape] = {
    "depthwise": conv(24, 24, groups=24, batch=2),
    "depthwise, more out": conv(16, 32, groups=16),
    "groups": conv(32, 48, groups=4, stride=2),
}
SOLID = Convolution(1, 16, 32, (5, 6, 7), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3)
TRANSPOSED = conv(16, 32, stride=2, transposed=True, output_padding=(1, 1))


def prepared(form: str, shape: Shape, density: float) -> Prepared:
    return FORMS[form].prepare(shape, density, torch.Generator().manual_seed(1))


def by_torch(shape: Shape, inputs: Tensor, weight: Tensor) -> Tensor:
    """Compute the layer with the functions that users call."""
    if isinstance(shape, Linear):
        return functional.linear(inputs, weight)
    how = (shape.stride, shape.padding)
    if shape.transposed:
        more = (shape.output_padding, shape.groups, shape.dilation)
        return functional.conv_transpose2d(inputs, weight, None, *how, *more)
    return functional.conv2d(inputs, weight, None, *how, shape.dilation, shape.groups)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.001])
@pytest.mark.parametrize("form", ["csr", "scipy", "bsr", "gather"])
@pytest.mark.parametrize("shape", [*PLAIN.values(), *GROUPED.values()], ids=[*PLAIN, *GROUPED])
def test_sparse_forms_compute_the_dense_layer_with_zeros(
    shape: Shape, form: str, density: float
) -> None:
    if form == "scipy":
        pytest.importorskip("scipy")
    if shape in GROUPED.values() and form in ("bsr", "gather"):
        with pytest.raises(UnsupportedError, match="in groups"):
            prepared(form, shape, density)
        return
    layer = prepared(form, shape, density)
    expected = by_torch(shape, layer.inputs, layer.weight)
    torch.testing.assert_close(layer.run(), expected, rtol=1e-4, atol=1e-4)
    kept = int(layer.weight.count_nonzero()) / shape.weights
    assert layer.density == pytest.approx(kept)
    unit = {"csr": 1, "scipy": 1, "bsr": 256, "gather": shape.weights // shape.inputs}[form]
    assert abs(kept - density) * shape.weights <= max(unit, 0.5)


def test_blocks_are_square_and_outputs_share_their_inputs() -> None:
    weight = prepared("bsr", conv(16, 64), 0.3).weight.flatten(1)
    alive = weight.view(4, 16, 9, 16).abs().amax((1, 3)) > 0
    assert 0 < alive.sum() < alive.numel()
    assert (weight.view(4, 16, 9, 16).transpose(1, 2)[alive] != 0).all()
    read = (prepared("gather", conv(16, 64), 0.25).weight != 0).flatten(2)
    assert torch.equal(read.any(2), read.all(2))
    groups = read.any(2).view(64 // SHARED_BY, SHARED_BY, 16)
    assert torch.equal(groups.any(1), groups.all(1))
    assert set(groups.any(1).sum(1).tolist()) == {4}


@pytest.mark.parametrize("shape", [*PLAIN.values(), *GROUPED.values()], ids=[*PLAIN, *GROUPED])
def test_integers_compute_the_dense_layer_to_half_a_step(shape: Shape) -> None:
    try:
        layer = prepared("int8", shape, 1.0)
        found = layer.run()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"no integer operations of oneDNN here: {error}")
    expected = by_torch(shape, layer.inputs, layer.weight)
    step = output_scale(expected)
    assert found.dtype == torch.uint8
    assert ((found.float() - 128) * step - expected).abs().max() <= 0.51 * step


@pytest.mark.parametrize("shape", [conv(32, 64, padding=0), Linear(64, 96, 3)])
def test_a_smaller_layer_is_the_dense_one_without_its_dead_channels(shape: Shape) -> None:
    layer = prepared("smaller", shape, 0.25)
    outputs, inputs = layer.weight.shape[:2]
    assert layer.density == outputs * inputs / (shape.inputs * shape.outputs)
    whole = torch.zeros(shape.outputs, shape.inputs, *layer.weight.shape[2:])
    whole[:outputs, :inputs] = layer.weight
    full = torch.randn(layer.inputs.shape[0], shape.inputs, *layer.inputs.shape[2:])
    full[:, :inputs] = layer.inputs
    expected = by_torch(shape, full, whole)[:, :outputs]
    torch.testing.assert_close(layer.run(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "density", "kept"),
    [
        (conv(64, 64), 1 / 4, (32, 32, 1)),
        (conv(64, 64), 1 / 512, (8, 8, 1)),
        (conv(3, 64, 7), 1 / 4, (3, 16, 1)),  # the colours of images stay
        (Linear(512, 10, 1), 1 / 2, (256, 10)),
        (conv(64, 64, groups=64), 1 / 4, (16, 16, 16)),
        (conv(256, 512, groups=32), 1 / 4, (64, 128, 8)),
    ],
)
def test_smaller_widths(shape: Shape, density: float, kept: tuple[int, ...]) -> None:
    layer = prepared("smaller", shape, density)
    groups = (kept[2],) if len(kept) == 3 else ()
    expected = (kept[1], kept[0] // (groups[0] if groups else 1))
    assert layer.weight.shape[:2] == expected
    assert layer.density == layer.weight.numel() / shape.weights


@pytest.mark.parametrize("shape", [SOLID, TRANSPOSED], ids=["3d", "transposed"])
def test_what_has_no_sparse_form_says_so_and_is_still_timed_dense(shape: Convolution) -> None:
    (layer,), _ = time_layers({shape: ["up"]}, FORMS, stopwatch(1)[0], 1e-6)
    assert set(layer.curves) == {"smaller"}
    assert set(layer.missing) == set(FORMS) - {"smaller"}
    assert "transposed" in layer.missing["csr"] or "two dimensions" in layer.missing["csr"]
    assert layer.seconds > 0
    assert layer.speedup("csr", 0.9) == 1


def test_transposed_dense_is_that_of_torch() -> None:
    layer = dense(TRANSPOSED, 1.0, torch.Generator())
    assert torch.equal(layer.run(), by_torch(TRANSPOSED, layer.inputs, layer.weight))
    assert layer.run().shape[2:] == TRANSPOSED.output_size


class Mixed(nn.Module):
    """One of each, with a shape that appears twice and a module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.flat = nn.Conv1d(8, 4, 5, padding=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> Tensor:
        image = self.up(self.deep(self.other(self.twice(self.twice(self.stem(image))))))
        words = self.flat(image.flatten(2)).transpose(1, 2)
        return self.head(self.attention(words, words, words)[0])  # type: ignore[no-any-return]


def test_shapes_of_a_model_hold_all_that_multiplies() -> None:
    model, image = Mixed(), torch.zeros(2, 3, 16, 16)
    found = shapes(model, (image,))
    names = {str(shape): names for shape, names in found.names.items()}
    assert names["3x3 16->16 @ 8x8, batch 2"] == ["twice", "twice", "other"]
    assert names["3x3 16->16 @ 8x8, 16 groups, dilation 2, batch 2"] == ["deep"]
    assert names["2x2 16->8 @ 8x8, stride 2, transposed, batch 2"] == ["up"]
    assert names["1x5 8->4 @ 1x256, batch 2"] == ["flat"]
    assert names["4->10, 512 rows"] == ["head"]
    assert names["4->12, 512 rows"] == ["attention"]
    assert {other.operation for other in found.untimed} == {"bmm"}
    timed = sum(shape.macs * len(names) for shape, names in found.names.items())
    rest = sum(other.macs or 0 for other in found.untimed)
    assert timed + rest == cost.inspect(model, image).macs
    for shape in found.names:  # sizes are such that torch's own layer really runs
        if isinstance(shape, Convolution):
            layer = dense(shape, 1.0, torch.Generator())
            assert multiply(shape, layer.inputs, layer.weight).shape[2:] == shape.output_size
