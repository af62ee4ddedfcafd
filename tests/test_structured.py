"""Structured patterns against brute force over all groups, in order, with levels, with a metric."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.sets import Block, Channel, Column, Filter, Kernel, Levels, Pattern, Unstructured
from secateur.sets.counted import Counted

SHAPES = [(3, 4), (3, 2, 2), (2, 3, 1, 2), (2, 2, 1, 2, 1), (5,)]
Label = Callable[[tuple[int, ...], tuple[int, ...]], object]


def column_of(place: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The GEMM column of an element, counted by hand."""
    number = 0
    for index, size in zip(place[1:], shape[1:], strict=True):
        number = number * size + index
    return number


GROUPS: list[tuple[Callable[..., Counted], Label]] = [
    (Filter, lambda place, shape: place[0]),
    (Channel, lambda place, shape: place[1:2]),
    (Column, lambda place, shape: place[1:]),
    (Kernel, lambda place, shape: place[:2]),
    (
        lambda **options: Block(2, 3, **options),
        lambda place, shape: (place[0] // 2, column_of(place, shape) // 3),
    ),
    (
        lambda **options: Block(1, 2, **options),
        lambda place, shape: (place[0], column_of(place, shape) // 2),
    ),
]
IDS = ["filter", "channel", "column", "kernel", "block 2x3", "block 1x2"]
each_set = pytest.mark.parametrize(("build", "label"), GROUPS, ids=IDS)


def masks_of(label: Label, shape: tuple[int, ...]) -> list[Tensor]:
    """One mask per group, in the order in which row-major reading meets them."""
    found: dict[object, Tensor] = {}
    for place in itertools.product(*map(range, shape)):
        group = found.setdefault(label(place, shape), torch.zeros(shape, dtype=torch.bool))
        group[place] = True
    return list(found.values())


def tensors(shape: tuple[int, ...]) -> list[Tensor]:
    """Random tensors; of small integers, so with exact ties; with groups of zeros."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator) for _ in range(6)]
    found += [torch.randint(-1, 2, shape, generator=generator).float() for _ in range(6)]
    for weight in found[::3]:
        weight[0] = 0
    return [*found, torch.zeros(shape), torch.ones(shape)]


def supports_of(masks: list[Tensor], keep: int) -> list[Tensor]:
    none = torch.zeros_like(masks[0])
    return [
        sum(chosen, none)
        for count in range(min(keep, len(masks)) + 1)
        for chosen in itertools.combinations(masks, count)
    ]


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().sum())


@each_set
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projection_is_the_best_of_all_group_supports(
    build: Callable[..., Counted], label: Label, shape: tuple[int, ...]
) -> None:
    masks = masks_of(label, shape)
    assert build(keep=1).total(shape) == len(masks)
    for keep in (0, 1, 2, 3, len(masks)):
        supports = supports_of(masks, min(keep, 3)) if keep < len(masks) else [sum(masks)]
        for weight in tensors(shape):
            projected = build(keep=keep).project(weight)
            best = min(distance(weight, weight * support) for support in supports)
            assert distance(weight, projected) == pytest.approx(best, abs=1e-9)
            gains = [float((weight * mask).double().square().sum()) for mask in masks]
            order = sorted(range(len(masks)), key=lambda i: (-round(gains[i], 9), i))[:keep]
            kept = sum((masks[i] for i in order), torch.zeros_like(masks[0]))
            assert torch.equal(projected, weight * kept)


@each_set
def test_membership_counts_groups_that_are_touched(
    build: Callable[..., Counted], label: Label
) -> None:
    shape = (4, 3, 2, 2)
    masks = masks_of(label, shape)
    weight = torch.zeros(shape)
    for count, mask in enumerate(masks, start=1):
        weight[tuple(mask.nonzero()[-1])] = 1e-30
        assert build(keep=count).contains(weight)
        assert not build(keep=count - 1).contains(weight)
    assert build(density=0.5).count(len(masks)) == max(1, round(0.5 * len(masks)))


@each_set
def test_a_group_that_is_kept_on_levels_has_no_zero(
    build: Callable[..., Counted], label: Label
) -> None:
    shape = (4, 3, 2, 2)
    masks = masks_of(label, shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.view(-1)[::5] = 0
    target = build(keep=2) & Levels(2)
    projected = target.project(weight)
    live = projected != 0
    assert bool(live.any())
    assert all(bool(live[mask].all()) or not bool(live[mask].any()) for mask in masks)
    if int(masks[0].sum()) > 1:
        holed = projected.clone()
        holed.view(-1)[int(live.flatten().nonzero()[0])] = 0
        assert not target.contains(holed)
        assert (build(keep=2) & Levels(3, zero=True)).contains(holed)
        assert (build(keep=2) & Unstructured(density=1.0) & Levels(2)).contains(holed)


@each_set
@pytest.mark.parametrize(
    "levels", [Levels(1), Levels(2), Levels(3, spacing="power_of_two"), Levels(3, zero=True)]
)
def test_joint_projection_is_near_the_best_of_all_group_supports(
    build: Callable[..., Counted], label: Label, levels: Levels
) -> None:
    """Never worse than pruning, then quantizing; the nearest member nearly always."""
    shape, optimal, total = (3, 2, 2), 0, 0
    masks = masks_of(label, shape)
    generator = torch.Generator().manual_seed(5)
    for keep in (1, 2, len(masks) - 1):
        for _ in range(10):
            weight = torch.randn(shape, generator=generator)
            reached = distance(weight, (build(keep=keep) & levels).project(weight))
            pruned = build(keep=keep).project(weight) != 0
            in_a_row = on_support(weight, pruned, levels)
            best = min(on_support(weight, each, levels) for each in supports_of(masks, keep))
            assert best - 1e-6 <= reached <= in_a_row + 1e-6
            optimal += reached <= best + 1e-6
            total += 1
    assert optimal >= 0.8 * total


def on_support(weight: Tensor, support: Tensor, levels: Levels) -> float:
    """The distance to the nearest tensor on levels with just this support."""
    member = torch.zeros_like(weight)
    member[support] = levels.project(weight[support])
    return distance(weight, member)


ORDERS: list[tuple[Pattern, ...]] = [
    (Column(keep=3), Filter(keep=2)),
    (Filter(keep=2), Column(keep=3)),
    (Kernel(keep=3), Channel(keep=1)),
    (Block(2, 2, keep=2), Filter(keep=2), Unstructured(keep=5)),
]


@pytest.mark.parametrize("patterns", ORDERS, ids=str)
def test_patterns_in_order_are_one_projection_inside_the_other(
    patterns: tuple[Pattern, ...],
) -> None:
    target = patterns[0] & patterns[1]
    for pattern in patterns[2:]:
        target = target & pattern
    for weight in tensors((3, 2, 2)):
        expected = weight
        for pattern in patterns:
            expected = pattern.project(expected)
        assert torch.equal(target.project(weight), expected)
        assert all(pattern.contains(expected) for pattern in patterns)
        assert target.contains(expected)
    assert not target.contains(torch.ones(3, 2, 2))


def test_column_then_filter_leaves_a_dense_matrix_of_levels() -> None:
    weight = torch.randn(20, 10, 5, 5, generator=torch.Generator().manual_seed(1))
    target = Column(density=0.2) & Filter(density=0.3) & Levels(3)
    projected = target.project(weight)
    rows = (projected != 0).flatten(1).any(1)
    columns = (projected != 0).flatten(1).any(0)
    assert (int(rows.sum()), int(columns.sum())) == (6, 50)
    assert bool((projected.flatten(1)[rows][:, columns] != 0).all())
    storage = target.storage(projected)
    assert storage.values <= 3 * 6 * 50
    assert storage.index <= 20 + 250  # which rows and columns, not which cells


def test_levels_for_patterns_in_order_are_no_worse_than_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(2)
    target = Column(keep=6) & Filter(keep=2)
    for number in range(40):
        weight = torch.randn(4, 3, 2, 2, generator=generator)
        if number % 2:
            weight[2:] = 0  # dead filters do not count against the columns
        support = target.project(weight) != 0
        reached = (target & Levels(2)).project(weight)
        assert distance(weight, reached) <= on_support(weight, support, Levels(2)) + 1e-6
        assert int(reached.count_nonzero()) == 12


@each_set
def test_a_metric_weighs_the_distance(build: Callable[..., Counted], label: Label) -> None:
    shape = (3, 2, 2)
    masks = masks_of(label, shape)
    for weight in tensors(shape)[:6]:
        metric = torch.tensor([0.1, 4.0, 0.0]).view(3, 1, 1)
        before = metric.clone()
        projected = build(keep=2).project(weight, metric)
        assert torch.equal(metric, before)

        def weighed(support: Tensor, weight: Tensor = weight, metric: Tensor = metric) -> float:
            return float((metric * (weight - weight * support).square()).sum())

        best = min(weighed(support) for support in supports_of(masks, 2))
        assert weighed(projected != 0) == pytest.approx(best, abs=1e-6)
        assert torch.equal(
            build(keep=2).project(weight, torch.full((), 3.0)), build(keep=2).project(weight)
        )
        joint = build(keep=2) & Levels(2)
        assert joint.contains(joint.project(weight, metric))


def test_a_metric_does_not_change_levels_alone_or_a_member() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    metric = torch.rand(4, 1)
    assert torch.equal(Levels(3).project(weight, metric), Levels(3).project(weight))
    target = Filter(keep=2) & Levels(2)
    member = target.project(weight)
    assert torch.equal(target.project(member, metric), member)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torch.ones(5, 1), "its shape"),
        (torch.ones(2, 4, 6), "its shape"),
        (torch.tensor(-1.0), "negative"),
        (torch.tensor(math.nan), "not finite"),
        (torch.tensor(math.inf), "not finite"),
    ],
)
def test_a_bad_metric_is_refused(metric: Tensor, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        Filter(keep=1).project(torch.ones(4, 6), metric)


@pytest.mark.parametrize(
    ("kept", "multiple", "expected"),
    [(9, 8, 8), (12, 8, 16), (3, 8, 8), (63, 8, 64), (0, 8, 0), (9, 1, 9), (64, 48, 64)],
)
def test_counts_of_whole_channels_become_multiples(kept: int, multiple: int, expected: int) -> None:
    shape = (64, 64, 3, 3)
    for kind in (Filter, Channel):
        rounded = kind(keep=kept).rounded(shape, multiple)
        assert rounded.count(64) == expected  # type: ignore[attr-defined]
    assert Filter(density=0.3).rounded(shape, 1) == Filter(density=0.3)
    assert Column(keep=9).rounded(shape, 8) == Column(keep=9)
    joined = (Column(keep=9) & Filter(keep=9) & Levels(3)).rounded(shape, 8)
    assert joined == Column(keep=9) & Filter(keep=8) & Levels(3)
