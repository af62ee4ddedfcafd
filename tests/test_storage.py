"""Storage tables, the entropy bound and the break-even rule."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.codec import Quantized, Storage
from secateur.cost import (
    ENCODINGS,
    bound,
    break_even,
    index_bits,
    measured_index_bits,
    storage_table,
)
from secateur.cost.encodings import NM, Bitmap, Dense, RelativeEscape, RelativeFiller
from secateur.errors import MembershipError, SecateurError
from secateur.report.storage import break_even_chart, storage_tables

LENET5 = {"conv1": (500, 90), "conv2": (25_000, 560), "fc1": (400_000, 440), "fc2": (5_000, 147)}
"""Weights and non-zeros of a LeNet-5 at 348x."""


def random_support(size: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(size)
    weight[torch.randperm(size, generator=generator)[:count]] = 1.0
    return weight


@pytest.mark.parametrize(
    ("encoding", "expected", "digits"),
    [
        ("relative_escape", (3.5, 4.6, 6.2, 7.2, 8.7, 10.6), 1),
        ("rice", (3.3, 4.4, 5.8, 6.7, 8.1, 9.9), 1),
        ("entropy", (3.25, 4.35, 5.7, 6.6, 8.1, 9.9), 1),
        ("bitmap", (4, 8, 20, 36, 100, 348), 6),
    ],
)
def test_index_bits_of_random_supports(
    encoding: str, expected: tuple[float, ...], digits: int
) -> None:
    for ratio, bits in zip((4, 8, 20, 36, 100, 348), expected, strict=True):
        assert index_bits(ratio, encoding) == pytest.approx(bits, abs=0.51 * 10**-digits)


@pytest.mark.parametrize("ratio", [1.5, 4, 20, 348])
def test_closed_forms_agree_with_measured_random_supports(ratio: float) -> None:
    weight = random_support(400_000, round(400_000 / ratio))
    levels = Quantized(weight.to(torch.int16), 1.0, 4, True)
    for encoding in (
        *("none", "bitmap", "relative_filler", "relative_escape", "rice"),
        *(RelativeEscape(4), RelativeFiller(5)),
    ):
        measured = measured_index_bits(weight, encoding, levels)
        assert index_bits(ratio, encoding, 4) == pytest.approx(measured, rel=0.03)
    limit = bound(weight).support * ratio / 400_000
    assert index_bits(ratio) == pytest.approx(limit, rel=0.001)


def test_index_bits_refuse_what_has_no_closed_form() -> None:
    assert index_bits(2, "nm") == 1.5
    assert index_bits(2, "nm_positions") == 2
    assert index_bits(8, NM(1, 8)) == 3
    for encoding in ("csr", "structured", "packed", NM(1, 8)):
        with pytest.raises(SecateurError, match="no closed form"):
            index_bits(100, encoding)
    for ratio in (1, 0.5, math.nan, math.inf):
        with pytest.raises(SecateurError, match="ratio"):
            index_bits(ratio)
    with pytest.raises(SecateurError, match="Did you mean 'bitmap'"):
        index_bits(4, "bitmaps")
    with pytest.raises(SecateurError, match="all of it is zero"):
        measured_index_bits(torch.zeros(3), "rice")


def test_no_encoding_beats_the_bound_on_a_random_support() -> None:
    for ratio in (1.3, 2, 7, 50, 1000):
        for encoding in ("none", "bitmap", "relative_filler", "relative_escape", "rice"):
            assert index_bits(ratio, encoding, 32) >= index_bits(ratio)


@pytest.mark.parametrize(
    ("encoding", "rows"),
    [
        ("relative_escape", {1: (1516, 35.5), 2: (1671, 64), 3: (1826, 88), 4: (1980, 109)}),
        ("rice", {1: (1428, None), 2: (1582, None), 3: (1737, None), 4: (1892, None)}),
    ],
)
def test_lenet5_at_348x(encoding: str, rows: dict[int, tuple[int, float | None]]) -> None:
    kept = sum(count for _, count in LENET5.values())
    index = sum(count * index_bits(size / count, encoding) for size, count in LENET5.values())
    for bits, (total, tie) in rows.items():
        assert (kept * bits + index) / 8 == pytest.approx(total, abs=1.5)
        if tie is not None:
            assert break_even(348, bits, index / kept) == pytest.approx(tie, abs=0.5)


def test_break_even_is_where_both_take_the_same_bits() -> None:
    weights = 1_000_000
    for ratio, bits, index in ((4, 1, 3.5), (36, 8, 7.2), (348, 32, 9.9)):
        structured = break_even(ratio, bits, index)
        assert weights * bits / structured == pytest.approx(weights / ratio * (bits + index))
    assert break_even(20, 4, index_bits(20, "none", 4)) == pytest.approx(1)


def test_bound_is_what_counting_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-2, 3, (7, 6), generator=generator) / 4
    values = [value for value in weight.flatten().tolist() if value]
    assert bound(weight).support == pytest.approx(math.log2(math.comb(42, len(values))))
    surprise = sum(-math.log2(Counter(values)[value] / len(values)) for value in values)
    assert bound(weight).values == pytest.approx(surprise)
    for constant in (torch.zeros(4, 4), torch.ones(5), torch.zeros(0)):
        assert bound(constant).total == pytest.approx(0)


class Tied(nn.Module):
    """Masked, tied, frozen, one-dimensional: every kind of weight that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight


