"""Models of machines against hand-computed times, laws they must obey, and their files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize, prune

from secateur.cost.platforms import (
    Platform,
    break_even,
    compare,
    load_platform,
    platform_names,
    timing,
    verdict,
)
from secateur.cost.workload import LayerWork, gap_bits, pattern_of, workload
from secateur.errors import SecateurError
from secateur.report.modelled import timing_table
from secateur.zoo import lenet5

DOCS = Path(__file__).parents[1] / "docs" / "platforms.md"

BOARD: dict[str, Any] = {
    "name": "board",
    "summary": "a board",
    "source": "invented",
    "compute": {"macs_per_second": {8: 1e6, 32: 1e5}},
    "memory": {"bytes_per_second": 1e4, "widths": [8, 32]},
    "skips": {
        "structured": {},
        "2:4": {"from_sparsity": 0.5},
        "unstructured": {"efficiency": 0.4},
    },
}

LAYER = LayerWork(
    name="fc",
    macs=10_000,
    weights=1000,
    nonzeros=1000,
    weight_bits=8,
    activation_bits=8,
    index_bits=0,
    inputs=60,
    outputs=40,
    pattern="dense",
)


def platform(path: Path, **changes: dict[str, Any]) -> Platform:
    """Load BOARD with some sections changed, by way of a file."""
    content = {**BOARD, **changes}
    (path / "board.yaml").write_text(yaml.safe_dump(content))
    return load_platform(path / "board.yaml")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Platform:
    return platform(tmp_path_factory.mktemp("board"))


def test_a_dense_layer_by_hand(board: Platform) -> None:
    (layer,) = timing(board, [LAYER]).layers
    assert layer.compute_seconds == pytest.approx(10_000 / 1e6)
    assert layer.memory_seconds == pytest.approx((1000 + 60 + 40) / 1e4)
    assert (layer.seconds, layer.bound) == (layer.memory_seconds, "memory")


def test_wider_operands_use_wider_multipliers_and_storage(board: Platform) -> None:
    (layer,) = timing(board, [replace(LAYER, weight_bits=4, activation_bits=16)]).layers
    assert layer.compute_seconds == pytest.approx(10_000 / 1e5)
    assert layer.memory_seconds == pytest.approx((1000 + 4 * 100) / 1e4)


@pytest.mark.parametrize(
    ("changes", "run_as", "share", "weight_bytes"),
    [
        ({"pattern": "structured", "nonzeros": 250}, "structured", 0.25, 250),
        ({"pattern": "2:4", "nonzeros": 500, "index_bits": 9}, "2:4", 0.5, 500 * 10 / 8),
        ({"pattern": "2:4", "nonzeros": 400}, "2:4", 0.5, 500 * 10 / 8),
        (
            {"pattern": "unstructured", "nonzeros": 100, "index_bits": 400},
            "unstructured",
            0.25,
            150,
        ),
        ({"pattern": "unstructured", "nonzeros": 800}, "unstructured", 2.0, 800),
    ],
)
def test_zeros_by_hand(
    board: Platform, changes: dict[str, Any], run_as: str, share: float, weight_bytes: float
) -> None:
    (layer,) = timing(board, [replace(LAYER, **changes)]).layers
    assert layer.run_as == run_as
    assert layer.compute_seconds == pytest.approx(share * 10_000 / 1e6)
    assert layer.memory_seconds == pytest.approx((weight_bytes + 100) / 1e4)


def test_zeros_that_a_machine_does_not_know_are_multiplied(tmp_path: Path) -> None:
    dull = platform(tmp_path, skips={"unstructured": {"from_sparsity": 0.9}})
    sparse = replace(LAYER, pattern="unstructured", nonzeros=200, index_bits=800)
    assert timing(dull, [sparse]) == timing(dull, [LAYER])
    sparser = replace(sparse, nonzeros=50)
    assert timing(dull, [sparser]).layers[0].run_as == "unstructured"


def test_bops_and_weights_on_the_chip(tmp_path: Path) -> None:
    memory = {"bytes_per_second": 1e4, "on_chip_bytes": 500, "activations": "on_chip"}
    chip = platform(tmp_path, compute={"bops_per_second": 1e6}, memory=memory)
    (narrow,) = timing(chip, [replace(LAYER, weight_bits=4, activation_bits=3)]).layers
    assert narrow.compute_seconds == pytest.approx(10_000 * 12 / 1e6)
    assert (narrow.memory_seconds, narrow.bound) == (0, "compute")
    spilt = timing(chip, [LAYER, LAYER]).layers  # 2,000 bytes of which 500 stay
    assert [layer.memory_seconds for layer in spilt] == pytest.approx([0.075, 0.075])


def test_products_of_activations_are_not_skipped(board: Platform, tmp_path: Path) -> None:
    layer = replace(LAYER, pattern="unstructured", nonzeros=100, activation_macs=4000)
    (timed,) = timing(board, [layer]).layers
    assert timed.compute_seconds == pytest.approx((4000 + 6000 * 0.1 / 0.4) / 1e6)
    chip = platform(tmp_path, compute={"bops_per_second": 1e6}, skips={})
    (narrow,) = timing(chip, [replace(layer, weight_bits=2)]).layers
    assert narrow.compute_seconds == pytest.approx((4000 * 8 * 8 + 6000 * 2 * 8) / 1e6)


def test_ppr_and_break_even_follow_from_the_efficiency(tmp_path: Path) -> None:
    fed = platform(tmp_path, memory={"bytes_per_second": 1e12})
    dense = [replace(LAYER, weights=100_000, nonzeros=100_000)]
    pruned = [replace(dense[0], nonzeros=1000, pattern="unstructured", index_bits=4000)]
    found = compare(fed, dense, pruned)
    assert (found.pruning_rate, found.speedup) == pytest.approx((100, 40))
    assert found.ppr == pytest.approx(1 / 0.4)
    assert break_even(fed, dense, pruned) == pytest.approx(1 - 0.4, abs=1e-4)


def test_break_even_where_memory_is_the_bound(tmp_path: Path) -> None:
    starved = platform(
        tmp_path, memory={"bytes_per_second": 1.0, "activations": "on_chip"}, skips=BOARD["skips"]
    )
    dense = [replace(LAYER, weights=100_000, nonzeros=100_000)]
    pruned = [replace(dense[0], nonzeros=1000, pattern="unstructured", index_bits=5000)]
    assert break_even(starved, dense, pruned) == pytest.approx(1 - 8 / 13, abs=1e-4)


def test_a_verdict_carries_its_numbers(tmp_path: Path) -> None:
    fed = platform(tmp_path, memory={"bytes_per_second": 1e12})
    pruned = replace(LAYER, nonzeros=100, pattern="unstructured", index_bits=400)
    rows = replace(LAYER, nonzeros=200, pattern="structured")
    found = verdict(fed, [LAYER], [pruned], [rows])
    assert found.text == (
        "On board, non-structured needs 60.1 % sparsity to break even and has 90.0 %: "
        "it pays 4.00x for 10x fewer weights (PPR 2.50). Structured pays 5.00x for 5x fewer "
        "weights (PPR 1.00): "
        "structured pruning is the faster one here."
    )
    short = verdict(fed, [LAYER], [replace(pruned, nonzeros=800)], [rows])
    assert "it does not pay: 0.50x" in short.text
    unable = platform(tmp_path, skips={"structured": {}})
    never = verdict(unable, [LAYER], [pruned], [rows])
    assert never.break_even is None
    assert "gain nothing, however many" in never.text
    assert json.loads(json.dumps(found.to_dict()))["structured"]["ppr"] == pytest.approx(1)


@st.composite
def layers(draw: st.DrawFn) -> LayerWork:
    weights = draw(st.integers(4, 10_000))
    nonzeros = draw(st.integers(1, weights))
    return LayerWork(
        name="layer",
        macs=draw(st.integers(1, 10**7)),
        weights=weights,
        nonzeros=nonzeros,
        weight_bits=draw(st.integers(1, 32)),
        activation_bits=draw(st.integers(1, 32)),
        index_bits=5 * nonzeros,
        inputs=draw(st.integers(1, 10_000)),
        outputs=draw(st.integers(1, 10_000)),
        pattern=draw(st.sampled_from(["dense", "structured", "2:4", "unstructured"])),
    )


@settings(max_examples=60)
@given(network=st.lists(layers(), min_size=1, max_size=4), share=st.floats(0.1, 1), data=st.data())
def test_less_to_do_never_takes_longer(
    board: Platform, network: list[LayerWork], share: float, data: st.DataObject
) -> None:
    chip = board.memory.model_copy(update={"on_chip_bytes": 5000})
    machine = board.model_copy(update={"memory": chip})
    field = data.draw(
        st.sampled_from(
            ["macs", "nonzeros", "weight_bits", "activation_bits", "index_bits", "inputs"]
        )
    )
    lighter = [
        replace(each, **{field: max(1, int(share * getattr(each, field)))}) for each in network
    ]
    if field == "nonzeros":  # across the threshold of 2:4 there may be a jump upwards
        lighter = [replace(each, pattern="unstructured") for each in lighter]
        network = [replace(each, pattern="unstructured") for each in network]
    before = timing(machine, network).seconds
    assert timing(machine, lighter).seconds <= before * (1 + 1e-12)
    faster = chip.model_copy(update={"bytes_per_second": 2e4})
    assert timing(machine.model_copy(update={"memory": faster}), network).seconds <= before


@settings(max_examples=40)
@given(network=st.lists(layers(), min_size=1, max_size=4))
def test_a_network_speeds_up_as_much_as_its_layers(
    board: Platform, network: list[LayerWork]
) -> None:
    dense = [replace(each, pattern="dense", nonzeros=each.weights) for each in network]
    singly = [compare(board, [a], [b]).speedup for a, b in zip(dense, network, strict=True)]
    whole = compare(board, dense, network).speedup
    assert min(singly) * (1 - 1e-9) <= whole <= max(singly) * (1 + 1e-9)


def test_operands_that_are_too_wide_are_refused() -> None:
    small = load_platform("weight-stationary")
    with pytest.raises(SecateurError, match="at most 16 bits, but layer 'fc' has 32"):
        timing(small, [replace(LAYER, weight_bits=32)])


@pytest.mark.parametrize("name", platform_names())
def test_every_platform_runs_a_network_and_states_its_source(name: str) -> None:
    found = load_platform(name)
    assert found.name == name
    assert "ssumed" in found.source
    timed = timing(found, workload(lenet5(), torch.zeros(1, 1, 28, 28), bits=(8, 8)))
    assert 0 < timed.seconds < 1
    console = Console(record=True, width=110)
    console.print(timing_table(found, timed))
    assert "conv1" in console.export_text()
    assert json.loads(json.dumps(timed.to_dict()))["total"]["seconds"] == timed.seconds


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"sumary": "x"}, ["unknown key 'sumary'", "Did you mean 'summary'?"]),
        ({"source": None}, ["source: null should be text", "where the numbers are from"]),
        ({"compute": {}}, ["compute: give either macs_per_second or bops_per_second"]),
        ({"compute": {"bops_per_second": 0}}, ["compute.bops_per_second: 0", "greater than 0"]),
        ({"compute": {"macs_per_second": {8: "fast"}}}, ["compute.macs_per_second[8]: 'fast'"]),
        ({"compute": {"macs_per_second": {8: 1, 16: 2}}}, ["not be faster for wider operands"]),
        ({"memory": {}}, ["memory.bytes_per_second: is missing"]),
        ({"memory": 3}, ["memory: 3 is a single value, but a map belongs here"]),
        ({"skips": {"4:8": {}}}, ["unknown key '4:8'", "2:4, structured, unstructured"]),
        ({"skips": {"unstructured": {"efficiency": 1.5}}}, ["skips.unstructured.efficiency: 1.5"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(SecateurError) as caught:
        platform(tmp_path, **change)
    message = str(caught.value)
    assert "board.yaml" in message
    assert all(part in message for part in parts), message
    assert message.count("\n") <= 2


def test_a_platform_that_is_not_there_is_named() -> None:
    with pytest.raises(SecateurError, match="Did you mean 'edge-cpu'"):
        load_platform("edge-cpux")


def test_the_documented_examples_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DOCS.parents[1])
    blocks = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (example,) = [text for kind, text in blocks if kind == "yaml"]
    (tmp_path / "my-board.yaml").write_text(example)
    mine = load_platform(tmp_path / "my-board.yaml")
    assert mine.skips["2:4"].from_sparsity == 0.5
    assert timing(mine, [LAYER]).seconds == pytest.approx(10_000 / 2e9)
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
    printed = capsys.readouterr().out
    assert "On weight-stationary-indexed, non-structured needs" in printed
    assert "On edge-cpu: 5.18x as fast as the dense network" in printed


def written(weight: torch.Tensor, width: int) -> int:
    """Write relative indices one by one and return their bits."""
    escape, gap, codes = 2**width - 1, 0, 0
    for value in weight.flatten().tolist():
        if value:
            while gap >= escape:
                codes, gap = codes + 1, gap - escape
            codes, gap = codes + 1, 0
        else:
            gap += 1
    return codes * width


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.0]), min_size=2, max_size=300))
def test_relative_indices_against_writing_them(values: list[float]) -> None:
    weight = torch.tensor(values)[None]
    assert gap_bits(weight) == min(written(weight, width) for width in range(1, 17))


def test_patterns_are_recognized() -> None:
    full = torch.ones(8, 8, 3, 3)
    assert pattern_of(full) == "dense"
    rows, columns = full.clone(), full.clone()
    rows[::2] = 0
    columns[:, 1, 2, 0] = 0
    assert pattern_of(rows) == pattern_of(columns) == pattern_of(rows * columns) == "structured"
    two_of_four = full.clone()
    two_of_four[0::2, [0, 1, 4, 5]] = 0
    two_of_four[1::2, [2, 3, 5, 7]] = 0
    assert pattern_of(two_of_four) == "2:4"
    two_of_four[0, 0, 0, 0] = 1
    assert pattern_of(two_of_four) == "unstructured"
    assert pattern_of(torch.eye(16)) == "unstructured"  # in 2:4 form by chance
    assert pattern_of(torch.zeros(4, 4)) == "structured"


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_network_becomes_plain_data() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 5))
    with torch.no_grad():
        net[2].weight[:] = 0
        net[2].weight[1, 7] = 1
    parametrize.register_parametrization(net[0], "weight", Doubled())
    conv, linear = workload(net, torch.zeros(1, 3, 4, 4), bits=(4, 8), first_last_bits=8)
    assert conv == LayerWork("0", 3456, 216, 216, 8, 8, 0, 48, 128, "dense")
    index = min(width * (1 + 135 // (2**width - 1)) for width in range(1, 17))
    assert linear == LayerWork("2", 640, 640, 1, 8, 8, index, 128, 5, "structured")
    conv, linear = workload(net, torch.zeros(1, 3, 4, 4), bits=(4, 8), weight_bits={"2": 3})
    assert (conv.weight_bits, linear.weight_bits, linear.activation_bits) == (4, 3, 8)


def test_masked_weights_count_as_the_layer_computes_with_them() -> None:
    net = nn.Linear(8, 4)
    with torch.no_grad():
        prune.custom_from_mask(net, "weight", torch.eye(8)[:4])
    (work,) = workload(net, torch.zeros(1, 8))
    assert (work.weights, work.nonzeros) == (32, 4)
