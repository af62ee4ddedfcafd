"""Break-even figures against closed forms on a fake clock, their JSON, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from secateur import cli, measure
from secateur.errors import SecateurError
from secateur.measure import BreakEven, Form, Layer
from secateur.measure.clock import Load, Stopwatch
from secateur.measure.forms import FORMS
from secateur.measure.prepared import Prepared
from secateur.measure.result import Point, ascending
from secateur.measure.run import DENSITIES, HOPELESS, MIN_SITTINGS, time_layers
from secateur.measure.shapes import Linear, Shape, Untimed


class FakeClock:
    """Time that passes only when a run says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


def faked(
    monkeypatch: pytest.MonkeyPatch, laws: dict[str, Callable[[float], float]], shape: Shape
) -> tuple[Layer, int]:
    """Time a layer whose forms take what a law says of their density; dense takes 1 ms."""
    clock = FakeClock()

    def form(law: Callable[[float], float]) -> Form:
        def prepare(shape: Shape, density: float, generator: torch.Generator) -> Prepared:
            nothing = torch.empty(0)
            return Prepared(clock.takes(1e-3 * law(density)), density, nothing, nothing)

        return Form("", prepare)

    monkeypatch.setattr(
        "secateur.measure.run.dense", lambda *_: form(lambda _: 1.0).prepare(shape, 1, None)
    )
    forms = {name: form(law) for name, law in laws.items()}
    (layer,), rounds = time_layers({shape: ("a", "b")}, forms, Stopwatch(clock, clock), 1.0)
    return layer, rounds


