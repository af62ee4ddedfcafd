"""Modelled energy against closed forms, measured energy against counters that are made up."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import secateur as sc
from secateur.cost import meter
from secateur.cost.energy import CAVEAT, energy, energy_of
from secateur.cost.node import load_node, node_names
from secateur.cost.workload import LayerWork, workload
from secateur.errors import MissingDependencyError, SecateurError
from secateur.report.modelled import energy_table

NODE = load_node("45nm")


def spotter() -> nn.Sequential:
    """Build the network of arXiv 1812.01739."""
    sizes = [(390, 256), (256, 256), (256, 29)]
    return nn.Sequential(*(nn.Linear(*each) for each in sizes))


@pytest.mark.parametrize(
    ("bits", "picojoules"),
    [
        ((32, 32), 3.7 + 0.9),
        ((16, 16), 1.1 + 0.4),
        ((4, 32), 3.7 + 0.9),
        ((8, 8), 0.2 + 0.1),
        ((4, 16), 1.1 + 0.4),
        ((4, 4), 0.2 / 4 + 0.1),
        ((2, 8), 0.2 / 4 + 0.1),
        ((20, 20), 400 * (0.2 / 64 + 3.1 / 1024) / 2 + 0.1),
    ],
)
def test_one_multiply_accumulate(bits: tuple[int, int], picojoules: float) -> None:
    assert NODE.mac_joules(*bits) == pytest.approx(picojoules * 1e-12)


@given(st.integers(1, 15), st.integers(1, 15))
def test_wider_integers_cost_more(weight_bits: int, activation_bits: int) -> None:
    here = NODE.mac_joules(weight_bits, activation_bits)
    assert here == NODE.mac_joules(activation_bits, weight_bits)
    if weight_bits < 15:
        assert here < NODE.mac_joules(weight_bits + 1, activation_bits)


def test_a_linear_layer_by_hand() -> None:
    found = energy(nn.Linear(390, 256), torch.zeros(1, 390))
    (layer,) = found.layers
    assert layer.compute == pytest.approx(459.264e-9)  # 99,840 x 4.6 pJ
    assert layer.weights == pytest.approx(99_840 * 32 / 64 * 100e-12)
    assert layer.activations == pytest.approx((390 + 256) * 32 / 64 * 10e-12)
    assert (found.weights_in, found.activations_in) == (2**20, 2**13)
    assert found.joules == layer.joules
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["joules"] == found.joules == plain["layers"][0]["joules"]


def test_quantized_layers_count_their_own_bits() -> None:
    found = sc.energy(spotter(), torch.zeros(1, 390), bits=(32, 8), weight_bits={"0": 4})
    first, second, _ = found.layers
    assert first.compute == pytest.approx(390 * 256 * NODE.mac_joules(4, 8))
    assert second.compute == pytest.approx(256 * 256 * NODE.mac_joules(32, 8))
    assert first.weights / second.weights == pytest.approx(390 * 4 / (256 * 32))
    assert found.total.compute == pytest.approx(sum(each.compute for each in found.layers))


def test_products_of_activations_take_their_bits_and_are_not_skipped() -> None:
    layer = LayerWork("attention", 1000, 100, 25, 4, 8, 0, 0, 0, "structured", activation_macs=400)
    (found,) = energy_of([layer], NODE, skip_zeros=True).layers
    by_weights, of_activations = 600 * 0.25 * NODE.mac_joules(4, 8), 400 * NODE.mac_joules(8, 8)
    assert found.compute == pytest.approx(by_weights + of_activations)


def test_fewer_bits_move_into_a_smaller_memory() -> None:
    layer = LayerWork("fc", 0, 2**18, 2**18, 32, 8, 0, 0, 0, "dense")
    homes = {8: 2**20, 1: 2**15, 32: 2**20}
    for bits, home in homes.items():
        found = energy_of([LayerWork("fc", 0, 2**18, 2**18, bits, 8, 0, 0, 0, "dense")], NODE)
        assert found.weights_in == home
    spilt = energy_of([layer, layer], NODE)
    assert spilt.weights_in is None
    assert spilt.joules == pytest.approx(2**19 * 32 / 64 * 1300e-12)


def convolved(weight: torch.Tensor, positions: int) -> int:
    """Count multiplications with non-zero weights, one by one."""
    indices = itertools.product(*map(range, weight.shape))
    return sum(positions for index in indices if weight[index] != 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_skipped_zeros_against_a_loop(groups: int) -> None:
    torch.manual_seed(groups)
    net = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    with torch.no_grad():
        net.weight[torch.rand_like(net.weight) < 0.7] = 0
    (work,) = workload(net, torch.zeros(1, 4, 9, 9), bits=(8, 8))
    (layer,) = energy_of([work], NODE, skip_zeros=True).layers
    assert layer.compute == pytest.approx(convolved(net.weight, 25) * 0.3e-12)
    stored = int(net.weight.count_nonzero()) * 8 + work.index_bits
    assert layer.weights == pytest.approx(stored * 10e-12 / 64)
    (dense,) = energy_of([work], NODE).layers
    assert dense.compute == pytest.approx(net.weight.numel() * 25 * 0.3e-12)


def test_the_order_of_compression_depends_on_memory() -> None:
    """Arithmetic alone puts int8 below pruned fp32; with the traffic of weights it is above."""
    torch.manual_seed(0)
    dense, pruned = (nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 256)) for _ in range(2))
    with torch.no_grad():
        for layer in pruned:
            layer.weight[torch.rand_like(layer.weight) < 0.95] = 0
    image = torch.zeros(1, 64)

    def parts(net: nn.Module, bits: int) -> tuple[float, float]:
        found = energy(net, image, bits=(bits, bits), skip_zeros=True)
        return sum(layer.compute for layer in found.layers), found.joules

    both, int8, fp32 = parts(pruned, 8), parts(dense, 8), parts(dense, 32)
    sparse = parts(pruned, 32)
    assert both[0] < sparse[0] < fp32[0]
    assert both[1] < sparse[1] < int8[1] < fp32[1]


def test_how_far_off_it_is() -> None:
    """The factors of docs/platforms.md and of the caveat: dynamic joules at batch 1 by model."""
    modelled = energy(spotter(), torch.zeros(1, 390)).joules
    assert modelled == pytest.approx(9.4e-6, abs=0.05e-6)
    measured = {0.27e-3: 29, 1.5e-3: 160, 5.6e-3: 590, 6.3e-3: 670, 29.7e-3: 3100}
    for joules, factor in measured.items():
        assert joules / modelled == pytest.approx(factor, rel=0.02)
    assert "29 to 3,100" in CAVEAT


def test_the_table_is_loud_about_what_it_is() -> None:
    console = Console(record=True, width=110)
    console.print(energy_table(energy(spotter(), torch.zeros(1, 390))))
    printed = console.export_text()
    assert "never quote the joules" in printed
    assert "1,024 KiB of SRAM" in printed
    assert "9.44 µJ" in printed


def test_nodes_state_their_source_and_mistakes_are_named(tmp_path: Path) -> None:
    assert all("Horowitz" in load_node(name).source for name in node_names())
    text = "name: n\nsummary: s\nsource: s\npicojoules: {integer: {add: {8: -1}, multiply: {8: 1}}}"
    (tmp_path / "n.yaml").write_text(text)
    with pytest.raises(SecateurError, match=r"n\.yaml: picojoules\.integer\.add\[8\]: -1"):
        load_node(tmp_path / "n.yaml")
    with pytest.raises(SecateurError, match="Known: 45nm"):
        load_node("7nm")


class Counter:
    """Stands in for ZeusMonitor: 17.0 W idle, 28.5 W running, of which 3 W are the memory's."""

    def begin_window(self, name: str) -> None:
        self.watts = {"idle": 14.0, "run": 25.5}[name]

    def end_window(self, name: str) -> Any:
        seconds = 2.0
        return SimpleNamespace(
            time=seconds,
            gpu_energy={},
            cpu_energy={0: self.watts * seconds},
            dram_energy={0: 3.0 * seconds},
        )


