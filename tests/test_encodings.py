"""Encodings of weights: round trips, counts against the stream and against element-wise loops."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur import codec
from secateur.codec import Quantized, Storage
from secateur.cost import ENCODINGS
from secateur.cost.encodings import (
    NM,
    Encoding,
    NMPositions,
    Packed,
    RelativeEscape,
    RelativeFiller,
    Structured,
)
from secateur.errors import ArtifactError, MembershipError, SecateurError
from secateur.sets import ConstraintSet
from test_sets import EVERY_SET, weights

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (9,), (3, 0), (1, 40), (40, 1), (6, 9), (5, 8), (4, 12, 3, 3), (60, 41))
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ALL = (
    *(kind() for kind in ENCODINGS.values()),
    *(kind(width) for kind in (RelativeFiller, RelativeEscape) for width in (1, 4, 5)),
    *(kind(n, m) for kind in (NM, NMPositions) for n, m in ((1, 4), (3, 8), (1, 1), (4, 4))),
)


def same_bits(one: Tensor, other: Tensor) -> bool:
    word = WORDS[one.element_size()]
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.reshape(-1).view(word), other.reshape(-1).view(word))


def mask_of(shape: tuple[int, ...], density: float, live: float, seed: int) -> Tensor:
    """A random support in random live rows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    if len(shape) > 1:
        rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) < live
        mask &= rows
    return mask


masks = st.builds(
    mask_of,
    st.sampled_from(SHAPES),
    st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0)) | st.floats(0, 1),
    st.sampled_from((0.2, 1.0)),
    st.integers(0, 2**32),
)


def level_tensor(
    mask: Tensor, bits: int, zero: bool, spacing: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Quantized]:
    """Random levels on a support; with zero among the levels, zeros in it too."""
    bits = min(max(bits, 1 + zero), 8 if spacing == "uniform" else 4)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, 2 ** (bits - 1) - zero, mask.shape, generator=generator)
    sizes = ranks + 1 if spacing == "uniform" else 2**ranks
    signs = torch.randint(-1 if zero else 0, 2, mask.shape, generator=generator)
    signs = signs if zero else 2 * signs - 1
    levels = (sizes * signs * mask).to(torch.int16)
    quantized = Quantized(levels, 0.375, bits, zero, spacing)  # type: ignore[arg-type]
    return (levels.double() * 0.375).to(dtype), quantized


def check(encoding: Encoding, weight: Tensor, quantized: Quantized | None) -> None:
    try:
        stream = encoding.encode(weight, quantized)
    except MembershipError:
        assert isinstance(encoding, (NM, NMPositions))
        with pytest.raises(MembershipError):
            encoding.storage(weight, quantized)
        return
    storage = encoding.storage(weight, quantized)
    assert storage.total == 8 * len(stream)
    assert min(storage.values, storage.index, storage.metadata) >= 0
    unsigned = torch.where(weight == 0, torch.zeros_like(weight), weight)
    expected = weight if isinstance(encoding, Packed) else unsigned
    assert same_bits(encoding.decode(stream, weight.shape, weight.dtype), expected)


@settings(max_examples=120)
@given(masks, st.sampled_from(FLOATS), st.integers(0, 2**32))
def test_raw_values_come_back_and_are_counted(mask: Tensor, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**15), 2**15, mask.shape, generator=generator)
    words = words * (65521 if dtype == torch.float32 else 1)  # NaN payloads, infinity, subnormals
    weight = (words * mask).to(WORDS[dtype.itemsize]).reshape(-1).view(dtype).reshape(mask.shape)
    for encoding in ALL:
        check(encoding, weight, None)


@settings(max_examples=150)
@given(
    masks,
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(("uniform", "power_of_two")),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32),
)
def test_levels_come_back_and_are_counted(
    mask: Tensor, bits: int, zero: bool, spacing: str, dtype: torch.dtype, seed: int
) -> None:
    weight, quantized = level_tensor(mask, bits, zero, spacing, dtype, seed)
    for encoding in ALL:
        check(encoding, weight, quantized)


@pytest.mark.parametrize("target", EVERY_SET, ids=str)
@settings(max_examples=5)
@given(weight=weights())
def test_members_of_every_set_come_back_from_every_encoding_and_are_counted(
    target: ConstraintSet, weight: Tensor
) -> None:
    member = target.project(weight) + 0.0  # levels have one zero
    for kind in ENCODINGS.values():
        check(kind(), member, target.quantized(member))


