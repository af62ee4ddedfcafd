"""N:M patterns against a choice among all supports, on every axis, and what plans make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from secateur.methods import GMP
from secateur.plan import build_plan
from secateur.report.plan import plan_table
from secateur.sets import NM, ConstraintSet, Levels, Transposable
from tiny import small_model, train

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RATIOS = [(n, m) for m in range(2, 17) for n in range(1, m)]


def places(shape: tuple[int, ...], target: NM) -> Iterator[list[list[tuple[int, ...]]]]:
    """Yield each group of a weight as a list of shared positions, each a list of elements."""
    height, *rest = shape
    inner = list(itertools.product(*map(range, rest)))
    if target.axis == "flat":
        lines = [inner]
    else:
        lines = [[p for p in inner if p[1:] == where] for where in sorted({p[1:] for p in inner})]
    for top in range(0, height, target.rows):
        block = range(top, min(top + target.rows, height))
        for line in lines:
            for start in range(0, len(line), target.m):
                yield [[(o, *p) for o in block] for p in line[start : start + target.m]]


def chosen(weight: Tensor, target: NM) -> Tensor:
    """Project by sorting the positions of each group in plain Python, ties to the lower index."""
    member = torch.zeros_like(weight)
    for group in places(tuple(weight.shape), target):
        energies = [math.fsum(float(weight[p]) ** 2 for p in each) for each in group]
        order = sorted(range(len(group)), key=lambda i: (-energies[i], i))[: target.n]
        for element in itertools.chain.from_iterable(group[i] for i in order):
            member[element] = weight[element]
    return member


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random numbers; small integers, so with ties and zeros of both signs; nothing but ties."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(shape, generator=generator).to(dtype)
    whole = torch.randint(-2, 3, shape, generator=generator).to(dtype) * -1.0
    return [free, whole, torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)]


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_every_ratio_keeps_the_largest_of_each_group(n: int, m: int) -> None:
    for dtype in DTYPES:
        for axis, shape in (("input", (2, 2 * m, 1, 2)), ("flat", (2, m, 1, 2)), ("input", (2, m))):
            target = NM(n, m, axis=axis)  # type: ignore[arg-type]
            for weight in tensors(shape, dtype, seed=m)[:2]:
                projected = target.project(weight)
                assert torch.equal(projected, chosen(weight, target))
                assert not bool(torch.signbit(projected[projected == 0]).any())


@pytest.mark.parametrize("axis", ["input", "flat"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 7), (4, 6, 3), (3, 5, 2, 2), (2, 3, 1, 2, 2), (6,)])
def test_any_shape_has_its_groups_where_they_are_said_to_be(
    shape: tuple[int, ...], rows: int, axis: str
) -> None:
    full = (*shape, 1) if len(shape) == 1 else shape
    target = NM(2, 4, axis=axis, rows=rows)  # type: ignore[arg-type]
    for dtype in DTYPES:
        for weight in tensors(full, dtype):
            expected = chosen(weight, target)
            assert torch.equal(target.project(weight.view(shape)), expected.view(shape))
            assert target.contains(expected.view(shape))
            most = max(
                sum(any(bool(weight[p]) for p in each) for each in group)
                for group in places(full, target)
            )
            assert target.contains(weight.view(shape)) == (most <= 2)


def test_one_choice_is_shared_by_rows_of_outputs() -> None:
    weight = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    live = NM(1, 4, rows=16).project(weight) != 0
    assert torch.equal(live[:16], live[:1].expand(16, -1, -1, -1))
    assert not torch.equal(live[0], live[16])
    assert NM(1, 4).contains(NM(1, 4, rows=16).project(weight))


def test_a_metric_decides_what_stays() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    metric = torch.tensor([[100.0, 1.0, 1.0, 1.0]])
    assert NM(2, 4).project(weight, metric).tolist() == [[1.0, 0.0, 0.0, 4.0]]
    assert Transposable(1, 4).project(weight, metric).tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("levels", [Levels(1), Levels(2), Levels(3, zero=True)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (1, 4), (2, 4)])
def test_joined_with_levels_it_is_the_nearest_of_all(n: int, m: int, levels: Levels) -> None:
    """Among the supports that are the largest weights of each group, or fewer of them."""
    for seed in range(12):
        weight = tensors((1, 2 * m), torch.float32, seed)[seed % 2]
        reached = (NM(n, m) & levels).project(weight)
        best = math.inf
        halves = [s for k in range(n + 1) for s in itertools.combinations(range(m), k)]
        for left, right in itertools.product(halves, repeat=2):
            index = [*left, *(m + i for i in right)]
            nearest = torch.zeros_like(weight)
            if index:
                nearest[0, index] = levels.project(weight[0, index])
            best = min(best, float((weight - nearest).square().sum()))
        assert float((weight - reached).square().sum()) <= best + 1e-5


def best_tile(gains: np.ndarray, n: int) -> float:
    """Return the largest sum with at most n elements of each row and column, by a linear program.

    Its matrix is that of a bipartite graph, so its corners are integral.
    """
    m = len(gains)
    sides = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    solved = linprog(-gains.ravel(), A_ub=sides, b_ub=np.full(2 * m, n), bounds=(0, 1))
    return -float(solved.fun)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_small_transposable_tiles_are_exact(n: int, m: int) -> None:
    for weight in tensors((2 * m, m, 1, 2), torch.float32, seed=n):
        projected = Transposable(n, m).project(weight)
        for top, position in itertools.product((0, m), range(2)):
            tile = weight[top : top + m, :, 0, position].double()
            kept = projected[top : top + m, :, 0, position] != 0
            assert int(kept.sum(0).max()) <= n
            assert int(kept.sum(1).max()) <= n
            energy = tile.square()
            assert float(energy[kept].sum()) == pytest.approx(best_tile(energy.numpy(), n))


@pytest.mark.parametrize(("n", "m"), [(1, 5), (4, 8), (2, 8), (8, 16)])
def test_large_transposable_tiles_keep_more_than_half(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    for power in (1, 4):
        weight = torch.randn(m, m, generator=generator) ** power
        projected = Transposable(n, m).project(weight)
        assert Transposable(n, m).contains(projected)
        kept = float(projected.double().square().sum())
        assert kept >= 0.5 * best_tile(weight.double().square().numpy(), n)


def test_the_transpose_of_a_transposable_weight_is_a_member() -> None:
    weight = torch.randn(10, 7, 3, 3, generator=torch.Generator().manual_seed(1))
    projected = Transposable(2, 4).project(weight)
    assert Transposable(2, 4).contains(projected.transpose(0, 1))
    assert NM(2, 4).contains(projected)
    assert NM(2, 4).contains(projected.transpose(0, 1))
    assert not Transposable(2, 4).contains(NM(2, 4).project(weight))
    tiny = projected.masked_fill(projected != 0, 1.0)
    tiny[tuple((tiny != 0).nonzero()[0])] = 1e-30
    assert torch.equal(Transposable(2, 4).project(tiny), tiny)


def test_tied_tiles_take_lower_indices() -> None:
    assert Transposable(1, 2).project(torch.ones(2, 2)).tolist() == [[1, 0], [0, 1]]
    assert Transposable(2, 5).project(torch.ones(5, 5))[0].tolist() == [1, 1, 0, 0, 0]


def test_relaxing_keeps_more_of_each_group() -> None:
    assert NM(1, 16).relaxed((64, 64), 0.5) == NM(4, 16)
    assert NM(1, 16, rows=4).relaxed((64, 64), 1.0) == NM(1, 16, rows=4)
    assert NM(2, 4).relaxed((64, 64), 0.0) == NM(4, 4)
    assert Transposable(1, 4).relaxed((64, 64), 0.5) == Transposable(2, 4)


def network() -> nn.Sequential:
    """A stem of one channel, a depthwise convolution, and layers with whole groups."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3), nn.Linear(6, 3)
    )


