"""n of each m in a bit stream, against the enumeration of all combinations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur import codec
from secateur.artifact import packed
from secateur.codec.bits import BitReader, from_bits
from secateur.codec.combinations import Groups, find_groups, rank, unrank
from secateur.errors import ArtifactError

ratios = st.integers(2, 64).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 16), (3, 7), (4, 8), (5, 6)])
def test_ranks_number_the_combinations_in_colexicographic_order(n: int, m: int) -> None:
    ordered = sorted(itertools.combinations(range(m), n), key=lambda each: each[::-1])
    numbers = np.arange(math.comb(m, n))
    assert rank(np.array(ordered)).tolist() == numbers.tolist()
    assert unrank(numbers, n, m).tolist() == [list(each) for each in ordered]


@given(ratios)
def test_the_first_and_the_last_combination_come_back(ratio: tuple[int, int]) -> None:
    n, m = ratio
    ends = np.array([0, math.comb(m, n) - 1])
    kept = unrank(ends, n, m)
    assert kept.tolist() == [list(range(n)), list(range(m - n, m))]
    assert rank(kept).tolist() == ends.tolist()


def chosen(groups: Groups, blocks: int, seed: int) -> tuple[np.ndarray, int]:
    """Random members, n of each group, by the definition of a group."""
    generator = np.random.default_rng(seed)
    members = [
        b * groups.m * groups.stride + int(lane) * groups.stride + offset
        for b in range(blocks)
        for offset in range(groups.stride)
        for lane in generator.choice(groups.m, groups.n, replace=False)
    ]
    return np.array(sorted(members)), blocks * groups.m * groups.stride


@given(ratios, st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**32))
def test_members_come_back_in_the_bits_that_were_counted(
    ratio: tuple[int, int], stride: int, blocks: int, seed: int
) -> None:
    n, m = ratio
    groups = Groups(m, n, stride)
    members, size = chosen(groups, blocks, seed)
    bits = groups.bits(members, size)
    assert len(bits) == groups.stream(size)
    reader = BitReader(np.packbits(bits, bitorder="little"))
    assert groups.read(size, reader).tolist() == members.tolist()
    count = blocks * stride
    bound = count * math.log2(math.comb(m, n))
    words = math.ceil(count / int(62 / math.log2(math.comb(m, n))))
    assert bound - 1e-6 <= len(bits) < bound + words + 1e-6


def test_a_word_is_the_sum_of_the_numbers_times_powers() -> None:
    groups = Groups(4, 2, 1)
    members, size = chosen(groups, 5, 0)
    numbers = rank(members.reshape(5, 2) % 4).tolist()
    word = sum(number * 6**place for place, number in enumerate(numbers))
    bits = groups.bits(members, size)
    assert from_bits(bits, len(bits)).tolist() == [word]
    assert len(bits) == (6**5 - 1).bit_length()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 16), (4, 8)])
@pytest.mark.parametrize("shape", [(64, 64), (16, 32, 3, 3)])
@pytest.mark.parametrize("axis", ["input", "flat"])
def test_weights_of_n_of_m_take_hardly_more_than_their_combinations(
    n: int, m: int, shape: tuple[int, ...], axis: sc.sets.nm.Axis
) -> None:
    pattern = sc.sets.NM(n, m, axis=axis)
    weight = pattern.project(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    record = pattern.encode(weight)
    bits = pattern.storage(weight)
    assert f"{n}:{m} combinations" in codec.describe(record)
    assert torch.equal(pattern.decode(record, tuple(shape), weight.dtype), weight)
    assert bits.total == 8 * len(record)
    bound = weight.numel() // m * math.log2(math.comb(m, n))
    assert bound <= bits.index <= 1.02 * bound + 8


def test_the_cheapest_groups_are_found_or_none() -> None:
    members, size = chosen(Groups(4, 2, 1), 32, 0)
    assert find_groups(members, size, 1) == Groups(4, 2, 1)
    uneven = np.concatenate([np.arange(20), 64 + np.arange(24)])  # 11 of each 32, but unevenly
    assert find_groups(uneven, 128, 1) is None


@pytest.mark.parametrize(
    ("m", "n", "stride"), [(1, 1, 1), (4, 0, 1), (4, 4, 1), (65, 2, 1), (4, 2, 0), (4, 2, 3)]
)
def test_groups_that_a_range_is_not_made_of_are_refused(m: int, n: int, stride: int) -> None:
    record = bytes([0, 253, m, n, stride]) + bytes(200)
    with pytest.raises(ArtifactError, match="is not made of"):
        codec.decode(record, (4, 4), torch.float32)


def test_a_word_that_is_too_large_and_a_cut_stream_are_refused() -> None:
    pattern = sc.sets.NM(2, 4)
    record = pattern.encode(pattern.project(torch.randn(32, 32)))
    first = record.index(bytes([253, 4, 2, 1])) + 4
    spoiled = record[:first] + b"\xff" * 8 + record[first + 8 :]
    with pytest.raises(ArtifactError, match="a word of 2:4 groups is out of range"):
        codec.decode(spoiled, (32, 32), torch.float32)
    with pytest.raises(ArtifactError, match="ends too early"):
        codec.decode(record[: first + 3], (32, 32), torch.float32)


def test_only_files_with_combinations_say_that_they_need_them(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    packed.save(tmp_path / "dense.secateur", model, {}, reference=None)
    with torch.no_grad():
        model[0].weight.copy_(sc.sets.NM(1, 4).project(model[0].weight))
    packed.save(tmp_path / "sparse.secateur", model, {}, reference=None)
    versions = [
        packed.read_header(tmp_path / f"{name}.secateur").version for name in ("dense", "sparse")
    ]
    assert versions == [1, 2]
