"""int8 without training: ranges, rounding and equalization against second implementations."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor, nn

import secateur as sc
from runtime_graph import optimized
from secateur import doctor, methods
from secateur.artifact import packed
from secateur.artifact.onnx import OnnxModel
from secateur.data import InMemory
from secateur.errors import DataError, RecipeError
from secateur.outcome import Outcome, finished
from secateur.plan import build_plan
from secateur.posttraining import Calibration, equalize, quantize, reconstruct
from secateur.posttraining.quadratic import Quadratic
from secateur.posttraining.ranges import BINS, Histogram, divergence
from secateur.posttraining.rounding import RowGrid, best_steps, in_turns, rounded
from secateur.posttraining.sequence import absorbers
from secateur.quantizers import FixedQuantizer, activation_bits, grids, input_quantizer, regrid
from secateur.quantizers.attach import detach_input
from secateur.sets import NM, Levels
from secateur.sets.channel_levels import ChannelLevels
from secateur.zoo import lenet5
from tiny import digits_task

INT8 = Levels(8, zero=True)


def histogram(values: Tensor, parts: int = 1) -> Histogram:
    found = Histogram()
    for part in values.tensor_split(parts):
        found.add(part)
    return found


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 7), st.floats(1e-3, 1e3))
def test_histograms_do_not_depend_on_batches(seed: int, parts: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(500, generator=generator) * torch.rand(500, generator=generator)
    values[::7] = 0
    found = histogram(values[torch.randperm(500, generator=generator)], parts)
    assert found.top / 2 < float(values.abs().max()) <= found.top
    assert math.log2(found.top).is_integer()
    for sign, counts in zip((-1, 1), found.counts, strict=True):
        side = (sign * values)[sign * values > 0].double().numpy()
        expected, _ = np.histogram(side, BINS, (0, found.top))
        assert np.abs(expected - counts.numpy()).sum() <= 2  # a value on an edge


def brute_force(values: Tensor, bits: int, low: Any, high: Any) -> float:
    """Return the least squared error over grids between given ends."""
    best = math.inf
    for a, b in itertools.product(low, high):
        step = (a + b) / (2**bits - 1)
        least = -round(a / step)
        levels = (values / step).round().clamp(least, least + 2**bits - 1)
        best = min(best, float((levels * step - values).square().sum()))
    return best


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "normal", "gelu"])
def test_least_squares_ranges_are_those_of_a_search_of_all(bits: int, kind: str) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    values = {"relu": values.relu(), "normal": values, "gelu": nn.functional.gelu(3 * values)}[kind]
    grid = histogram(values).grid(bits, "mse", 100)
    assert grid.width == bits
    assert grid.signed or kind != "normal"
    error = float((grid(values) - values).square().sum())
    ends = [max(0.0, -float(values.min())), float(values.max())]
    shares = np.geomspace(1 / 32, 1, 60)
    low = ends[0] * shares if ends[0] else [0.0]
    assert error <= 1.03 * brute_force(values, bits, low, ends[1] * shares)


def test_other_ranges_are_what_they_say() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0)).double()
    ways: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")
    found = {how: histogram(values).grid(8, how, 99.0) for how in ways}
    ends = {how: (grid.least * grid.step, grid.most * grid.step) for how, grid in found.items()}
    step = float(found["minmax"].step)
    assert ends["minmax"] == pytest.approx((float(values.min()), float(values.max())), abs=step)
    for end, side in zip(ends["percentile"], (values[values < 0], values[values > 0]), strict=True):
        assert abs(end) == pytest.approx(float(side.abs().quantile(0.99)), abs=step)
    tails = values**3
    limit = [histogram(tails).grid(8, how, 99.0) for how in ("entropy", "minmax")]  # type: ignore[arg-type]
    assert float(limit[0].step) < 0.8 * float(limit[1].step)
    nothing = histogram(torch.zeros(9)).grid(8, "mse", 99.0)
    assert torch.equal(nothing(torch.zeros(3)), torch.zeros(3))


def direct_divergence(counts: list[float], width: float, limit: float, most: int) -> float:
    """Return the same by loops and SciPy."""
    end = math.ceil(limit / width - 1e-9)
    p = [*counts[: end - 1], sum(counts[end - 1 :])]
    level = [min(most, round((i + 0.5) * width * most / limit)) for i in range(end)]
    members: dict[int, list[int]] = {}
    for i in range(end):
        if counts[i] > 0:
            members.setdefault(level[i], []).append(i)
    q = [0.0] * end
    for bins in members.values():
        for i in bins:
            q[i] = sum(counts[j] for j in bins) / len(bins)
    return float(entropy(p, [max(each / sum(q), 1e-30) for each in q]))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=60), st.integers(3, 60), st.integers(1, 9))
def test_divergences_are_those_of_a_direct_count(counts: list[int], end: int, most: int) -> None:
    end = min(end, len(counts))
    if not any(counts[:end]):
        return
    numbers = [float(each) for each in counts]
    made = divergence(torch.tensor(numbers, dtype=torch.float64), 0.5, end * 0.5, most)
    assert made == pytest.approx(direct_divergence(numbers, 0.5, end * 0.5, most), abs=1e-9)


def layer_problem(outputs: int, inputs: int, seed: int = 0) -> Quadratic:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    mixed = torch.randn(inputs, inputs, **options)
    reads = torch.randn(1, 200, inputs, **options) @ mixed
    return Quadratic.damped(torch.randn(outputs, inputs, **options), reads.mT @ reads, 1e-6)


def test_levels_are_near_the_best_of_all() -> None:
    """Every one of 3^6 ternary rows is tried, each at its own best scale."""
    ratios, nearest = [], []
    for seed in range(10):
        made = layer_problem(1, 6, seed)
        found = made.loss(rounded(made, Levels(2, zero=True), 40, 0.1).weight(torch.float64))
        plain = made.loss(rounded(made, Levels(2, zero=True), 0, 0.1).weight(torch.float64))
        best = math.inf
        for row in itertools.product((-1.0, 0.0, 1.0), repeat=6):
            levels = torch.tensor([row], dtype=torch.float64)
            image = levels @ made.gram[0]
            size = float((image * levels).sum())
            scale = float((image * made.weight).sum()) / size if size else 0.0
            best = min(best, made.loss(levels * scale)) if scale >= 0 else best
        ratios.append(found / best)
        nearest.append(plain / best)
        assert found >= best * (1 - 1e-9)
    assert sum(ratios) < 0.7 * sum(nearest)
    assert sorted(ratios)[len(ratios) // 2] < 1.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_no_farther_away_than_rounded(bits: int) -> None:
    made, target = layer_problem(12, 30), Levels(bits, zero=True)
    found, plain = (rounded(made, target, n, 0.1) for n in (40, 0))
    losses = []
    for each in (found, plain):
        assert ChannelLevels(bits, zero=True).contains(each.weight(torch.float32))
        gap = made.rows(made.weight - each.weight(torch.float64))
        losses.append((gap @ made.gram * gap).sum(-1).flatten())
    assert bool((losses[0] <= losses[1] * (1 + 1e-9)).all())
    assert float(losses[0].sum()) < 0.7 * float(losses[1].sum())
    made.weight[:, ::3] = 0
    assert not bool(rounded(made, target, 40, 0.1).levels[:, ::3].any()), "pruned weights stay so"


def test_no_single_level_can_be_improved_after_turns() -> None:
    made = layer_problem(5, 9)
    grid = RowGrid(best_steps(made, (1, 2, 3)), (1, 2, 3), made.weight != 0)
    levels = grid.levels(made.weight)
    for _ in range(10):
        levels = in_turns(made, levels, grid)
    least = made.loss(levels * grid.step)
    for row, column, change in itertools.product(range(5), range(9), (-1, 1)):
        other = levels.clone()
        other[row, column] = (other[row, column] + change).clamp(-3, 3)
        assert made.loss(other * grid.step) >= least * (1 - 1e-9)


class Branching(nn.Module):
    """Chains with all that lets factors pass, and branches and functions that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, groups=8)
        self.c = nn.Conv2d(8, 6, 1)
        self.d = nn.Conv2d(6, 6, 3, padding=1)
        self.e = nn.Linear(6 * 16, 12)
        self.f = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).relu())
        x = self.c(nn.functional.max_pool2d(x, 2))
        x = x + self.d(x.relu())
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        out: Tensor = self.f(nn.functional.gelu(self.e(x)))
        return out