def test_a_table_takes_each_weight_as_the_model_computes_with_it() -> None:
    torch.manual_seed(0)
    model = Tied()
    prune.random_unstructured(model.first, "weight", 0.75)
    table = storage_table(model)
    assert [layer.name for layer in table.layers] == ["first.weight", "second.weight"]
    first, second = table.layers
    assert (first.weights, first.nonzeros, first.bits) == (216, 54, 32)
    assert first.encodings["bitmap"] == Bitmap().storage(model.first.weight)
    assert first.encodings["bitmap"].values == 54 * 32
    assert (second.nonzeros, second.dense) == (64, 64 * 32)
    assert list(table.total) == [str(kind()) for kind in ENCODINGS.values()]


def test_a_table_of_a_model_takes_the_levels_of_its_weights_only() -> None:
    model = Tied()
    levels = torch.ones(8, 8, dtype=torch.int16)
    model.second.weight.data = levels * 0.5
    four_bits = Quantized(levels, 0.5, 4, True)
    bias = Quantized(torch.zeros(8, dtype=torch.int16), 1.0, 8, True)
    names = ("second.weight", "third.weight", "second.bias")  # the second is tied to the first
    table = storage_table(model, dict(zip(names, (four_bits, four_bits, bias), strict=True)))
    first, second = table.layers
    assert (first.bits, second.bits) == (32, 4)
    assert second.encodings["none"].values == 64 * 4
    with pytest.raises(SecateurError, match=r"Did you mean 'second\.weight'"):
        storage_table(model, {"secnd.weight": four_bits})


def test_attention_and_recurrent_weights_are_in_the_table() -> None:
    attention, lstm = nn.MultiheadAttention(4, 2), nn.LSTM(4, 3)
    assert {layer.name for layer in storage_table(attention, encodings=["none"]).layers} == {
        *("in_proj_weight", "out_proj.weight"),
    }
    assert {layer.name for layer in storage_table(lstm, encodings=["none"]).layers} == {
        *("weight_ih_l0", "weight_hh_l0"),
    }


def test_a_refused_layer_counts_as_dense() -> None:
    weights = {"kept": torch.tensor([[1.0, 0, 0, 2]]), "crowded": torch.tensor([[1.0, 2, 3, 0]])}
    table = storage_table(weights, encodings=["nm", Dense(), RelativeEscape(4)])
    assert list(table.total) == ["nm 2:4", "none", "relative_escape 4"]
    kept, crowded = table.layers
    assert not kept.refused
    assert "1 of 1 groups" in crowded.refused["nm 2:4"]
    dense = Dense().storage(weights["crowded"])
    assert table.total["nm 2:4"] == NM().storage(weights["kept"]) + dense


