"""Whole networks timed in real runtimes; the load by other programs is played."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

import secateur as sc
from secateur import cli, measure
from secateur.artifact import packed
from secateur.errors import ArtifactError, BusyError, MissingDependencyError, SecateurError
from secateur.measure import RUNTIMES, Spread
from secateur.measure import networks as module
from secateur.measure.clock import Load, Stopwatch
from secateur.measure.networks import ENOUGH, sit
from secateur.measure.runtimes import feeds_of, holds_integers
from secateur.report.bench import bench_table
from secateur.sets import Levels
from secateur.zoo import lenet5

pytest.importorskip("onnxruntime")


class Quiet:
    """Stands for a meter of a machine with 4 cores, of which others use so many, time by time."""

    others: Iterator[float] = iter(())

    def read(self) -> Load:
        return Load(4, next(Quiet.others, 0.0))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    Quiet.others = iter(())
    monkeypatch.setattr(module, "LoadMeter", Quiet)


def installed(name: str) -> str:
    pytest.importorskip(RUNTIMES[name].package)
    return name


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return {
        width: sc.export_onnx(network(width), torch.zeros(1, 32), folder / f"{width}.onnx")
        for width in (16, 2048)
    }


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_runtime_computes_what_torch_does(
    name: str, batch: int, files: dict[int, Path]
) -> None:
    feeds = feeds_of(files[16], batch)
    (found,) = RUNTIMES[installed(name)].prepare(files[16], feeds, 1)()
    with torch.no_grad():
        expected = network(16)(torch.from_numpy(feeds["input"])).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_network_16000_times_smaller_is_faster(name: str, files: dict[int, Path]) -> None:
    found = measure.bench(
        files[16], files[2048], runtimes=[installed(name)], batches=(1, 2), seconds=0.2
    )
    assert [(each.runtime, each.batch) for each in found.figures] == [(name, 1), (name, 2)]
    for figure in found.figures:
        assert figure.speedup.median > 2
        assert figure.speedup == figure.speedup_over_fastest, "there is one runtime only"
        for spread in (figure.seconds, figure.against, figure.speedup):
            assert 0 < spread.low <= spread.median <= spread.high
    assert found.rounds >= ENOUGH
    assert found.clock == "processor time"
    assert found.fastest == {1: name, 2: name}


class Clock:
    """Passes only while something runs: 1, 2 ... seconds for the runs in turn."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds

        return run


def test_sittings_do_not_count_while_others_work() -> None:
    clock = Clock()
    Quiet.others = iter((0.3, 0.7, 3.0, 0.1))
    sat = sit([clock.taking(1), clock.taking(3)], Stopwatch(clock, clock), 60)
    assert sat.discarded == 2
    assert sat.others == pytest.approx((0.3 + 0.1) / 2)
    assert len(sat.rounds) == 6
    assert all(each == [1, 3] for each in sat.rounds)


def test_a_machine_that_is_never_quiet_gets_no_figure() -> None:
    clock = Clock()
    Quiet.others = iter([1.0] * 1000)
    with pytest.raises(BusyError, match=r"other programs use 1\.0 of 4 cores"):
        sit([clock.taking(1)], Stopwatch(clock, clock), 60)
    assert clock.now < 4 * 60


def test_the_fastest_runtime_of_the_other_network_is_what_counts() -> None:
    rounds = [[8.0, 4.0, 6.0, 2.0]] * 4  # against and network in a, then in b
    first, second = module._figures(["a", "b"], 1, rounds)
    assert first.speedup.median == 2
    assert first.speedup_over_fastest.median == 1.5
    assert second.speedup.median == 3
    assert second.speedup_over_fastest.median == 3
    assert first.seconds == Spread(4, 4, 4)
    assert second.against == Spread(6, 6, 6)


