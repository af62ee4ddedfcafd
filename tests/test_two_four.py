"""2:4 weights in the layouts of torch and compressed-tensors, against readers written out here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from secateur.artifact.two_four import from_bitmask, from_torch, to_bitmask, to_torch
from secateur.errors import ArtifactError, MembershipError
from secateur.sets import NM

SHAPES = [(32, 64), (64, 128), (32, 64, 1, 1), (64, 64, 3, 3)]


def member(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a 2:4 weight with groups that have fewer than two non-zeros, and -0.0."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[::3, ::2] = 0
    weight = NM(2, 4).project(weight)
    weight[weight == 0] = -0.0
    return (20 * weight).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_torch_reads_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype == torch.int8:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    weight = member(shape, dtype)
    values, metadata = to_torch(weight)
    assert values.numel() * 2 == weight.numel()
    assert 8 * metadata.numel() * metadata.element_size() == weight.numel()
    back = from_torch(values, metadata, shape)
    assert torch.equal(back, weight)
    assert not bool(torch.signbit(back[back == 0]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bit_by_bit_reader_finds_the_weight(dtype: torch.dtype) -> None:
    weight = member((6, 12, 2, 1), dtype)
    found = to_bitmask("conv", weight)
    assert found["conv.shape"].tolist() == [[6], [24]]
    assert found["conv.compressed"].shape == (6, 12)
    assert found["conv.bitmask"].shape == (6, 3)
    back = torch.zeros_like(weight)
    for row in range(6):
        values = iter(found["conv.compressed"][row].tolist())
        for place, (y, x, channel) in enumerate(itertools.product(range(2), range(1), range(12))):
            if int(found["conv.bitmask"][row, place // 8]) >> place % 8 & 1:
                back[row, channel, y, x] = next(values)
        assert next(values, None) is None
    assert torch.equal(back, weight)
    decoded = from_bitmask(found, "conv", weight.shape)
    assert torch.equal(decoded, weight)
    assert not bool(torch.signbit(decoded[decoded == 0]).any())
    stored = sum(found[f"conv.{part}"].nbytes for part in ("compressed", "bitmask"))
    assert stored == weight.nbytes // 2 + weight.numel() // 8


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(32, 64).half(), "not 2:4 in whole groups"),
        (torch.zeros(32, 66).half(), "not 2:4 in whole groups"),
        (torch.zeros(8).half(), "not 2:4 in whole groups"),
        (torch.zeros(32, 64), "no 2:4 layout of .32, 64. in torch.float32"),
        (torch.zeros(30, 64).half(), "multiples of 32x64"),
    ],
)
def test_what_has_no_layout_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(MembershipError, match=message):
        to_torch(weight)


def test_damaged_bitmasks_are_refused() -> None:
    weight = member((4, 8), torch.float32)
    good = to_bitmask("fc", weight)
    with pytest.raises(ArtifactError, match=r"no tensor 'fc\.bitmask'"):
        from_bitmask({key: good[key] for key in ("fc.shape", "fc.compressed")}, "fc", (4, 8))
    with pytest.raises(ArtifactError, match="not a matrix of 4x16"):
        from_bitmask(good, "fc", (4, 16))
    with pytest.raises(ArtifactError, match="15 values for 16"):
        from_bitmask({**good, "fc.compressed": torch.ones(15)}, "fc", (4, 8))
