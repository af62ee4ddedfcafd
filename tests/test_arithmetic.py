"""The arithmetic code of levels, against a reader in exact integers and closed forms."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.codec import Quantized, decode, describe, encode, storage
from secateur.codec import arithmetic as code
from secateur.errors import ArtifactError


class ExactReader:
    """docs/format.md read literally: the code is one number, the interval has unlimited digits."""

    def __init__(self, stream: bytes) -> None:
        self.code, self.bits = int.from_bytes(stream, "big"), 8 * len(stream)
        self.low, self.width, self.precision = 0, 2**32, 32  # multiples of 2^-precision
        self.counts: dict[object, list[int]] = {}

    def bit(self, context: object) -> int:
        counts = self.counts.setdefault(context, [1, 1])
        split = self.width * counts[0] // sum(counts)
        value = int(self.code << self.precision >= (self.low + split) << self.bits)
        self.low, self.width = self.low + value * split, (split, self.width - split)[value]
        counts[value] += 1
        if sum(counts) == 256:
            counts[:] = [-(-count // 2) for count in counts]
        while self.width < 2**24:
            self.low, self.width, self.precision = (
                self.low << 8,
                self.width << 8,
                self.precision + 8,
            )
        return value

    def level(self, before: int, largest: int, flagged: bool) -> int:
        if flagged and not self.bit(("flag", before != 0)):
            return 0
        negative = self.bit(("sign", (before > 0) - (before < 0)))
        prefix = ""
        depth = math.ceil(math.log2(largest))
        while len(prefix) < depth:
            smallest = int((prefix + "1").ljust(depth, "0"), 2)
            prefix += str(self.bit(("magnitude", prefix)) if smallest < largest else 0)
        rank = int(prefix or "0", 2) + 1
        return -rank if negative else rank


def read_exactly(stream: bytes, cells: int, largest: int, flagged: bool) -> list[int]:
    reader, ranks = ExactReader(stream), [0]
    for _ in range(cells):
        ranks.append(reader.level(ranks[-1], largest, flagged))
    shifted = (reader.precision - 32) // 8
    for length in (shifted, shifted + 1):  # the smallest number of the shorter length that fits
        smallest = -(-reader.low >> (reader.precision - 8 * length))
        if smallest << (reader.precision - 8 * length) < reader.low + reader.width:
            assert stream == smallest.to_bytes(length, "big")
            return ranks[1:]
    raise AssertionError("no number of either length is in the interval")


@st.composite
def regions(draw: st.DrawFn) -> tuple[np.ndarray, int, bool]:
    """Ranks of a region, the largest rank that their grid has, and whether zeros are flagged."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    cells = draw(st.integers(1, 40) | st.integers(1, 1500))
    largest = draw(st.sampled_from((1, 2, 3, 4, 7, 8, 127, 128)))
    used = draw(st.integers(1, largest))
    ranks = rng.integers(1, used + 1, cells)
    ranks[rng.random(cells) < draw(st.sampled_from((0, 0.05, 0.5, 1)))] *= -1
    flagged = draw(st.booleans())
    if flagged:
        ranks[rng.random(cells) >= draw(st.sampled_from((0, 0.01, 0.3, 0.9)))] = 0
    return ranks, largest, flagged


@settings(max_examples=150)
@given(regions())
def test_ranks_come_back_and_an_exact_reader_agrees(region: tuple[np.ndarray, int, bool]) -> None:
    ranks, largest, flagged = region
    coded = code.encode(ranks, largest, flagged)
    assert code.decode(coded.stream, len(ranks), largest, flagged).tolist() == ranks.tolist()
    assert read_exactly(coded.stream, len(ranks), largest, flagged) == ranks.tolist()


@settings(max_examples=500)
@given(
    st.binary(max_size=12) | st.lists(st.sampled_from((0, 1, 128, 255)), max_size=12).map(bytes),
    st.integers(1, 40),
    st.sampled_from((1, 3, 4, 128)),
    st.booleans(),
)
def test_a_reader_accepts_only_what_the_writer_writes(
    stream: bytes, cells: int, largest: int, flagged: bool
) -> None:
    try:
        ranks = code.decode(stream, cells, largest, flagged)
    except ArtifactError:
        return
    assert code.encode(ranks, largest, flagged).stream == stream


def test_a_stream_with_bytes_more_or_less_is_hardly_ever_another_stream() -> None:
    rng = random.Random(0)
    ranks = np.array([rng.choice((0, 0, 1, -2, 3)) for _ in range(400)])
    stream = code.encode(ranks, 4, flagged=True).stream
    for other in (stream + b"\0", stream + b"\1", stream + bytes(50), stream[:-2], stream[:9], b""):
        with pytest.raises(ArtifactError, match=r"ends too early|does not end"):
            code.decode(other, 400, 4, flagged=True)


def laplace_bits(zeros: int, ones: int) -> float:
    """What an adaptive code for bits costs whose counts begin at 1, in whatever order they are."""
    return math.log2((zeros + ones + 1) * math.comb(zeros + ones, ones))