def test_layers_without_a_whole_group_stay_dense_and_the_plan_says_why() -> None:
    rows = {row.layer: row for row in build_plan(network(), NM(2, 4)).rows}
    assert [name for name, row in rows.items() if row.set] == ["2", "3"]
    why = "left dense, not 2:4: its input channels, 1, make no group of 4"
    assert rows["0"].note == rows["1"].note == why
    flat = build_plan(network(), NM(2, 4, axis="flat"))
    assert len(flat.compressed) == 4
    both = {row.layer: row for row in build_plan(network(), Transposable(2, 4)).rows}
    assert "its 3 outputs x 6 input channels make no tile of 4" in both["3"].note
    assert plan_table(build_plan(network(), NM(2, 4)), "").row_count == 4


def test_levels_stay_where_the_pattern_does_not_fit() -> None:
    rows = {row.layer: row for row in build_plan(network(), NM(2, 4) & Levels(4)).rows}
    assert rows["0"].set == Levels(4)
    assert rows["0"].note == "not 2:4: its input channels, 1, make no group of 4"
    assert rows["2"].set == NM(2, 4) & Levels(4)


def test_a_layer_may_have_a_ratio_of_its_own() -> None:
    plan = build_plan(network(), NM(1, 4), layers={"3": {"n": 2}})
    assert {row.layer: row.set for row in plan.compressed} == {"2": NM(1, 4), "3": NM(2, 4)}
    assert plan.positional == "nm"


@pytest.mark.parametrize("target", [NM(2, 8), NM(1, 4, rows=4), Transposable(1, 2)], ids=str)
def test_gradual_pruning_raises_sparsity_within_groups(target: ConstraintSet) -> None:
    model = small_model()
    method = GMP(target, interval=1).attach(model)
    method.begin(method.phases()[0], 2)
    counts = [128]
    for _ in range(20):
        train(model, method, torch.optim.SGD(model.parameters(), 0.05), 1)
        counts.append(int(model[0].weight.count_nonzero()))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 2
    method.finalize()
    assert target.contains(model[0].weight)
