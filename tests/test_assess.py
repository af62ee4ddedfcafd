"""What compression pays on a platform: by hand, and laws that every assessment obeys."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.cost.platforms import (
    Platform,
    assess,
    load_platform,
    narrowed,
    platform_names,
    timing,
)
from secateur.cost.workload import LayerWork

LAYER = LayerWork("fc", 10_000, 1000, 1000, 8, 8, 0, 60, 40, "dense")
HALF = replace(LAYER, macs=5000, weights=500, nonzeros=500)
SPARSE = replace(HALF, nonzeros=50, index_bits=200, pattern="unstructured")


def board(**changes: Any) -> Platform:
    """A platform with multipliers of 16 bits that never waits for its memory."""
    content = {
        "name": "board",
        "summary": "a board",
        "source": "invented",
        "compute": {"macs_per_second": {8: 1e6, 16: 5e5}},
        "memory": {"bytes_per_second": 1e12},
        "skips": {"structured": {}, "unstructured": {"efficiency": 0.4}},
    }
    return Platform.model_validate(content | changes)


def test_a_cut_sparse_network_by_hand() -> None:
    found = assess(board(), [SPARSE], [LAYER])
    assert (found.speedup, found.by_size, found.by_zeros) == pytest.approx((8, 2, 4))
    assert found.sparsity == pytest.approx(0.9)
    assert found.break_even == pytest.approx(1 - 199 / 500)  # the first count below 0.4 of 500
    assert found.text == (
        "On board: 8.00x as fast as the dense network, 2.00x by smaller layers and fewer bits, "
        "4.00x by zeros. Zeros, 90.0 % of its weights, pay from 60.2 % on."
    )


def test_without_a_dense_network_only_zeros_count() -> None:
    found = assess(board(), [SPARSE])
    assert (found.speedup, found.by_size, found.dense) == (None, None, None)
    assert found.text.startswith("On board: 4.00x as fast as without its zeros. Zeros, 90.0 %")


@pytest.mark.parametrize(
    ("layer", "skips", "words"),
    [
        (HALF, {"unstructured": {"efficiency": 0.4}}, "It has no zeros."),
        (SPARSE, {"structured": {}}, "Zeros gain nothing here, however many."),
        (
            replace(SPARSE, nonzeros=400),
            {"unstructured": {"efficiency": 0.4}},
            "Zeros, 20.0 % of its weights, would pay only from 60.2 % on.",
        ),
    ],
)
def test_what_is_said_of_zeros(layer: LayerWork, skips: dict[str, Any], words: str) -> None:
    assert words in assess(board(skips=skips), [layer], [LAYER]).text


def test_operands_that_are_too_wide_are_narrowed_and_that_is_said() -> None:
    wide = replace(LAYER, weight_bits=32, activation_bits=32)
    four = replace(SPARSE, weight_bits=4, activation_bits=32)
    found = assess(board(), [four], [wide])
    assert found.narrowed_to == 16
    assert "Operands of more than 16 bits are taken as 16." in found.text
    assert found.dense == timing(board(), [replace(wide, weight_bits=16, activation_bits=16)])
    assert narrowed(board(), [four]) == [replace(four, activation_bits=16)]
    stored = board(memory={"bytes_per_second": 1e12, "widths": [4, 8]})
    assert stored.widest == 8
    assert narrowed(load_platform("fpga-bops"), [wide]) == [wide]
    assert assess(board(), [SPARSE], [LAYER]).narrowed_to is None


def test_plain_data_is_json_even_if_nothing_is_left() -> None:
    memory = {"bytes_per_second": 1e12, "on_chip_bytes": 1e6, "activations": "on_chip"}
    gone = replace(HALF, nonzeros=0, pattern="structured")
    found = assess(board(memory=memory), [gone], [LAYER]).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["speedup"] == {"whole": None, "size": pytest.approx(2), "zeros": None}


@st.composite
def layers(draw: st.DrawFn) -> LayerWork:
    weights = draw(st.integers(1, 10_000))
    nonzeros = draw(st.integers(1, weights))
    pattern = draw(st.sampled_from(("structured", "2:4", "unstructured")))
    return LayerWork(
        name="fc",
        macs=weights * draw(st.integers(1, 100)),
        weights=weights,
        nonzeros=nonzeros,
        weight_bits=draw(st.integers(1, 32)),
        activation_bits=draw(st.integers(1, 32)),
        index_bits=nonzeros * draw(st.integers(1, 8)),
        inputs=draw(st.integers(1, 1000)),
        outputs=draw(st.integers(1, 1000)),
        pattern=pattern if nonzeros < weights else "dense",  # type: ignore[arg-type]
    )


@settings(max_examples=60)
@given(
    st.sampled_from(platform_names()),
    st.lists(layers(), min_size=1, max_size=3),
    st.lists(layers(), min_size=1, max_size=3),
)
def test_every_network_can_be_assessed_everywhere(
    name: str, network: list[LayerWork], dense: list[LayerWork]
) -> None:
    platform = load_platform(name)
    found = assess(platform, network, dense)
    assert found.by_size is not None
    assert found.speedup == pytest.approx(found.by_size * found.by_zeros)
    assert name in found.text
    if platform.widest is None or all(
        max(each.weight_bits, each.activation_bits) <= platform.widest for each in network
    ):
        assert found.compressed == timing(platform, network)