def test_runtimes_that_compute_something_else_are_named(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("openvino")
    both = {"against": str(files[16]), "network": str(files[2048])}

    def lines() -> tuple[measure.Bench, str]:
        found = measure.bench(files[2048], files[16], batches=(1, 3), seconds=0.05)
        console = Console(width=300, record=True, file=io.StringIO())
        console.print(bench_table(found, both["network"], both["against"]))
        return found, console.export_text()

    found, text = lines()
    for role, path in both.items():
        feeds = feeds_of(Path(path), 3)
        (one,), (other,) = (
            [np.array(out) for out in each.prepare(Path(path), feeds, 1)()]
            for each in RUNTIMES.values()
        )
        apart = np.abs(one - other).max() / np.abs(one).max()
        assert apart <= found.agreement[role].difference < 1e-5
        assert found.agreement[role].met
        assert f"{path}: the runtimes agree to" in text
    assert set(json.loads(json.dumps(found.to_dict()))["agreement"]) == set(both)

    honest = RUNTIMES["openvino"].load

    def load(path: Path, feeds: Any, threads: int) -> Any:
        run = honest(path, feeds, threads)
        scale = {files[2048]: 1.25, files[16]: np.nan}[path]
        return lambda given: [each * scale for each in run(given)]

    monkeypatch.setitem(RUNTIMES, "openvino", replace(RUNTIMES["openvino"], load=load))
    found, text = lines()
    assert found.agreement["network"].difference == pytest.approx(0.25, rel=1e-4)
    assert found.agreement["against"].difference == 1, "no number is off by all"
    assert text.count("one may be wrong") == 2
    alone = measure.bench(files[16], files[16], runtimes=["onnxruntime"], seconds=0.05)
    assert alone.agreement == {}


def test_files_with_integers_are_known(tmp_path: Path, files: dict[int, Path]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    weight = model.get_parameter("0.weight")
    weight.data = Levels(4, zero=True).project(weight.detach())
    levels = {"0.weight": Levels(4, zero=True).quantized(weight.detach())}
    for batch in (None, 1, 64):
        path = sc.export_onnx(model, torch.zeros(1, 32), tmp_path / "m.onnx", levels, batch)
        assert holds_integers(path)
    assert not holds_integers(files[16])


def test_integers_and_several_inputs_are_fed(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.table(tokens).sum(1) * scale

    example = (torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 4))
    path = sc.export_onnx(Two().eval(), example, tmp_path / "two.onnx")
    feeds = feeds_of(path, 3)
    assert [(v.dtype.kind, v.shape) for v in feeds.values()] == [("i", (3, 7)), ("f", (3, 4))]
    (found,) = RUNTIMES["onnxruntime"].prepare(path, feeds, 1)()
    assert found.shape == (3, 4)


def test_what_cannot_be_timed_is_refused(tmp_path: Path, files: dict[int, Path]) -> None:
    import onnx

    fixed = onnx.load(files[16])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, tmp_path / "fixed.onnx")
    with pytest.raises(SecateurError, match="batch: 1 is not what"):
        feeds_of(tmp_path / "fixed.onnx", 1)
    fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    onnx.save(fixed, tmp_path / "open.onnx")
    with pytest.raises(SecateurError, match="leaves more open"):
        feeds_of(tmp_path / "open.onnx", 2)
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(ArtifactError, match="no ONNX file"):
        feeds_of(tmp_path / "bad.onnx", 1)
    wrong = {"input": np.zeros((1, 31), np.float32)}
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot run this file"):
        RUNTIMES["onnxruntime"].prepare(files[16], wrong, 1)
    for arguments in ({"batches": ()}, {"threads": 0}, {"seconds": 0}, {"runtimes": ["abacus"]}):
        with pytest.raises(SecateurError, match=next(iter(arguments))[:5]):
            measure.bench(files[16], files[16], **arguments)  # type: ignore[arg-type]


def test_a_runtime_that_is_not_here_is_named(
    files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"secateur\[openvino\]\""):
        measure.bench(files[16], files[16], runtimes=["openvino"])


def invoke(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lenet") / "model.secateur"
    packed.save(
        path, lenet5(), {}, reference="secateur.zoo:lenet5", metadata={"input": "1x1x28x28"}
    )
    return str(path)


FAST = ("--runtime", "onnxruntime", "--seconds", "0.1")


def test_the_command_names_the_fastest_runtime(lenet: str, files: dict[int, Path]) -> None:
    found = json.loads(invoke(lenet, *FAST, "--batch", "1,2", "--json").stdout)
    assert found["fastest"] == {"1": "onnxruntime", "2": "onnxruntime"}
    assert [each["batch"] for each in found["figures"]] == [1, 2]
    small, large = str(files[16]), str(files[2048])
    text = invoke(small, "--against", large, *FAST).stdout
    assert "fastest at batch 1: ONNX Runtime" in text
    invoke(large, "--against", small, *FAST)


def test_the_command_refuses_without_a_figure(
    lenet: str, files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Quiet.others = iter([4.0] * 100_000)
    monkeypatch.setattr(module, "SITTING", 0.05)
    refused = invoke(lenet, *FAST, code=2)
    assert "other programs use 4.0 of 4 cores" in refused.output
    assert "x" not in refused.stdout
    unknown = invoke(str(files[16]), *FAST, code=2)
    assert "--against" in unknown.output
