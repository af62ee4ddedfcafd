"""The bit streams of one tensor, against a bit-by-bit reader and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from secateur import codec
from secateur.codec import Quantized, Storage, decode, describe, encode, storage
from secateur.codec.bits import BitReader, pack, read_varint, unpack, varint
from secateur.codec.subset import listed, read_header, read_subset
from secateur.errors import ArtifactError, MembershipError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (7,), (1, 1), (3, 0), (1, 40), (40, 1), (6, 9), (4, 3, 5, 5), (300, 41))
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    word = WORDS[one.element_size()]
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.reshape(-1).view(word), other.reshape(-1).view(word))


def keep_mask(shape: tuple[int, ...], density: float, live: float, seed: int) -> Tensor:
    """A random mask, optionally with whole rows and columns of the GEMM matrix empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    if len(shape) > 1:
        matrix = mask.reshape(shape[0], math.prod(shape[1:]))
        matrix &= torch.rand(matrix.shape[0], 1, generator=generator) < live
        matrix &= torch.rand(1, matrix.shape[1], generator=generator) < live
        mask = matrix.reshape(shape)
    return mask


densities = st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9, 1.0)) | st.floats(0, 1)
masks = st.builds(
    keep_mask,
    st.sampled_from(SHAPES),
    densities,
    st.sampled_from((0.1, 0.5, 1.0)),
    st.integers(0, 2**32),
)


def check_round_trip(weight: Tensor, quantized: Quantized | None) -> None:
    record = encode(weight, quantized)
    back = decode(record, weight.shape, weight.dtype)
    assert same_bits(back, weight)
    bits = storage(weight, quantized)
    assert bits.total == 8 * len(record)
    assert min(bits.values, bits.index, bits.metadata) >= 0
    describe(record)
    found = codec.levels(record, weight.shape)
    raw = bool(record) and record[0] & 0x7F == 0  # shorter, where scales would take more
    assert (found is None) == (quantized is None or not record or raw)
    if found and quantized:
        assert torch.equal(found.levels, quantized.levels)
        assert torch.equal(found.weight(weight.dtype), weight)
        for name in ("scale", "bits", "zero", "spacing"):
            assert getattr(found, name) == getattr(quantized, name)


@settings(max_examples=300)
@given(masks, st.sampled_from(FLOATS), st.integers(0, 2**32))
def test_raw_values_come_back_bit_for_bit(mask: Tensor, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**15), 2**15, mask.shape, generator=generator)
    words = words * (65521 if dtype == torch.float32 else 1)  # NaN payloads, infinity, subnormals
    weight = (words * mask).to(WORDS[dtype.itemsize]).reshape(-1).view(dtype).reshape(mask.shape)
    check_round_trip(weight, None)