def test_other_dtypes_and_signed_zeros() -> None:
    for weight in (torch.tensor([[True, False], [False, False]]), torch.arange(6).view(2, 3)):
        for encoding in ALL:
            check(encoding, weight, None)
    signed = torch.tensor([[-0.0, 1.0, 0.0, -0.0, 0.0, 0.0, 0.0, -2.0]])
    plain = signed + 0.0
    for encoding in ALL:
        check(encoding, signed, None)
        if not isinstance(encoding, Packed):
            try:
                assert encoding.encode(signed) == encoding.encode(plain)
            except MembershipError:
                assert str(encoding) in ("nm 1:1", "nm_positions 1:1")
    assert Packed().storage(signed).values == 32 * 4  # the file keeps each -0.0 as a value
    assert Packed().storage(plain).values == 32 * 2


@settings(max_examples=100)
@given(masks, st.booleans(), st.integers(0, 2**32))
def test_counts_agree_with_loops_over_the_elements(mask: Tensor, zero: bool, seed: int) -> None:
    weight, quantized = level_tensor(mask, 3, zero, "uniform", torch.float32, seed)
    support = [value != 0 for value in weight.flatten().tolist()]
    size, count = len(support), sum(support)
    bits = 3

    def storage(name: str) -> Storage:
        return ENCODINGS[name]().storage(weight, quantized)

    assert storage("none").values == size * (bits + (count < size and not zero))
    assert (storage("bitmap").values, storage("bitmap").index) == (count * bits, size)
    rows, columns = (weight.shape[0] if weight.ndim else 1), math.prod(weight.shape[1:])
    column_bits = next(width for width in itertools.count() if 2**width >= columns)
    pointer_bits = next(width for width in itertools.count() if 2**width > count)
    assert storage("csr").index == (rows + 1) * pointer_bits + count * column_bits
    assert storage("packed") == codec.storage(weight, quantized)
    live = weight.reshape(rows, columns) != 0
    alive = int(live.any(1).sum()), int(live.any(0).sum())
    inside = alive[0] * alive[1]
    assert storage("structured").values == inside * (bits + (count < inside and not zero))


def walk(support: list[bool], width: int, escape: bool) -> Iterator[tuple[int, bool]]:
    """The codes of a support and whether each has a value, found element by element."""
    gap = 0
    for position, nonzero in enumerate(support):
        if nonzero:
            yield gap, True
            gap = 0
        elif not any(support[position:]):
            return
        elif gap == 2**width - 1 - escape:
            yield 2**width - 1, not escape
            gap = 0
        else:
            gap += 1


@settings(max_examples=100)
@given(masks, st.booleans(), st.integers(0, 2**32))
def test_gap_codes_agree_with_a_walk_and_the_best_width_is_best(
    mask: Tensor, zero: bool, seed: int
) -> None:
    weight, quantized = level_tensor(mask, 2, zero, "uniform", torch.float32, seed)
    support = [value != 0 for value in weight.flatten().tolist()]
    for kind, escape in ((RelativeFiller, False), (RelativeEscape, True)):
        totals = []
        for width in range(1, 13):
            codes = list(walk(support, width, escape))
            valued = sum(with_value for _, with_value in codes)
            wider = valued > sum(support) and not zero
            storage = kind(width).storage(weight, quantized)
            assert storage.index == len(codes) * width
            assert storage.values == valued * (2 + wider)
            header = 3 + 1 + (1 if len(codes) < 128 else 2)  # levels, width, number of codes
            stream = kind(width).encode(weight, quantized)[header:]
            number = int.from_bytes(stream, "little")
            found = [number >> (width * i) & (2**width - 1) for i in range(len(codes))]
            assert found == [code for code, _ in codes]
            totals.append(storage.values + storage.index)
        best = kind().storage(weight, quantized)
        assert best.values + best.index == min(totals)


def test_a_filler_makes_levels_without_zero_one_bit_wider() -> None:
    weight = torch.zeros(100)
    weight[[0, 3, 99]] = torch.tensor([1.0, -1.0, 1.0])
    levels = weight.to(torch.int16)
    for width, values in ((3, 3 + 11), (7, 3)):  # 95 zeros before the last: 11 fillers of 8 each
        with_zero = RelativeFiller(width).storage(weight, Quantized(levels, 1.0, 2, True))
        without = RelativeFiller(width).storage(weight, Quantized(levels, 1.0, 1, False))
        assert with_zero.values == 2 * values
        assert without.values == (2 if values > 3 else 1) * values
        escape = RelativeEscape(width).storage(weight, Quantized(levels, 1.0, 1, False))
        assert escape.values == 3


@pytest.mark.parametrize("width", [0, 33, -1])
@pytest.mark.parametrize("kind", [RelativeFiller, RelativeEscape])
def test_widths_out_of_range_are_refused(kind: type[Encoding], width: int) -> None:
    with pytest.raises(SecateurError, match="width"):
        kind(width)  # type: ignore[call-arg]