def test_equalization_balances_and_changes_no_output() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    with torch.no_grad():
        model.norm.running_var.copy_(torch.logspace(-2, 2, 8))
        model.norm.weight.copy_(torch.logspace(1, -1, 8))
        model.a.weight *= torch.logspace(-1, 1, 8).view(-1, 1, 1, 1)
        model.b.weight *= torch.logspace(1, -2, 8).view(-1, 1, 1, 1)
    images = torch.randn(4, 3, 16, 16)
    before = model(images)
    before_d, before_e = model.d.weight.clone(), model.e.weight.clone()
    assert equalize(model, images) == 2, "a to b, b to c"
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    made = (model.a.weight.flatten(1).abs().amax(1) * gain.abs()).log2()
    read = model.b.weight.flatten(1).abs().amax(1).log2()
    assert float((made - read).detach().abs().max()) <= 2.01, "as near as powers of two allow"
    assert torch.equal(model.d.weight, before_d), "its channels are also added"
    assert torch.equal(model.e.weight, before_e)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip
    model[1].running_mean.copy_(torch.randn(8) / 5)
    model[1].running_var.copy_(torch.rand(8) + 0.1)
    model[1].weight.data.copy_(torch.randn(8))
    return model.eval()


def test_means_of_outputs_are_kept_by_bias_or_batchnorm() -> None:
    model, images = small(), torch.rand(64, 1, 16, 16)
    found = absorbers(model, ["0", "3", "6"], images[:2])
    assert found["0"].tensor is model[1].running_mean
    assert found["3"].tensor is model[3].bias
    means = []
    for correct in (True, False):
        quantized = copy.deepcopy(model)
        quantize(quantized, [images], Levels(2, zero=True), bias_correction=correct, iterations=0)
        gap = quantized[:2](images) - model[:2](images)
        means.append(float(gap.detach().mean((0, 2, 3)).abs().max()))
    assert means[0] < 1e-5 < 1e-3 < means[1]