@settings(max_examples=400)
@given(
    masks,
    st.sampled_from(FLOATS),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from((0.5, 0.1, 1e-3)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_levels_come_back(
    mask: Tensor,
    dtype: torch.dtype,
    bits: int,
    zero: bool,
    scale: float,
    narrow: bool,
    seed: int,
) -> None:
    scale = float(np.float16(scale) if narrow else np.float32(scale))
    generator = torch.Generator().manual_seed(seed)
    largest = 2 ** (bits - 1) - zero
    levels = torch.randint(-largest, largest + 1, mask.shape, generator=generator)
    if not zero:
        levels[levels == 0] = -1
    levels = (levels * mask).to(torch.int16)
    weight = (levels.double() * scale).to(dtype)
    check_round_trip(weight, Quantized(levels, scale, bits, zero))


@settings(max_examples=300)
@given(
    masks,
    st.sampled_from(FLOATS),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from((0.5, 0.1, 1e-3)),
    st.integers(0, 2**32),
)
def test_powers_of_two_come_back_in_no_more_than_their_bits(
    mask: Tensor, dtype: torch.dtype, bits: int, zero: bool, scale: float, seed: int
) -> None:
    bits += zero and bits == 1
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(0, 2 ** (bits - 1) - zero, mask.shape, generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, mask.shape, generator=generator)
    levels = (signs * 2**exponents * mask).to(torch.int16)
    scale = float(np.float32(scale))
    weight = (levels.double() * scale).to(dtype)
    quantized = Quantized(levels, scale, bits, zero, "power_of_two")
    check_round_trip(weight, quantized)
    if bool(mask.all()):
        assert storage(weight, quantized).values <= bits * mask.numel()


@settings(max_examples=200)
@given(masks, st.integers(2, 8), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_levels_with_a_scale_for_each_row_come_back(
    mask: Tensor, bits: int, zero: bool, wide: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if not mask.ndim:
        return
    most = 2 ** (bits - 1) - zero
    levels = torch.randint(1, most + 1, mask.shape, generator=generator) * mask
    scales = torch.rand(len(mask), generator=generator) + 0.1
    scales = tuple((scales if wide else scales.half()).tolist())
    quantized = Quantized(levels, scales, bits, zero)
    weight = quantized.weight(torch.float32)
    check_round_trip(weight, quantized)
    record = encode(weight, quantized)
    back = codec.levels(record, weight.shape)
    if back is not None:
        assert back.scale == scales
        assert torch.equal(back.levels.long(), levels)
        size = len(varint(len(scales))) + (4 if wide else 2) * len(scales)
        assert storage(weight, quantized).metadata >= 8 * size
        with pytest.raises(ArtifactError, match="scales for a tensor"):
            decode(record, (len(mask) + 1, *mask.shape[1:]), torch.float32)
    elif record:  # the scales took more than the values
        assert len(record) < 4 * weight.numel() + 16


def test_scales_of_another_number_than_rows_are_refused() -> None:
    levels = torch.ones(3, 2, dtype=torch.int16)
    with pytest.raises(MembershipError, match="2 for a tensor"):
        encode(levels.float(), Quantized(levels, (1.0, 1.0), 2, True))


def test_the_codes_of_powers_of_two_are_those_of_the_format() -> None:
    def stream(levels: list[int], bits: int, zero: bool) -> tuple[int, list[int]]:
        weight = torch.tensor(levels).float()
        record = encode(weight, Quantized(torch.tensor(levels), 1.0, bits, zero, "power_of_two"))
        assert record[1:4] == b"\x00\x3c\x00"  # the scale, and all cells
        return record[0], unpack(record[4:], len(levels), bits).tolist()

    assert stream([1, 2, 4, 8, -1, -8], 3, False) == (1 + 32 + 8, [0, 1, 2, 3, 4, 7])
    assert stream([1, 64, -1, -64, 16], 4, True) == (1 + 32 + 12 + 2, [9, 15, 7, 1, 13])
    assert stream([0, 4, -2, 1], 3, True) == (1 + 32 + 8 + 2, [4, 7, 2, 5])


@settings(max_examples=100)
@given(hnp.arrays(np.int64, st.integers(0, 40)), st.sampled_from((torch.int64, torch.bool)))
def test_integers_and_booleans_come_back(array: np.ndarray, dtype: torch.dtype) -> None:
    check_round_trip(torch.from_numpy(array).to(dtype), None)


def test_a_signed_zero_is_a_value_when_raw_and_loses_its_sign_as_a_level() -> None:
    weight = torch.tensor([0.0, -0.0, 1.0, 0.0])
    assert same_bits(decode(encode(weight), (4,), torch.float32), weight)
    levels = torch.tensor([0, 0, 1, 0], dtype=torch.int16)
    back = decode(encode(weight, Quantized(levels, 1.0, 2, False)), (4,), torch.float32)
    assert same_bits(back, torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_gradients_transposes_and_slices_do_not_matter() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 8)).t()[::2]
    assert torch.equal(decode(encode(weight), weight.shape, weight.dtype), weight)


def test_zeros_take_no_bytes() -> None:
    for shape in SHAPES:
        assert encode(torch.zeros(shape)) == b""
        assert storage(torch.zeros(shape)) == Storage(0, 0, 0)


def test_storage_adds_up() -> None:
    assert sum([Storage(1, 2, 3), Storage(10, 20, 30)], Storage()) == Storage(11, 22, 33)
    assert Storage(11, 22, 33).total == 66


def naive_rice(bits: list[int], count: int, k: int) -> tuple[list[int], int]:
    """Read a Rice list bit by bit: the members and the number of bits used."""
    remainders = [sum(bits[i * k + j] << j for j in range(k)) for i in range(count)]
    at, position, members = count * k, -1, []
    for remainder in remainders:
        quotient = 0
        while bits[at]:
            quotient, at = quotient + 1, at + 1
        at += 1
        position += 1 + (quotient << k) + remainder
        members.append(position)
    return members, at


def naive_cost(members: list[int], k: int) -> int:
    gaps = [b - a - 1 for a, b in zip([-1, *members], members, strict=False)]
    return sum(k + 1 + (gap >> k) for gap in gaps)


@settings(max_examples=300)
@given(st.integers(1, 3000), st.data())
def test_a_list_agrees_with_a_reader_that_goes_bit_by_bit(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(size, 60)))
    members = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=count, max_size=count)))
    subset = listed(np.array(members, dtype=np.int64), size)
    bits = subset.bits()
    assert len(bits) == subset.stream
    header, end = read_header(subset.header(), 0)
    assert end == len(subset.header())
    if header.coder == 1:
        assert np.flatnonzero(bits).tolist() == members
    else:
        assert naive_rice(bits.tolist(), header.count, header.coder - 2) == (members, len(bits))
        assert subset.stream == min(naive_cost(members, k) for k in range(15))
    reader = BitReader(np.packbits(bits, bitorder="little"))
    read, length = read_subset(header, size, reader)
    assert read is not None
    assert read.tolist() == members
    assert length == len(members)