def test_measured_energy_is_split_as_in_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Xeon of arXiv 1812.01739: 6.3 mJ above idle, 15.7 mJ in all, at 1814 calls a second."""
    monkeypatch.setattr(meter, "counters", lambda: ("package",))
    monkeypatch.setattr(meter, "_monitor", Counter)
    calls: list[int] = []
    found = meter.measure(lambda: calls.append(1), seconds=0.01, idle_seconds=0)
    assert found.calls == len(calls) - 1  # one to warm up
    assert found.seconds == pytest.approx(2.0 / found.calls)
    paper = meter.Measured(("package",), 1814, 1 / 1814, found.idle_watts, found.run_watts)
    assert paper.dynamic_joules == pytest.approx(6.3e-3, abs=0.05e-3)
    assert paper.total_joules == pytest.approx(15.7e-3, abs=0.05e-3)
    assert json.loads(json.dumps(paper.to_dict()))["calls"] == 1814


def test_counters_are_found_where_they_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text("1")
    monkeypatch.setattr(meter, "_POWERCAP", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert meter.counters() == ("processor intel-rapl:0", "processor intel-rapl:1")


def test_without_a_counter_nothing_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "_POWERCAP", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SecateurError, match="not measured") as caught:
        meter.measure(lambda: None)
    assert str(caught.value).count("\n") <= 2
    assert "not virtual" in str(caught.value)
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SecateurError, match=r"Remedy: sudo chmod a\+r"):
        meter.measure(lambda: None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "counters", lambda: ("package",))
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    with pytest.raises(MissingDependencyError, match=r"secateur\[energy\]"):
        meter.measure(lambda: None)