def test_everything_planned_is_integers() -> None:
    model, images = small(), torch.rand(64, 1, 16, 16)
    dense = copy.deepcopy(model)
    found = quantize(model, images.split(16), profile="no_vnni", equalize=True)
    assert [each.layer for each in found.fits] == ["0", "3", "6"]
    assert activation_bits(model) == {"0": 8, "3": 8, "6": 8}
    assert grids(model) == "u255;u255;u255"
    for name, levels in found.quantized.items():
        assert int(levels.levels.abs().max()) <= 63
        assert torch.equal(levels.weight(torch.float32), model.get_parameter(name))
        assert len(levels.scale) == len(model.get_parameter(name))  # type: ignore[arg-type]
    expected = dense(images)
    assert float((model(images) - expected).detach().norm() / expected.detach().norm()) < 0.02
    wide = quantize(copy.deepcopy(dense), [images], profile="vnni").quantized
    assert max(int(each.levels.abs().max()) for each in wide.values()) == 127
    again = quantize(model, [images], NM(2, 4) & Levels(6, zero=True), activation_bits=4)
    assert all(
        NM(2, 4).contains(model.get_parameter(name)) for name in again.quantized if name > "1"
    )
    assert set(activation_bits(model).values()) == {4}


def test_shared_weights_are_quantized_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    found = quantize(model, [torch.randn(32, 16)])
    assert [each.layer for each in found.fits] == ["0"]
    assert found.quantized["2.weight"] is found.quantized["0.weight"]
    assert torch.equal(found.quantized["0.weight"].weight(torch.float32), model[2].weight)
    assert set(activation_bits(model)) == {"0", "2"}