@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 2**32))
def test_packing_is_least_significant_bit_first(width: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << width, count).astype(np.uint8)
    number = sum(int(code) << (i * width) for i, code in enumerate(codes))
    packed = number.to_bytes((count * width + 7) // 8, "little")
    assert pack(codes, width) == packed
    assert unpack(packed, count, width).tolist() == codes.tolist()


def test_packing_goes_over_chunks() -> None:
    codes = (np.arange(600_001) % 7).astype(np.uint8)
    assert np.array_equal(unpack(pack(codes, 3), len(codes), 3), codes)


@given(st.integers(0, 2**62))
def test_varints_come_back(number: int) -> None:
    data = varint(number)
    assert read_varint(b"x" + data + b"y", 1) == (number, 1 + len(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9, b"\xff" * 20])
def test_malformed_varints_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_varint(data, 0)


def fc1_at_348x() -> tuple[Tensor, Quantized]:
    """LeNet-5's fc1 with 367 non-zeros in 63 rows and 172 columns."""
    rng = np.random.default_rng(0)
    rows, columns = rng.choice(500, 63, False), rng.choice(800, 172, False)
    cells = {(int(rows[i % 63]), int(columns[i % 172])) for i in range(172)}
    while len(cells) < 367:
        cells.add((int(rng.choice(rows)), int(rng.choice(columns))))
    levels = torch.zeros(500, 800, dtype=torch.int16)
    for row, column in cells:
        levels[row, column] = int(rng.choice([-4, -3, -2, -1, 1, 2, 3, 4]))
    return levels.float() * 0.125, Quantized(levels, 0.125, 3, False)


def test_live_rows_and_columns_pay_off() -> None:
    weight, quantized = fc1_at_348x()
    bits = storage(weight, quantized)
    assert "live" in describe(encode(weight, quantized))
    assert bits.values == 3 * 367
    flat = Quantized(quantized.levels.reshape(-1), 0.125, 3, False)  # a vector has no columns
    without = storage(weight.reshape(-1), flat)
    assert bits.total < without.total
    naive = naive_cost(torch.nonzero(flat.levels).reshape(-1).tolist(), 9)
    assert bits.index < without.index <= naive


def test_structured_sparsity_is_nearly_free() -> None:
    weight = torch.zeros(64, 32, 3, 3)
    weight[3:40, 5:20] = torch.randn(37, 15, 3, 3)
    bits = storage(weight)
    assert bits.values == 32 * 37 * 15 * 9
    assert bits.index + bits.metadata < 500


@pytest.mark.parametrize(
    ("levels", "scale", "bits", "zero"),
    [
        ([1, 2, 3], 0.5, 2, False),  # 3 needs three bits
        ([-2, 1, 1], 0.5, 2, True),  # with zero, -2 needs three bits
        ([1, 1, 1], 0.0, 2, False),
        ([1, 1, 1], math.inf, 2, False),
        ([1, 1, 1], math.nan, 2, False),
        ([1, 1, 1], 0.1, 2, False),  # not a float32
        ([1, 1, 1], 0.5, 9, False),
        ([1, 1, 1], 0.5, 0, False),
        ([1, 1], 0.5, 2, False),
    ],
)
def test_levels_out_of_range_are_refused(
    levels: list[int], scale: float, bits: int, zero: bool
) -> None:
    weight = torch.tensor(levels).double().mul(scale).float()
    if len(levels) == 2:
        weight = torch.zeros(3)
    with pytest.raises(MembershipError):
        encode(weight, Quantized(torch.tensor(levels), scale, bits, zero))


@pytest.mark.parametrize(
    ("levels", "bits", "message"),
    [([1, 3], 4, "power of two"), ([1, 16], 3, "exceeds 8"), ([1, 2], 5, "1 ... 4")],
)
def test_other_levels_than_powers_of_two_are_refused(
    levels: list[int], bits: int, message: str
) -> None:
    weight = torch.tensor(levels).float()
    with pytest.raises(MembershipError, match=message):
        encode(weight, Quantized(torch.tensor(levels), 1.0, bits, False, "power_of_two"))


def test_a_weight_that_is_not_what_its_levels_say_is_refused() -> None:
    quantized = Quantized(torch.tensor([1, 0, 2]), 0.5, 3, False)
    for weight in ([0.5, 0.0, 1.001], [0.5, 1e-30, 1.0], [0.5, math.nan, 1.0]):
        with pytest.raises(MembershipError, match="project it first"):
            encode(torch.tensor(weight), quantized)


@pytest.mark.parametrize(
    "record",
    [
        bytes([49, 0x00, 0x3C, 0, 0, 0, 0]),  # powers of two beyond 4 bits
        bytes([64, 0x00, 0x3C, 0, 0, 0, 0]),  # the same, 8 bits
        bytes([65, 0x00, 0x3C, 0, 0]),  # a value coder that does not exist
        bytes([127, 0x00, 0x3C, 0, 0]),
        bytes([39, 0x00, 0x3C, 0, 0x24]),  # powers of two, 2 bits with zero: code 0
        bytes([41, 0x00, 0x3C, 0, 0]),  # powers of two, one byte short
        bytes([1, 0x38]),  # a scale cut off
        bytes([1, 0x00, 0x3C]),  # no subset coder
        bytes([1, 0x00, 0x00, 0, 0]),  # a scale of zero
        bytes([1, 0x00, 0xFC, 0, 0]),  # an infinite scale
        bytes([0, 0]) + bytes(15),  # one byte short
        bytes([0, 0]) + bytes(17),  # one byte long
        bytes([0, 1, 0x11]),  # a bitmap with padding that is not zero
        bytes([0, 2, 5, 0]),  # five of four
        bytes([0, 9, 1, 0, 0]),  # a Rice parameter beyond the range
        bytes([0, 2, 1, 0x0F, 1, 0, 0, 0]),  # a position beyond the range
        bytes([0, 4, 2, 0xFF]),  # quotients cut off
        bytes([7, 0x00, 0x3C, 0, 0x24]),  # 2 bits with zero: code 0
        bytes([0x80, 0, 0]),  # live without the third coder
    ],
)
def test_malformed_records_are_refused(record: bytes) -> None:
    with pytest.raises(ArtifactError):
        decode(record, (2, 2), torch.float32)


def test_a_boolean_is_zero_or_one() -> None:
    with pytest.raises(ArtifactError, match="boolean"):
        decode(bytes([0, 0, 2]), (1,), torch.bool)


def test_a_dtype_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(ArtifactError, match="complex64"):
        encode(torch.ones(2, dtype=torch.complex64))