def quantized_network() -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    levels = {
        name: random_support(size, count, seed).view(5, -1).to(torch.int16)
        for seed, (name, (size, count)) in enumerate(LENET5.items())
        if name != "fc1"
    }
    quantized = {name: Quantized(each, 0.5, 1, False) for name, each in levels.items()}
    return {name: each * 0.5 for name, each in levels.items()}, quantized


def test_the_table_is_plain_data_and_adds_up() -> None:
    table = storage_table(*quantized_network())
    plain = json.loads(json.dumps(table.to_dict()))
    total = plain["total"]
    assert total["nonzeros"] == 90 + 560 + 147
    assert total["dense"] == 32 * total["weights"]
    for name in table.total:
        parts = [layer["encodings"][name] for layer in plain["layers"]]
        for kind in ("values", "index", "metadata", "total"):
            assert total["encodings"][name][kind] == sum(part[kind] for part in parts)
        assert table.total[name] == sum((x.encodings[name] for x in table.layers), Storage())
        assert total["encodings"][name]["total"] >= total["bound"]["total"]
    assert total["refused"]["structured"] == 0
    assert total["refused"]["nm 2:4"] == sum(bool(each["refused"]) for each in plain["layers"]) > 0


def test_errors_name_what_is_wrong() -> None:
    weights, quantized = quantized_network()
    with pytest.raises(SecateurError, match="Did you mean 'conv1'"):
        storage_table({"conv1": weights["conv1"]}, {"conv_1": quantized["conv1"]})
    with pytest.raises(SecateurError, match="weights"):
        storage_table(nn.BatchNorm1d(3))
    with pytest.raises(MembershipError, match="levels x scale"):
        storage_table({"conv1": 2 * weights["conv1"]}, {"conv1": quantized["conv1"]})


def test_the_terminal_tables_show_every_encoding_and_layer() -> None:
    table = storage_table(*quantized_network())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(storage_tables(table.to_dict(), "LeNet-5 [348x]"))
    text = console.export_text()
    by_layer, total = text.split("LeNet-5 [348x]")
    for name, bits in table.total.items():
        (row,) = (line for line in total.splitlines() if line.strip().startswith(name + " "))
        assert f"{bits.values:,}" in row
        assert f"{bits.index:,}" in row
    for layer in table.layers:
        rest = by_layer.partition(f"{layer.name}, ")[2]
        assert f"{layer.nonzeros:,} of {layer.weights:,} kept" in rest.splitlines()[0]
        shown = {
            line.strip().partition("  ")[0]: line for line in rest.split("\n\n")[0].splitlines()
        }
        assert f" {layer.encodings['rice'].index:,} " in shown["rice"]
        assert set(layer.refused) == set(layer.encodings) - set(shown)
    empty = storage_table({"zeros": torch.zeros(0, 4)}, encodings=["packed", "rice"])
    console.print(storage_tables(empty.to_dict()))


def test_the_chart_is_a_file_of_its_own() -> None:
    root = ElementTree.fromstring(break_even_chart())
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    lines = [path for path in root.iter(f"{space}path") if path.get("class", "").startswith("line")]
    labels = [text.text for text in root.iter(f"{space}text")]
    assert [f"{bits} bit" for bits in (1, 2, 4, 8, 32)] == labels[-5:]
    ends = [float(path.get("d", "").rsplit(" ", 1)[1]) for path in lines]
    assert ends == sorted(ends, reverse=True)  # wider values, higher ratio; y points down
    description = root.findtext(f"{space}desc")
    expected = break_even(1000, 1, index_bits(1000, "relative_escape"))
    assert description is not None
    assert f"1 bit: {expected:.1f}x at 1,000x" in description
    with pytest.raises(SecateurError, match="closed form"):
        break_even_chart("csr")