@pytest.mark.parametrize("kept", [1, 60, 125, 249])
def test_the_length_is_that_of_laplaces_rule(kept: int) -> None:
    rng = np.random.default_rng(kept)
    flags = rng.permutation(np.arange(250) < kept).astype(int)
    ranks = flags * 2  # of 1 and 2, always positive
    before = np.concatenate([[0], flags[:-1]])
    pairs = [np.bincount(flags[before == context], minlength=2) for context in (0, 1)]
    index = sum(laplace_bits(*map(int, pair)) for pair in pairs)
    signs = [int((before[flags == 1] == context).sum()) for context in (0, 1)]
    total = index + sum(laplace_bits(count, 0) for count in (*signs, kept))
    coded = code.encode(ranks, 2, flagged=True)
    assert coded.flag_bits == pytest.approx(index)
    assert total - 8 <= 8 * len(coded.stream) <= total + 8


def test_a_long_region_forgets_and_follows() -> None:
    ranks = np.repeat([1, -1], 4000)
    assert 8 * len(code.encode(ranks, 1, flagged=False).stream) < 0.02 * len(ranks)


def test_carries_run_through_many_bytes() -> None:
    """Streams with long runs of zeros, where the interval's low end is 255, 255, ... at first."""
    rng = random.Random(0)
    read = 0
    for _ in range(2_000):
        stream = rng.randbytes(4) + bytes(8) + rng.randbytes(2)
        try:
            ranks = code.decode(stream, rng.randint(10, 16), 128, flagged=False)
        except ArtifactError:
            continue
        read += 1
        assert code.encode(ranks, 128, flagged=False).stream == stream
    assert read > 100


def laplacian(shape: tuple[int, int], bits: int, density: float, seed: int) -> Quantized:
    """Levels without zero of a Laplacian tensor of which the largest are kept."""
    rng = np.random.default_rng(seed)
    weight = rng.laplace(size=shape)
    weight *= np.abs(weight) >= np.quantile(np.abs(weight), 1 - density)
    step = np.abs(weight).max() / 2 ** (bits - 1)
    levels = np.sign(weight) * np.clip(np.ceil(np.abs(weight) / step), 1, 2 ** (bits - 1))
    return Quantized(torch.from_numpy(levels.astype(np.int16)), 0.125, bits, False)


@pytest.mark.parametrize("shape", [(14, 125), (10, 224), (50, 500)])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("bits", [1, 3])
def test_small_tensors_come_near_their_entropy(
    shape: tuple[int, int], density: float, bits: int
) -> None:
    quantized = laplacian(shape, bits, density, seed=0)
    weight = quantized.levels * 0.125
    record = encode(weight, quantized)
    assert torch.equal(decode(record, shape, torch.float32), weight)
    counts = torch.unique(quantized.levels, return_counts=True)[1].double()
    entropy = float(-(counts * (counts / counts.sum()).log2()).sum())
    assert 8 * len(record) < 1.02 * entropy + 8 * 12


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_the_flags_of_zeros_count_as_index(density: float) -> None:
    quantized = laplacian((50, 100), 3, density, seed=1)
    weight = quantized.levels * 0.125
    assert describe(encode(weight, quantized)) == "3 bits, arithmetic"
    bits = storage(weight, quantized)
    odds = (density, 1 - density)
    entropy = -sum(5000 * share * math.log2(share) for share in odds if share)
    assert bits.index == pytest.approx(entropy, rel=0.02)
    assert bits.metadata == 32
    assert bits.total == 8 * len(encode(weight, quantized))


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        (bytes([0, 255]) + bytes(16), (2, 2)),  # raw values
        (bytes([0, 254]) + bytes(16), (2, 2)),
        (bytes([1 + 8 + 128, 0, 0x3C, 254, 0, 0]), (2, 2)),  # of rows
        (bytes([1 + 8 + 128, 0, 0x3C, 0, 255, 0]), (2, 2)),  # of columns
        (bytes([1 + 8 + 128, 0, 0x3C, 1, 0, 255, 0]), (2, 2)),  # of no cells
        (bytes([1 + 2, 0, 0x3C, 255]), (2, 2)),  # one bit with zero: there is no level but zero
        (bytes([1 + 8, 0, 0x3C, 254]), ((1 << 18) + 1,)),  # more cells than may be coded so
        (bytes([1 + 8, 0, 0x3C, 254]) + bytes(9), (2, 2)),  # bytes that nothing reads
        (bytes([1 + 8, 0, 0x3C, 254]), (30, 30)),  # no bytes at all
    ],
)
def test_malformed_records_are_refused(record: bytes, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError):
        decode(record, shape, torch.float32)


def test_larger_regions_are_stored_otherwise() -> None:
    levels = torch.ones(2**18 + 1, dtype=torch.int16)
    for size, arithmetic in ((2**18, True), (2**18 + 1, False)):
        part = levels[:size]
        record = encode(part.float(), Quantized(part, 1.0, 4, False))
        assert ("arithmetic" in describe(record)) == arithmetic