@pytest.mark.parametrize(
    ("target", "inputs", "options", "message"),
    [
        (Levels(8), [torch.rand(2, 1, 16, 16)], {}, "zero: true"),
        (NM(2, 4), [torch.rand(2, 1, 16, 16)], {}, "int8"),
        (INT8, [], {}, "there are none"),
        (INT8, [torch.rand(2, 1, 16, 16)], {"activation_bits": 9}, "9 is not"),
        (INT8, [torch.rand(2, 1, 16, 16)], {"calibration": "best"}, "none of mse"),
        (INT8, [(torch.rand(2, 1, 16, 16),)], {"equalize": True}, "one tensor"),
    ],
)
def test_what_cannot_be_is_refused(
    target: Any, inputs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(small(), inputs, target, **options)


def test_grids_between_any_ends_are_text_and_bytes(tmp_path: Path) -> None:
    model = regrid(lenet5(), "-17:238;u255;s127;-255:0")
    assert grids(model) == "-17:238;u255;s127;-255:0"
    assert list(activation_bits(model).values()) == [8, 8, 8, 8]
    packed.save(tmp_path / "m", model, {}, reference="secateur.zoo:lenet5")
    grid = input_quantizer(packed.load(tmp_path / "m").conv1)
    assert isinstance(grid, FixedQuantizer)
    assert (grid.least, grid.most) == (-17, 238)
    for bad in ("5:9", "-1:-1", "-0:5", "-70000:1", "-3:07"):
        with pytest.raises(sc.SecateurError, match="is not the grid"):
            regrid(lenet5(), f"{bad};;;")


def test_profiles_follow_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, flags, expected in (
        ("x86_64", ["avx2"], "no_vnni"),
        ("x86_64", ["avx2", "avx_vnni"], "vnni"),
        ("AMD64", [], "no_vnni"),
        ("aarch64", ["neon"], "vnni"),
    ):
        monkeypatch.setattr(doctor.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(doctor, "_cpu", lambda flags=flags: {"instructions": flags})
        assert doctor.int8_profile() == expected
    # two products in 16 bits: the largest weight that never saturates has 7 bits
    assert 2 * 255 * 63 < 2**15 <= 2 * 255 * 127


onnx = pytest.importorskip("onnx")


def test_files_run_in_integers_and_agree(tmp_path: Path) -> None:
    model, images = small(), torch.rand(64, 1, 16, 16) - 0.2
    dense = model(images).detach()
    found = quantize(model, [images], profile="no_vnni")
    assert grids(model).startswith("-")
    assert bool((model[1].weight < 0).any()), "which goes into levels"
    path = sc.export_onnx(model, images, tmp_path / "m.onnx", found.quantized)
    graph = onnx.load(path).graph
    assert not {"BatchNormalization", "Clip", "Transpose"} & {each.op_type for each in graph.node}
    stored = {each.data_type for each in graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.INT32} <= stored
    inside = optimized(path)
    assert inside["QLinearConv"] == 2
    assert inside["QGemm"] == 1
    expected = model(images).detach()
    found_error = float((OnnxModel(path)(images) - expected).norm() / expected.norm())
    noise = float((expected - dense).norm() / dense.norm())
    assert found_error < 0.5 * noise
    plain = OnnxModel(path, optimized=False)(images)
    assert float((plain - expected).norm() / expected.norm()) < 0.5 * noise
    seen = sc.saturation(path, images, dense)
    assert seen.noise == pytest.approx(noise, rel=0.2)
    assert seen.error <= 2 * noise


def test_transformer_layers_are_integer_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False)).eval()
    tokens = torch.randn(8, 5, 32)
    found = quantize(model, [tokens], profile="no_vnni")
    path = sc.export_onnx(model, tokens, tmp_path / "m.onnx", found.quantized)
    assert optimized(path)["MatMulIntegerToFloat"] == 2
    torch.testing.assert_close(
        OnnxModel(path)(tokens), model(tokens).detach(), rtol=1e-3, atol=1e-4
    )


def test_branches_stay_in_floats_and_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Branching().eval(), torch.randn(32, 3, 16, 16)
    dense = model(images).detach()
    found = quantize(model, [images], profile="no_vnni", iterations=0)
    noise = float((model(images).detach() - dense).norm() / dense.norm())
    assert noise < 0.05
    path = sc.export_onnx(model, images, tmp_path / "m.onnx", found.quantized)
    assert sc.saturation(path, images, dense).error <= noise


def test_saturation_is_seen_where_it_happens(tmp_path: Path) -> None:
    """All products are as large as can be: pairs of them exceed 16 bits at 8-bit weights."""
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.ReLU()).eval()
    model[0].weight.data.fill_(1.0)
    ones = torch.ones(4, 3, 64)
    errors = {}
    for profile in ("vnni", "no_vnni"):
        copied = copy.deepcopy(model)
        found = quantize(copied, [ones], profile=profile, calibration="minmax", iterations=0)  # type: ignore[arg-type]
        path = sc.export_onnx(copied, ones, tmp_path / "m.onnx", found.quantized)
        errors[profile] = sc.saturation(path, ones, model(ones)).error
    assert errors["no_vnni"] < 1e-5
    assert (errors["vnni"] > 0.1) is (doctor.int8_profile() == "no_vnni")


STAGE = {"method": "post_training", "set": "levels", "bits": 8, "zero": True, "activation_bits": 8}


