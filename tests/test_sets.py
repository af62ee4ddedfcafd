"""The battery every constraint set must pass, and what is particular to each."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import MembershipError, NonFiniteError, SecateurError
from secateur.sets import (
    NM,
    Block,
    Channel,
    Column,
    ConstraintSet,
    Counted,
    Filter,
    Intersection,
    Kernel,
    Levels,
    Transposable,
    Unstructured,
)
from secateur.sets import levels as levels_module

EVERY_SET: list[ConstraintSet] = [
    Unstructured(density=0.3),
    Unstructured(density=1.0),
    Unstructured(keep=0),
    Unstructured(keep=5),
    Levels(1),
    Levels(3),
    Levels(8),
    Levels(2, zero=True),
    Levels(8, zero=True),
    Unstructured(density=0.3) & Levels(1),
    Unstructured(keep=4) & Levels(3),
    Unstructured(keep=6) & Levels(4, zero=True),
    Unstructured(density=1.0) & Levels(8),
    Levels(1, spacing="power_of_two"),
    Levels(3, spacing="power_of_two"),
    Levels(4, spacing="power_of_two"),
    Levels(2, zero=True, spacing="power_of_two"),
    Levels(4, zero=True, spacing="power_of_two"),
    Unstructured(keep=5) & Levels(4, spacing="power_of_two"),
    Filter(density=0.5),
    Channel(density=0.5),
    Column(density=0.3),
    Kernel(keep=4),
    Block(2, 3, density=0.4),
    Block(8, 8, keep=0),
    Filter(keep=2) & Levels(1),
    Channel(keep=2) & Levels(3),
    Column(density=0.4) & Levels(3, spacing="power_of_two"),
    Kernel(density=0.5) & Levels(2, zero=True),
    Block(2, 2, keep=2) & Levels(2),
    Column(density=0.5) & Filter(keep=2),
    Column(density=0.5) & Filter(keep=2) & Levels(2),
    Block(2, 2, keep=2) & Kernel(keep=3) & Levels(1),
    Channel(keep=2) & Unstructured(keep=3) & Levels(3),
    NM(2, 4),
    NM(1, 2, axis="flat"),
    NM(1, 3, rows=2),
    NM(2, 4) & Levels(3),
    NM(1, 2, axis="flat", rows=4) & Levels(2, zero=True),
    NM(2, 4) & Filter(keep=2) & Levels(1),
    Transposable(1, 2),
    Transposable(2, 4) & Levels(2),
    Transposable(3, 5),
]
SHAPES = [(1,), (7,), (3, 5), (4, 3, 2, 2), (1, 1), (2, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Draw a tensor with ties, zeros and scales far from 1."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        values = values.mul(2).round().div(2)
    zeros = torch.rand(shape, generator=generator) > draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return (values * zeros * draw(st.sampled_from([1.0, 1e-3, 100.0]))).to(dtype)


@pytest.mark.parametrize("target", EVERY_SET, ids=str)
@settings(max_examples=60)
@given(weight=weights())
def test_projection_is_an_idempotent_member_and_leaves_its_input(
    target: ConstraintSet, weight: Tensor
) -> None:
    before = weight.clone()
    projected = target.project(weight)
    assert torch.equal(weight, before)
    assert projected.dtype == weight.dtype
    assert projected.shape == weight.shape
    assert target.contains(projected)
    assert torch.equal(target.project(projected), projected)


@pytest.mark.parametrize("target", EVERY_SET, ids=str)
@settings(max_examples=60)
@given(weight=weights())
def test_encoding_is_exact_and_counted_exactly(target: ConstraintSet, weight: Tensor) -> None:
    member = target.project(weight)
    record = target.encode(member)
    assert 8 * len(record) == target.storage(member).total
    decoded = target.decode(record, tuple(member.shape), member.dtype)
    assert decoded.dtype == member.dtype
    assert torch.equal(decoded, member)


@pytest.mark.parametrize("target", EVERY_SET, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(target: ConstraintSet, value: float) -> None:
    weight = torch.tensor([[0.5, value, -0.25]])
    assert not target.contains(weight) or target.split()[1] is None
    with pytest.raises(NonFiniteError, match="1 of 3 weights"):
        target.project(weight)


def test_encoding_refuses_a_non_member() -> None:
    with pytest.raises(MembershipError):
        Unstructured(keep=1).encode(torch.ones(3))
    with pytest.raises(MembershipError):
        Levels(2).encode(torch.tensor([1.0, 1.1, 1.7, 3.1, -2.0]))


def squared_distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().sum())


def best_by_brute_force(
    weight: Tensor, magnitudes: tuple[int, ...], supports: list[tuple[int, ...]]
) -> float:
    """Try every support, every assignment of levels on it, each with its own best scale."""
    flat = weight.double().flatten()
    signed = torch.tensor([sign * m for m in magnitudes for sign in (1, -1)], dtype=torch.float64)
    best = float("inf")
    for support in supports:
        inside = flat[list(support)]
        outside = float(flat.square().sum() - inside.square().sum())
        if not support:
            best = min(best, outside)
            continue
        levels = torch.cartesian_prod(*[signed] * len(support)).view(-1, len(support))
        scale = (levels @ inside / levels.square().sum(1)).clamp(min=0).nan_to_num()
        distances = (inside - scale[:, None] * levels).square().sum(1)
        best = min(best, outside + float(distances.min()))
    return best


def tiny_tensors(count: int, size: int) -> list[Tensor]:
    """Random tensors, every third with ties and every fifth with zeros."""
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for number in range(count):
        weight = torch.randn(size, generator=generator)
        if number % 3 == 0:
            weight = (2 * weight).round() / 2
        if number % 5 == 0:
            weight[number % size] = 0
        tensors.append(weight)
    return tensors


@pytest.mark.parametrize(
    "levels", [Levels(1), Levels(2), Levels(3, spacing="power_of_two")], ids=str
)
@pytest.mark.parametrize("keep", range(5))
def test_joint_projection_is_optimal_over_all_supports_levels_and_scales(
    levels: Levels, keep: int
) -> None:
    supports = [s for n in range(keep + 1) for s in itertools.combinations(range(4), n)]
    for weight in tiny_tensors(40, 4):
        projected = (Unstructured(keep=keep) & levels).project(weight)
        best = best_by_brute_force(weight, levels.magnitudes, supports)
        assert squared_distance(weight, projected) <= best + 1e-7


def test_joint_projection_beats_pruning_then_quantizing() -> None:
    weight = torch.tensor([1.0, -1.0, 1.0, 0.3])
    joint = (Unstructured(keep=4) & Levels(1)).project(weight)
    in_a_row = Levels(1).project(Unstructured(keep=4).project(weight))
    assert torch.equal(joint, torch.tensor([1.0, -1.0, 1.0, 0.0]))
    assert squared_distance(weight, joint) < squared_distance(weight, in_a_row)


@pytest.mark.parametrize(
    "grid",
    [
        Levels(1),
        Levels(2),
        Levels(2, zero=True),
        Levels(3, zero=True),
        Levels(3, spacing="power_of_two"),
        Levels(4, spacing="power_of_two"),
        Levels(3, zero=True, spacing="power_of_two"),
        Levels(4, zero=True, spacing="power_of_two"),
    ],
    ids=str,
)
def test_levels_are_optimal_over_all_assignments_and_scales(grid: Levels) -> None:
    every = tuple(range(4))
    supports = [s for n in range(5) for s in itertools.combinations(every, n)]
    for weight in tiny_tensors(25, 4):
        best = best_by_brute_force(weight, grid.magnitudes, supports if grid.zero else [every])
        assert squared_distance(weight, grid.project(weight)) <= best + 1e-7


@pytest.mark.parametrize(
    ("grid", "magnitudes"),
    [
        (Levels(1), [1]),
        (Levels(3), [1, 2, 3, 4]),
        (Levels(2, zero=True), [1]),
        (Levels(3, zero=True), [1, 2, 3]),
        (Levels(3, spacing="power_of_two"), [1, 2, 4, 8]),
        (Levels(4, spacing="power_of_two"), [1, 2, 4, 8, 16, 32, 64, 128]),
        (Levels(4, zero=True, spacing="power_of_two"), [1, 2, 4, 8, 16, 32, 64]),
    ],
    ids=str,
)
def test_the_levels_are_those_of_the_docstring(grid: Levels, magnitudes: list[int]) -> None:
    every = torch.tensor([s * m for m in magnitudes for s in (1, -1)] + [0] * grid.zero).float()
    assert grid.contains(0.37 * every)
    assert len(every) <= 2**grid.bits
    assert not grid.contains(torch.cat([every, torch.tensor([2.0 * magnitudes[-1]])])) or (
        len(magnitudes) == 1
    )
    halfway = [(a + b) / 2 for a, b in itertools.pairwise(magnitudes)]
    taken = levels_module.nearest_levels(torch.tensor(halfway), 1.0, grid.grid)
    assert taken.tolist() == magnitudes[:-1]


def test_binary_scale_is_the_mean_magnitude() -> None:
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    scale = float(weight.abs().mean())
    expected = torch.where(weight < 0, -scale, scale)
    torch.testing.assert_close(Levels(1).project(weight), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [Levels(4), Levels(4, spacing="power_of_two")], ids=str)
def test_large_tensors_reach_nearly_the_exact_optimum(
    grid: Levels, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    exact = squared_distance(weight, grid.project(weight))
    monkeypatch.setattr(levels_module, "EXACT_SEARCH_LIMIT", 2000)
    sampled = squared_distance(weight, grid.project(weight))
    assert exact <= sampled <= 1.02 * exact


@given(weight=weights(), keep=st.integers(0, 30))
@settings(max_examples=100)
def test_unstructured_keeps_the_largest_and_the_lower_index(weight: Tensor, keep: int) -> None:
    magnitudes = weight.float().abs().flatten().tolist()
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))[:keep]
    expected = torch.zeros_like(weight).flatten()
    expected[order] = weight.flatten()[order]
    assert torch.equal(Unstructured(keep=keep).project(weight).flatten(), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Unstructured(), "either density or keep"),
        (lambda: Unstructured(density=0.1, keep=3), "either density or keep"),
        (lambda: Unstructured(density=0.0), "density: 0.0"),
        (lambda: Unstructured(density=1.2), "density: 1.2"),
        (lambda: Unstructured(density=float("nan")), "density: nan"),
        (lambda: Unstructured(keep=-1), "keep: -1"),
        (lambda: Levels(0), "bits: 0"),
        (lambda: Levels(9), "bits: 9"),
        (lambda: Levels(1, zero=True), "bits: 1"),
        (lambda: Levels(5, spacing="power_of_two"), "bits: 5 is not in 1..4"),
        (lambda: Levels(2, spacing="log"), "spacing: 'log' is not uniform or power_of_two"),
        (lambda: Filter(), "filter: give either density or keep"),
        (lambda: Column(density=2), "density: 2 .* a tenth of the columns"),
        (lambda: Kernel(keep=-1), "keep: -1 is negative; give a number of kernels"),
        (lambda: Block(0, 2, keep=1), "rows: 0 is not positive"),
        (lambda: Block(2, -3, keep=1), "columns: -3 is not positive"),
        (lambda: Block(2, 3), "block: give either density or keep"),
        (lambda: NM(3, 2), "n, m: 3:2 is not 1 <= n <= m <= 64"),
        (lambda: NM(0, 4), "n, m: 0:4"),
        (lambda: Transposable(1, 65), "n, m: 1:65"),
        (lambda: NM(2, 4, axis="output"), "axis: 'output' is not input or flat"),
        (lambda: NM(2, 4, rows=0), "rows: 0 is not positive"),
        (lambda: Levels(2) & Unstructured(keep=1), "give patterns first, then levels"),
    ],
)
def test_impossible_sets_are_refused(build: object, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        build()  # type: ignore[operator]


def test_and_builds_an_intersection() -> None:
    column, filters, levels = Column(keep=3), Filter(density=0.5), Levels(2)
    assert column & levels == Intersection((column,), levels)
    assert column & filters == Intersection((column, filters))
    assert column & filters & levels == column & (filters & levels)
    assert (column & filters & levels).split() == ((column, filters), levels)
    assert str(column & filters & levels) == "column 3 & filter 50.000% & levels 2 bit"
    assert str(Block(2, 4, keep=3)) == "block 2x4 3"


@pytest.mark.parametrize("pattern", [each for each in EVERY_SET if isinstance(each, Counted)])
def test_relaxing_raises_the_share_and_drops_levels(pattern: Counted) -> None:
    shape = (40, 20, 5, 5)
    total = pattern.total(shape)
    count = pattern.count(total)
    half = pattern.relaxed(shape, 0.5)
    assert half.keep == round((count * total) ** 0.5)
    assert (pattern & Levels(2)).relaxed(shape, 0.5) == half
    assert (pattern & pattern).relaxed(shape, 0.5) == half & half
    assert Levels(2).relaxed(shape, 0.5) is None


def test_a_share_keeps_one_group_at_least() -> None:
    weight = torch.tensor([[1.0, 3.0], [2.0, 0.5]])
    assert torch.equal(Filter(density=0.01).project(weight), torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    assert int(Unstructured(density=0.01).project(weight).count_nonzero()) == 1