def nm_tensor(n: int, m: int, shape: tuple[int, ...], most: bool, seed: int) -> Tensor:
    """A tensor with n (or up to n) non-zeros of every m consecutive input channels."""
    generator = torch.Generator().manual_seed(seed)
    last = torch.rand(*shape[:1], *shape[2:], shape[1], generator=generator)
    rank = last.unflatten(-1, (-1, m)).argsort(-1).argsort(-1)
    few = torch.randint(0, n + 1, rank.shape[:-1], generator=generator) if most else n
    keep = rank < (few.unsqueeze(-1) if isinstance(few, Tensor) else few)
    return (last * keep.flatten(-2)).movedim(-1, 1)


@settings(max_examples=60)
@given(
    st.sampled_from(((1, 2), (2, 4), (1, 4), (4, 8), (3, 5), (8, 16), (5, 64))),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_nm_is_along_the_input_channels(pattern: tuple[int, int], most: bool, seed: int) -> None:
    n, m = pattern
    for shape in ((3, 2 * m), (2, m, 3, 2)):
        weight = nm_tensor(n, m, shape, most, seed)
        groups = weight.numel() // m
        combinations = math.comb(m, n)
        for encoding, metadata in (
            (NM(n, m), math.ceil(math.log2(combinations))),
            (NMPositions(n, m), n * math.ceil(math.log2(m))),
        ):
            check(encoding, weight, None)
            storage = encoding.storage(weight)
            assert (storage.values, storage.index) == (32 * n * groups, metadata * groups)


def test_nm_numbers_are_a_bijection() -> None:
    """All supports of a group get another number of 0 ... C(m, n) - 1."""
    supports = list(itertools.combinations(range(6), 3))
    weight = torch.zeros(len(supports), 6)
    for row, support in enumerate(supports):
        weight[row, list(support)] = 1
    stream = NM(3, 6).encode(weight)
    number = int.from_bytes(stream[1:], "little")
    assert sorted(number >> (5 * i) & 31 for i in range(20)) == list(range(20))


def test_two_of_four_take_three_bits_or_the_standard_four() -> None:
    weight = nm_tensor(2, 4, (8, 16), False, 0)
    assert NM().storage(weight) == Storage(8 * 8 * 32, 8 * 4 * 3, 8)
    assert NMPositions().storage(weight) == Storage(8 * 8 * 32, 8 * 4 * 4, 8)
    half = weight.half()  # values and 2-bit positions: 9/16 of dense
    standard = NMPositions().storage(half)
    assert (standard.values + standard.index) / (16 * half.numel()) == 9 / 16


def test_nm_refuses_what_it_cannot_express() -> None:
    along_kernel = torch.zeros(1, 8, 2, 2)
    along_kernel[0, :3, 0, 0] = 1
    for weight, reason in (
        (along_kernel, "1 of 8 groups have more than 2"),
        (torch.zeros(4, 6), "no dimension 1 that is a multiple of 4"),
        (torch.zeros(8), "no dimension 1 that is a multiple of 4"),
    ):
        for encoding in (NM(), NMPositions()):
            with pytest.raises(MembershipError, match=reason):
                encoding.storage(weight)
    for n, m in ((0, 4), (5, 4), (2, 65)):
        with pytest.raises(SecateurError, match="n, m"):
            NM(n, m)


def test_structured_lists_live_rows_and_columns() -> None:
    weight = torch.zeros(20, 2, 5, 5)
    weight[3, 0, 1], weight[17, 0, 1] = 1.0, 2.0
    assert Structured().storage(weight) == Storage(2 * 5 * 32, 2 * 5 + 5 * 6, 8 * 3)
    full = torch.ones(20, 50)
    assert Structured().storage(full).index == 0
    assert Structured().storage(torch.zeros(20, 50)) == Storage(0, 0, 24)


def test_damaged_streams_are_refused_or_read_as_another_tensor() -> None:
    weight = nm_tensor(1, 4, (6, 8), True, 1).ne(0) * 0.5  # all encodings can express it
    quantized = Quantized((weight != 0).to(torch.int16), 0.5, 1, False)
    generator = np.random.default_rng(0)
    for encoding in ALL:
        if isinstance(encoding, Packed):
            continue  # the record has tests of its own
        stream = encoding.encode(weight, quantized)
        for cut in range(len(stream)):
            with pytest.raises(ArtifactError):
                encoding.decode(stream[:cut], weight.shape, weight.dtype)
        for _ in range(30):
            damaged = bytearray(stream)
            damaged[generator.integers(len(stream))] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(ArtifactError):
                encoding.decode(bytes(damaged), weight.shape, weight.dtype)