def recipe(**stage: Any) -> dict[str, Any]:
    return {
        "train": {"epochs": 3, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "stages": [{**STAGE, "samples": 64, "profile": "no_vnni", **stage}],
    }


def test_a_recipe_ends_in_int8_files(tmp_path: Path) -> None:
    result = sc.compress(digits_task(), recipe(equalize=True), out=tmp_path)
    report = result.report
    accuracy = report["accuracy"]
    assert accuracy["compressed"] == accuracy["decoded"] >= accuracy["dense"] - 0.02
    assert report["parity"]["saturation"]["error"] <= 2 * report["parity"]["saturation"]["noise"]
    assert {(row["bits"], row["activation_bits"]) for row in report["layers"]} == {(7, 8)}
    loaded = sc.load(tmp_path / "model.secateur", digits_task().model)
    images = torch.rand(5, 1, 28, 28)
    assert torch.equal(loaded(images), result.model(images))


def test_a_convolution_that_nothing_rounds_behind(tmp_path: Path) -> None:
    """ONNX Runtime dequantizes its weight: one scale for the tensor becomes one for each row."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 4)
    )
    model.append(nn.Flatten())
    images = torch.randn(64, 3, 16, 16)
    samples = InMemory(images, torch.arange(64) % 32)
    stage = {"method": "post_training", "bits": 8, "zero": True, "activation_bits": 8}
    given = {"train": {"epochs": 1}, "stages": [stage]}
    task = sc.Task(model, samples, samples, samples)
    report = sc.compress(task, given, out=tmp_path).report
    assert report["parity"]["agreement"]["onnx"] >= 0.98


def test_stages_that_cannot_be_are_refused_before_training() -> None:
    for change, message in (({"zero": False}, "zero: true"), ({"retrain_epochs": 2}, "retrain")):
        with pytest.raises(RecipeError, match=message):
            sc.compress(digits_task(), recipe(**change), out="/nonexistent/never")
    method = methods.PostTraining(INT8, torch.rand(8, 1, 16, 16), activation_bits=8).attach(small())
    assert method.approximate
    assert not methods.PostTraining(INT8, torch.rand(8, 1, 16, 16)).outcome()["layers"]


def unlabelled_inputs() -> Tensor:
    return torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def pretrained() -> nn.Module:
    return small()


def test_inputs_without_labels_are_enough(tmp_path: Path) -> None:
    given = {
        **recipe(),
        "model": f"{__name__}:pretrained",
        "data": f"{__name__}:unlabelled_inputs",
        "train": {"epochs": 0},
    }
    report = sc.compress(None, given, out=tmp_path).report
    assert report["accuracy"]["dense"] == 1.0
    assert report["accuracy"]["compressed"] > 0.8
    assert any("agreement" in note for note in report["notes"])
    assert report["history"] == []
    for change, message in (
        ({"train": {"epochs": 1}}, "no labels"),
        ({"data": f"{__name__}:pretrained"}, "inputs alone"),
        ({"weights": str(Path(__file__))}, "could run code"),
    ):
        error = RecipeError if "data" not in change else DataError
        with pytest.raises(error, match=message):
            sc.compress(None, {**given, **change}, out=tmp_path / "other")


def test_inputs_in_a_file(tmp_path: Path) -> None:
    from secateur import data

    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.float64).reshape(10, 4))
    splits = data.load(str(tmp_path / "x.npy"))
    assert not splits.labelled
    assert (len(splits.train), len(splits.test)) == (8, 2)  # type: ignore[arg-type]
    assert splits.test[0][0].tolist() == [16.0, 17.0, 18.0, 19.0]
    np.save(tmp_path / "bad.npy", np.arange(10))
    np.save(tmp_path / "few.npy", np.zeros((3, 2)))
    for name, message in (
        ("bad", "floats of shape"),
        ("few", "3 inputs"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            data.load(str(tmp_path / f"{name}.npy"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_powers_of_two_are_rounded_to_powers_of_two(bits: int) -> None:
    torch.manual_seed(0)
    target = Levels(bits, zero=True, spacing="power_of_two")
    model = nn.Linear(8, 6)
    found = quantize(model, [torch.randn(64, 8)], target, profile="no_vnni")
    levels = found.quantized["weight"].levels
    assert set(levels.abs().unique().tolist()) <= {0, *target.magnitudes}
    assert torch.equal(found.quantized["weight"].weight(torch.float32), model.weight)
    outcome: Outcome = {"layers": {"": {"bits": bits, "by_channel": True}}, "spent": {}}
    (row,) = finished(build_plan(model, target), outcome).compressed
    assert row.set is not None
    assert row.set.contains(model.weight.detach())


class ByKeyword(nn.Module):
    """Calls its layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.a(input=x).relu())  # type: ignore[no-any-return]


def test_layers_that_are_called_by_keyword_read_through_their_grids() -> None:
    torch.manual_seed(0)
    named, images = ByKeyword(), torch.randn(64, 8)
    plain = nn.Sequential(named.a, nn.ReLU(), named.b)
    plain = copy.deepcopy(plain)
    quantize(named, [images])
    quantize(plain, [images])
    assert torch.equal(named(images), plain(images))
    for layer in (named.a, named.b):
        detach_input(layer)
        assert not layer._forward_pre_hooks
        assert not layer._forward_pre_hooks_with_kwargs
    named(images)


def test_no_inputs_are_refused_by_reconstruct_too() -> None:
    with pytest.raises(RecipeError, match="there are none"):
        reconstruct(nn.Linear(8, 4), [], NM(2, 4))