@settings(max_examples=40)
@given(factor=st.floats(1.05, 4.9), power=st.floats(0.3, 1.2), at=st.floats(0, 1 - DENSITIES[-1]))
def test_a_power_law_is_found_again(factor: float, power: float, at: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        layer, rounds = faked(patch, {"it": lambda d: factor * d**power}, Linear(8, 8, 1))
    assert rounds >= 3 * MIN_SITTINGS
    assert layer.seconds == pytest.approx(1e-3)
    assert layer.speedup("it", at) == pytest.approx((1 - at) ** -power / factor)
    density = factor ** (-1 / power)
    if density > DENSITIES[-1]:
        assert layer.starts_to_pay("it") == pytest.approx(1 - density, abs=2e-6)
    else:
        assert layer.starts_to_pay("it") is None
    for point in layer.curves["it"]:
        expected = factor * (1 - point.sparsity) ** (power - 1)
        assert point.ppr == pytest.approx(expected)
        assert point.low == pytest.approx(point.speedup)


def test_forms_that_never_pay_pay_at_once_or_are_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    laws = {
        "floor": lambda d: 1.5 + d,  # what is repeated for any density already costs more
        "quick": lambda d: 0.5 + d / 10,
        "hopeless": lambda d: 100 * d,
    }
    layer, _ = faked(monkeypatch, laws, Linear(8, 8, 1))
    assert layer.starts_to_pay("floor") is None
    assert layer.starts_to_pay("quick") == 0
    assert layer.starts_to_pay("hopeless") == pytest.approx(0.99, abs=2e-6)
    assert all(100 * (1 - at) <= HOPELESS for at in layer.sparsities("hopeless"))
    assert layer.speedup("hopeless", 0.1) == pytest.approx(1 / 90)  # the line goes on


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_ascending_is_isotonic_regression(values: list[float]) -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    expected = isotonic.isotonic_regression(values)
    assert ascending(values) == pytest.approx(list(expected), abs=1e-9)


def test_a_dip_is_averaged_away() -> None:
    curve = (point(0.0, 0.5), point(0.5, 2.0), point(0.75, 0.5), point(0.875, 4.0))
    layer = replace(network().layers[0], curves={"csr": curve})
    assert layer.speedup("csr", 0.5) == layer.speedup("csr", 0.75) == pytest.approx(1)
    assert layer.starts_to_pay("csr") == pytest.approx(0.75, abs=2e-6)


def point(sparsity: float, speedup: float) -> Point:
    return Point(sparsity, 1.0, speedup, speedup, speedup)


def network() -> BreakEven:
    def layer(
        names: tuple[str, ...], seconds: float, curves: dict[str, tuple[Point, ...]]
    ) -> Layer:
        missing = {} if "csr" in curves else {"csr": "no such form"}
        return Layer(names, "linear", "8->8", 64, 64, seconds, seconds, seconds, curves, missing)

    curve = (point(0.0, 0.25), point(0.5, 0.5), point(0.9375, 4.0))  # 1 / 4d
    return BreakEven(
        layers=(layer(("a", "b"), 3.0, {"csr": curve}), layer(("c",), 2.0, {})),
        forms={"csr": "zeros anywhere"},
        untimed=(Untimed("bmm", 5), Untimed("mystery", None)),
        machine="none",
        torch="0",
        threads=1,
        clock="processor time",
        rounds=7,
        load=Load(2, 0.5),
    )


def test_the_network_is_the_sum_of_its_layers() -> None:
    found = network()
    assert found.seconds == 8
    for sparsity in (0.0, 0.3, 0.5, 0.8, 0.9375):
        spent = 6 * 4 * (1 - sparsity) + 2
        assert found.speedup("csr", sparsity) == pytest.approx(8 / spent)
        assert found.ppr("csr", sparsity) == pytest.approx(spent / 8 / (1 - sparsity))
    assert found.starts_to_pay("csr") == pytest.approx(0.75, abs=2e-6)
    assert found.covered("csr") == 0.75
    assert found.speedup("csr", {"a": 0.5}) == pytest.approx(8 / (3 * 2 + 3 + 2))
    assert found.speedup("csr", 0.9999) == pytest.approx(found.speedup("csr", 0.9375))


def test_json_round_trip_and_what_cannot_be() -> None:
    found = network()
    text = json.dumps(found.to_dict())
    assert BreakEven.from_dict(json.loads(text)) == BreakEven.from_dict(found.to_dict()) == found
    assert json.loads(text)["network"]["csr"]["covered"] == 0.75
    assert json.loads(text)["busy"]
    broken = found.to_dict()
    del broken["layers"][0]["seconds"]
    with pytest.raises(SecateurError, match=r"layers\.0\.seconds: Field required"):
        BreakEven.from_dict(broken)
    with pytest.raises(SecateurError, match="Did you mean 'csr'"):
        found.speedup("csrr", 0.5)
    with pytest.raises(SecateurError, match="no layer 'd'"):
        found.speedup("csr", {"d": 0.5})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads: 0"),
        ({"seconds": math.nan}, "seconds: nan"),
        ({"model": nn.ReLU()}, "no convolution"),
    ],
)
def test_breakeven_of_what_cannot_be(options: dict[str, object], words: str) -> None:
    with pytest.raises(SecateurError, match=words):
        measure.breakeven(
            **{"model": nn.Linear(4, 4), "inputs": torch.zeros(1, 4), **options}  # type: ignore[arg-type]
        )


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    (tmp_path / "nets.py").write_text(
        "from torch.nn import *\n"
        "def net():\n"
        "    return Sequential(Conv2d(3, 32, 3), ReLU(), Flatten(), Linear(1152, 32))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("secateur.measure.clock._MIN_ROUNDS", 2)
    page = tmp_path / "page.html"
    arguments = ["breakeven", "nets:net", "--input", "1x3x8x8", "--seconds", "0.01"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json", "--out", str(page)])
    assert result.exit_code == 0, result.output
    found = BreakEven.from_dict(json.loads(result.stdout))
    assert [layer.names for layer in found.layers] == [("0",), ("3",)]
    assert set(found.forms) == set(FORMS)
    for layer in found.layers:
        assert set(layer.curves) | set(layer.missing) == set(FORMS)
        assert {len(curve) for curve in layer.curves.values()} - {0}
    assert "square blocks" in found.layers[0].missing["bsr"]
    assert torch.get_num_threads() == threads
    html = page.read_text()
    assert "<svg" in html
    assert "nets:net" in html
    assert "stays dense" in html
    shown = CliRunner().invoke(cli.app, arguments).stdout
    for words in ("starts to pay", "1 thread", "3x3 3->32 @ 8x8", "1152->32, 1 row"):
        assert words in shown


def test_command_errors() -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["breakeven", "secateur.zoo:lenet5", *arguments])
        assert result.exit_code == 2
        return result.stderr

    assert "--input" in refused()
    assert "threads: 0" in refused("--input", "1x1x28x28", "--threads", "0")
    assert "seconds: 0.0" in refused("--input", "1x1x28x28", "--seconds", "0")
